"""The presets as one table of values, and the values that other methods than KV-Lock need."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from kvlock_fast.parameters import OTHERS, documented, parameter

_other = partial(parameter, panel=OTHERS)
METHODS = ("lock", "flowedit", "tokenflow", "fatezero", "apg", "rfsolver", "uniedit")


@documented
@dataclass(frozen=True, kw_only=True)
class NeighbourOptions:
    """Values of `LockConfig` that come from elsewhere than KV-Lock. The methods are in `kvlock_fast/methods/`."""

    method: str = _other("lock", "|".join(METHODS), "KV-Lock, or another method")
    family: str | None = _other(None, "TEXT", "Only family of models that the edit is for", what="a name", unset="any")
    source_guidance: float | None = _other(
        None, ">=0", "Guidance scale of the source's own runs", unset="none to invert; FlowEdit: --guidance"
    )
    foreground_mix: float = _other(0.0, "0..1", "Part of alpha that the foreground's K and V take")
    latents_shift: float = _other(0.0, "0..1", "How far the starting foreground moves to the statistics of noise")
    background_bias: float = _other(0.0, ">=0", "KV-Edit: added to the attention logits of the background's keys")
    noise_samples: int = _other(1, ">=1", "FlowEdit: noises that a step averages over")
    free_share: float = _other(
        0.0, "0..1", "FlowEdit: share of the steps, the last ones, that sample by the prompt alone"
    )
    inject_share: float = _other(0.0, "0..1", "TokenFlow, FateZero, RF-Solver: share of the steps that inject")
    edit_strength: float = _other(5.0, ">=0", "UniEdit-Flow: weight of the prompts' difference, in place of guidance")
    apg_momentum: float = _other(-0.5, "-1..1", "APG: part of the earlier steps' guidance that is added")
    apg_parallel: float = _other(0.0, "0..1", "APG: part kept of the guidance along the prediction")
    apg_norm: float = _other(0.06, ">0", "APG: largest root mean square of the guidance, in latents")
    keyframe_stride: int = _other(2, ">=1", "TokenFlow: latent frames per keyframe")

    @property
    def neighbour_values(self) -> dict[str, Any]:
        """Values that differ from their default."""
        named = ((f.name, getattr(self, f.name), f.default) for f in fields(NeighbourOptions))
        return {name: value for name, value, default in named if value != default}


PLAIN = {
    "alpha": 0,
    "omega": "constant",
    "s_star": False,
    "zero_init_share": 0.0,
    "compute": "full",
    "halo": 0,
    "edit_path": "free",
    "guidance_interval": None,
}
"""Values of the lock that a method other than KV-Lock needs."""

PAPER: dict[str, Any] = {
    "background_latents": "model",
    "edit_path": "free",
    "tau": 0.01,
    "b": 2.0,
    "omega_floor": 0.0,
    "min_predictions": 2,
}
"""The paper's settings, where they differ from the default, in a first reading: what its ablations keep."""
TO_THE_LETTER: dict[str, Any] = {**PAPER, "reduction": "mean", "warmup_alpha": 0.0}
"""Preset `paper`, by two public notes: one mean of the foreground a step, nothing mixed before the last steps."""
UNLOCKED: dict[str, Any] = {**PAPER, "alpha": 0.0, "omega": "constant", "s_star": False}

NEIGHBOURS: dict[str, dict[str, Any]] = {
    # arXiv 2502.17363: in FLUX 28 steps, of which 4 are left out, guidance 1.5 at the inversion and 5.5 at the edit.
    # Queries are the foreground's only, and its public code adds 1 to the logits of the background's keys. In FLUX
    # guidance is an input of the model; in a model with two branches it is classifier-free.
    "kv-edit": {
        **PAPER,
        "alpha": 1.0,
        "omega": "constant",
        "s_star": False,
        "compute": "foreground",
        "background_latents": "source",
        "source_path": "invert",
        "skip_share": 0.143,
        "background_bias": 1.0,
        "source_guidance": 1.5,
    },
    # Without inversion (their inversion-free variant): one noise, and the edit is a difference to the source's path.
    "kv-edit-inversion-free": {
        **PAPER,
        "alpha": 1.0,
        "omega": "constant",
        "s_star": False,
        "compute": "foreground",
        "background_latents": "source",
        "edit_path": "coupled",
        "source_noise": 1,
        "skip_share": 0.143,
        "background_bias": 1.0,
    },
    # arXiv 2512.22118: KV-mix (r = 0.9) in the first steps, the background's keys and values the source's; and the
    # inverted noise shifted on the foreground. How many steps is not in what is public: half of them is our choice.
    # Its mask comes from cross-attention; here it is the user's.
    "proedit": {
        **PAPER,
        "alpha": 1.0,
        "omega": "constant",
        "s_star": False,
        "source_path": "invert",
        "lock_interval": (0.0, 0.5),
        "foreground_mix": 0.1,
        "latents_shift": 0.25,
    },
    # The figures of FLUX: 28 steps, of which the first 4 are left out, guidance 1.5 of the source and 5.5 of the edit.
    "flowedit": {**UNLOCKED, "method": "flowedit", "skip_share": 0.143, "source_guidance": 1.5},
    # FLUX: 15 steps, of which the first 6 are left out (their alpha is 0.6), and omega is 5.
    "uniedit-flow": {
        **UNLOCKED,
        "method": "uniedit",
        "source_path": "invert",
        "inversion_solver": "uni-inv",
        "skip_share": 0.4,
    },
    # FLUX: 25 steps. In how many of them values are injected is left to the user: a fifth is our choice.
    "rf-solver": {
        **UNLOCKED,
        "method": "rfsolver",
        "source_path": "invert",
        "inversion_solver": "midpoint",
        "inject_share": 0.2,
    },
    "tokenflow": {**UNLOCKED, "method": "tokenflow", "source_path": "invert", "inject_share": 0.5},
    "fatezero": {**UNLOCKED, "method": "fatezero", "source_path": "invert", "inject_share": 0.5},
    # Trained for the task: the model itself is shown what is kept, so nothing is locked.
    "vace": {**UNLOCKED, "family": "wan-vace"},
}
"""Presets that stand for other methods."""

PRESETS: dict[str, dict[str, Any]] = {
    "kvlock": {},
    "paper": TO_THE_LETTER,
    "free-path": {"edit_path": "free"},
    "variance-kv": {**PAPER, "omega": "constant", "s_star": False},
    "omega-only": {**PAPER, "alpha": 1.0, "s_star": False},
    "s-star-only": {**PAPER, "alpha": 1.0, "omega": "constant"},
    "s-star-omega": {**PAPER, "alpha": 0.0},
    "fixed-alpha": {**PAPER, "alpha": 0.5},
    "global-detection": {**PAPER, "detection": "global"},
    "cfg": UNLOCKED,
    "cfg-zero-star": {**UNLOCKED, "s_star": True, "zero_init_share": 0.04},
    "apg": {**UNLOCKED, "method": "apg"},
    **NEIGHBOURS,
}
"""The values that each preset changes."""
