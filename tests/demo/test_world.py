"""The demo world and its judge: determinism, exact masks, captions that say what is shown, verdicts that are true."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.demo_model.networks import vocabulary
from bench.quality.judge import edit_is_right, judge
from kvlock_fast.demo.gallery import contact_sheet
from kvlock_fast.demo.scene import COLOURS, HELD_OUT, PLACES, SHAPES, sample_scene
from kvlock_fast.demo.world import EDIT_KINDS, centres, coverage, render, render_background, sample_edit
from tests.support.captions import parse_caption

SEEDS = st.integers(0, 2**32)


def test_a_seed_gives_the_same_pixels_again_and_another_seed_others():
    first, again, other = (render(sample_scene(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first.video, again.video)
    assert first.caption == again.caption
    assert not np.array_equal(first.video, other.video)


@pytest.mark.parametrize(("frames", "height", "width"), [(17, 64, 64), (1, 96, 96), (9, 64, 128), (5, 48, 32)])
def test_sizes_and_types(frames, height, width):
    clip = render(sample_scene(3, frames=frames, height=height, width=width))
    assert clip.video.shape == (frames, height, width, 3)
    assert clip.video.dtype == np.uint8
    assert clip.mask.shape == (frames, height, width)
    assert clip.mask.dtype == np.bool_
    assert clip.mask.any((1, 2)).all()


def test_the_scene_is_the_same_at_any_size():
    small, big = (sample_scene(11, height=n, width=n) for n in (64, 96))
    assert small.caption == big.caption
    assert small.objects == big.objects
    share = [render(scene).mask.mean() for scene in (small, big)]
    assert share[0] == pytest.approx(share[1], rel=0.05)


def _inside(shape: str, x: float, y: float) -> bool:
    """The shapes' definition, written out a second time by cases."""
    if shape == "circle":
        return math.hypot(x, y) <= 1
    if shape == "ring":
        return 0.48 <= math.hypot(x, y) <= 1
    if shape == "square":
        return abs(x) <= 0.86 and abs(y) <= 0.86
    if shape == "triangle":
        return -1.12 <= y <= 0.72 and abs(x) <= (y + 1.12) / math.sqrt(3)
    return max(abs(x), abs(y)) <= 1 and min(abs(x), abs(y)) <= 0.36


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_is_exactly_the_pixels_whose_centre_is_inside(shape):
    seed = next(s for s in range(200) if sample_scene(s).objects[0].shape == shape)
    scene = sample_scene(seed, frames=3, height=40, width=56)
    thing = scene.objects[0]
    mask, path = render(scene).mask, centres(thing, 3)
    for f, (cx, cy) in enumerate(path):
        for row in range(40):
            for column in range(56):
                x, y = (column + 0.5 - cx * 56) / (thing.radius * 40), (row + 0.5 - cy * 40) / (thing.radius * 40)
                assert mask[f, row, column] == _inside(shape, x, y), (f, row, column)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_outside_the_object_only_background_is_seen_and_inside_only_the_colour(seed):
    scene = sample_scene(seed, frames=5)
    clip, cover = render(scene), coverage(scene.objects[0], (5, 64, 64))
    behind = np.clip(render_background(scene.background, (5, 64, 64)) * 255 + 0.5, 0, 255).astype(np.uint8)
    assert np.array_equal(clip.video[cover == 0], behind[cover == 0])
    whole = clip.video[cover == 1].astype(int)
    assert len(whole) > 0
    assert np.abs(whole - np.array(COLOURS[scene.objects[0].colour])).max() <= 1


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.sampled_from([0, 1, 2]))
def test_captions_read_back_as_the_scene(seed, objects):
    scene = sample_scene(seed, objects=objects)
    read = parse_caption(scene.caption)
    assert (read["pattern"], read["pan"]) == (scene.background.pattern, scene.background.pan_word)
    names = ("size", "colour", "shape", "place", "goal", "bend")
    assert read["objects"] == [{n: getattr(thing, n) for n in names} for thing in scene.objects]
    assert set(scene.caption.split()) <= set(vocabulary())


