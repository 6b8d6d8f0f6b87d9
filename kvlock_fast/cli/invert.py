"""`kvlock-fast invert`: its options."""

from pathlib import Path
from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import (
    FORMATS,
    MOST_SEED,
    STEPS,
    STRIDE,
    Alpha,
    Device,
    Dtype,
    FramesPolicy,
    InversionSolver,
    JsonFile,
    Kappa,
    MaskFeather,
    MaskGrow,
    MaskInvert,
    MaskPreview,
    MaskThreshold,
    MaxFrames,
    Model,
    Policy,
    Processors,
    Quiet,
    Size,
    Source,
    SourcePath,
    Steps,
    lock_config,
    number_or,
    option,
    parse_layers,
    parse_size,
)


@app.command()
def invert(
    source: Source,
    mask: Annotated[str, option("Where it may change, as for edit. An edit's mask may be larger, not smaller.")],
    source_prompt: Annotated[str, option("What the source shows.")],
    output: Annotated[Path, option("The folder of the cache; other files in it stay.")],
    model: Model = "demo",
    steps: Steps = 50,
    guidance: Annotated[float, option("The edits' guidance scale, for models that take it as an input.")] = 5.0,
    seed: Annotated[int, option("Of the noise.", min=0, max=MOST_SEED)] = 0,
    mask_threshold: MaskThreshold = 0.5,
    mask_invert: MaskInvert = False,
    mask_grow: MaskGrow = 0,
    mask_feather: MaskFeather = 0,
    mask_preview: MaskPreview = None,
    size: Size = None,
    max_frames: MaxFrames = None,
    frames_policy: Policy = FramesPolicy.pad,
    preset: Annotated[str, option("Values for the lock parameters below; see the README.")] = "kvlock",
    alpha: Alpha = None,
    kappa: Kappa = None,
    warmup_alpha: Annotated[float | None, option("Alpha before them; with 0 they are not stored.")] = None,
    layers: Annotated[str | None, option("Self-attention layers to store, like 0-11,15; all if not given.")] = None,
    source_path: SourcePath = None,
    inversion_solver: InversionSolver = None,
    format: Annotated[str, option(FORMATS, "--format", "--cache-format")] = "fp8_e4m3",
    stride: Annotated[int, option(STRIDE, "--stride", "--cache-stride")] = 1,
    store: Annotated[str, option(STEPS, "--store", "--cache-steps")] = "all",
    processors: Processors = "auto",
    json_file: JsonFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Run a source through the model once and keep its K and V in a folder, for edit --cache."""
    from kvlock_fast.edit import EditSettings
    from kvlock_fast.invert import cache_config, invert_files
    from kvlock_fast.media import MaskShape

    lock = lock_config(
        preset, alpha=number_or("dynamic", alpha, "--alpha"), kappa=kappa, warmup_alpha=warmup_alpha,
        layers=parse_layers(layers), source_path=source_path, inversion_solver=inversion_solver,
    )  # fmt: skip
    settings = EditSettings(
        source_prompt, [], steps=steps, guidance=guidance, seed=seed, size=parse_size(size),
        frames_policy=frames_policy.value, lock=lock,
        cache=cache_config(format=format, step_stride=stride, steps=store), processors=processors,
        mask_shape=MaskShape(mask_threshold, mask_invert, mask_grow, mask_feather),
    )  # fmt: skip
    invert_files(source, mask, output, settings, model, max_frames, device, dtype, json_file, quiet, mask_preview)
