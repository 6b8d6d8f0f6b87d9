"""docs/interplay.md says what the tests of interplay show, no more and no less."""

import re
from pathlib import Path

import pytest

from tests.locking.test_interplay import OFFLOADED
from tests.locking.test_interplay_layers import CACHES, SETTINGS
from tests.support.parallel_worker import REFUSED

PAGE = (Path(__file__).parents[2] / "kvlock_fast" / "docs" / "interplay.md").read_text()


def rows(heading):
    """The table's rows below a heading: its other cells by the first."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells if first and not first.startswith("---")}


def test_every_way_of_offloading_is_there():
    table = rows("Where the weights are")
    assert set(table) == {*OFFLOADED, "layerwise casting"}
    assert all(cells[:3] == ["yes"] * 3 for cells in table.values())


def test_every_cache_and_setting_is_there():
    table = {re.sub(r" \(.*\)", "", name): text for name, (text,) in rows("How the layers run").items()}
    assert {name: table[name] for name in CACHES} == dict.fromkeys(CACHES, "refused")
    assert all(table[name].startswith("work") for name in SETTINGS)


@pytest.mark.parametrize("name", ["lockstep", "resident", "host", "several prompts", "two transformers", "in stretches",
                                  "inverted", "compiled blocks"])  # fmt: skip
def test_what_processes_can_share_is_there(name):
    from tests.support.parallel_worker import KINDS

    table = {re.sub(r" \(.*\)", "", name): text for name, (text,) in rows("Context parallelism").items()}
    assert table[name].startswith("works") and name in KINDS["ulysses"][1]


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"path", "invert", "stretches", "one of two", "text mask"}))
def test_what_processes_cannot_share_is_there(name):
    assert rows("Context parallelism")[name][0].startswith("refused")