def test_a_caption_outside_the_grammar_is_refused_and_quoted():
    with pytest.raises(ValueError, match="a dog on the moon"):
        parse_caption("a dog on the moon")
    with pytest.raises(ValueError, match="nowhere"):
        parse_caption("a small red ring staying at the nowhere over a striped background standing still")


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_object_is_where_the_caption_says_and_stays_in_the_picture(seed):
    scene = sample_scene(seed)
    thing, path = scene.objects[0], centres(scene.objects[0], 17)
    assert np.abs(path[0] - PLACES[thing.place]).max() < 0.05
    assert np.abs(path[-1] - PLACES[thing.goal]).max() < 0.05
    assert np.isfinite(path).all()
    area = coverage(thing, (17, 64, 64)).sum((1, 2))
    assert area.min() > 0.97 * area.max()


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_an_edit_changes_only_what_it_says_and_its_mask_holds_both_objects(kind):
    for seed in range(HELD_OUT, HELD_OUT + 12):
        case = sample_edit(seed, kind)
        assert case.source.scene == sample_scene(seed)
        before, after = case.source.scene.objects[0], case.target.scene.objects[0]
        assert (before.colour != after.colour) == (kind != "reshape")
        assert (before.shape != after.shape) == (kind != "recolour")
        assert (before.start, before.end, before.radius) == (after.start, after.end, after.radius)
        assert not (case.source.mask & ~case.mask).any()
        assert not (case.target.mask & ~case.mask).any()
        assert np.array_equal(case.source.video[~case.mask], case.target.video[~case.mask])
        assert case.mask.mean() < 0.35
        assert (case.source_prompt, case.prompt) == (case.source.caption, case.target.caption)


def test_the_judge_errs_on_fewer_than_one_true_clip_in_fifty():
    wrong = 0
    for seed in range(HELD_OUT + 500, HELD_OUT + 600):
        scene = sample_scene(seed, frames=5)
        clip, thing = render(scene), scene.objects[0]
        seen = judge(clip.video)
        away = np.hypot(*(seen.centres - centres(thing, 5)).T).max() if seen.colour else 1.0
        wrong += (seen.colour, seen.shape) != (thing.colour, thing.shape) or away > 0.05 or seen.presence < 1
    assert wrong < 2


def test_the_judge_sees_nothing_where_nothing_is():
    seen = judge(render(sample_scene(4, frames=5, objects=0)).video)
    assert (seen.colour, seen.shape, seen.presence) == (None, None, 0.0)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_the_judge_accepts_the_true_edit_and_no_other(kind):
    for seed in range(HELD_OUT + 700, HELD_OUT + 706):
        case = sample_edit(seed, kind)
        assert edit_is_right(case, case.target.video)
        assert not edit_is_right(case, case.source.video)
        assert not edit_is_right(case, case.target.video[:, ::-1, ::-1]) or _is_symmetric(case)
        erased = render_background(case.target.scene.background, (17, 64, 64))
        assert not edit_is_right(case, (erased * 255).astype(np.uint8))


def _is_symmetric(case) -> bool:
    """Whether the object's path and shape look the same after turning the picture by 180 degrees."""
    thing = case.target.scene.objects[0]
    path = centres(thing, 17)
    return thing.shape != "triangle" and float(np.hypot(*(2 * path - 1).T).mean()) < 0.15


def test_a_second_object_outside_the_mask_is_not_right():
    case = sample_edit(HELD_OUT + 3, "recolour")
    video, spot = case.target.video.copy(), np.zeros((64, 64), bool)
    corner = min(((r, c) for r in (0, 52) for c in (0, 52)), key=lambda rc: case.mask[:, rc[0] :, rc[1] :].sum())
    spot[corner[0] : corner[0] + 12, corner[1] : corner[1] + 12] = True
    video[:, spot] = COLOURS["green"]
    assert edit_is_right(case, case.target.video)
    assert not edit_is_right(case, video)


def test_the_sheet_shows_every_clip():
    clips = [render(sample_scene(seed, frames=5, height=16, width=16)) for seed in range(3)]
    sheet = np.asarray(contact_sheet(clips, columns=2, shown=2, scale=1))
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (16, 16, 3))[:, :, 0]
    for clip in clips:
        for frame in (clip.video[0], clip.video[-1]):
            assert (windows == frame).all((2, 3, 4)).sum() >= 1
