"""Held-out edits of the demo's world with their true answers: kinds of edit, and masks that are tight, boxed or grown.

Case i is the same for every row: its seed, its kind and its mask's form (`kind_and_form`). Of five cases in a row three
show one object and two a second one beside it, which must stay: 60 and 40 of 100. The captions of an edit say what its
mask shows, so they leave the second object out; `whole_captions` name both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bench.quality.judge import edit_is_right, judge
from kvlock_fast.demo.scene import COLOURS, HELD_OUT, PANS, PLACES, SHAPES, Scene, Thing, sample_scene
from kvlock_fast.demo.world import EditCase, centres, coverage, grow, render

FIRST_SEED = HELD_OUT + 31 * 10**6
CHECK_SEED = HELD_OUT + 47 * 10**6
"""Kept back: seeds that nothing was chosen by, for `--check`."""
ONE_OBJECT = ("recolour", "reshape", "both", "remove", "pan")
SECOND_OBJECT = ("several", "occlusion")
MASKS = ("tight", "boxed", "grown")
WIDER = {"tight": 1, "boxed": 1, "grown": 6}
"""Pixels that a mask is wider than the objects, at a side of 64."""
CLEAR = 0.85
"""The share of an object that must show in a frame for the judge to be asked about it."""


@dataclass(frozen=True)
class QualityCase:
    """An edit with its answer.

    edit: source, target, mask and captions of what the mask shows; kind, form: of the edit and of its mask; other: the
    object beside the edited one, which must stay, or None; clear: bool [F], the frames in which the edited object shows
    almost whole.
    """

    number: int
    seed: int
    kind: str
    form: str
    edit: EditCase
    other: Thing | None
    clear: np.ndarray

    def is_right(self, video: np.ndarray) -> bool:
        """Whether uint8 [F, H, W, 3] shows what was asked for, by its pixels alone."""
        if self.kind == "remove":
            return _nothing_is_left(self.edit, video)
        if self.other is None:
            return edit_is_right(self.edit, video)
        return _both_are_right(self, video)

    @property
    def whole_captions(self) -> tuple[str, str]:
        """Captions of the whole clip, before and after."""
        return self.edit.source.caption, self.edit.target.caption

    @property
    def path(self) -> tuple[np.ndarray, float] | None:
        """The edited object's true centres [F, 2] in pixels (x, y) and its radius; None where there is none."""
        if self.kind == "remove":
            return None
        frames, height, width = self.edit.mask.shape
        thing = self.edit.target.scene.objects[0]
        return centres(thing, frames) * (width, height), thing.radius * min(height, width)


