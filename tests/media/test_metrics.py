"""Metrics against scikit-image, and against what can be said by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import mean_squared_error, structural_similarity

from bench.quality.measures import background_figures
from kvlock_fast.media.metrics import edge_step, flicker, measure_delivered, measure_edit, psnr, seam, ssim


def pair(shape, seed=0, noise=20):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, shape, dtype=np.uint8)
    b = np.clip(a + rng.normal(0, noise, shape), 0, 255).astype(np.uint8)
    return a, b


def ssim_map(a, b):
    """scikit-image's map of one picture, the mean over channels."""
    _, full = structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, full=True,
        channel_axis=-1 if a.ndim == 3 else None,
    )  # fmt: skip
    return full.mean(-1) if a.ndim == 3 else full


@pytest.mark.parametrize("shape", [(2, 24, 31, 3), (1, 11, 11, 3), (3, 40, 17)], ids=["odd", "window", "grey"])
@pytest.mark.parametrize("smooth", [False, True], ids=["noise", "flat"])
def test_ssim_equals_scikit_image(shape, smooth):
    a, b = pair(shape, noise=3 if smooth else 40)
    if smooth:
        # Nearly constant and far from zero: where a variance by squares loses most.
        a, b = a // 64 + 190, b // 64 + 190
    expected = np.stack([ssim_map(x, y) for x, y in zip(a, b, strict=True)])
    assert ssim(a, b) == pytest.approx(expected.mean(), abs=2e-6)
    where = np.random.default_rng(1).random(shape[:3]) < 0.2
    where[0] = False
    where[-1, 0, 0] = True
    assert ssim(a, b, where) == pytest.approx(expected[where].mean(), abs=2e-5)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_psnr_equals_the_mean_squared_error_of_the_counted_pixels(frames, height, width, seed):
    a, b = pair((frames, height, width, 3), seed)
    where = np.random.default_rng(seed).random((frames, height, width)) < 0.5
    where[0, 0, 0] = True
    error = mean_squared_error(a[where], b[where])
    expected = 10 * math.log10(255**2 / error) if error else math.inf
    assert psnr(a, b, where) == pytest.approx(expected, rel=1e-12)


def test_what_is_outside_does_not_count_for_psnr():
    a, b = pair((2, 8, 8, 3))
    where = np.zeros((2, 8, 8), dtype=bool)
    where[:, :4] = True
    changed = b.copy()
    changed[:, 4:] = 255 - changed[:, 4:]
    assert psnr(a, b, where) == psnr(a, changed, where)


def test_equal_videos():
    a, _ = pair((2, 12, 12, 3))
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)


def test_a_picture_smaller_than_the_window():
    a, b = pair((1, 3, 2, 3))
    assert -1 <= ssim(a, b) < 1


def test_flicker_by_hand():
    video = np.zeros((3, 2, 2, 3), dtype=np.uint8)
    video[1] = 255
    video[2, 0] = 250
    assert flicker(video) == pytest.approx((255 * 12 + 5 * 6 + 255 * 6) / 24)
    where = np.zeros((3, 2, 2), dtype=bool)
    where[1:, 0] = True
    # Only the step from frame 1 to 2 lies inside on both sides; unsigned bytes must not wrap around.
    assert flicker(video, where) == 5


@pytest.mark.parametrize("function", [psnr, ssim])
def test_refusals(function):
    a, b = pair((2, 8, 8, 3))
    with pytest.raises(ValueError, match="one shape"):
        function(a, b[:1])
    with pytest.raises(ValueError, match="empty"):
        function(a, b, np.zeros((2, 8, 8), dtype=bool))
    with pytest.raises(ValueError, match="where must be bool"):
        function(a, b, np.ones((2, 8, 8), dtype=np.uint8))


def test_flicker_refuses_a_single_frame_and_disjoint_masks():
    a, _ = pair((2, 4, 4, 3))
    with pytest.raises(ValueError, match="two frames"):
        flicker(a[:1])
    where = np.zeros((2, 4, 4), dtype=bool)
    where[0, 0, 0] = where[1, 1, 1] = True
    with pytest.raises(ValueError, match="neighbouring"):
        flicker(a, where)


