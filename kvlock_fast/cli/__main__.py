"""`python -m kvlock_fast.cli`."""

import sys

from kvlock_fast.cli.run import main

sys.exit(main())