def kind_and_form(number: int) -> tuple[str, str]:
    """Kind of a case's edit and form of its mask; every kind meets every form equally often."""
    five, place = divmod(number, 5)
    kinds = SECOND_OBJECT if place % 2 else ONE_OBJECT
    turn = 2 * five + place // 2 if place % 2 else 3 * five + place // 2
    return kinds[turn % len(kinds)], MASKS[turn // len(kinds) % len(MASKS)]


def quality_case(number: int, first_seed: int = FIRST_SEED) -> QualityCase:
    """Case `number` of the table."""
    kind, form = kind_and_form(number)
    seed = first_seed + number
    rng = np.random.default_rng([seed, 5])
    source = _source(seed, kind, rng)
    target = replace(source, objects=_edited(source, kind, rng))
    before, after = render(source), render(target)
    other = source.objects[1] if len(source.objects) > 1 else None
    touched, clear = _touched(source, target, other)
    mask = _formed(touched, form)
    shown, wanted = (replace(scene, objects=scene.objects[:1]).caption for scene in (source, target))
    case = EditCase(before, after, mask, shown, wanted, kind)
    return QualityCase(number, seed, kind, form, case, other, clear)


def _source(seed: int, kind: str, rng: np.random.Generator) -> Scene:
    scene = sample_scene(seed, objects=1)
    if kind == "pan" and scene.background.pan_word == "standing still":
        word = str(rng.choice([name for name, axis in PANS.items() if axis != (0, 0)]))
        speed = float(rng.uniform(0.15, 0.3))
        moving = replace(scene.background, pan_word=word, pan=tuple(float(axis) * speed for axis in PANS[word]))
        return replace(scene, background=moving)
    if kind == "several":
        return replace(scene, objects=_two_apart(scene.objects[0], rng))
    if kind == "occlusion":
        return replace(scene, objects=_two_crossing(scene.objects[0], rng))
    return scene


def _at(thing: Thing, place: str, goal: str) -> Thing:
    """The same thing on a straight way between two places."""
    return replace(thing, place=place, goal=goal, bend="straight", bow=0.0, start=PLACES[place], end=PLACES[goal])


def _another(thing: Thing, rng: np.random.Generator) -> Thing:
    """A small thing of another colour and shape."""
    colour = str(rng.choice([name for name in COLOURS if name != thing.colour]))
    shape = str(rng.choice([name for name in SHAPES if name != thing.shape]))
    return replace(thing, colour=colour, shape=shape, size="small", radius=0.165)


def _two_apart(thing: Thing, rng: np.random.Generator) -> tuple[Thing, Thing]:
    """On two sides, which they do not leave."""
    small = replace(thing, size="small", radius=0.165)
    return _at(small, "top left", "bottom left"), _at(_another(small, rng), "bottom right", "top right")


def _two_crossing(thing: Thing, rng: np.random.Generator) -> tuple[Thing, Thing]:
    """The second comes to lie in front of the first."""
    small = replace(thing, size="small", radius=0.175)
    return _at(small, "left", "left"), _at(_another(small, rng), "top right", "bottom left")


def _edited(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[Thing, ...]:
    thing, *rest = scene.objects
    if kind == "remove":
        return ()
    taken = {thing.colour, *(other.colour for other in rest)}
    colour = str(rng.choice([name for name in COLOURS if name not in taken]))
    shape = str(rng.choice([name for name in SHAPES if name != thing.shape]))
    changes = {"recolour": {"colour": colour}, "reshape": {"shape": shape}, "occlusion": {"colour": colour}}
    return replace(thing, **changes.get(kind, {"colour": colour, "shape": shape})), *rest


def _touched(source: Scene, target: Scene, other: Thing | None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the edited object, before or after, that nothing is in front of; the frames that show it."""
    size = (source.frames, source.height, source.width)
    things = [scene.objects[0] for scene in (source, target) if scene.objects]
    touched = np.any([coverage(thing, size) >= 0.5 for thing in things], axis=0)
    if other is None:
        return touched, np.ones(source.frames, bool)
    whole = touched.sum((1, 2))
    touched = touched & ~(coverage(other, size) >= 0.5)
    return touched, touched.sum((1, 2)) >= CLEAR * whole


def _formed(touched: np.ndarray, form: str) -> np.ndarray:
    """bool [F, H, W]: as tight as the objects, each frame's box, or much wider."""
    pixels = max(1, round(WIDER[form] * min(touched.shape[1:]) / 64))
    if form != "boxed":
        return grow(touched, pixels)
    boxes = np.zeros_like(touched)
    for frame, box in zip(touched, boxes, strict=True):
        rows, columns = frame.any(1).nonzero()[0], frame.any(0).nonzero()[0]
        if len(rows):
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return grow(boxes, pixels)


def _nothing_is_left(edit: EditCase, video: np.ndarray) -> bool:
    """No object is seen in nine frames of ten, where it was or elsewhere."""
    return judge(video).presence <= 0.1


def _both_are_right(case: QualityCase, video: np.ndarray) -> bool:
    """The edited object is seen in the frames that show it, and the other one is as it was, all along."""
    thing, size = case.edit.target.scene.objects[0], video.shape[:3]
    side = min(size[1:])
    beside = coverage(case.other, size) >= 0.5
    around = grow(case.edit.mask, side // 12) & ~grow(beside, 1)
    seen = judge(video[case.clear], around[case.clear])
    if (seen.colour, seen.shape) != (thing.colour, thing.shape) or seen.presence < 0.9:
        return False
    kept = judge(video, grow(beside, side // 16))
    stray = judge(video, ~(around | grow(beside, side // 12)))
    return kept.colour == case.other.colour and kept.presence >= 0.9 and stray.presence < 0.5