def test_torchmetrics_says_the_same():
    functional = pytest.importorskip("torchmetrics.functional.image")
    a, b = pair((3, 40, 51, 3))
    x, y = (torch.from_numpy(v).permute(0, 3, 1, 2).double() for v in (a, b))
    assert psnr(a, b) == pytest.approx(functional.peak_signal_noise_ratio(x, y, data_range=255.0).item(), rel=1e-6)
    _, full = functional.structural_similarity_index_measure(
        x, y, sigma=1.5, data_range=255.0, return_full_image=True, reduction="none"
    )
    # It reflects at the border in another way, so the inner pixels count.
    inner = np.zeros((3, 40, 51), dtype=bool)
    inner[:, 6:-6, 6:-6] = True
    assert ssim(a, b, inner) == pytest.approx(full.mean(1).numpy()[inner].mean(), abs=2e-5)


@given(st.integers(1, 3), st.integers(0, 2**31), st.sampled_from(["some", "all", "none between frames"]))
def test_both_regions_of_an_edit(frames, seed, kind):
    a, b = pair((frames, 9, 13, 3), seed)
    mask = np.random.default_rng(seed).random((frames, 9, 13)) < 0.4
    mask[:, 0, 0], mask[:, 0, 1] = True, False
    if kind == "all":
        mask[:] = True
    if kind == "none between frames":
        mask[:] = False
        mask[np.arange(frames), np.arange(frames), 0] = True
    found = measure_edit(a, mask, b)
    for name, where in (("background", ~mask), ("foreground", mask)):
        if not where.any():
            assert [value for key, value in found.items() if key.startswith(name)] == [None] * 4
            assert kind == "all" and found["seam"] is None
            continue
        assert found[f"{name}_psnr"] == psnr(a, b, where)
        assert found[f"{name}_ssim"] == pytest.approx(ssim(a, b, where), abs=1e-12)
        both = where[:-1] & where[1:]
        calm = [found[f"{name}_flicker"], found[f"{name}_flicker_source"]]
        if both.any():
            expected = [np.abs(np.diff(v.astype(float), axis=0))[both].mean() for v in (b, a)]
            assert calm == pytest.approx(expected)
        else:
            assert calm == [None, None]


@given(st.integers(1, 3), st.integers(9, 40), st.integers(0, 2**31))
def test_the_seam_is_the_quality_tables(frames, side, seed):
    a, b = pair((frames, side, side + 3, 3), seed)
    mask = np.zeros(a.shape[:3], bool)
    mask[:, 3:6, 2:7] = True
    assert seam(a, mask, b) == pytest.approx(background_figures(b, a, mask)["seam"])
    assert seam(a, np.ones_like(mask), b) is None


@given(st.integers(1, 3), st.integers(0, 2**31), st.booleans())
def test_the_step_at_the_edge_by_brute_force(frames, seed, answered):
    a, b = pair((frames, 6, 7, 3), seed)
    mask = np.random.default_rng(seed).random(a.shape[:3]) < 0.4
    left = b.astype(float) - (a if answered else 0)
    steps = []
    for f, y, x in np.ndindex(mask.shape):
        for beside in ((f, y + 1, x), (f, y, x + 1)):
            if beside[1] < 6 and beside[2] < 7 and mask[f, y, x] != mask[beside]:
                steps += [*(left[f, y, x] - left[beside])]
    found = edge_step(mask, b, a if answered else None)
    assert found == (pytest.approx(np.sqrt(np.mean(np.square(steps)))) if steps else None)


def test_what_is_delivered():
    a, b = pair((2, 8, 9, 3))
    mask = np.zeros(a.shape[:3], bool)
    mask[:, 2:5, 3:6] = True
    out = np.where(mask[..., None], b, a)
    assert measure_delivered(a, mask, out) == {"delivered_psnr": math.inf, "delivered_seam": edge_step(mask, out)}
    assert measure_delivered(a, mask, b)["delivered_psnr"] == psnr(a, b, ~mask)
    assert measure_delivered(a, np.ones_like(mask), b) == {"delivered_psnr": None, "delivered_seam": None}
