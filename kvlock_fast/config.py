"""Lock and cache as the user asked for them: frozen dataclasses, checked when made."""

from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from os import PathLike
from typing import Any

from kvlock_fast.parameters import LOCK, MEMORY, SPEED, check, documented, is_whole, parameter
from kvlock_fast.presets import PLAIN, PRESETS, NeighbourOptions
from kvlock_fast.renamed import FIELDS, REPLACED, refuse_cache_steps, renamed

TIERS = ("lockstep", "resident", "host", "disk")
FORMATS = ("native", "bf16", "fp8_e4m3", "int8", "int4")

_lock, _speed, _memory = (partial(parameter, panel=panel) for panel in (LOCK, SPEED, MEMORY))


@renamed(window="variance_window", **REPLACED)
@documented
@dataclass(frozen=True)
class LockConfig(NeighbourOptions):
    """When and where to lock, and how to guide. The defaults are the preset "kvlock".

    Parameters of other methods than KV-Lock are keyword-only. `compute="foreground"` is exact for the foreground, as
    nothing it sees depends on the background's hidden states; the background's latents are then the source path's in
    every step. A tau above 0.1 belongs with background_latents "source".
    """

    alpha: float | str = _lock(
        "dynamic", "dynamic|0..1", "Share of the source's K and V in the background; 0 never locks"
    )
    omega: str = _lock("dynamic", "dynamic|constant", "Guidance scale: it follows the variance, or stays as given")
    s_star: bool = _lock(True, "", "Calibrate guidance by the projection s*; off means s* = 1")
    s_star_region: str | None = _lock(
        None, "all|foreground", "Elements that s* is computed over", unset="as compute needs"
    )
    tau: float | str = _lock(
        3.0, "auto|>0", "Variance at which locking saturates; auto takes it from the source's trajectory"
    )
    b: float = _lock(1.0, ">0", "Largest factor on the guidance scale")
    variance_window: int = _lock(10, ">=2", "Predictions that the variance looks back on (W)")
    min_predictions: int = _lock(
        3, ">=2", "Predictions before the variance decides; until then the warm-up's values hold"
    )
    reduction: str = _lock(
        "elements", "elements|mean", "Average the foreground elements' variances, or take the variance of their mean"
    )
    kappa: int = _lock(20, ">=0", "Last steps, in which alpha and omega follow the variance")
    warmup_alpha: float = _lock(1.0, "0..1", "Alpha before the last kappa steps; 0 stores nothing for them")
    alpha_floor: float = _lock(0.0, "0..1", "Least alpha while it is dynamic")
    omega_floor: float = _lock(1.0, ">=0", "Least guidance scale while it is dynamic")
    detection: str = _lock("foreground", "foreground|global", "Elements that the variance is averaged over")
    lock_interval: tuple[float, float] | None = _lock(
        None, "0-0.55", "Share of the steps that lock; the source's K and V are not run in the others", unset="all"
    )
    guidance_interval: tuple[float, float] | None = _lock(
        None, "0-0.55", "Share of the steps that are guided; the others run the prompt's branch alone", unset="all"
    )
    layers: tuple[int, ...] | None = _lock(None, "0-11,15", "Self-attention layers to lock", unset="all")
    background_latents: str = _lock(
        "source", "model|source", "Background latents: the model's, or the source's after each step"
    )
    source_path: str = _lock(
        "renoise", "renoise|invert", "Source latents: the source with noise added, or its inverted ODE"
    )
    edit_path: str | None = _lock(
        None,
        "free|coupled",
        "Latents of the edit: by its own velocity, or the source's plus a difference",
        unset="coupled; free where nothing is locked, and in a loop of your own",
    )
    source_noise: int | str | None = _lock(
        None,
        "fresh|>=1",
        "Noises of the source's path, taken in turn; fresh draws one for each step",
        unset="3 for a coupled, renoised edit; else 1",
    )
    skip_share: float | None = _lock(
        None,
        "0..<1",
        "Share of the steps to leave out at the start, rounded: the edit begins on the source's path",
        unset="0.1 for a coupled edit; else 0",
    )
    inversion_solver: str = _lock("euler", "euler|heun|midpoint|uni-inv", "Solver of the inverted ODE")
    zero_init_share: float = _lock(
        0.0, "0..1", "Share of the steps, the first ones, whose prediction is taken as 0 (CFG-Zero*)"
    )
    guidance_batching: str = _speed(
        "auto", "auto|separate|batched", "Run the branches of guidance apart or as one batch"
    )
    guidance_skip: bool = _speed(
        True, "", "Run the prompt's branch alone where the dynamic guidance scale is 1; the host waits for the scale"
    )
    compute: str = _speed(
        "full", "full|foreground", "Tokens to compute in steps with alpha = 1: all, or the foreground's"
    )
    alpha_snap: float = _speed(1.0, ">0..1", "Dynamic alpha from which on it counts as 1")
    alpha_lag: int = _speed(
        1, "1..2", "Steps back whose variance sets alpha; 2 tells sooner what the next step computes"
    )
    halo: int = _lock(0, ">=0", "Tokens around the mask, in each frame, whose latents are edited too (K and V locked)")
    seam: str = _lock("cut", "cut|blend", "Latents of the halo: the edit's, or blended with the source's by distance")

    def __post_init__(self):
        check(self)
        self._check_layers()
        self._check_intervals()
        self._check_path()
        self._check_compute()
        self._check_method()

    def _check_layers(self):
        if self.layers is None:
            return
        listed = isinstance(self.layers, (tuple, list)) and len(self.layers) > 0
        whole = listed and all(is_whole(n, 0) for n in self.layers)
        if not whole or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must be distinct whole numbers of at least 0, got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(sorted(self.layers)))

    def _check_intervals(self):
        for name in ("lock_interval", "guidance_interval"):
            value = getattr(self, name)
            if value is None:
                continue
            pair = isinstance(value, (tuple, list)) and len(value) == 2
            numbers = pair and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
            if not numbers or not 0 <= value[0] < value[1] <= 1:
                raise ValueError(f"{name} must be two shares of the steps, 0 <= start < stop <= 1, got {value!r}")
            object.__setattr__(self, name, (float(value[0]), float(value[1])))

    def _check_path(self):
        if self.coupled and self.latents_shift:
            raise ValueError(
                f"latents_shift {self.latents_shift} needs edit_path 'free': a coupled edit starts at the source"
            )
        if self.noises == 1:
            return
        if not self.coupled:
            raise ValueError(
                f"source_noise {self.source_noise!r} needs edit_path 'coupled': a free edit's latents hold one noise"
            )
        if self.source_path == "invert":
            raise ValueError(
                f"source_noise {self.source_noise!r} does not go with source_path 'invert', which draws none"
            )

    def _check_compute(self):
        if self.halo and not self.keeps_background:
            raise ValueError(f"halo {self.halo} needs background_latents 'source' or compute 'foreground'")
        if self.compute == "full":
            return
        reason = None
        if self.s_star and self.s_star_region == "all":
            reason = "s_star_region 'all': s* would need the background's predictions"
        elif self.detection == "global":
            reason = "detection 'global': the variance would need the background's predictions"
        elif not isinstance(self.alpha, str) and self.alpha < 1:
            reason = f"alpha {self.alpha}: only at 1 do foreground tokens not depend on the background's"
        if reason is not None:
            raise ValueError(f"compute 'foreground' does not go with {reason}")

    def _check_method(self) -> None:
        """Refuse what does not go with a method, once every value is right by itself."""
        if self.method != "lock":
            for name, wanted in PLAIN.items():
                if getattr(self, name) not in (wanted, None):
                    wrong = f"{name} {getattr(self, name)!r}"
                    raise ValueError(f"{wrong} does not go with the method {self.method!r}: it must be {wanted!r}")
        if self.foreground_mix and self.compute == "foreground":
            raise ValueError(
                f"foreground_mix {self.foreground_mix} does not go with compute 'foreground': its tokens see their own "
                "keys and values"
            )
        if self.background_bias and (self.compute != "foreground" or self.alpha != 1):
            raise ValueError(
                f"background_bias {self.background_bias} needs compute 'foreground' and alpha 1, where every step "
                "attends to the source's background alone"
            )
        inverts = self.source_path == "invert" or self.method == "flowedit"
        if self.source_guidance is not None and not inverts:
            raise ValueError(
                f"source_guidance {self.source_guidance} needs source_path 'invert', where the source is run by itself"
            )

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
        return self.alpha != 0.0

    @property
    def coupled(self) -> bool:
        """Whether the edit is the source's path plus a difference."""
        if self.edit_path is not None:
            return self.edit_path == "coupled"
        return self.method == "lock" and not self._changes_nothing

    @property
    def noises(self) -> int | str:
        """Number of noises that the source's path takes in turn, or "fresh"."""
        if self.source_noise is not None:
            return self.source_noise
        return 3 if self.coupled and self.source_path == "renoise" else 1

    @property
    def skipped_share(self) -> float:
        """Share of the steps, the first ones, that are left out."""
        if self.skip_share is not None:
            return self.skip_share
        return 0.1 if self.coupled else 0.0

    @property
    def stock_guidance(self) -> bool:
        """Whether guidance is plain classifier-free guidance at a constant scale."""
        return self.omega == "constant" and not self.s_star and self.zero_init_share == 0

    @property
    def stock(self) -> bool:
        """Whether nothing is changed at all: the latents are diffusers' own, bit for bit."""
        return self._changes_nothing and not self.coupled

    @property
    def _changes_nothing(self) -> bool:
        return self.stock_guidance and not self.locks and self.background_latents == "model"

    @property
    def follows_variance(self) -> bool:
        """Whether the variance decides anything."""
        return "dynamic" in (self.alpha, self.omega)

    def in_own_loop(self) -> "LockConfig":
        """The same lock for a denoising loop of one's own, whose edit is free unless it says otherwise."""
        return replace(self, edit_path="free") if self.edit_path is None else self

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "LockConfig":
        """The preset of that name, with any field changed. Raises ValueError for an unknown name or field."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: one of {', '.join(PRESETS)}")
        known = {f.name for f in fields(cls)}
        for key in changes:
            if key in FIELDS | REPLACED:
                raise ValueError(f"lock parameter {key!r} is called {(FIELDS | REPLACED)[key]!r} now")
            if key not in known:
                raise ValueError(f"unknown lock parameter {key!r}: one of {', '.join(sorted(known))}")
        return cls(**{**PRESETS[name], **changes})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for reports and manifests."""
        path = "coupled" if self.coupled else "free"
        chosen = {"s_star_region": self.projection_region, "edit_path": path, "source_noise": self.noises}
        return asdict(self) | chosen | {"skip_share": self.skipped_share}


