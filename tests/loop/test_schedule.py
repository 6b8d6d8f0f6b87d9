"""The schedule against the formulas, written again in numpy fp64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlock_fast.loop.schedule import Controller, can_lock
from tests.support.locks import paper

BATCH, SHAPE = 2, (3, 2, 3, 4)


def run(lock, steps, omega0=5.0, seed=0, source=None):
    """alpha, omega and variance of every step of a run over random predictions, with those and the region."""
    random = np.random.default_rng(seed)
    region = random.random((1, *SHAPE[1:])) < 0.4
    region.flat[0] = True
    predictions = random.normal(size=(steps, BATCH, *SHAPE)).astype(np.float32)
    predictions[:, 1] *= 0.05
    controller = Controller(lock, steps, BATCH, torch.from_numpy(region))
    rows = []
    for k in range(steps):
        alpha, omega = controller.alpha(k), controller.omega(k, omega0)
        theirs = None if source is None else torch.from_numpy(source[k])
        variance = controller.observe(torch.from_numpy(predictions[k]), theirs)
        assert can_lock(lock, steps, k) or (alpha == 0).all()
        rows.append((alpha.numpy(), omega.numpy(), variance.numpy()))
    return rows, predictions.astype(np.float64), region


def expected_variance(predictions, k, window, region, reduction="elements"):
    """var_k, or None while there are fewer than two predictions."""
    past = predictions[max(0, k - window + 1) : k + 1]
    if len(past) < 2:
        return None
    if reduction == "mean":
        inside = np.broadcast_to(region[0], past.shape[2:])
        return np.array([past[:, b][:, inside].mean(1).var(ddof=1) for b in range(past.shape[1])])
    each = past.var(axis=0, ddof=1)
    inside = np.broadcast_to(region[:, None], each.shape)
    return np.array([each[i][inside[i]].mean() for i in range(each.shape[0])])


@given(
    steps=st.integers(1, 12),
    kappa=st.integers(0, 15),
    window=st.integers(2, 15),
    tau=st.floats(0.01, 3),
    b=st.floats(0.1, 3),
    alpha_floor=st.sampled_from([0.0, 0.3]),
    omega_floor=st.sampled_from([0.0, 1.0]),
    warmup=st.sampled_from([0.0, 0.5, 1.0]),
    least=st.integers(2, 5),
    reduction=st.sampled_from(["elements", "mean"]),
)
def test_schedule_follows_the_formulas(
    steps, kappa, window, tau, b, alpha_floor, omega_floor, warmup, least, reduction
):
    lock = paper(
        kappa=kappa,
        variance_window=window,
        tau=tau,
        b=b,
        alpha_floor=alpha_floor,
        omega_floor=omega_floor,
        warmup_alpha=warmup,
        min_predictions=least,
        reduction=reduction,
    )
    rows, predictions, region = run(lock, steps)
    for k, (alpha, omega, variance) in enumerate(rows):
        now = expected_variance(predictions, k, window, region, reduction)
        before = expected_variance(predictions, k - 1, window, region, reduction) if k else None
        if now is None:
            assert np.isnan(variance).all()
        else:
            np.testing.assert_allclose(variance, now, rtol=1e-5, atol=1e-9)
        if k < steps - kappa or before is None or k < min(least, max(2, min(window, steps))):
            np.testing.assert_array_equal(alpha, np.float32(warmup))
            np.testing.assert_array_equal(omega, np.float32(5.0))
        else:
            np.testing.assert_allclose(alpha, np.clip(before / tau, alpha_floor, 1), rtol=1e-4)
            np.testing.assert_allclose(omega, np.maximum(5 * np.clip(before / tau, 0, b), omega_floor), rtol=1e-4)


def test_global_detection_averages_over_everything():
    rows, predictions, region = run(paper(detection="global"), 4)
    everything = np.ones_like(region)
    np.testing.assert_allclose(rows[3][2], expected_variance(predictions, 3, 10, everything), rtol=1e-5)
    assert not np.allclose(rows[3][2], expected_variance(predictions, 3, 10, region), rtol=1e-4)


def test_tau_auto_is_the_sources_own_variance():
    source = np.random.default_rng(9).normal(size=(6, 1, *SHAPE)).astype(np.float32) * 0.7
    lock = paper(tau="auto", kappa=6, variance_window=3)
    rows, predictions, region = run(lock, 6, source=source)
    for k in range(2, 6):
        mine = expected_variance(predictions, k - 1, 3, region)
        theirs = expected_variance(source.astype(np.float64), k - 1, 3, region)
        np.testing.assert_allclose(rows[k][0], np.clip(mine / theirs, 0, 1), rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_fixed_alpha_holds_in_every_step(alpha):
    rows, *_ = run(paper(alpha=alpha, warmup_alpha=0.2), 6)
    assert all((row[0] == np.float32(alpha)).all() for row in rows)


def test_constant_omega_ignores_the_variance():
    rows, *_ = run(paper(omega="constant", omega_floor=9.0), 6)
    assert all((row[1] == np.float32(5.0)).all() for row in rows)
