"""The settings of one edit: what a run computes, how fast, and what is done with its frames.

The command line, the manifest of a batch and its jobs take them from here.
"""

from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kvlock_fast.config import FORMATS, PRESETS, TIERS, CacheConfig, LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.parameters import (
    EDIT,
    MASK,
    MEMORY,
    MODEL,
    OUTPUT,
    SPEED,
    again,
    check,
    declared,
    described,
    documented,
    parameter,
)
from kvlock_fast.renamed import refuse_cache_steps

MOST_STEPS = 10_000
MOST_TEXT = 20_000
FEATHER = 1
"""Pixels inside the mask's edge over which a composite fades, where nothing else was asked for.

By 42 edits of the demo's world (preset coupled, paste screened): with 0, 1, 2 the step at the edge is 14.4, 9.4, 8.4
levels, the whole frame is 26.3, 26.3, 25.7 dB from the true answer, and 26, 26, 25 edits are right.
"""
_NOT_ONE = "{name} {value!r} is not one of {words}"
_NUMBER = "{name} must be a number of at least {low}, got {value!r}"
_LEAST = "{name} must be at least {low}, got {value!r}"

_edit, _mask, _model, _memory, _speed, _output = (
    partial(parameter, panel=panel) for panel in (EDIT, MASK, MODEL, MEMORY, SPEED, OUTPUT)
)
_text = partial(described, values="TEXT", panel=EDIT)


@dataclass(frozen=True)
class Checked:
    """Settings whose values are checked when they are made. Raises InputError."""

    def __post_init__(self):
        check(self, InputError)


@documented
@dataclass(frozen=True)
class MaskShape(Checked):
    """Steps by which a mask becomes the part of the video that may change, in this order."""

    threshold: float = _mask(
        0.5,
        "0..<1",
        "Share of full brightness above which a pixel is marked",
        name="mask_threshold",
        sentence="the mask threshold must be at least 0 and below 1, not {value}",
    )
    invert: bool = _mask(False, "", "Keep what is marked and change the rest", name="mask_invert")
    grow: int = _mask(0, "-1024..1024 pixels", "How far to grow the mask; negative shrinks it", name="mask_grow")
    feather: int = _mask(0, "0..256 pixels", "Width of a soft edge that may change too", name="mask_feather")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, named as the command line names them."""
        return {f"mask_{name}": value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Inputs:
    """The clip: paths, relative to a manifest or not, or URLs."""

    source: str = field(metadata=_text("The video: a file, a folder of images, or an image", low=1))
    mask: str = field(
        metadata=_text(
            "Where it may change: video, image, folder, .npy, .npz, or box:x,y,w,h, which moves as "
            "'box:0=x,y,w,h;24=x,y,w,h' (at frame 0, at frame 24, straight in between)",
            low=1,
        )
    )


@dataclass(frozen=True)
class Preset:
    """The preset of a lock, which gives all its values that are not given one by one."""

    preset: str = _edit(
        "kvlock", "NAME", f"Values for all parameters of the lock: {', '.join(PRESETS)}", words=tuple(PRESETS)
    )


@documented
@dataclass(frozen=True)
class RunConfig(Checked):
    """Settings that decide what the model computes, beside the clip and the prompts."""

    source_prompt: str = field(metadata=_text("What the source shows in the mask, and around it"))
    _: KW_ONLY
    model: str = _edit("demo", "TEXT", "A folder, a hub id, or demo (the bundled model)", low=1)
    dtype: str = _model(
        "auto",
        "bf16|fp16|fp32|auto",
        "Precision of the weights; auto is bf16 on a GPU",
        manifest=False,
        sentence="dtype {value!r} is not one of bf16, fp16, fp32, auto",
    )
    negative_prompt: str | None = _edit(None, "TEXT", "What guidance leads away from")
    steps: int = _edit(50, f"1..{MOST_STEPS}", "Denoising steps", said="num_inference_steps")
    guidance: float = _edit(
        5.0, ">=0", "Guidance scale; at most 1 turns guidance off", said="guidance_scale", sentence=_NUMBER
    )
    guidance_2: float | None = _model(
        None,
        ">=0",
        "Guidance scale of a second transformer",
        said="guidance_scale_2",
        sentence=_NUMBER,
        unset="--guidance",
    )
    seed: int | None = _edit(0, ">=0", "Seed of the noise", high=2**63 - 1)
    size: tuple[int, int] | None = _edit(
        None, "HEIGHTxWIDTH", "Size to work at", unset="the source's; with demo a small one"
    )
    max_frames: int | None = _model(None, ">=1", "Use only the first N frames of the source", unset="all")
    frames_policy: str = _model(
        "pad", "pad|trim|error", "What to do where the model cannot take the number of frames", sentence=_NOT_ONE
    )
    lock: LockConfig = field(default_factory=LockConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    mask_shape: MaskShape = field(default_factory=MaskShape)
    clip_frames: int | None = _memory(
        None, ">=2", "Most frames at once; longer clips are cut into overlapping parts", unset="all", sentence=_LEAST
    )
    clip_overlap: int | None = _memory(
        None, ">=1", "Frames that neighbouring parts share and blend", unset="a quarter", sentence=_LEAST
    )


@documented
@dataclass(frozen=True, kw_only=True)
class Speed(Checked):
    """Settings that change how fast an edit is, and not what is asked for."""

    graph: str = _speed("off", "off|auto|on", "Capture the steps in CUDA graphs; auto does where it can")
    compile: str = _speed("off", "off|regional", "torch.compile of the transformer's blocks")
    processors: str = _speed(
        "auto", "auto|generic|fast", "Attention of locked layers; fast is one kernel, for a GPU and some models"
    )


GRAPH, COMPILE, PROCESSORS = (one.words for one in declared(Speed))


@documented
@dataclass(frozen=True, kw_only=True)
class Finish(Checked):
    """Treatment of the frames that the model has made; jobs of one pass may differ in it."""

    composite: bool = _output(
        True, "", "Deliver the source's own pixels outside the mask, at its size; off delivers the model's frames"
    )
    feather: int | None = _output(
        None,
        "0..2 pixels",
        "How far inside the mask's edge the composite fades",
        unset=f"{FEATHER}, or 0 with --mask-feather",
    )
    paste: str = _output(
        "screened",
        "hard|screened|harmonic",
        "Colours inside the mask: kept, or shifted to meet the source's at the edge, nearby or in all of the mask",
    )
    audio: bool = _output(True, "", "Keep the source's sound")


[(PASTE, PASTES)] = ((one.default, one.words) for one in declared(Finish) if one.attribute == "paste")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Device on which an edit is computed."""

    device: str = _model("auto", "TEXT", "cuda, cpu, mps or xpu; auto is cuda where there is a GPU")


