"""An edit pasted into its source: exact outside the mask, and the corrections of colours against dense equations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

import kvlock_fast as kvf
from kvlock_fast.errors import InputError
from kvlock_fast.media import grow_mask, paste, resize_video
from kvlock_fast.media.paste import composite, fade
from kvlock_fast.settings import PASTES
from tests.support.clipmaker import noise


def by_hand(difference, mask, reach=None):
    """The correction of one frame by the dense equations of its pixels, fp64."""
    marked = [tuple(place) for place in np.argwhere(mask)]
    matrix, right = np.zeros((len(marked), len(marked))), np.zeros((len(marked), difference.shape[-1]))
    for i, (y, x) in enumerate(marked):
        matrix[i, i] = 0 if reach is None else reach**-2
        for beside in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= beside[0] < mask.shape[0] and 0 <= beside[1] < mask.shape[1]:
                matrix[i, i] += 1
                if mask[beside]:
                    matrix[i, marked.index(beside)] -= 1
                else:
                    right[i] += difference[beside]
    return np.linalg.solve(matrix, right)


def some_mask(height, width, seed, share=0.6):
    mask = np.random.default_rng(seed).random((height, width)) < share
    mask[0, 0], mask[-1, -1] = True, False
    return mask


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**32 - 1), st.sampled_from([None, 0.5, 4.0]))
def test_corrections_solve_the_dense_equations(height, width, seed, reach):
    """The multigrid solves it; a grid of 3 pixels is the coarsest here."""
    mask = some_mask(height, width, seed)
    difference = np.random.default_rng(seed).normal(0, 50, (height, width, 3))
    expected = by_hand(difference, mask, reach)
    for direct in (3, 2000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paste, "DIRECT", direct)
            patch.setattr(paste, "EXACT", 1e-4)
            found = paste.Correction(reach).of(difference, mask)
        # Deeper than six reaches a screened correction is taken to be 0.
        assert np.abs(found - expected).max() < 0.01 + (0 if reach is None else 200 * np.exp(-6))


def test_the_stop_of_the_multigrid_is_far_below_a_level():
    mask = np.zeros((120, 150), bool)
    mask[10:110, 20:130] = some_mask(100, 110, 0, 0.97)
    difference = np.random.default_rng(1).normal(30, 20, (120, 150, 3))
    found = paste.Correction(None).of(difference, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paste, "DIRECT", 10**9)
        exact = paste.Correction(None).of(difference, mask)
    assert mask.sum() > 4 * paste.DIRECT and np.abs(found - exact).max() < 0.05


def smooth_source(frames=3, height=24, width=30):
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([60 + 3 * y + x, 90 + 2 * x, 150 - y - x], axis=-1)
    return np.stack([ramp + frame for frame in range(frames)]).astype(np.uint8)


def test_a_constant_offset_is_removed_exactly_and_a_gradient_stays():
    source = smooth_source()
    mask = np.zeros(source.shape[:3], bool)
    mask[:, 5:17, 8:22] = True
    mask[1] = np.roll(mask[1], 3, axis=1)
    assert np.array_equal(composite(source, source + np.uint8(20), mask, feather=0, paste="harmonic"), source)
    # The edit's own detail, which is no offset along the edge, is kept.
    edited = source.copy()
    edited[:, 10:12, 12:14] += 30
    shifted = composite(source, edited - np.uint8(15), mask, feather=0, paste="harmonic")
    detail = mask & (edited != source).any(-1)
    assert detail[0].sum() > 0 and np.array_equal(shifted[detail & mask], edited[detail & mask])


def test_a_screened_offset_is_gone_at_the_edge_and_stays_within():
    source = np.full((1, 60, 60, 3), 100, np.uint8)
    mask = np.zeros((1, 60, 60), bool)
    mask[:, 10:50, 10:50] = True
    out = composite(source, source + np.uint8(40), mask, feather=0, paste="screened").astype(int)
    line = out[0, 30, 10:30, 0] - 100
    # On a line the equation's solution falls by one factor a pixel, r + 1/r = 2 + 1/reach^2.
    sum_of = 2 + paste.REACH**-2
    factor = (sum_of - np.sqrt(sum_of**2 - 4)) / 2
    expected = 40 * (1 - factor ** np.arange(1, 21))
    assert np.abs(line - expected).max() <= 1 and line[0] <= 16 and line[-1] == 40


def test_the_reach_of_a_screened_paste_grows_with_an_edit_that_is_enlarged():
    """Along a straight edge the correction falls to 1/e in REACH pixels of the edit, here of 4 pixels each."""
    mask = np.zeros((1, 8, 400), bool)
    mask[:, :, 200:] = True
    source = np.full((1, 8, 400, 3), 0.2)
    for across in (1, 4):
        edit = np.full((1, 8 // across, 400 // across, 3), 0.6)
        line = composite(source, edit, mask, feather=0, paste="screened")[0, 4, 200:, 0]
        left = (0.6 - line) / 0.4
        assert left[0] / left[4 * across] == pytest.approx(np.exp(4 / paste.REACH), rel=0.06)


@given(st.integers(0, 2**32 - 1), st.sampled_from(PASTES), st.integers(0, 2), st.integers(0, 2), st.booleans())
def test_outside_the_mask_every_pixel_is_the_sources_bit_for_bit(seed, way, feather, soft, floats):
    random = np.random.default_rng(seed)
    source = random.random((2, 9, 11, 3)) if floats else random.integers(0, 256, (2, 9, 11, 3), dtype=np.uint8)
    edit = random.random((2, 9, 11, 3), dtype=np.float32)
    mask = random.random((2, 9, 11)) < 0.4
    mask[0, 0, 0], mask[1] = True, mask[1] & (seed % 2 == 0)
    out = composite(source, edit, mask, feather, way, soft)
    outside = ~grow_mask(mask, soft)
    assert out.dtype == source.dtype and out.shape == source.shape
    assert out[outside].tobytes() == source[outside].tobytes()
    assert out is not source and (not floats or (out.min() >= 0 and out.max() <= 1))


def test_a_hard_paste_without_a_feather_is_the_edit_in_every_dtype():
    source, edit = noise(4, 12, 10), noise(4, 12, 10)[::-1].copy()
    mask = np.zeros((12, 10), bool)
    mask[3:8, 2:7] = True
    for given_source in (source, source / 255, (source / 255).astype(np.float32)):
        for given_edit in (edit, edit / 255, (edit / 255).astype(np.float32)):
            out = kvf.composite(given_source, given_edit, mask, feather=0, paste="hard")
            levels = out if out.dtype == np.uint8 else out * 255
            assert out.dtype == given_source.dtype
            assert np.abs(levels[:, mask] - edit[:, mask].astype(float)).max() < 1e-3


def test_an_edit_of_another_size_is_brought_to_the_sources():
    source, edit = noise(9, 32, 48), noise(9, 16, 24)
    mask = np.zeros((1, 32, 48), bool)
    mask[:, 8:20, 10:30] = True
    out = composite(source, edit, mask, feather=0, paste="hard")
    assert np.array_equal(out[:, mask[0]], resize_video(edit, 32, 48)[:, mask[0]])
    as_floats = composite(source / 255, edit / 255, mask, feather=0, paste="hard")
    assert np.abs(as_floats * 255 - out).max() <= 0.5 + 1e-3
    assert np.array_equal(composite(source, edit, mask)[:, ~mask[0]], source[:, ~mask[0]])


@given(st.integers(0, 5), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_a_fade_rises_in_equal_steps_across_the_edge(feather, soft, seed):
    """Brute force: inside by Chebyshev distance to the rest, outside by Euclidean distance to the mask."""
    mask = np.random.default_rng(seed).random((1, 7, 9)) < 0.7
    weight = fade(mask, feather, soft)[0]
    marked, rest = np.argwhere(mask[0]), np.argwhere(~mask[0])
    for y, x in np.ndindex(7, 9):
        if mask[0, y, x]:
            inside = min([max(abs(y - a), abs(x - b)) for a, b in rest], default=99)
            expected = min(1, (soft + inside) / (soft + feather + 1))
        else:
            outside = min([np.hypot(y - a, x - b) for a, b in marked], default=99)
            expected = 0 if outside > soft else (soft + 1 - outside) / (soft + feather + 1)
        assert weight[y, x] == pytest.approx(expected)
    assert np.array_equal(weight > 0, grow_mask(mask, soft)[0])


def test_without_a_feather_a_soft_edge_is_1_on_the_mask_and_0_at_its_end():
    mask = np.zeros((1, 20, 20), bool)
    mask[:, 8:12, 8:12] = True
    weight = fade(mask, 0, 3)[0]
    assert (weight[mask[0]] == 1).all() and weight[10, 4:9].tolist() == [0, 0.25, 0.5, 0.75, 1]
    distance = np.asarray(distance_transform_edt(~mask[0]))
    assert (weight[distance > 3] == 0).all()


def test_masks_without_an_edge_or_without_a_pixel():
    source, edit = noise(2, 8, 8), noise(2, 8, 8)[::-1].copy()
    for way in PASTES:
        assert np.array_equal(composite(source, edit, np.ones((8, 8), bool), paste=way), edit)
        assert np.array_equal(composite(source, edit, np.zeros((8, 8), bool), paste=way), source)


WRONG = {
    "source of integers": ({"source": np.zeros((2, 4, 4, 3), int)}, "source must be .F, H, W, 3., uint8 or float 0..1"),
    "source of levels": ({"source": np.full((2, 4, 4, 3), 99.0)}, "source must be uint8 or float 0..1, got floats"),
    "edit with NaN": ({"edit": np.full((2, 4, 4, 3), np.nan)}, "edit must be uint8 or float 0..1, got floats from nan"),
    "one frame": ({"edit": np.zeros((4, 4, 3), np.uint8)}, r"edit must be .* got uint8 \(4, 4, 3\)"),
    "frames": ({"edit": np.zeros((3, 4, 4, 3), np.uint8)}, "edit has 3 frames but source has 2"),
    "mask of numbers": (
        {"mask": np.zeros((2, 4, 4))},
        "mask must be bool, True where .* got float64",
    ),
    "mask's size": ({"mask": np.ones((2, 4, 5), bool)}, r"mask must be \[2 or 1, 4, 4\] like source, got \(2, 4, 5\)"),
    "feather": ({"feather": -1}, "feather must be a whole number of at least 0, got -1"),
    "soft": ({"soft": 0.5}, "soft must be a whole number of at least 0, got 0.5"),
    "paste": ({"paste": "soft"}, "paste must be one of hard, screened, harmonic, got 'soft'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_pasted(name):
    changes, message = WRONG[name]
    video = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(InputError, match=message):
        kvf.composite(**{"source": video, "edit": video, "mask": np.ones((4, 4), bool), **changes})
