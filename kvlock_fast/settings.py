"""The settings of one edit: what a run computes, how fast, and what is done with its frames.

The command line, the manifest of a batch and its jobs take them from here.
"""

from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kvlock_fast.config import PRESETS, CacheConfig, LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.parameters import EDIT, MASK, MEMORY, MODEL, OUTPUT, SPEED, check, described, documented, parameter

MOST_STEPS = 10_000
MOST_TEXT = 20_000
FEATHER = 8
"""Pixels over which a composite mixes, where nothing else was asked for."""
GRAPH = ("off", "auto", "on")
COMPILE = ("off", "regional")
PROCESSORS = ("auto", "generic", "fast")
FRAMES_POLICIES = ("pad", "trim", "error")
_NUMBER = "must be a number of at least 0, got {value!r}"
DTYPES = ("fp32", "bf16", "fp16", "auto")

_edit, _mask, _model, _memory, _speed, _output = (
    partial(parameter, panel=panel) for panel in (EDIT, MASK, MODEL, MEMORY, SPEED, OUTPUT)
)
_text = partial(described, panel=EDIT, low=1, high=MOST_TEXT)


@dataclass(frozen=True)
class Checked:
    """Settings whose values are checked when they are made. Raises InputError."""

    def __post_init__(self):
        check(self, InputError)


