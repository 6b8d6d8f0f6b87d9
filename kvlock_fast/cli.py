"""The command line, `kvlock-fast`. Only arguments here; the work is done in other rooms, loaded when it begins."""

import shlex
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.version import __version__

app = typer.Typer(
    name="kvlock-fast",
    help="Edit a region of a video by text; the background stays the source's.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


class FramesPolicy(StrEnum):
    pad = "pad"
    trim = "trim"
    error = "error"


MOST_SEED = 2**63 - 1
_FORMATS = "How the source's K and V are packed: native, bf16, fp8_e4m3, int8, int4."
_STRIDE = "Of so many steps in a row one is stored, and stands for the others."
_STEPS = "'all' locked steps are stored, or those of the 'window' (the last kappa)."
JsonFile = Annotated[str | None, typer.Option("--json", help="Write the figures as JSON; - for stdout.")]


def _option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, **more)


# What several commands take.
Quiet = Annotated[bool, _option("No progress.", "--quiet", "-q")]
Device = Annotated[str, _option("cuda, cpu, ... or auto.")]
Dtype = Annotated[str, _option("bf16, fp16, fp32, or auto (bf16 on a GPU).")]
Kappa = Annotated[int | None, _option("How many last steps follow the variance.")]
Preset = Annotated[str, _option("The lock's preset.")]
Model = Annotated[str, _option("A folder, a hub id, or demo (the bundled model).")]
Source = Annotated[str, _option("The video: a file, a folder of images, or an image.")]
ModelFrames = Annotated[int | None, _option("Frames of the video; else the model's usual number.")]
ModelSize = Annotated[str | None, _option("HEIGHTxWIDTH; else the model's usual size.")]
Steps = Annotated[int, _option("Denoising steps.")]
CacheSteps = Annotated[str, _option(_STEPS)]
CacheFormat = Annotated[str, _option(_FORMATS)]
InversionSolver = Annotated[str | None, _option("'euler' or 'heun'.")]
SourcePath = Annotated[str | None, _option("'renoise' or 'invert'.")]
Alpha = Annotated[str | None, _option("'dynamic' or a fixed ratio of the source's K and V, 0 to 1.")]
Processors = Annotated[
    str, _option("Locked attention: 'generic', 'fast' by one kernel, or 'auto': fast on a GPU where the model has it.")
]
Policy = Annotated[FramesPolicy, _option("For a frame count the model cannot take.")]
MaxFrames = Annotated[int | None, _option("Use only the first so many frames.", min=1)]
Size = Annotated[str | None, _option("Work at HEIGHTxWIDTH; else the source's size (demo: small).")]
_OUTPUT = (
    "The edit: .mp4, .m4v, .mov, .webm, .gif, .mkv (lossless), or a folder, which has no suffix (PNG, lossless); "
    "NAME-1, NAME-2, ... for several prompts."
)
_FEATHER = "Pixels outside the mask over which --composite mixes; those of --mask-feather, or else 8."
Mask = Annotated[
    str,
    _option(
        "Where it may change: video, image, folder, .npy, .npz, or box:x,y,w,h, which moves as "
        "'box:0=x,y,w,h;24=x,y,w,h' (at frame 0, at frame 24, straight in between)."
    ),
]
_GROW = "Grow it by so many pixels of the source in every direction; a negative number shrinks it."
_SOFT = "A soft edge around it: so many more pixels that may change, over which --composite fades to the source."
MaskThreshold = Annotated[float, _option("Marked is what is brighter than this share, 0 to 1.")]
MaskInvert = Annotated[bool, _option("What is marked stays, the rest may change.", "--mask-invert")]
MaskGrow = Annotated[int, _option(_GROW, min=-1024, max=1024)]
MaskFeather = Annotated[int, _option(_SOFT, min=0, max=256)]
MaskPreview = Annotated[
    Path | None, _option("Write a video of what the model sees of the mask: its tokens. Before any step is run.")
]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """HEIGHTxWIDTH as (height, width)."""
    if text is None:
        return None
    height, cross, width = text.lower().partition("x")
    if not (cross and _is_number(height, 5) and _is_number(width, 5) and int(height) and int(width)):
        raise InputError(f"--size must be HEIGHTxWIDTH in pixels, like 480x832, got '{_short(text)}'")
    return int(height), int(width)


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers as 0,1,5-9."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (_is_number(first, 4) and _is_number(last, 4) and int(first) <= int(last)):
            raise InputError(f"--layers must be numbers and ranges like 0,1,5-9, got '{_short(text)}'")
        layers += range(int(first), int(last) + 1)
    if len(set(layers)) < len(layers):
        raise InputError(f"--layers names a layer twice: '{_short(text)}'")
    return tuple(layers)


