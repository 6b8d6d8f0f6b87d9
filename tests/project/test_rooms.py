"""The house keeps its street plan: rooms import one way, no two files wait for each other, the picture is true."""

import re
from graphlib import TopologicalSorter

import pytest

from tests.project.rooms import FRONT, ORDER, PICTURE, draw, imports, modules, room_of, rooms

LEVEL = {room: level for level, group in enumerate(ORDER) for room in group}


def test_rooms_import_only_rooms_before_them():
    wrong = [
        f"{module} imports {target}"
        for module, targets in imports(modules()).items()
        for target in targets
        if module not in FRONT and (target in FRONT[1:] or LEVEL[room_of(target)] > LEVEL[room_of(module)])
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("arrows", [rooms()[1], imports(modules())], ids=["rooms", "files"])
def test_nothing_imports_in_a_circle(arrows):
    TopologicalSorter({name: targets - {"kvlock_fast"} for name, targets in arrows.items()}).prepare()


def test_the_picture_is_of_these_rooms():
    """Drawn anew by `python -m tests.project.rooms`. Lines of code may have changed since."""
    without_sizes = [re.sub(r"[\d,]+ lines", "", text) for text in (PICTURE.read_text(), draw())]
    assert without_sizes[0] == without_sizes[1]
