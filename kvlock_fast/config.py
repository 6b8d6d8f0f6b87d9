"""What the user asked for: frozen dataclasses, checked when made, and the presets as one table of values."""

from dataclasses import asdict, dataclass, fields
from os import PathLike
from typing import Any

from kvlock_fast.checks import choice, number, whole
from kvlock_fast.presets import PRESETS, NeighbourOptions
from kvlock_fast.renamed import FIELDS, refuse_cache_steps, renamed

Layers = tuple[int, ...] | None
TIERS = ("lockstep", "resident", "host", "disk")
FORMATS = ("native", "bf16", "fp8_e4m3", "int8", "int4")


@renamed(window="variance_window")
@dataclass(frozen=True)
class LockConfig(NeighbourOptions):
    """When and where to lock, and how to guide. The defaults are the preset "kvlock".

    alpha: "dynamic" (the schedule by variance) or a fixed number in [0, 1] for every step; 0 never locks.
    omega: the guidance scale, "dynamic" (it follows the variance) or "constant" (as given).
    s_star: calibrate guidance by the projection s*; off means s* = 1.
    s_star_region: "all" or "foreground", the elements s* is computed over; None: what `compute` needs, else "all".
    tau: the variance at which locking saturates, where 1 is about that of the normalised latents themselves; or "auto":
    what the source's own trajectory shows at each step. Above 0.1 it belongs with background_latents "source".
    b: the largest factor on the guidance scale. variance_window: W, predictions the variance looks back on.
    kappa: how many last steps are scheduled dynamically. warmup_alpha: alpha before them.
    alpha_floor, omega_floor: least alpha, least guidance scale while scheduled dynamically (0: the paper's letter).
    detection: "foreground" or "global", the elements the variance is averaged over.
    layers: which self-attention layers are locked, by index; None for all.
    background_latents: "model" (locked by K/V alone) or "source" (set to the source path's after each step).
    source_path: "renoise" (source plus the edit's own noise) or "invert" (the ODE integrated from the source up).
    inversion_solver: "euler" or "heun", for source_path="invert".
    zero_init_steps: first steps whose prediction is taken as 0 (CFG-Zero*).
    guidance_batching: "separate" (a forward per branch), "batched" (one), or "auto".
    compute: "full", or "foreground": steps in which a sample's alpha is 1 are computed for its foreground tokens only
    (exact for them, as nothing they see depends on the background's hidden states); the background's latents are then
    the source path's in every step.
    alpha_snap: from here on a dynamic alpha counts as 1. alpha_lag: 1, or 2 to have alpha follow the variance of the
    step before the last: a step's kind is then known before the step before it has ended.
    halo: tokens around the mask, within each frame, whose latents the model makes too, their K and V locked. seam: how
    their latents are taken, "cut" (as the model made them) or "blend" (mixed with the source's, less with distance).

    By keyword only, what other methods need: see `NeighbourOptions`.
    """

    alpha: float | str = "dynamic"
    omega: str = "dynamic"
    s_star: bool = True
    s_star_region: str | None = None
    tau: float | str = 1.0
    b: float = 1.0
    variance_window: int = 10
    kappa: int = 20
    warmup_alpha: float = 1.0
    alpha_floor: float = 0.0
    omega_floor: float = 1.0
    detection: str = "foreground"
    layers: Layers = None
    background_latents: str = "source"
    source_path: str = "renoise"
    inversion_solver: str = "euler"
    zero_init_steps: int = 0
    guidance_batching: str = "auto"
    compute: str = "full"
    alpha_snap: float = 1.0
    alpha_lag: int = 1
    halo: int = 0
    seam: str = "cut"

    def __post_init__(self):
        choice(self, "omega", "dynamic", "constant")
        choice(self, "s_star_region", None, "all", "foreground")
        choice(self, "detection", "foreground", "global")
        choice(self, "background_latents", "model", "source")
        choice(self, "source_path", "renoise", "invert")
        choice(self, "inversion_solver", "euler", "heun")
        choice(self, "guidance_batching", "auto", "separate", "batched")
        choice(self, "compute", "full", "foreground")
        choice(self, "seam", "cut", "blend")
        if not isinstance(self.s_star, bool):
            raise ValueError(f"s_star must be True or False, got {self.s_star!r}")
        if self.alpha != "dynamic":
            number(self, "alpha", 0, 1, or_word="dynamic")
        if self.tau != "auto":
            number(self, "tau", 0, None, open_low=True, or_word="auto")
        number(self, "b", 0, None, open_low=True)
        number(self, "warmup_alpha", 0, 1)
        number(self, "alpha_floor", 0, 1)
        number(self, "omega_floor", 0, None)
        whole(self, "variance_window", 2)
        whole(self, "kappa", 0)
        whole(self, "zero_init_steps", 0)
        number(self, "alpha_snap", 0, 1, open_low=True)
        whole(self, "alpha_lag", 1)
        whole(self, "halo", 0)
        self._check_neighbours()
        self._check_layers()
        self._check_compute()
        self._check_neighbours_together()

    def _check_layers(self):
        if self.layers is None:
            return
        listed = isinstance(self.layers, (tuple, list)) and len(self.layers) > 0
        whole = listed and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.layers)
        if not whole or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must be distinct whole numbers of at least 0, got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(sorted(self.layers)))

    def _check_compute(self):
        if self.alpha_lag > 2:
            raise ValueError(f"alpha_lag must be 1 or 2, got {self.alpha_lag}")
        if self.halo and not self.keeps_background:
            raise ValueError(f"halo {self.halo} needs background_latents 'source' or compute 'foreground'")
        if self.compute == "full":
            return
        reason = None
        if self.s_star and self.s_star_region == "all":
            reason = "s_star_region 'all': s* would need the background's predictions"
        elif self.detection == "global":
            reason = "detection 'global': the variance would need the background's predictions"
        elif self.alpha != "dynamic" and self.alpha < 1:
            reason = f"alpha {self.alpha}: only at 1 do foreground tokens not depend on the background's"
        if reason is not None:
            raise ValueError(f"compute 'foreground' does not go with {reason}")

    @property
    def keeps_background(self) -> bool:
        """Whether the background's latents are the source path's."""
        return self.background_latents == "source" or self.compute == "foreground"

    @property
    def projection_region(self) -> str:
        """The elements s* is computed over."""
        return self.s_star_region or ("foreground" if self.compute == "foreground" else "all")

    @property
    def locks(self) -> bool:
        """Whether alpha can exceed 0 in any step."""
        return self.alpha != 0.0 and self.lock_share > 0

    @property
    def stock_guidance(self) -> bool:
        """Whether guidance is plain classifier-free guidance at a constant scale."""
        return self.omega == "constant" and not self.s_star and self.zero_init_steps == 0

    @property
    def stock(self) -> bool:
        """Whether nothing is changed at all: the latents are diffusers' own, bit for bit."""
        return self.stock_guidance and not self.locks and self.background_latents == "model"

    @property
    def follows_variance(self) -> bool:
        """Whether the variance decides anything."""
        return "dynamic" in (self.alpha, self.omega)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "LockConfig":
        """The preset of that name, with any field changed. Raises ValueError for an unknown name or field."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: one of {', '.join(PRESETS)}")
        known = {f.name for f in fields(cls)}
        for key in changes:
            if key in FIELDS:
                raise ValueError(f"lock parameter {key!r} is called {FIELDS[key]!r} now")
            if key not in known:
                raise ValueError(f"unknown lock parameter {key!r}: one of {', '.join(sorted(known))}")
        return cls(**{**PRESETS[name], **changes})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for reports and manifests."""
        return asdict(self) | {"s_star_region": self.projection_region}


