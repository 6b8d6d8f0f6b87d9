"""The command line, `kvlock-fast`: a file a command. The work is done in other rooms, loaded when it begins."""

from kvlock_fast.cli.run import main as main