@documented
@dataclass(frozen=True)
class EditSettings(Place, Finish, Speed, RunConfig):
    """All settings of editing a clip, one edit per prompt. A seed of None is the cache's, where it knows one."""

    prompts: list[str] = field(
        metadata=_text("What the edit shows in the mask, and around it; several make several edits", name="prompt")
    )

    @property
    def composite_feather(self) -> int:
        """Pixels inside the mask's edge over which a composite fades."""
        if self.feather is not None:
            return self.feather
        return 0 if self.mask_shape.feather else FEATHER


JOB = (Inputs, RunConfig, Finish, MaskShape, CacheConfig, Preset, LockConfig)
"""Parameters that a line of a manifest may give."""


@dataclass(frozen=True, kw_only=True)
class EditFiles(Inputs):
    """The files of one edit."""

    output: Path = field(
        metadata=described(
            "The edited video: .mp4, .m4v, .mov, .webm, .gif, .mkv (lossless), or a folder, which has no suffix (PNG, "
            "lossless); NAME-1, NAME-2, ... for several prompts",
            "PATH",
            EDIT,
        )
    )
    mask_preview: Path | None = parameter(
        None, "PATH", "Write a video of the mask's tokens, before the first step", MASK
    )
    trace: Path | None = parameter(None, "PATH", "Write what happened at each step, as JSON", OUTPUT)
    report: Path | None = parameter(None, "PATH", "Write an HTML page about the edit", OUTPUT)
    sheet: Path | None = parameter(None, "PATH", "Write one picture of the edit, PNG", OUTPUT)
    json: str | None = parameter(None, "PATH", "Write the figures as JSON; - for stdout", OUTPUT)


JOBS, MACHINES = "Jobs", "Machines"