@dataclass(frozen=True)
class CacheConfig:
    """Where the source's keys and values come from.

    tier: "lockstep" (the source is run along with the edit, nothing stored), "resident" (a pass of the source first,
    its K and V kept on the device), "host" (kept in host memory), "disk" (kept in `root`, or found there), or "auto"
    (what serves the call best: see `kvlock-fast plan`).
    format: how they are packed: native (the model's dtype), bf16, fp8_e4m3, int8, int4.
    step_stride: of so many steps in a row one is stored, and stands for the others.
    steps: "all" locked steps are stored, or the "dynamic" ones (the last kappa) while the source is run along in the
    warm-up.
    path: the folder of a cache made by `KVLockPipeline.invert`: the source is not run. root: the folder of automatic
    caches (None: the user's cache folder). quota: the most bytes kept in it, None for no limit.
    prompts_at_once: the most prompts in one batch, None for all of them.
    """

    tier: str = "auto"
    format: str = "fp8_e4m3"
    step_stride: int = 1
    steps: str = "all"
    path: str | None = None
    root: str | None = None
    quota: int | None = None
    prompts_at_once: int | None = None

    def __post_init__(self):
        choice(self, "tier", "auto", *TIERS)
        choice(self, "format", *FORMATS)
        refuse_cache_steps("steps", self.steps)
        choice(self, "steps", "all", "dynamic")
        whole(self, "step_stride", 1)
        for name in ("path", "root"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (str, PathLike)) and str(value)):
                raise ValueError(f"{name} must be a folder, got {value!r}")
        for name, low in (("quota", 0), ("prompts_at_once", 1)):
            if getattr(self, name) is not None:
                whole(self, name, low)
        if self.path is not None and self.tier == "lockstep":
            raise ValueError(f"tier must not be lockstep for the cache {str(self.path)!r}: it would not be read")
        for name in ("format", "step_stride", "steps", "root", "quota") if self.path is not None else ():
            value = getattr(self, name)
            if value != getattr(type(self), name):
                raise ValueError(
                    f"{name} must not be given for the cache {str(self.path)!r}, which has its own: {value!r}"
                )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for reports and manifests."""
        own = ("format", "step_stride", "steps") if self.path is not None else ()
        values = {name: value for name, value in vars(self).items() if name not in own}
        return {name: str(value) if isinstance(value, PathLike) else value for name, value in values.items()}
