"""Content of a clip of the demo world: the attributes, their words, and how they are drawn from a seed.

Lengths are fractions of the shorter side and centres fractions of width and height, so that one scene renders at any
size. Time runs from 0 (first frame) to 1 (last frame).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Training draws seeds below this number; held-out figures use this number and above.
HELD_OUT = 2**31

# Hues are far apart and strong; backgrounds stay below half their saturation, so pixels alone tell them apart.
COLOURS = {
    "red": (226, 38, 42),
    "yellow": (242, 214, 36),
    "green": (40, 184, 62),
    "cyan": (36, 206, 216),
    "blue": (44, 72, 232),
    "magenta": (226, 56, 206),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": (0.155, 0.18), "large": (0.215, 0.24)}
PLACES = {
    f"{row} {column}".strip() or "centre": (x, y)
    for row, y in (("top", 0.27), ("", 0.5), ("bottom", 0.73))
    for column, x in (("left", 0.27), ("", 0.5), ("right", 0.73))
}
BENDS = {"straight": 0.0, "curving left": -1.0, "curving right": 1.0}
PATTERNS = ("gradient", "striped", "checked", "cloudy", "speckled")
PANS = {
    "standing still": (0, 0),
    "panning left": (-1, 0),
    "panning right": (1, 0),
    "panning up": (0, -1),
    "panning down": (0, 1),
}


@dataclass(frozen=True)
class Thing:
    """One moving object. `start`, `end`: (x, y) of its centre; `radius` of its shape; `bow`: its bulge."""

    colour: str
    shape: str
    size: str
    place: str
    goal: str
    bend: str
    start: tuple[float, float]
    end: tuple[float, float]
    radius: float
    bow: float

    def words(self) -> str:
        """The object's part of the caption."""
        name = f"a {self.size} {self.colour} {self.shape}"
        if self.place == self.goal:
            return f"{name} staying at the {self.place}"
        return f"{name} moving {self.bend} from the {self.place} to the {self.goal}"


@dataclass(frozen=True)
class Background:
    """A pattern between two colours, shaded towards a third, moving by `pan` (fractions of the side over the clip).

    `waves` are plane waves (amplitude, cycles per side in x, in y, phase); what is done with their sum depends on the
    pattern. Colours are RGB in 0..1.
    """

    pattern: str
    pan_word: str
    pan: tuple[float, float]
    colours: tuple[tuple[float, float, float], ...]
    waves: tuple[tuple[float, float, float, float], ...]
    shade: tuple[float, float]

    def words(self) -> str:
        """The background's part of the caption."""
        return f"a {self.pattern} background {self.pan_word}"


@dataclass(frozen=True)
class Scene:
    """Full content of a clip. Equal scenes render to equal pixels."""

    seed: int
    frames: int
    height: int
    width: int
    background: Background
    objects: tuple[Thing, ...]

    @property
    def caption(self) -> str:
        """One sentence of the fixed grammar: objects (colour, shape, size, place, motion), background."""
        things = " and ".join(thing.words() for thing in self.objects)
        return f"{things} over {self.background.words()}" if things else self.background.words()


def sample_scene(seed: int, *, frames: int = 17, height: int = 64, width: int = 64, objects: int = 1) -> Scene:
    """Draw a scene from a seed.

    Args:
        seed: decides everything; the size in pixels does not change what is drawn.
        frames: number of frames.
        height: in pixels.
        width: in pixels.
        objects: 0, 1 or 2.
    """
    if objects not in (0, 1, 2):
        raise ValueError(f"objects must be 0, 1 or 2, got {objects!r}")
    rng = np.random.default_rng(seed)
    background = _sample_background(rng)
    things = tuple(_sample_thing(rng) for _ in range(objects))
    return Scene(int(seed), frames, height, width, background, things)


def _pick(rng: np.random.Generator, names) -> str:
    names = list(names)
    return names[int(rng.integers(len(names)))]


def _sample_thing(rng: np.random.Generator) -> Thing:
    size, place, goal, bend = (_pick(rng, names) for names in (SIZES, PLACES, PLACES, BENDS))
    bend = "straight" if place == goal else bend
    start, end = _near(rng, place), _near(rng, goal)
    if place == goal:
        end = start
    bow = BENDS[bend] * float(rng.uniform(0.1, 0.15))
    radius = float(rng.uniform(*SIZES[size]))
    return Thing(_pick(rng, COLOURS), _pick(rng, SHAPES), size, place, goal, bend, start, end, radius, bow)


def _near(rng: np.random.Generator, place: str) -> tuple[float, float]:
    x, y = (float(c + rng.uniform(-0.03, 0.03)) for c in PLACES[place])
    return x, y


def _sample_background(rng: np.random.Generator) -> Background:
    pattern = _pick(rng, PATTERNS)
    pan_word = "standing still" if rng.random() < 0.5 else _pick(rng, list(PANS)[1:])
    speed = float(rng.uniform(0.15, 0.3))
    pan = PANS[pan_word][0] * speed, PANS[pan_word][1] * speed
    hue = rng.random()
    hues = (hue, hue + rng.uniform(0.15, 0.85), rng.random())
    # The first two differ in brightness too, or many patterns would be invisible.
    values = (rng.uniform(0.3, 0.5), rng.uniform(0.6, 0.85), rng.uniform(0.2, 0.9))
    colours = tuple(_hsv(h, float(rng.uniform(0.1, 0.36)), float(v)) for h, v in zip(hues, values, strict=True))
    angle = rng.uniform(0, 2 * np.pi)
    shade = (float(0.3 * np.cos(angle)), float(0.3 * np.sin(angle)))
    return Background(pattern, pan_word, pan, colours, _sample_waves(rng, pattern), shade)


def _sample_waves(rng: np.random.Generator, pattern: str) -> tuple[tuple[float, float, float, float], ...]:
    """Plane waves for a pattern; cycles per side stay below 8, which the autoencoder can follow."""
    low, high, count = {
        "gradient": (0.3, 0.6, 1),
        "striped": (2.0, 4.5, 1),
        "checked": (1.6, 3.2, 2),
        "cloudy": (0.5, 2.2, 6),
        "speckled": (3.5, 6.0, 5),
    }[pattern]
    strength = 0.55 if pattern == "speckled" else 1.0
    first = rng.uniform(0, 2 * np.pi)
    cycles = rng.uniform(low, high)
    waves = []
    for i in range(count):
        angle = first + i * np.pi / 2 if pattern == "checked" else rng.uniform(0, 2 * np.pi)
        if pattern in ("cloudy", "speckled"):
            cycles = rng.uniform(low, high)
        amplitude = strength * (1.0 if count <= 2 else 1.1 / np.sqrt(count))
        phase = rng.uniform(0, 2 * np.pi)
        waves.append(tuple(map(float, (amplitude, cycles * np.cos(angle), cycles * np.sin(angle), phase))))
    return tuple(waves)


def _hsv(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    """HSV in 0..1 (hue wraps) to RGB in 0..1."""
    offset = np.array([5.0, 3.0, 1.0])
    k = (offset + (hue % 1.0) * 6.0) % 6.0
    rgb = value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
    return float(rgb[0]), float(rgb[1]), float(rgb[2])
