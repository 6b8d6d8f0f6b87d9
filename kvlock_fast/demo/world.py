"""The demo world: short procedural videos with captions and exact masks, from a seed.

A clip shows coloured shapes that move on straight or curved paths over a patterned, shaded, sometimes panning
background. Nothing in the background is named but its pattern and its motion, so it can be copied from a source but
not guessed. Training uses seeds below `HELD_OUT` (2**31), held-out figures those from there up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvlock_fast.demo.scene import COLOURS, SHAPES, Background, Scene, Thing, sample_scene

Size = tuple[int, int, int]
EDIT_KINDS = ("recolour", "reshape", "both")
# Pixels by which an edit's mask is wider than the two objects, at a side of 64.
_GROW = 2 / 64


@dataclass(frozen=True)
class Clip:
    """A rendered scene. `video` uint8 [F, H, W, 3]; `mask` bool [F, H, W]: every object's visible pixels."""

    video: np.ndarray
    mask: np.ndarray
    caption: str
    scene: Scene


@dataclass(frozen=True)
class EditCase:
    """An edit with its true answer: `target` has the source's background and motion, another colour and/or shape.

    `mask` bool [F, H, W]: the union of both objects' pixels, slightly grown, so that either fits inside.
    """

    source: Clip
    target: Clip
    mask: np.ndarray
    source_prompt: str
    prompt: str
    kind: str


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside, exact near edges) of a shape of radius 1 about the origin; y points down."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74) - 0.26
    if shape == "square":
        return np.maximum(ax, ay) - 0.86
    if shape == "triangle":
        return np.maximum(y - 0.72, ax * (np.sqrt(3) / 2) - (y + 1.12) / 2)
    if shape == "cross":
        return np.minimum(np.maximum(ax - 1.0, ay - 0.36), np.maximum(ay - 1.0, ax - 0.36))
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def centres(thing: Thing, frames: int) -> np.ndarray:
    """Find the object's centre in each frame, [F, 2] float64 as fractions of (width, height)."""
    t = np.linspace(0.0, 1.0, frames)[:, None]
    start, end = np.array(thing.start), np.array(thing.end)
    step = end - start
    length = np.hypot(*step)
    sideways = np.array([-step[1], step[0]]) / length if length > 0 else np.zeros(2)
    path = start + t * step + 4 * t * (1 - t) * thing.bow * sideways
    # A bowed path near the border would leave the frame.
    return np.clip(path, 0.24, 0.76)


def coverage(thing: Thing, size: Size) -> np.ndarray:
    """Draw an object's share of each pixel, float32 [F, H, W] in 0..1; at least 0.5 where the pixel's centre is inside.

    size: (F, H, W).
    """
    frames, height, width = size
    side = min(height, width)
    middle = centres(thing, frames) * (width, height)
    x = (np.arange(width, dtype=np.float32) + 0.5)[None, None, :] - middle[:, 0, None, None].astype(np.float32)
    y = (np.arange(height, dtype=np.float32) + 0.5)[None, :, None] - middle[:, 1, None, None].astype(np.float32)
    radius = np.float32(thing.radius * side)
    x, y = np.broadcast_arrays(x / radius, y / radius)
    return np.clip(0.5 - shape_distance(thing.shape, x, y) * radius, 0.0, 1.0).astype(np.float32)


def render_background(background: Background, size: Size) -> np.ndarray:
    """Draw the background alone, float32 [F, H, W, 3] in 0..1; size: (F, H, W)."""
    frames, height, width = size
    side = min(height, width)
    t = np.linspace(0.0, 1.0, frames)
    x, y = (np.arange(width) + 0.5) / side, (np.arange(height) + 0.5) / side
    field = _waves(background, t, y, x)
    if background.pattern in ("striped", "checked"):
        field = np.tanh(1.8 * field)
    a, b, c = (np.array(colour, dtype=np.float32) for colour in background.colours)
    mix = np.clip(0.5 + 0.5 * field, 0, 1).astype(np.float32)[..., None]
    # Shading belongs to the lens, not to the pattern: it stays while the pattern pans.
    shade = 0.25 + (x - 0.5)[None, :] * background.shade[0] + (y - 0.5)[:, None] * background.shade[1]
    shade = np.clip(shade, 0, 0.6).astype(np.float32)[None, :, :, None]
    return (a + (b - a) * mix) * (1 - shade) + c * shade


def _waves(background: Background, t: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Sum (product for "checked") of plane waves at times, rows and columns; float [F, H, W].

    A plane wave is the real part of a product of one factor in t, one in y and one in x: a matmul, not F*H*W sines.
    """
    amplitude, kx, ky, phase = np.array(background.waves).T
    pan_x, pan_y = background.pan
    along_x = np.exp(2j * np.pi * np.outer(kx, x))
    along_y = np.exp(2j * np.pi * np.outer(y, ky))
    along_t = amplitude * np.exp(1j * (phase - 2 * np.pi * np.outer(t, kx * pan_x + ky * pan_y)))
    if background.pattern == "checked":
        rows = along_t[:, None, :] * along_y[None]
        return np.prod([np.real(rows[..., i : i + 1] * along_x[i]) for i in range(2)], axis=0)
    return np.real((along_t[:, None, :] * along_y[None]) @ along_x)


def render(scene: Scene) -> Clip:
    """Draw a scene. The result depends on the scene only."""
    size = (scene.frames, scene.height, scene.width)
    video = render_background(scene.background, size)
    mask = np.zeros(size, dtype=bool)
    for thing in scene.objects:
        part = coverage(thing, size)
        colour = np.array(COLOURS[thing.colour], dtype=np.float32) / 255
        video += part[..., None] * (colour - video)
        mask |= part >= 0.5
    pixels = np.clip(video * 255 + 0.5, 0, 255).astype(np.uint8)
    return Clip(pixels, mask, scene.caption, scene)


def sample_edit(seed: int, kind: str, *, frames: int = 17, height: int = 64, width: int = 64) -> EditCase:
    """Draw an edit from a seed; its source is `sample_scene(seed)`.

    Args:
        seed: decides everything but the kind.
        kind: "recolour", "reshape" or "both".
        frames: number of frames.
        height: in pixels.
        width: in pixels.
    """
    if kind not in EDIT_KINDS:
        raise ValueError(f"unknown kind of edit {kind!r}; known: {', '.join(EDIT_KINDS)}")
    scene = sample_scene(seed, frames=frames, height=height, width=width)
    thing = scene.objects[0]
    rng = np.random.default_rng([seed, 1 + EDIT_KINDS.index(kind)])
    colour = str(rng.choice([name for name in COLOURS if name != thing.colour]))
    shape = str(rng.choice([name for name in SHAPES if name != thing.shape]))
    changes = {"recolour": {"colour": colour}, "reshape": {"shape": shape}, "both": {"colour": colour, "shape": shape}}
    edited = replace(scene, objects=(replace(thing, **changes[kind]),))
    source, target = render(scene), render(edited)
    mask = grow(source.mask | target.mask, max(1, round(_GROW * min(height, width))))
    return EditCase(source, target, mask, source.caption, target.caption, kind)


def grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Dilate bool [F, H, W] within each frame by a square of 2 * pixels + 1."""
    from scipy.ndimage import maximum_filter1d

    size = 2 * pixels + 1
    return maximum_filter1d(maximum_filter1d(mask, size, axis=1, mode="constant"), size, axis=2, mode="constant")