@documented
@dataclass(frozen=True)
class MaskShape(Checked):
    """How a mask becomes the part of the video that may change; its steps apply in this order."""

    threshold: float = _mask(
        0.5,
        "Brightness, as a share of the full range, above which a pixel is marked",
        name="mask_threshold",
        low=0,
        below=1,
        sentence="the mask threshold must be at least 0 and below 1, not {value}",
    )
    invert: bool = _mask(False, "Keep what is marked and change the rest", name="mask_invert", said="mask_invert")
    grow: int = _mask(
        0,
        "How far to grow the mask; negative shrinks it",
        name="mask_grow",
        said="mask_grow",
        low=-1024,
        high=1024,
        unit="pixels",
    )
    feather: int = _mask(
        0,
        "Width of a soft edge that may change too",
        name="mask_feather",
        said="mask_feather",
        low=0,
        high=256,
        unit="pixels",
    )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, named as the command line names them."""
        return {f"mask_{name}": value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Inputs:
    """The clip: paths, relative to a manifest or not, or URLs."""

    source: str = field(metadata=_text("The video: a file, a folder of images, or an image"))
    mask: str = field(
        metadata=_text(
            "Where it may change: video, image, folder, .npy, .npz, or box:x,y,w,h, which moves as "
            "'box:0=x,y,w,h;24=x,y,w,h' (at frame 0, at frame 24, straight in between)"
        )
    )


@dataclass(frozen=True)
class Preset:
    """The preset of a lock, which gives all its values that are not given one by one."""

    preset: str = _edit(
        "kvlock", f"Values for all parameters of the lock: {', '.join(PRESETS)}", choices=tuple(PRESETS), shown="NAME"
    )


@documented
@dataclass(frozen=True)
class RunConfig(Checked):
    """Everything that decides what the model computes, but the clip and the prompts."""

    source_prompt: str = field(metadata=described("What the source shows", EDIT, high=MOST_TEXT))
    _: KW_ONLY
    model: str = _edit("demo", "A folder, a hub id, or demo (the bundled model)", low=1, high=MOST_TEXT)
    dtype: str = _model(
        "auto",
        "Precision of the weights; auto is bf16 on a GPU, else fp32",
        choices=DTYPES,
        manifest=False,
        sentence=f"dtype {{value!r}} is not one of {', '.join(DTYPES)}",
    )
    negative_prompt: str | None = _edit(None, "What guidance leads away from", high=MOST_TEXT)
    steps: int = _edit(
        50,
        "Denoising steps",
        low=1,
        high=MOST_STEPS,
        sentence=f"num_inference_steps must be a whole number from 1 to {MOST_STEPS}, got {{value!r}}",
    )
    guidance: float = _edit(
        5.0, "Guidance scale (omega0); at most 1 turns guidance off", low=0, sentence=f"guidance_scale {_NUMBER}"
    )
    guidance_2: float | None = _model(
        None,
        "Guidance scale of a second, low-noise transformer",
        low=0,
        unset="--guidance",
        sentence=f"guidance_scale_2 {_NUMBER}",
    )
    seed: int | None = _edit(0, "Seed of the noise", low=0, high=2**63 - 1)
    size: tuple[int, int] | None = _edit(
        None, "Size to work at", shown="HEIGHTxWIDTH", unset="the source's; with demo a small one"
    )
    max_frames: int | None = _model(None, "Use only the first N frames of the source", low=1, unset="all")
    frames_policy: str = _model(
        "pad",
        "What to do with a frame count the model cannot take; pad repeats the last frame, and cuts it off again",
        choices=FRAMES_POLICIES,
        sentence="frames_policy {value!r} is not one of 'pad', 'trim', 'error'",
    )
    lock: LockConfig = field(default_factory=LockConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    mask_shape: MaskShape = field(default_factory=MaskShape)
    clip_frames: int | None = _memory(
        None,
        "Most frames at once; a longer clip is cut into overlapping stretches",
        low=2,
        unset="all",
        sentence="clip_frames must be at least 2, got {value!r}",
    )
    clip_overlap: int | None = _memory(
        None,
        "Frames that neighbouring stretches share and blend",
        low=1,
        unset="a quarter",
        sentence="clip_overlap must be at least 1, got {value!r}",
    )


@documented
@dataclass(frozen=True, kw_only=True)
class Speed(Checked):
    """What changes how fast an edit is, and not what is asked for."""

    graph: str = _speed(
        "off", "Capture the steps in CUDA graphs; auto does where it can", choices=GRAPH, manifest=False
    )
    compile: str = _speed("off", "torch.compile of the transformer's blocks", choices=COMPILE, manifest=False)
    processors: str = _speed(
        "auto",
        "Locked attention; fast is one kernel, which auto takes on a GPU where the model has it",
        choices=PROCESSORS,
        manifest=False,
    )


@documented
@dataclass(frozen=True, kw_only=True)
class Finish(Checked):
    """What is done with an edit's frames once the model has made them, so that jobs of one pass may differ in it."""

    composite: bool = _output(False, "Paste the source's background back, at its size")
    feather: int | None = _output(
        None,
        "How far outside the mask --composite mixes",
        low=0,
        high=256,
        unit="pixels",
        unset="--mask-feather, or else 8",
    )
    audio: bool = _output(True, "Keep the source's sound")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an edit is computed."""

    device: str = _model("auto", "cuda, cpu, mps or xpu; auto is cuda where there is a GPU", manifest=False)


@documented
@dataclass(frozen=True)
class EditSettings(Place, Finish, Speed, RunConfig):
    """How to edit a clip: one edit for each prompt. A seed of None is that of the cache, where it knows one."""

    prompts: list[str] = field(
        metadata=_text("What the edit shall show; give it again for another edit of the same source", name="prompt")
    )

    @property
    def composite_feather(self) -> int:
        """Pixels outside the mask over which a composite mixes."""
        if self.feather is not None:
            return self.feather
        return self.mask_shape.feather or FEATHER


@dataclass(frozen=True, kw_only=True)
class EditFiles(Inputs):
    """The files of one edit."""

    output: Path = field(
        metadata=described(
            "The edit: .mp4, .m4v, .mov, .webm, .gif, .mkv (lossless), or a folder, which has no suffix (PNG, "
            "lossless); NAME-1, NAME-2, ... for several prompts",
            EDIT,
        )
    )
    mask_preview: Path | None = parameter(None, "Write a video of the mask's tokens, before the first step", MASK)
    trace: Path | None = parameter(None, "Write what happened at each step, as JSON", OUTPUT)
    report: Path | None = parameter(None, "Write an HTML page about the edit", OUTPUT)
    sheet: Path | None = parameter(None, "Write one picture of the edit, PNG", OUTPUT)
    json: str | None = parameter(None, "Write the figures as JSON; - for stdout", OUTPUT, shown="PATH")