def _is_number(text: str, digits: int) -> bool:
    """Whether it is a whole number that is not absurdly long."""
    return text.isascii() and text.isdecimal() and len(text) <= digits


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def number_or(word: str, text: str | None, option: str) -> float | str | None:
    """A number, or the one word that is allowed instead."""
    if text is None or text == word:
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option} must be a number or '{word}', got '{text}'") from None


@app.command()
def edit(
    source: Source,
    mask: Mask,
    prompt: Annotated[list[str], _option("What the edit shall show; once for each edit of the same source.")],
    output: Annotated[Path, _option(_OUTPUT)],
    source_prompt: Annotated[str | None, _option("What the source shows; with --cache, as it was made.")] = None,
    model: Model = "demo",
    negative_prompt: Annotated[str | None, _option("What guidance shall lead away from.")] = None,
    steps: Annotated[int | None, _option("Denoising steps; 50, or with --cache as it was made.")] = None,
    guidance: Annotated[float, _option("The guidance scale (omega0); 1 or less: no guidance.")] = 5.0,
    guidance_2: Annotated[float | None, _option("For the low-noise transformer, where there are two.")] = None,
    seed: Annotated[int | None, _option("Of the noise; 0, or the cache's.", min=0, max=MOST_SEED)] = None,
    mask_threshold: MaskThreshold = 0.5,
    mask_invert: MaskInvert = False,
    mask_grow: MaskGrow = 0,
    mask_feather: MaskFeather = 0,
    mask_preview: MaskPreview = None,
    size: Size = None,
    max_frames: MaxFrames = None,
    frames_policy: Policy = FramesPolicy.pad,
    preset: Annotated[str, _option("Values for all the lock parameters below; see the README.")] = "kvlock",
    alpha: Alpha = None,
    omega: Annotated[str | None, _option("'dynamic' or 'constant' guidance scale.")] = None,
    s_star: Annotated[bool | None, _option("Calibrate guidance by the projection s*.", "--s-star/--no-s-star")] = None,
    s_star_region: Annotated[str | None, _option("'all' or 'foreground'.")] = None,
    tau: Annotated[str | None, _option("The variance at which locking saturates, or 'auto'.")] = None,
    b: Annotated[float | None, _option("The largest factor on the guidance scale.")] = None,
    variance_window: Annotated[int | None, _option("W: predictions the variance looks back on.")] = None,
    kappa: Kappa = None,
    warmup_alpha: Annotated[float | None, _option("Alpha before them.")] = None,
    alpha_floor: Annotated[float | None, _option("Least alpha.")] = None,
    omega_floor: Annotated[float | None, _option("Least guidance scale.")] = None,
    detection: Annotated[str | None, _option("Variance over 'foreground' or 'global'.")] = None,
    layers: Annotated[str | None, _option("Locked self-attention layers, like 0-11,15; all if not given.")] = None,
    background_latents: Annotated[str | None, _option("'model' (K/V locking alone) or 'source'.")] = None,
    source_path: SourcePath = None,
    inversion_solver: InversionSolver = None,
    zero_init_steps: Annotated[int | None, _option("First steps with a prediction of 0.")] = None,
    guidance_batching: Annotated[str | None, _option("'separate' or 'batched' forwards, or 'auto'.")] = None,
    window: Annotated[int | None, _option("The most frames at once: longer clips go in stretches.")] = None,
    overlap: Annotated[int | None, _option("Frames that they share and blend; else a quarter.")] = None,
    compute: Annotated[str | None, _option("'foreground' leaves out what alpha = 1 makes needless, or 'full'.")] = None,
    alpha_snap: Annotated[float | None, _option("A dynamic alpha from here on counts as 1.")] = None,
    alpha_lag: Annotated[int | None, _option("Alpha follows the variance 1 or 2 steps back.")] = None,
    halo: Annotated[int | None, _option("Tokens around the mask whose latents are made too.")] = None,
    seam: Annotated[str | None, _option("Latents of the halo: 'cut', or 'blend' with the source's.")] = None,
    method: Annotated[str | None, _option("'lock', or another method's own: flowedit, tokenflow, fatezero.")] = None,
    skip_steps: Annotated[int | None, _option("First steps that are left out.")] = None,
    source_guidance: Annotated[float | None, _option("Guidance scale of the source's own runs.")] = None,
    lock_share: Annotated[float | None, _option("Share of the steps, from the first on, that lock.")] = None,
    foreground_mix: Annotated[float | None, _option("Part of alpha that the foreground takes.")] = None,
    latents_shift: Annotated[float | None, _option("How far the start's foreground goes towards fresh noise.")] = None,
    noise_samples: Annotated[int | None, _option("FlowEdit: noises a step averages over.")] = None,
    free_steps: Annotated[int | None, _option("FlowEdit: last steps by the prompt alone.")] = None,
    inject_share: Annotated[float | None, _option("TokenFlow, FateZero: share of the steps with injection.")] = None,
    keyframe_stride: Annotated[int | None, _option("TokenFlow: latent frames a keyframe.")] = None,
    cache: Annotated[str | None, _option("A folder made by invert: the source is not run again.")] = None,
    cache_tier: Annotated[str, _option("Where its K and V are: auto, lockstep, resident, host, disk.")] = "auto",
    cache_format: CacheFormat = "fp8_e4m3",
    cache_stride: Annotated[int, _option(_STRIDE)] = 1,
    cache_steps: CacheSteps = "all",
    cache_root: Annotated[str | None, _option("Where automatic caches of the disk tier are kept.")] = None,
    cache_quota: Annotated[str | None, _option("The most they may take, like 200GB.")] = None,
    prompts_at_once: Annotated[int | None, _option("The most prompts in one batch.")] = None,
    graph: Annotated[str, _option("Capture the steps in CUDA graphs: 'off', 'on', or 'auto' where it can.")] = "off",
    compile: Annotated[str, _option("torch.compile: 'off', or 'regional' for the transformer's blocks.")] = "off",
    processors: Processors = "auto",
    composite: Annotated[bool, _option("Paste the source's background back, at its size.")] = False,
    feather: Annotated[int | None, _option(_FEATHER, min=0, max=256)] = None,
    no_audio: Annotated[bool, _option("Leave the source's sound out of the edit.", "--no-audio")] = False,
    trace: Annotated[Path | None, _option("Write what happened at each step, as JSON.")] = None,
    report: Annotated[Path | None, _option("Write an HTML page about the edit.")] = None,
    sheet: Annotated[Path | None, _option("Write one picture of the edit, PNG.")] = None,
    json_file: JsonFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Edit the masked region of a video by text."""
    from kvlock_fast import commands

    overrides = {
        "alpha": number_or("dynamic", alpha, "--alpha"), "omega": omega, "s_star": s_star,
        "s_star_region": s_star_region, "tau": number_or("auto", tau, "--tau"), "b": b, "window": variance_window,
        "kappa": kappa, "warmup_alpha": warmup_alpha, "alpha_floor": alpha_floor, "omega_floor": omega_floor,
        "detection": detection, "layers": parse_layers(layers), "background_latents": background_latents,
        "source_path": source_path, "inversion_solver": inversion_solver, "zero_init_steps": zero_init_steps,
        "guidance_batching": guidance_batching, "compute": compute, "alpha_snap": alpha_snap, "alpha_lag": alpha_lag,
        "halo": halo, "seam": seam, "method": method, "skip_steps": skip_steps, "source_guidance": source_guidance,
        "lock_share": lock_share, "foreground_mix": foreground_mix, "latents_shift": latents_shift,
        "noise_samples": noise_samples, "free_steps": free_steps, "inject_share": inject_share,
        "keyframe_stride": keyframe_stride,
    }  # fmt: skip
    lock = commands.lock_config(preset, {name: value for name, value in overrides.items() if value is not None})
    kept = commands.cache_config(
        tier=cache_tier, format=cache_format, step_stride=cache_stride, steps=cache_steps, path=cache, root=cache_root,
        quota=cache_quota, prompts_at_once=prompts_at_once,
    )  # fmt: skip
    made = commands.CacheNotes.of(kept)
    settings = commands.EditSettings(
        made.or_given("source_prompt", source_prompt, "--source-prompt"), prompt, negative_prompt,
        made.or_given("num_inference_steps", steps, "--steps", made.steps or 50), guidance, guidance_2,
        made.or_given("seed", seed, "--seed", 0 if cache is None else None), parse_size(size) or made.size,
        frames_policy.value, lock, composite, feather, kept, graph, compile, processors,
        mask_shape=commands.MaskShape(mask_threshold, mask_invert, mask_grow, mask_feather),
        window_frames=window, window_overlap=overlap,
    )  # fmt: skip
    max_frames = made.or_given("max_frames", max_frames, "--max-frames", None)
    files = commands.EditFiles(
        source, mask, output, trace, report, json_file, max_frames,
        sheet=sheet, mask_preview=mask_preview, audio=not no_audio,
    )  # fmt: skip
    commands.edit(files, settings, model, device, dtype, _command_line(), quiet)


@app.command()
def batch(
    manifest: Annotated[Path | None, typer.Argument(help="The jobs: .jsonl or .csv; see --schema.")] = None,
    output: Annotated[Path | None, _option("The folder for results, ledger and index; files in it stay.")] = None,
    model: Annotated[str | None, _option("A folder, a hub id, or demo; for jobs that name none.")] = None,
    defaults: Annotated[Path | None, _option("A .yaml or .toml file of fields for jobs that lack them.")] = None,
    settings: Annotated[list[str] | None, _option("NAME=VALUE: any other field for such jobs.", "--set")] = None,
    steps: Annotated[int | None, _option("Denoising steps of such jobs.")] = None,
    guidance: Annotated[float | None, _option("Their guidance scale.")] = None,
    seed: Annotated[int | None, _option("Of their noise.")] = None,
    size: Annotated[str | None, _option("Their HEIGHTxWIDTH.")] = None,
    preset: Annotated[str | None, _option("Their lock's preset.")] = None,
    check: Annotated[bool, _option("Only look: files, masks, memory. Nothing is loaded or run.", "--check")] = False,
    schema: Annotated[bool, _option("Print the JSON Schema of a job.", "--schema")] = False,
    retry_failed: Annotated[bool, _option("Also run what failed before.", "--retry-failed")] = False,
    edits_per_pass: Annotated[int, _option("Jobs that share a pass of their source at most.", min=1, max=1000)] = 8,
    reports: Annotated[bool, _option("A page about each job.", "--reports/--no-reports")] = True,
    results: Annotated[str | None, _option("Where videos go instead: a folder or URL, like s3://bucket/run.")] = None,
    metrics_file: Annotated[Path | None, _option("Keep figures there in the text format of Prometheus.")] = None,
    engine: Annotated[str, _option("Who runs it: local, or ray.")] = "local",
    address: Annotated[str | None, _option("The Ray cluster: auto, ray://HOST:PORT; else one is started.")] = None,
    workers: Annotated[int | None, _option("Ray actors; else as many as fit.", min=1)] = None,
    cpus_per_worker: Annotated[int | None, _option("Cores of an actor, without a GPU.", min=1)] = None,
    graph: Annotated[str, _option("As for edit, of every job.")] = "off",
    compile: Annotated[str, _option("As for edit, of every job.")] = "off",
    processors: Annotated[str, _option("As for edit, of every job.")] = "auto",
    json_file: JsonFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> int:
    """Run the edits of a manifest, none lost: the same command again does what is missing."""
    from kvlock_fast.batch import command
    from kvlock_fast.batch.editor import Speed

    if schema:
        command.print_schema()
        return 0
    for name, value in (("argument 'MANIFEST'", manifest), ("option '--output'", output)):
        if value is None:
            raise InputError(f"missing {name}")
    given = {"model": model, "steps": steps, "guidance": guidance, "seed": seed, "size": size, "preset": preset}
    asked = command.BatchSettings(
        manifest, output, defaults, {name: value for name, value in given.items() if value is not None},
        tuple(settings or ()), results, device, dtype, Speed(graph, compile, processors), edits_per_pass, reports,
        retry_failed, engine, address, workers, cpus_per_worker, metrics_file, json_file, _command_line(), quiet,
    )  # fmt: skip
    return command.check(asked) if check else command.run(asked)


@app.command()
def invert(
    source: Source,
    mask: Annotated[str, _option("Where it may change, as for edit. An edit's mask may be larger, not smaller.")],
    source_prompt: Annotated[str, _option("What the source shows.")],
    output: Annotated[Path, _option("The folder of the cache; other files in it stay.")],
    model: Model = "demo",
    steps: Steps = 50,
    guidance: Annotated[float, _option("The edits' guidance scale, for models that take it as an input.")] = 5.0,
    seed: Annotated[int, _option("Of the noise.", min=0, max=MOST_SEED)] = 0,
    mask_threshold: MaskThreshold = 0.5,
    mask_invert: MaskInvert = False,
    mask_grow: MaskGrow = 0,
    mask_feather: MaskFeather = 0,
    mask_preview: MaskPreview = None,
    size: Size = None,
    max_frames: MaxFrames = None,
    frames_policy: Policy = FramesPolicy.pad,
    preset: Annotated[str, _option("Values for the lock parameters below; see the README.")] = "kvlock",
    alpha: Alpha = None,
    kappa: Kappa = None,
    warmup_alpha: Annotated[float | None, _option("Alpha before them; with 0 they are not stored.")] = None,
    layers: Annotated[str | None, _option("Self-attention layers to store, like 0-11,15; all if not given.")] = None,
    source_path: SourcePath = None,
    inversion_solver: InversionSolver = None,
    format: Annotated[str, _option(_FORMATS, "--format", "--cache-format")] = "fp8_e4m3",
    stride: Annotated[int, _option(_STRIDE, "--stride", "--cache-stride")] = 1,
    store: Annotated[str, _option(_STEPS, "--store", "--cache-steps")] = "all",
    processors: Processors = "auto",
    json_file: JsonFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Run a source through the model once and keep its K and V in a folder, for edit --cache."""
    from kvlock_fast import commands

    overrides = {
        "alpha": number_or("dynamic", alpha, "--alpha"), "kappa": kappa, "warmup_alpha": warmup_alpha,
        "layers": parse_layers(layers), "source_path": source_path, "inversion_solver": inversion_solver,
    }  # fmt: skip
    lock = commands.lock_config(preset, {name: value for name, value in overrides.items() if value is not None})
    settings = commands.EditSettings(
        source_prompt, [], steps=steps, guidance=guidance, seed=seed, size=parse_size(size),
        frames_policy=frames_policy.value, lock=lock,
        cache=commands.cache_config(format=format, step_stride=stride, steps=store), processors=processors,
        mask_shape=commands.MaskShape(mask_threshold, mask_invert, mask_grow, mask_feather),
    )  # fmt: skip
    commands.invert(source, mask, output, settings, model, max_frames, device, dtype, json_file, quiet, mask_preview)


@app.command("mask")
def show_mask(
    source: Source,
    mask: Mask,
    output: Annotated[Path, _option("The picture of it: a video, as for edit.")],
    model: Annotated[str, _option("Whose tokens: a known size like wan-1.3b, a config file, or as for edit.")] = "demo",
    mask_threshold: MaskThreshold = 0.5,
    mask_invert: MaskInvert = False,
    mask_grow: MaskGrow = 0,
    mask_feather: MaskFeather = 0,
    size: Size = None,
    max_frames: MaxFrames = None,
    frames_policy: Policy = FramesPolicy.pad,
    json_file: JsonFile = None,
) -> None:
    """Show a mask as the model sees it: its tokens over the video. Needs the model's configs only."""
    from kvlock_fast import show
    from kvlock_fast.media import MaskShape

    shape = MaskShape(mask_threshold, mask_invert, mask_grow, mask_feather)
    show.show_mask(
        source, mask, output, model, parse_size(size), max_frames, frames_policy.value, shape, json_file
    )  # fmt: skip


@app.command()
def report(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="What edit --trace or demo wrote.")],
    output: Annotated[Path, _option("The HTML page.")],
    source: Annotated[str | None, _option("The source's video; else the file that the trace names.")] = None,
    mask: Annotated[str | None, _option("Its mask, as for edit; else what the trace names.")] = None,
    edited: Annotated[list[str] | None, _option("The edit; once for each prompt. Else as the trace names.")] = None,
    sheet: Annotated[Path | None, _option("Write one picture of the edit as well, PNG.")] = None,
) -> None:
    """Make the page about an edit again, from its trace and what is left of its videos."""
    from kvlock_fast import show

    show.report(trace, output, sheet, source, mask, edited or [])


