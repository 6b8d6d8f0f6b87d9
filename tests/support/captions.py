"""Captions of the demo's world read back."""

import re

from kvlock_fast.demo.scene import BENDS, COLOURS, PANS, PATTERNS, PLACES, SHAPES, SIZES

_THING = re.compile(
    rf"a (?P<size>{'|'.join(SIZES)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"(?:staying at the (?P<stay>[a-z ]+?)|moving (?P<bend>{'|'.join(BENDS)}) "
    rf"from the (?P<place>[a-z ]+?) to the (?P<goal>[a-z ]+?))(?= and a | over a )"
)
_BACKGROUND = re.compile(rf"a (?P<pattern>{'|'.join(PATTERNS)}) background (?P<pan>{'|'.join(PANS)})$")


def parse_caption(caption: str) -> dict:
    """The caption read back: {"objects": [{size, colour, shape, place, goal, bend}], "pattern", "pan"}.

    Raises ValueError, quoting the caption, when it is not of the grammar.
    """
    behind = _BACKGROUND.search(caption)
    if not behind:
        raise ValueError(f"caption names no background: {caption!r}")
    objects = []
    for match in _THING.finditer(caption):
        words = match.groupdict()
        stay = words.pop("stay")
        if stay:
            words.update(place=stay, goal=stay, bend="straight")
        if words["place"] not in PLACES or words["goal"] not in PLACES:
            raise ValueError(f"caption names an unknown place: {caption!r}")
        objects.append(words)
    return {"objects": objects, "pattern": behind["pattern"], "pan": behind["pan"]}
