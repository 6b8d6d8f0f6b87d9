"""The presets as one table of values, and the values that other methods than KV-Lock need."""

from dataclasses import dataclass, fields
from typing import Any

from kvlock_fast.checks import choice, number, whole

METHODS = ("lock", "flowedit", "tokenflow", "fatezero")


@dataclass(frozen=True, kw_only=True)
class NeighbourOptions:
    """Values of `LockConfig` that come from elsewhere than KV-Lock.

    method: "lock" (the loop of this project), or another method's own, one file each in `kvlock_fast/methods/`.
    family: the only family of models that the edit is for, by name; None for any.
    skip_steps: first steps that are left out: the edit begins on the source's path, as noisy as it is there.
    source_guidance: the guidance scale at the source's inversion, and of FlowEdit's source (None: its own prompt alone
    at an inversion, and the edit's scale in FlowEdit).
    lock_share: the share of the steps, from the first on, that lock at all.
    foreground_mix: alpha's part on the foreground: its keys and values take foreground_mix * alpha of the source's.
    latents_shift: how far the foreground of the starting latents goes towards the statistics of fresh noise.
    noise_samples: fresh noises that a step of FlowEdit averages over. free_steps: its last steps, which sample by the
    edit's prompt alone.
    inject_share: the share of the steps, from the first on, in which TokenFlow takes the source's queries and keys, and
    FateZero its attention maps.
    keyframe_stride: TokenFlow's latent frames a keyframe.
    """

    method: str = "lock"
    family: str | None = None
    skip_steps: int = 0
    source_guidance: float | None = None
    lock_share: float = 1.0
    foreground_mix: float = 0.0
    latents_shift: float = 0.0
    noise_samples: int = 1
    free_steps: int = 0
    inject_share: float = 0.0
    keyframe_stride: int = 2

    @property
    def neighbour_values(self) -> dict[str, Any]:
        """Those of these values that are not off."""
        named = ((f.name, getattr(self, f.name), f.default) for f in fields(NeighbourOptions))
        return {name: value for name, value, default in named if value != default}

    def _check_neighbours(self) -> None:
        choice(self, "method", *METHODS)
        if self.family is not None and not (isinstance(self.family, str) and self.family):
            raise ValueError(f"family must be a name, got {self.family!r}")
        for name in ("skip_steps", "free_steps"):
            whole(self, name, 0)
        for name in ("noise_samples", "keyframe_stride"):
            whole(self, name, 1)
        for name in ("lock_share", "foreground_mix", "latents_shift", "inject_share"):
            number(self, name, 0, 1)
        if self.source_guidance is not None:
            number(self, "source_guidance", 0, None)

    def _check_neighbours_together(self) -> None:
        """What does not go together, once every value is right by itself."""
        if self.method != "lock":
            for name, wanted in _PLAIN.items():
                if getattr(self, name) != wanted:
                    wrong = f"{name} {getattr(self, name)!r}"
                    raise ValueError(f"{wrong} does not go with the method {self.method!r}: it must be {wanted!r}")
        if self.foreground_mix and self.compute == "foreground":
            raise ValueError(
                f"foreground_mix {self.foreground_mix} does not go with compute 'foreground': its tokens see their own "
                "keys and values"
            )
        inverts = self.source_path == "invert" or self.method == "flowedit"
        if self.source_guidance is not None and not inverts:
            raise ValueError(
                f"source_guidance {self.source_guidance} needs source_path 'invert', where the source is run by itself"
            )


_PLAIN = {"alpha": 0, "omega": "constant", "s_star": False, "zero_init_steps": 0, "compute": "full", "halo": 0}
"""What a method of its own needs of the lock."""

PAPER: dict[str, Any] = {"background_latents": "model", "tau": 0.01, "b": 2.0, "omega_floor": 0.0}
"""The paper's exact settings, where they differ from the default."""
UNLOCKED: dict[str, Any] = {**PAPER, "alpha": 0.0, "omega": "constant", "s_star": False}

NEIGHBOURS: dict[str, dict[str, Any]] = {
    # arXiv 2502.17363: in FLUX 28 steps, of which 4 are left out, guidance 1.5 at the inversion and 5.5 at the edit.
    # Queries are the foreground's only; in FLUX guidance is an input of the model, here it is classifier-free.
    "kv-edit": {
        **PAPER,
        "alpha": 1.0,
        "omega": "constant",
        "s_star": False,
        "compute": "foreground",
        "background_latents": "source",
        "source_path": "invert",
        "skip_steps": 4,
        "source_guidance": 1.5,
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
        "lock_share": 0.5,
        "foreground_mix": 0.1,
        "latents_shift": 0.25,
    },
    # The figures of FLUX: 28 steps, of which the first 4 are left out, guidance 1.5 of the source and 5.5 of the edit.
    "flowedit": {**UNLOCKED, "method": "flowedit", "skip_steps": 4, "source_guidance": 1.5},
    "tokenflow": {**UNLOCKED, "method": "tokenflow", "source_path": "invert", "inject_share": 0.5},
    "fatezero": {**UNLOCKED, "method": "fatezero", "source_path": "invert", "inject_share": 0.5},
    # Trained for the task: the model itself is shown what is kept, so nothing is locked.
    "vace": {**UNLOCKED, "family": "wan-vace"},
}
"""Presets that stand for other methods."""

PRESETS: dict[str, dict[str, Any]] = {
    "kvlock": {},
    "paper": PAPER,
    "variance-kv": {**PAPER, "omega": "constant", "s_star": False},
    "omega-only": {**PAPER, "alpha": 1.0, "s_star": False},
    "s-star-only": {**PAPER, "alpha": 1.0, "omega": "constant"},
    "fixed-alpha": {**PAPER, "alpha": 0.5},
    "global-detection": {**PAPER, "detection": "global"},
    "cfg": UNLOCKED,
    "cfg-zero-star": {**UNLOCKED, "s_star": True, "zero_init_steps": 2},
    **NEIGHBOURS,
}
"""The values that each preset changes."""
