"""Masks in motion, grown, shrunk, inverted, softened; and the preview of their tokens."""

import json
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from skimage import morphology

from kvlock_fast import media
from kvlock_fast.cli import main
from kvlock_fast.edit import EditSettings, load_pipeline
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.masks import Geometry
from kvlock_fast.media import MaskShape
from kvlock_fast.media.clip import read_clip
from kvlock_fast.report import token_preview
from tests.support.clipmaker import noise
from tests.support.tiny import tiny_wan

# --- boxes that move -----------------------------------------------------------------------------------------------

edge = st.integers(0, 30)


@example({34: (0, 0, 2, 1), 0: (0, 0, 1, 1), 6: (10, 0, 10, 1)})  # a half that floating point misses
@given(st.dictionaries(st.integers(0, 40), st.tuples(edge, edge, st.integers(1, 10), st.integers(1, 12)), min_size=1))
def test_boxes_move_straight_from_keyframe_to_keyframe(keys):
    """By fractions: each edge lies on the line between the two keyframes around it, halves rounded up."""
    spec = "box:" + ";".join(f"{k}={','.join(map(str, box))}" for k, box in keys.items())
    mask = media.box_mask(spec, 30, 42, 40)
    times = sorted(keys)
    for frame in range(30):
        before = max((t for t in times if t <= frame), default=times[0])
        after = min((t for t in times if t >= frame), default=times[-1])
        share = Fraction(frame - before, after - before) if after > before else Fraction(0)
        (x0, y0, w0, h0), (x1, y1, w1, h1) = keys[before], keys[after]
        ends = [(x0, x1), (y0, y1), (x0 + w0, x1 + w1), (y0 + h0, y1 + h1)]
        left, top, right, bottom = ((a + (b - a) * share + Fraction(1, 2)) // 1 for a, b in ends)
        expected = np.zeros((42, 40), bool)
        expected[int(top) : int(bottom), int(left) : int(right)] = True
        assert np.array_equal(mask[frame], expected), (spec, frame)


def test_a_box_stands_still_before_its_first_and_after_its_last_keyframe():
    mask = media.box_mask("box: 4 = 1, 2, 3, 4 ; 8=5,2,3,4", 20, 10, 10)
    assert (mask[:5] == mask[4]).all() and (mask[8:] == mask[8]).all() and mask[6, 2:6, 3:6].all()
    assert mask.sum() == 20 * 12
    assert np.array_equal(media.box_mask("box:7=1,2,3,4", 2, 10, 10), media.box_mask("box:1,2,3,4", 2, 10, 10))


@pytest.mark.parametrize("spec", [
    "box:0=1,2,3,4;", "box:0=1,2,3,4;1,2,3,4", "box:1,2,3,4;2,2,3,4", "box:-1=1,2,3,4", "box:0:1,2,3,4",
    "box:x=1,2,3,4", "box:0=1,2,3;4=1,2,3,4", "box:0=1,2,3,4;0=2,2,3,4", "box:0=1,2,3,4;9=8,2,3,4",
    "box:9999999999=1,2,3,4", "box:1,2,3,99999999999",
])  # fmt: skip
def test_keyframes_that_are_none(spec):
    with pytest.raises(InputError) as caught:
        media.box_mask(spec, 3, 10, 10)
    assert f"'{spec}'" in str(caught.value)


# --- grow and shrink -----------------------------------------------------------------------------------------------

size = st.integers(1, 22)


@given(size, size, st.integers(-7, 9), st.sampled_from([0.03, 0.5, 0.97]), st.integers(0, 2**32 - 1))
def test_growing_equals_a_disc_of_scikit_image(height, width, radius, density, seed):
    mask = np.random.default_rng(seed).random((3, height, width)) < density
    disc, margin = morphology.disk(abs(radius)), abs(radius)
    for frame, found in zip(mask, media.grow_mask(mask, radius), strict=True):
        if radius >= 0:
            expected = morphology.dilation(np.pad(frame, margin), disc)
        else:  # what lies beyond the picture's edge takes nothing away
            expected = morphology.erosion(np.pad(frame, margin, constant_values=True), disc)
        assert np.array_equal(found, expected[margin : margin + height, margin : margin + width])


@given(size, size, st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_growing_by_brute_force(height, width, radius, seed):
    mask = np.random.default_rng(seed).random((1, height, width)) < 0.05
    marked, (y, x) = np.argwhere(mask[0]), np.mgrid[:height, :width]
    expected = np.zeros((height, width), bool)
    for a, b in marked:
        expected |= (y - a) ** 2 + (x - b) ** 2 <= radius**2
    assert np.array_equal(media.grow_mask(mask, radius)[0], expected)


def test_growing_keeps_frames_apart_and_the_given_mask_as_it_was():
    mask = np.zeros((4, 9, 9), bool)
    mask[1, 4, 4] = mask[2, 4, 4] = True
    before = mask.copy()
    grown = media.grow_mask(mask, 2)
    assert [int(frame.sum()) for frame in grown] == [0, 13, 13, 0] and np.array_equal(mask, before)
    assert np.array_equal(media.grow_mask(grown, -2), mask)


# --- the shape of a mask -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A clip of 5 frames of 24x32 and a grey mask: 200 in a square, 100 around it."""
    media.write_video(tmp_path / "s.mkv", noise(5, 24, 32), 10)
    levels = np.zeros((24, 32), np.uint8)
    levels[6:18, 8:24] = 100
    levels[9:15, 12:20] = 200
    np.save(tmp_path / "m.npy", levels)
    return tmp_path


def shaped(folder, mask="m.npy", **shape):
    mask = mask if mask.startswith("box:") else str(folder / mask)
    return read_clip(str(folder / "s.mkv"), mask, shape=MaskShape(**shape))


def test_threshold_invert_grow_and_feather_apply_in_this_order(folder):
    inner = np.zeros((5, 24, 32), bool)
    inner[:, 9:15, 12:20] = True
    outer = np.zeros_like(inner)
    outer[:, 6:18, 8:24] = True
    assert np.array_equal(shaped(folder).mask, inner)
    assert np.array_equal(shaped(folder, threshold=0.3).mask, outer)
    assert np.array_equal(shaped(folder, threshold=0.3, invert=True).mask, ~outer)
    # Inverted first: growing then takes from the square.
    assert np.array_equal(shaped(folder, invert=True, grow=2).mask, media.grow_mask(~inner, 2))
    clip = shaped(folder, grow=-1, feather=3)
    assert np.array_equal(clip.solid, media.grow_mask(inner, -1))
    assert np.array_equal(clip.mask, media.grow_mask(clip.solid, 3))
    assert shaped(folder, grow=2).solid is None
    assert np.array_equal(shaped(folder, "box:12,9,8,6", grow=2).mask, media.grow_mask(inner, 2))


def test_a_mask_that_is_empty_after_all(folder):
    for shape, words in (
        ({"grow": -9}, "is empty once it is shrunk by 9 pixels"),
        ({"threshold": 0.9}, "no pixel is marked"),
    ):
        with pytest.raises(InputError, match=rf"m\.npy' .*{words}"):
            shaped(folder, **shape)
    with pytest.raises(InputError, match="'box:0,0,32,24' is empty: every pixel is marked, and it is inverted"):
        shaped(folder, "box:0,0,32,24", invert=True)


@pytest.mark.parametrize("wrong", [
    {"threshold": 1}, {"threshold": float("nan")}, {"threshold": "x"}, {"invert": "no"}, {"grow": 1.5},
    {"grow": 1025}, {"grow": -1025}, {"grow": True}, {"feather": -1}, {"feather": 257},
], ids=str)  # fmt: skip
def test_shapes_out_of_range(wrong):
    with pytest.raises(InputError) as caught:
        MaskShape(**wrong)
    name, value = next(iter(wrong.items()))
    assert name in str(caught.value) and str(value) in str(caught.value)


def test_a_longer_mask_is_cut_with_the_video_and_not_to_it(folder):
    np.save(folder / "long.npy", np.ones((9, 24, 32), bool))
    assert read_clip(str(folder / "s.mkv"), str(folder / "long.npy"), 4).mask.shape[0] == 4
    with pytest.raises(InputError, match="7 frames but the video has 5"):
        read_clip(str(folder / "s.mkv"), str(folder / "long.npy"), 7)


def test_the_fade_of_a_composite_follows_the_soft_edge():
    settings = EditSettings("a", ["b"])
    assert settings.composite_feather == 1
    assert EditSettings("a", ["b"], mask_shape=MaskShape(feather=3)).composite_feather == 0
    assert EditSettings("a", ["b"], mask_shape=MaskShape(feather=3), feather=2).composite_feather == 2


# --- what the model sees -------------------------------------------------------------------------------------------


def test_configs_alone_tell_the_tokens(tmp_path):
    tiny = tiny_wan()
    tiny.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    expected = Geometry(4, 8, (1, 2, 2), most_tokens=64)
    assert token_preview.geometry_of(str(tmp_path)) == expected
    assert token_preview.geometry_of("demo") == load_pipeline("demo", "cpu").model.geometry
    assert token_preview.geometry_of("wan-1.3b").size_multiple() == (16, 16)


def tokens_by_hand(mask, stride, down, across):
    """Any marked pixel under a token, frame by frame."""
    frames, height, width = mask.shape
    found = np.zeros((1 + -(-(frames - 1) // stride), height // down, width // across), bool)
    for f, y, x in np.argwhere(mask):
        found[-(-f // stride), y // down, x // across] = True
    return found


@given(st.integers(1, 10), st.integers(0, 2**32 - 1), st.sampled_from(["pad", "trim"]))
def test_the_view_holds_the_tokens_under_marked_pixels(frames, seed, policy):
    mask = np.random.default_rng(seed).random((frames, 32, 48)) < 0.004
    mask[0, 3, 40] = True
    geometry = Geometry(4, 8, (1, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        view = token_preview.view_tokens(noise(frames, 32, 48), mask, geometry, None, policy)
    kept = frames if policy == "pad" else frames - (frames - 1) % 4
    shown = np.concatenate([mask[:kept], np.repeat(mask[kept - 1 : kept], view.padded, axis=0)])
    assert len(view.video) == kept and np.array_equal(view.tokens, tokens_by_hand(shown, 4, 16, 16))
    facts = view.facts()
    assert facts["foreground_tokens"] + facts["background_tokens"] == np.prod(facts["tokens"])


def test_the_drawing_tints_foreground_tokens_and_nothing_else():
    video = np.full((6, 64, 96, 3), 100, np.uint8)
    mask = np.zeros((6, 64, 96), bool)
    mask[5, 20, 70] = True
    geometry = Geometry(4, 8, (1, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        view = token_preview.view_tokens(video, mask, geometry, None, "pad")
    drawn = token_preview.draw_tokens(view).astype(int)
    factor = 8  # 96 pixels become 768
    assert drawn.shape[0] == 6 and drawn.shape[2] == 96 * factor
    centres = drawn[:, 8 * factor :: 16 * factor, 8 * factor :: 16 * factor][:, :4]
    warm = centres[..., 0] - centres[..., 2] > 20
    expected = np.zeros((6, 4, 6), bool)
    # Frame 5 is in the second latent after the first, with the padding behind it.
    expected[5, 1, 4] = True
    assert np.array_equal(warm, expected)
    pixel = drawn[5, 20 * factor : 21 * factor, 70 * factor : 71 * factor]
    assert (pixel[0] == (255, 64, 129)).all() and (pixel[:, -1] == (255, 64, 129)).all()
    assert (drawn[:, 0, : 96 * factor].max(-1) > centres[0, 0, 0].max()).all()


def test_the_mask_command(folder, capsys):
    output, figures = folder / "o.mkv", folder / "o.json"
    arguments = ["mask", "--source", str(folder / "s.mkv"), "--mask", "box:0=0,0,4,4;4=28,20,4,4"]
    arguments += ["--model", "wan-1.3b", "--size", "32x32", "--output", str(output)]
    assert main([*arguments, "--json", str(figures)]) == 0
    facts = json.loads(figures.read_text())
    assert facts["tokens"] == [2, 2, 2] and facts["size"] == [32, 32] and facts["frames"] == 5
    assert "of 8 tokens (2x2x2) may change" in capsys.readouterr().out
    assert len(media.read_video(output).frames) == 5
    assert main([*arguments[:-1], str(folder / "o.txt")]) == 2
    assert "o.txt" in capsys.readouterr().err
    assert main([*arguments, "--model", "no/such/model"]) == 2
    assert "no/such/model" in capsys.readouterr().err.splitlines()[-1]


def test_an_edit_and_an_inversion_show_the_mask_that_they_use(folder, capsys):
    flags = ["--mask-threshold", "0.3", "--mask-invert", "--mask-grow=-2", "--mask-feather", "1"]
    common = ["--source", str(folder / "s.mkv"), "--mask", str(folder / "m.npy"), "--source-prompt", "a", *flags]
    common += ["--steps", "1", "-q"]
    shape = MaskShape(0.3, True, -2, 1)
    clip = read_clip(str(folder / "s.mkv"), str(folder / "m.npy"), shape=shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        view = token_preview.view_tokens(clip.video, clip.mask, token_preview.geometry_of("demo"), None, "pad")
    for command, output in (("edit", "o.mkv"), ("invert", "cache")):
        extra = ["--prompt", "b", "--json", str(folder / "o.json")] if command == "edit" else []
        shown = folder / f"{command}.mkv"
        arguments = [command, *common, *extra, "--output", str(folder / output), "--mask-preview", str(shown)]
        assert main(arguments) == 0, capsys.readouterr().err
        assert np.array_equal(media.read_video(shown).frames, token_preview.draw_tokens(view))
    data = json.loads((folder / "o.json").read_text())
    assert data["foreground_share"] == pytest.approx(view.tokens.mean())
    assert {k: v for k, v in data["settings"].items() if k.startswith("mask_")} == shape.as_dict()
