"""`kvlock-fast cache`: its options."""

from pathlib import Path
from typing import Annotated

import typer

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import JsonFile, option

cache_app = typer.Typer(help="List, verify or prune stored caches of sources.", rich_markup_mode="rich")
app.add_typer(cache_app, name="cache")
CacheFolder = Annotated[Path, typer.Argument(metavar="DIR", help="One cache, or a folder of several.")]


@cache_app.command("ls")
def cache_ls(folder: CacheFolder, json_file: JsonFile = None) -> None:
    """Each cache: its size, when it was made and used, what it is of."""
    from kvlock_fast.cache import maintain

    maintain.list_entries(folder, json_file)


@cache_app.command("verify")
def cache_verify(folder: CacheFolder, json_file: JsonFile = None) -> int:
    """Read every byte; exit status 1 if a cache is damaged."""
    from kvlock_fast.cache import maintain

    return maintain.verify_entries(folder, json_file)


@cache_app.command("prune")
def cache_prune(
    folder: CacheFolder,
    quota: Annotated[str | None, option("Then the least recently used, down to a size like 10GB.")] = None,
    everything: Annotated[bool, option("Every cache that is not in use.", "--all")] = False,
    json_file: JsonFile = None,
) -> None:
    """Remove what interrupted writes left, and damaged caches. Every byte is read."""
    from kvlock_fast.cache import maintain

    maintain.prune_entries(folder, quota, everything, json_file)
