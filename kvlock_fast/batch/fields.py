"""The fields of a manifest's line: types, ranges, and what is wrong with one, in words."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvlock_fast.config import FORMATS, PRESETS, TIERS, CacheConfig, LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.media import MaskShape, check_box, is_box
from kvlock_fast.media.masks import MOST_FEATHER, MOST_GROW
from kvlock_fast.presets import METHODS
from kvlock_fast.renamed import CACHE_STEPS, FIELDS

SIZE = r"^[1-9][0-9]{0,4}[xX][1-9][0-9]{0,4}$"
MOST_SEED = 2**63 - 1
MOST_STEPS = 10_000
MOST_TEXT = 20_000
MOST_ID = 128

Text = Annotated[str, Field(min_length=1, max_length=MOST_TEXT)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LayerList = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class JobFields(BaseModel):
    """A job: a line of the manifest. What is not given is taken from the defaults."""

    model_config = ConfigDict(extra="forbid", strict=True, title="kvlock-fast batch: a job")

    id: Annotated[str, Field(min_length=1, max_length=MOST_ID, description="Its name; each job has another.")]
    source: Annotated[Text, Field(description="The video: a file or a folder of images, or a URL.")]
    mask: Annotated[
        Text,
        Field(
            description="Where it may change: a file, a folder, a URL, or box:x,y,w,h, "
            "which moves as box:0=x,y,w,h;24=x,y,w,h."
        ),
    ]
    source_prompt: Annotated[str, Field(max_length=MOST_TEXT, description="What the source shows.")]
    prompt: Annotated[
        Text | Annotated[list[Text], Field(min_length=1, max_length=10_000)],
        Field(description="What the edit shall show; a list makes a job of each: ID-1, ID-2, ..."),
    ]
    negative_prompt: Annotated[str, Field(max_length=MOST_TEXT)] | None = None
    output: Annotated[Text, Field(description="A file name below the output folder; else ID.mp4.")] | None = None
    audio: Annotated[bool, Field(description="Whether the source's sound is kept.")] = True
    mask_threshold: Annotated[float, Field(ge=0, lt=1, description="Marked is what is brighter than this share.")] = 0.5
    mask_invert: Annotated[bool, Field(description="What is marked stays, the rest may change.")] = False
    mask_grow: Annotated[int, Field(ge=-MOST_GROW, le=MOST_GROW, description="Pixels; a negative number shrinks.")] = 0
    mask_feather: Annotated[int, Field(ge=0, le=MOST_FEATHER, description="Pixels of a soft edge around it.")] = 0
    model: Annotated[Text, Field(description="A folder, a hub id, or demo.")] = "demo"
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 50
    guidance: NotNegative = 5.0
    guidance_2: NotNegative | None = None
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    size: Annotated[str, Field(pattern=SIZE, description="HEIGHTxWIDTH; else the source's.")] | None = None
    max_frames: Annotated[int, Field(ge=1)] | None = None
    frames_policy: Literal["pad", "trim", "error"] = "pad"
    clip_frames: Annotated[int, Field(ge=2, description="The most frames at once; else all.")] | None = None
    clip_overlap: Annotated[int, Field(ge=1, description="Frames that stretches share; else a quarter.")] | None = None
    composite: bool = False
    feather: (
        Annotated[int, Field(ge=0, le=MOST_FEATHER, description="Of composite; else mask_feather, or 8.")] | None
    ) = None
    preset: Literal[tuple(PRESETS)] = "kvlock"
    alpha: Share | Literal["dynamic"] | None = None
    omega: Literal["dynamic", "constant"] | None = None
    s_star: bool | None = None
    s_star_region: Literal["all", "foreground"] | None = None
    tau: Positive | Literal["auto"] | None = None
    b: Positive | None = None
    variance_window: Annotated[int, Field(ge=2, description="W: predictions the variance looks back on.")] | None = None
    kappa: Annotated[int, Field(ge=0)] | None = None
    warmup_alpha: Share | None = None
    alpha_floor: Share | None = None
    omega_floor: NotNegative | None = None
    detection: Literal["foreground", "global"] | None = None
    layers: LayerList | None = None
    background_latents: Literal["model", "source"] | None = None
    source_path: Literal["renoise", "invert"] | None = None
    inversion_solver: Literal["euler", "heun"] | None = None
    zero_init_steps: Annotated[int, Field(ge=0)] | None = None
    guidance_batching: Literal["auto", "separate", "batched"] | None = None
    compute: Literal["full", "foreground"] | None = None
    alpha_snap: Annotated[float, Field(gt=0, le=1)] | None = None
    alpha_lag: Annotated[int, Field(ge=1, le=2)] | None = None
    halo: Annotated[int, Field(ge=0)] | None = None
    seam: Literal["cut", "blend"] | None = None
    method: Literal[METHODS] | None = None
    family: Annotated[str, Field(min_length=1, description="The only family of models it is for.")] | None = None
    skip_steps: Annotated[int, Field(ge=0)] | None = None
    source_guidance: NotNegative | None = None
    lock_share: Share | None = None
    foreground_mix: Share | None = None
    latents_shift: Share | None = None
    noise_samples: Annotated[int, Field(ge=1)] | None = None
    free_steps: Annotated[int, Field(ge=0)] | None = None
    inject_share: Share | None = None
    keyframe_stride: Annotated[int, Field(ge=1)] | None = None
    cache_tier: Literal[("auto", *TIERS)] = "auto"
    cache_format: Literal[FORMATS] = "fp8_e4m3"
    cache_stride: Annotated[int, Field(ge=1)] = 1
    cache_steps: Literal["all", "dynamic"] = "all"
    prompts_at_once: Annotated[int, Field(ge=1)] | None = None


NAMES = tuple(JobFields.model_fields)
LOCK_NAMES = tuple(f.name for f in fields(LockConfig))
MASK_NAMES = tuple(MaskShape().as_dict())
OWN_TO_A_JOB = ("id", "output", "prompt")
"""What no default can give."""
TEXTS = frozenset({"id", "source", "mask", "source_prompt", "negative_prompt", "output", "model", "size"})

Problem = tuple[str, str]
"""A field, and a sentence about it."""


def problems_of(values: dict[str, Any], partial: bool = False) -> list[Problem]:
    """What is wrong with the fields that are given; partial: nothing needs to be there (defaults)."""
    found: dict[str, str] = {}
    try:
        JobFields.model_validate(values)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            name = str(fault["loc"][0])
            if not (partial and fault["type"] == "missing"):
                found.setdefault(name, _sentence(name, fault, values))
    for name in values:
        if name in NAMES and name not in found and (why := _text_problem(values[name])):
            found[name] = why
    if "mask" in values and "mask" not in found and (why := _box_problem(values["mask"])):
        found["mask"] = why
    return list(found.items())


def _sentence(name: str, fault: dict[str, Any], values: dict[str, Any]) -> str:
    if fault["type"] == "missing":
        return "is missing"
    if name in FIELDS:
        return f"is called {FIELDS[name]!r} now: kvlock-fast migrate rewrites a manifest"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, NAMES, 1)
        return f"is no field of a job{f'; did you mean {near[0]!r}?' if near else ''}"
    value = values[name]
    if name == "cache_steps" and isinstance(value, str) and value in CACHE_STEPS:
        return f"{value!r} is called {CACHE_STEPS[value]!r} now: kvlock-fast migrate rewrites a manifest"
    if value is None:
        return "must not be null: leave it out instead"
    if why := _text_problem(value):
        return why
    if name in LOCK_NAMES and (why := lock_problem(name, value)):
        return why
    if name == "prompt":
        return f"must be a text or a non-empty list of texts, none of them empty, got {short(value)}"
    if name == "size":
        return f"must be HEIGHTxWIDTH in pixels, like 480x832, got {short(value)}"
    said = fault["msg"].replace("Input should be", "must be").replace("String should", "must")
    return f"{said.replace(' valid', '')}, got {short(value)}"


def lock_problem(name: str, value: Any) -> str | None:
    """What the lock says of one of its values, without the name in front."""
    try:
        LockConfig.preset("paper", **{name: value})
    except (ValueError, TypeError) as error:
        return str(error).removeprefix(f"{name} ")
    return None


def _text_problem(value: Any) -> str | None:
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            continue
        if "\0" in text:
            return f"must not hold a NUL, got {short(text)}"
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"is no text that a file can hold: {text[:80]!a}"
    return None


def _box_problem(mask: str) -> str | None:
    """What is wrong with a mask in words, as far as that shows without the video."""
    try:
        if is_box(mask):
            check_box(mask)
    except InputError as error:
        return str(error)
    return None


def short(value: Any) -> str:
    """The value quoted, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def lock_of(values: dict[str, Any]) -> LockConfig:
    """The lock of checked fields."""
    changes = {name: values[name] for name in LOCK_NAMES if values.get(name) is not None}
    return LockConfig.preset(values["preset"], **changes)


def shape_of(values: dict[str, Any]) -> MaskShape:
    """The mask's shape of checked fields."""
    return MaskShape(**{name.removeprefix("mask_"): values[name] for name in MASK_NAMES})


def cache_of(values: dict[str, Any]) -> CacheConfig:
    """The cache of checked fields."""
    return CacheConfig(
        tier=values["cache_tier"],
        format=values["cache_format"],
        step_stride=values["cache_stride"],
        steps=values["cache_steps"],
        prompts_at_once=values["prompts_at_once"],
    )


def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object of JSON. Raises ValueError where one is there twice."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the field {name!r} is there twice")
        fields[name] = value
    return fields


def no_constant(word: str) -> Any:
    """Raise ValueError for NaN and infinities, which JSON does not have."""
    raise ValueError(f"{word} is no number of JSON")