@documented
@dataclass(frozen=True)
class BatchSettings(Place):
    """Settings of a batch.

    Args:
        manifest: The jobs.
        flags: Fields for jobs that lack them, above those of the file `defaults`.
        speed: How every edit is run.
        command: Command line, for the pages.
        quiet: Whether progress is not shown.
    """

    manifest: Path
    output: Path = field(metadata=described("The folder for results, ledger and index; files in it stay", "PATH", JOBS))
    defaults: Path | None = parameter(None, "PATH", "A .yaml or .toml file of fields for jobs that lack them", JOBS)
    flags: dict[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = parameter(
        (), "NAME=VALUE", "Any field for jobs that lack it; can be given several times", JOBS, name="set"
    )
    results: str | None = parameter(
        None, "TEXT", "Write videos elsewhere: a folder or URL, like s3://bucket/run", OUTPUT, unset="--output"
    )
    dtype: str = again(RunConfig, "dtype")
    speed: Speed = field(default_factory=Speed)
    edits_per_pass: int = parameter(8, "1..1000", "Most jobs that share a pass of their source", JOBS)
    reports: bool = parameter(True, "", "Write a page about each job", OUTPUT)
    retry_failed: bool = parameter(False, "", "Also run what failed before", JOBS)
    overwrite: bool = parameter(False, "", "Replace files that no batch in this folder made", JOBS)
    engine: str = parameter("local", "local|ray", "What runs the jobs", MACHINES)
    address: str | None = parameter(
        None, "TEXT", "Ray cluster: auto, or ray://HOST:PORT", MACHINES, unset="one is started"
    )
    workers: int | None = parameter(None, ">=1", "Number of Ray actors", MACHINES, unset="as many as fit")
    cpus_per_worker: int | None = parameter(None, ">=1", "CPU cores of an actor, without a GPU", MACHINES)
    metrics_file: Path | None = parameter(None, "PATH", "Keep figures there in the text format of Prometheus", OUTPUT)
    json_file: str | None = again(EditFiles, "json")
    command: str = "kvlock-fast batch"
    quiet: bool = False


@documented
@dataclass(frozen=True)
class PlanSettings(Checked):
    """Settings of a plan: the edit and the machine."""

    model: str = field(metadata=_text("A folder, a hub id, or demo (the bundled model)"))
    frames: int | None = _edit(None, "N", "Frames of the video", unset="the model's usual")
    size: tuple[int, int] | None = again(RunConfig, "size", help="Size of the video", unset="the model's usual")
    mask_share: float | None = _edit(
        None,
        ">0..1",
        "Share of the video that may change",
        unset="0.2",
        said="--mask-share",
        sentence="{name} must be more than 0 and at most 1, got {value!r}",
    )
    mask: str | None = _edit(None, "TEXT", "A mask's file or folder, to count that share")
    steps: int = again(RunConfig, "steps", said="--steps")
    guidance: float = again(RunConfig, "guidance", said="--guidance")
    prompts: int = _edit(1, "1..10000", "Edits of one source, made together", said="--prompts")
    edits: int = _edit(1, "1..10000", "Edits made one after another with the same cache", said="--edits")
    lock: LockConfig = field(default_factory=LockConfig)
    step_stride: int = again(CacheConfig, "step_stride", said="--step-stride", high=MOST_STEPS)
    cache_steps: str = again(CacheConfig, "steps", sentence="--cache-steps must be all or dynamic, got {value!r}")
    dtype: str = again(RunConfig, "dtype")
    formats: tuple[str, ...] = _memory(
        (), "|".join(FORMATS), "Plan only this format; can be given several times", name="format", unset="all"
    )
    gpu_memory: int | None = _memory(None, "24GB", "GPU memory to plan for", unset="this machine's")
    host_memory: int | None = _memory(None, "64GB", "Host memory to plan for", unset="this machine's")
    disk: int | None = _memory(None, "900GB", "Free disk space to plan for", unset="this machine's")

    def __post_init__(self):
        refuse_cache_steps("--cache-steps", self.cache_steps)
        super().__post_init__()


RUN = "What to run"


@documented
@dataclass(frozen=True, kw_only=True)
class ProfileSettings(Place, Preset):
    """Request for a profile. A config is run with random weights, a model with its own."""

    output: Path = parameter(Path("out/profile"), "PATH", "The folder for the results; files in it stay", RUN)
    config: str | None = parameter(None, "TEXT", "A known size like wan-1.3b, or a config file: random weights", RUN)
    model: str | None = parameter(None, "TEXT", "A folder, a hub id, or demo: its own weights", RUN)
    frames: int | None = again(PlanSettings, "frames", panel=RUN)
    size: tuple[int, int] | None = again(PlanSettings, "size", panel=RUN)
    steps: int = parameter(4, f"1..{MOST_STEPS}", "Denoising steps", RUN, said="--steps")
    layers: int | None = parameter(None, "N", "Layers to run, from the first on", RUN, unset="all")
    tier: str = parameter("lockstep", "|".join(TIERS), "Where the source's K and V are kept", MEMORY, name="cache_tier")
    format: str = again(CacheConfig, "format")
    dtype: str = again(RunConfig, "dtype")
    force: bool = parameter(False, "", "Run even what looks too large", RUN)