@documented
@dataclass(frozen=True)
class CacheConfig:
    """Storage of the source's keys and values.

    The tiers: "lockstep" runs the source along with the edit and stores nothing; the others run the source first and
    keep its K and V on the device ("resident"), in host memory ("host") or in `root` ("disk", where they may be found
    too). "auto" is what serves the call best: see `kvlock-fast plan`.
    """

    tier: str = _memory(
        "auto", "auto|lockstep|resident|host|disk", "Where the source's K and V are kept", name="cache_tier"
    )
    format: str = _memory(
        "fp8_e4m3", "|".join(FORMATS), "Number format of the source's K and V; native is lossless", name="cache_format"
    )
    step_stride: int = _memory(
        1, ">=1", "Store only every Nth step, which stands for the steps after it", name="cache_stride"
    )
    steps: str = _memory("all", "all|dynamic", "Store all locked steps, or the last kappa only", name="cache_steps")
    path: str | None = _memory(
        None, "PATH", "Cache made by invert: the source is not run again", name="cache", what="a folder", manifest=False
    )
    root: str | None = _memory(
        None,
        "PATH",
        "Folder of automatic caches (default: the user's)",
        name="cache_root",
        what="a folder",
        manifest=False,
    )
    quota: int | None = _memory(
        None, "200GB", "Most bytes that automatic caches take", name="cache_quota", low=0, manifest=False
    )
    prompts_at_once: int | None = _memory(None, ">=1", "Most prompts in one batch", unset="all")

    def __post_init__(self):
        refuse_cache_steps("steps", self.steps)
        check(self)
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