@app.command()
def demo(
    output: Annotated[Path, _option("The folder for the results; files in it stay.")] = Path("out/demo"),
    world: Annotated[int | None, _option("Instead of an edit, write so many clips of the demo's world.")] = None,
    steps: Annotated[int | None, _option("Denoising steps; a quick default if not given.", min=1)] = None,
    preset: Preset = "kvlock",
    seed: Annotated[int, _option("Of the noise, or of the world.", min=0, max=MOST_SEED)] = 0,
    device: Device = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Edit a procedurally made clip with the bundled model; writes videos, a report, a sheet and a trace."""
    from kvlock_fast import commands

    if world is not None:
        commands.demo_world(world, output, seed)
    else:
        commands.demo(output, steps, preset, seed, device, _command_line(), json_file, quiet)


@app.command()
def kernels(
    arch: Annotated[str, _option("Architectures, like sm_80,sm_90.")] = "sm_90",
    only: Annotated[list[str] | None, _option("Only this kernel file; can be given several times.")] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> int:
    """Compile every kernel that ships, without a GPU, and check what came out."""
    from kvlock_fast import commands

    return commands.kernels(arch, only or [], json_file, quiet)


@app.command()
def plan(
    config: Annotated[str | None, _option("A known size like wan-1.3b, or a config file or model folder.")] = None,
    model: Annotated[str | None, _option("The same; demo is the bundled model.")] = None,
    frames: ModelFrames = None,
    size: ModelSize = None,
    mask_share: Annotated[float | None, _option("Share of the video that may change; else 0.2.")] = None,
    mask: Annotated[str | None, _option("A mask's file or folder, to count that share.")] = None,
    steps: Steps = 50,
    prompts: Annotated[int, _option("Edits of one source, made together.")] = 1,
    edits: Annotated[int, _option("How often, with the same cache.")] = 1,
    guidance: Annotated[float, _option("The guidance scale; 1 or less: no guidance.")] = 5.0,
    preset: Preset = "kvlock",
    alpha: Annotated[str | None, _option("'dynamic' or a fixed ratio, 0 to 1.")] = None,
    kappa: Kappa = None,
    warmup_alpha: Annotated[float | None, _option("Alpha before them; 0 stores the last kappa steps only.")] = None,
    layers: Annotated[str | None, _option("Locked self-attention layers, like 0-11,15.")] = None,
    compute: Annotated[str | None, _option("'foreground' or 'full', as of edit.")] = None,
    step_stride: Annotated[int, _option(_STRIDE, "--step-stride", "--cache-stride")] = 1,
    cache_steps: CacheSteps = "all",
    dtype: Annotated[str, _option("bf16, fp16, fp32, or auto (the model's own).")] = "auto",
    format: Annotated[list[str] | None, _option("Only this format; can be given several times.")] = None,
    gpu_memory: Annotated[str | None, _option("Of the machine to plan for, like 24GB; else this one's.")] = None,
    host_memory: Annotated[str | None, _option("Its host memory; else this one's.")] = None,
    disk: Annotated[str | None, _option("Its free disk space; else this one's.")] = None,
    json_file: JsonFile = None,
) -> None:
    """What an edit needs in memory and time, and how the source's keys and values are best kept."""
    from kvlock_fast import commands

    if (config is None) == (model is None):
        raise InputError(f"one of --config and --model must be given, not {'both' if config else 'neither'}")
    overrides = {"alpha": number_or("dynamic", alpha, "--alpha"), "kappa": kappa, "warmup_alpha": warmup_alpha,
                 "layers": parse_layers(layers), "compute": compute}  # fmt: skip
    lock = commands.lock_config(preset, {name: value for name, value in overrides.items() if value is not None})
    commands.plan(
        json_file, model=config or model or "", frames=frames, size=parse_size(size), mask_share=mask_share, mask=mask,
        steps=steps, lock=lock, prompts=prompts, edits=edits, guidance=guidance, step_stride=step_stride,
        cache_steps=cache_steps, dtype=dtype, formats=tuple(format or ()), memory=(gpu_memory, host_memory, disk),
    )  # fmt: skip


@app.command()
def profile(
    output: Annotated[Path, _option("The folder for the results; files in it stay.")] = Path("out/profile"),
    config: Annotated[str | None, _option("A known size like wan-1.3b, or a config file: random weights.")] = None,
    model: Annotated[str | None, _option("A folder, a hub id, or demo (the bundled model): its own weights.")] = None,
    frames: ModelFrames = None,
    size: ModelSize = None,
    steps: Steps = 4,
    layers: Annotated[int | None, _option("Only the first so many layers; else all.")] = None,
    preset: Preset = "kvlock",
    cache_tier: Annotated[str, _option("Where the source's K and V are: lockstep, resident, host, disk.")] = "lockstep",
    cache_format: CacheFormat = "fp8_e4m3",
    nsys: Annotated[bool, _option("Also run it under Nsight Systems.", "--nsys")] = False,
    ncu: Annotated[bool, _option("Also run it under Nsight Compute.", "--ncu")] = False,
    ranges_only: Annotated[bool, _option("Only run, for a profiler that looks on; no files.", "--ranges-only")] = False,
    force: Annotated[bool, _option("Run what looks too large as well.", "--force")] = False,
    json_file: JsonFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> int:
    """Where the time of a locked edit goes: a table by range, a trace, and the commands for Nsight."""
    from kvlock_fast import commands

    if (config is None) == (model is None):
        raise InputError(f"one of --config and --model must be given, not {'both' if config else 'neither'}")
    return commands.profile(
        output, steps, device, [name for name, asked in (("nsys", nsys), ("ncu", ncu)) if asked], ranges_only,
        json_file, quiet, config=config, model=model, frames=frames, size=parse_size(size), layers=layers,
        tier=cache_tier, format=cache_format, preset=preset, dtype=dtype, force=force,
    )  # fmt: skip


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """What is installed, what will be used, what is missing."""
    from kvlock_fast import commands

    commands.doctor(json_file)


cache_app = typer.Typer(help="List, verify or prune stored caches of sources.", rich_markup_mode=None)
app.add_typer(cache_app, name="cache")
CacheFolder = Annotated[Path, typer.Argument(metavar="DIR", help="One cache, or a folder of several.")]


@cache_app.command("ls")
def cache_ls(folder: CacheFolder, json_file: JsonFile = None) -> None:
    """Each cache: its size, when it was made and used, what it is of."""
    from kvlock_fast.cache import maintain

    maintain.list_entries(folder, json_file)


@cache_app.command("verify")
def cache_verify(folder: CacheFolder, json_file: JsonFile = None) -> int:
    """Read every byte; exit status 1 if a cache is damaged."""
    from kvlock_fast.cache import maintain

    return maintain.verify_entries(folder, json_file)


@cache_app.command("prune")
def cache_prune(
    folder: CacheFolder,
    quota: Annotated[str | None, _option("Then the least recently used, down to a size like 10GB.")] = None,
    everything: Annotated[bool, _option("Every cache that is not in use.", "--all")] = False,
    json_file: JsonFile = None,
) -> None:
    """Remove what interrupted writes left, and damaged caches. Every byte is read."""
    from kvlock_fast.cache import maintain

    maintain.prune_entries(folder, quota, everything, json_file)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kvlock-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, _option("Print the version.", "--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Edit a region of a video by text; the background stays the source's."""


def _command_line() -> str:
    return shlex.join(["kvlock-fast", *sys.argv[1:]])


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _usage_message(error: Any, arguments: list[str]) -> str:
    """The library's sentence, with the value that was given where it leaves that out."""
    message = error.format_message().replace("\n", " ").rstrip(".")
    for option in getattr(getattr(error, "param", None), "opts", ()):
        for i, argument in reversed(list(enumerate(arguments))):
            given = arguments[i + 1] if argument == option and i + 1 < len(arguments) else None
            given = argument.removeprefix(f"{option}=") if argument.startswith(f"{option}=") else given
            if given is not None and f"'{given}'" not in message:
                return f"{message}, got '{given}'"
    return message


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status: 0 done, 1 some work failed, 2 bad input."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", InputWarning)
            result = app(args=arguments, prog_name="kvlock-fast", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (InputError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted"
    except Exception as error:
        # Usage errors of the command-line library, whose classes move between its versions.
        if not hasattr(error, "format_message"):
            raise
        message = _usage_message(error, arguments)
    print(f"error: {message.encode(errors='backslashreplace').decode()}", file=sys.stderr, flush=True)
    return 130 if message == "interrupted" else 2


if __name__ == "__main__":
    sys.exit(main())
