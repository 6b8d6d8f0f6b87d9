"""`kvlock-fast doctor`: its options."""

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import JsonFile


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """Show what is installed, what will be used and what is missing."""
    from kvlock_fast.files import check_json, write_json
    from kvlock_fast.tools.doctor import render, report

    check_json(json_file)
    facts = report()
    if json_file != "-":
        print(render(facts))
    write_json(json_file, facts)
