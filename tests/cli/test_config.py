"""Configurations: what is refused, and what the presets mean."""

import pytest

from kvlock_fast.config import PRESETS, CacheConfig, LockConfig
from tests.support import locks

BAD = [
    ("tau", 0), ("tau", -1.0), ("tau", float("nan")), ("tau", float("inf")), ("tau", "often"), ("tau", None),
    ("b", 0.0), ("b", -2), ("b", "2"), ("variance_window", 1), ("variance_window", 2.5), ("variance_window", True),
    ("kappa", -1), ("kappa", "x"),
    ("alpha", 1.01), ("alpha", -0.1), ("alpha", "always"), ("alpha", True), ("warmup_alpha", 2), ("alpha_floor", -1),
    ("omega_floor", -1), ("omega", "high"), ("detection", "local"), ("background_latents", "none"),
    ("source_path", "ddim"), ("inversion_solver", "rk4"), ("guidance_batching", "both"), ("s_star", "yes"),
    ("s_star_region", "mask"), ("layers", ()), ("layers", (1, 1)), ("layers", (-1,)), ("layers", (0.5,)),
    ("zero_init_share", -1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n}={v}" for n, v in BAD])
def test_bad_values_are_named_and_quoted(name, value):
    with pytest.raises(ValueError) as caught:
        LockConfig.preset("paper", **{name: value})
    assert str(caught.value).startswith(name) and repr(value) in str(caught.value)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown preset 'papr': one of kvlock, paper"):
        LockConfig.preset("papr")
    with pytest.raises(ValueError, match="unknown lock parameter 'kapa'"):
        LockConfig.preset("paper", kapa=3)
    with pytest.raises(ValueError, match="tier must be one of auto, lockstep, resident, host, disk, got 'moon'"):
        CacheConfig(tier="moon")


def test_kappa_and_window_may_exceed_the_steps():
    assert LockConfig.preset("paper", kappa=1000, variance_window=1000).kappa == 1000


def test_presets_are_what_their_names_say():
    letter, paper = LockConfig.preset("paper"), locks.paper()
    assert (letter.reduction, letter.warmup_alpha, letter.min_predictions) == ("mean", 0.0, 2)
    assert (paper.tau, paper.b, paper.variance_window, paper.kappa) == (0.01, 2.0, 10, 20)
    changes = {name: {k for k, v in LockConfig.preset(name).as_dict().items() if v != paper.as_dict()[k]}
               for name in PRESETS}  # fmt: skip
    assert changes["variance-kv"] == {"omega", "s_star"}
    assert changes["omega-only"] == {"alpha", "s_star"} and LockConfig.preset("omega-only").alpha == 1.0
    assert changes["s-star-only"] == {"alpha", "omega"} and LockConfig.preset("s-star-only").alpha == 1.0
    assert changes["s-star-omega"] == {"alpha"} and not LockConfig.preset("s-star-omega").locks
    assert changes["fixed-alpha"] == {"alpha"} and LockConfig.preset("fixed-alpha").alpha == 0.5
    assert changes["global-detection"] == {"detection"}
    assert not LockConfig.preset("cfg").locks and LockConfig.preset("cfg").stock_guidance
    zero = LockConfig.preset("cfg-zero-star")
    assert not zero.locks and zero.s_star and zero.zero_init_share == 0.04


def test_the_default_is_the_preset_kvlock():
    assert LockConfig() == LockConfig.preset("kvlock")
    assert LockConfig(kappa=7) == LockConfig.preset("kvlock", kappa=7)


def test_a_preset_can_be_changed():
    assert LockConfig.preset("kvlock", tau="auto", layers=[3, 1]).layers == (1, 3)
