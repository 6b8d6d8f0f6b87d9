"""`kvlock-fast edit`: its options."""

from pathlib import Path
from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import (
    MOST_SEED,
    STRIDE,
    Alpha,
    CacheFormat,
    CacheSteps,
    Device,
    Dtype,
    FramesPolicy,
    InversionSolver,
    JsonFile,
    Kappa,
    Mask,
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
    command_line,
    lock_config,
    number_or,
    option,
    parse_layers,
    parse_size,
)

OUTPUT = (
    "The edit: .mp4, .m4v, .mov, .webm, .gif, .mkv (lossless), or a folder, which has no suffix (PNG, lossless); "
    "NAME-1, NAME-2, ... for several prompts."
)
FEATHER = "Pixels outside the mask over which --composite mixes; those of --mask-feather, or else 8."


@app.command()
def edit(
    source: Source,
    mask: Mask,
    prompt: Annotated[list[str], option("What the edit shall show; once for each edit of the same source.")],
    output: Annotated[Path, option(OUTPUT)],
    source_prompt: Annotated[str | None, option("What the source shows; with --cache, as it was made.")] = None,
    model: Model = "demo",
    negative_prompt: Annotated[str | None, option("What guidance shall lead away from.")] = None,
    steps: Annotated[int | None, option("Denoising steps; 50, or with --cache as it was made.")] = None,
    guidance: Annotated[float, option("The guidance scale (omega0); 1 or less: no guidance.")] = 5.0,
    guidance_2: Annotated[float | None, option("For the low-noise transformer, where there are two.")] = None,
    seed: Annotated[int | None, option("Of the noise; 0, or the cache's.", min=0, max=MOST_SEED)] = None,
    mask_threshold: MaskThreshold = 0.5,
    mask_invert: MaskInvert = False,
    mask_grow: MaskGrow = 0,
    mask_feather: MaskFeather = 0,
    mask_preview: MaskPreview = None,
    size: Size = None,
    max_frames: MaxFrames = None,
    frames_policy: Policy = FramesPolicy.pad,
    preset: Annotated[str, option("Values for all the lock parameters below; see the README.")] = "kvlock",
    alpha: Alpha = None,
    omega: Annotated[str | None, option("'dynamic' or 'constant' guidance scale.")] = None,
    s_star: Annotated[bool | None, option("Calibrate guidance by the projection s*.", "--s-star/--no-s-star")] = None,
    s_star_region: Annotated[str | None, option("'all' or 'foreground'.")] = None,
    tau: Annotated[str | None, option("The variance at which locking saturates, or 'auto'.")] = None,
    b: Annotated[float | None, option("The largest factor on the guidance scale.")] = None,
    variance_window: Annotated[int | None, option("W: predictions the variance looks back on.")] = None,
    kappa: Kappa = None,
    warmup_alpha: Annotated[float | None, option("Alpha before them.")] = None,
    alpha_floor: Annotated[float | None, option("Least alpha.")] = None,
    omega_floor: Annotated[float | None, option("Least guidance scale.")] = None,
    detection: Annotated[str | None, option("Variance over 'foreground' or 'global'.")] = None,
    layers: Annotated[str | None, option("Locked self-attention layers, like 0-11,15; all if not given.")] = None,
    background_latents: Annotated[str | None, option("'model' (K/V locking alone) or 'source'.")] = None,
    source_path: SourcePath = None,
    inversion_solver: InversionSolver = None,
    zero_init_steps: Annotated[int | None, option("First steps with a prediction of 0.")] = None,
    guidance_batching: Annotated[str | None, option("'separate' or 'batched' forwards, or 'auto'.")] = None,
    clip_frames: Annotated[int | None, option("The most frames at once: longer clips go in stretches.")] = None,
    clip_overlap: Annotated[int | None, option("Frames that they share and blend; else a quarter.")] = None,
    compute: Annotated[str | None, option("'foreground' leaves out what alpha = 1 makes needless, or 'full'.")] = None,
    alpha_snap: Annotated[float | None, option("A dynamic alpha from here on counts as 1.")] = None,
    alpha_lag: Annotated[int | None, option("Alpha follows the variance 1 or 2 steps back.")] = None,
    halo: Annotated[int | None, option("Tokens around the mask whose latents are made too.")] = None,
    seam: Annotated[str | None, option("Latents of the halo: 'cut', or 'blend' with the source's.")] = None,
    method: Annotated[str | None, option("'lock', or another method's own: flowedit, tokenflow, fatezero.")] = None,
    skip_steps: Annotated[int | None, option("First steps that are left out.")] = None,
    source_guidance: Annotated[float | None, option("Guidance scale of the source's own runs.")] = None,
    lock_share: Annotated[float | None, option("Share of the steps, from the first on, that lock.")] = None,
    foreground_mix: Annotated[float | None, option("Part of alpha that the foreground takes.")] = None,
    latents_shift: Annotated[float | None, option("How far the start's foreground goes towards fresh noise.")] = None,
    noise_samples: Annotated[int | None, option("FlowEdit: noises a step averages over.")] = None,
    free_steps: Annotated[int | None, option("FlowEdit: last steps by the prompt alone.")] = None,
    inject_share: Annotated[float | None, option("TokenFlow, FateZero: share of the steps with injection.")] = None,
    keyframe_stride: Annotated[int | None, option("TokenFlow: latent frames a keyframe.")] = None,
    cache: Annotated[str | None, option("A folder made by invert: the source is not run again.")] = None,
    cache_tier: Annotated[str, option("Where its K and V are: auto, lockstep, resident, host, disk.")] = "auto",
    cache_format: CacheFormat = "fp8_e4m3",
    cache_stride: Annotated[int, option(STRIDE)] = 1,
    cache_steps: CacheSteps = "all",
    cache_root: Annotated[str | None, option("Where automatic caches of the disk tier are kept.")] = None,
    cache_quota: Annotated[str | None, option("The most they may take, like 200GB.")] = None,
    prompts_at_once: Annotated[int | None, option("The most prompts in one batch.")] = None,
    graph: Annotated[str, option("Capture the steps in CUDA graphs: 'off', 'on', or 'auto' where it can.")] = "off",
    compile: Annotated[str, option("torch.compile: 'off', or 'regional' for the transformer's blocks.")] = "off",
    processors: Processors = "auto",
    composite: Annotated[bool, option("Paste the source's background back, at its size.")] = False,
    feather: Annotated[int | None, option(FEATHER, min=0, max=256)] = None,
    no_audio: Annotated[bool, option("Leave the source's sound out of the edit.", "--no-audio")] = False,
    trace: Annotated[Path | None, option("Write what happened at each step, as JSON.")] = None,
    report: Annotated[Path | None, option("Write an HTML page about the edit.")] = None,
    sheet: Annotated[Path | None, option("Write one picture of the edit, PNG.")] = None,
    json_file: JsonFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Edit the masked region of a video by text."""
    from kvlock_fast.edit import EditSettings
    from kvlock_fast.edit_files import EditFiles, edit_files
    from kvlock_fast.invert import CacheNotes, cache_config
    from kvlock_fast.media import MaskShape

    overrides = {
        "alpha": number_or("dynamic", alpha, "--alpha"), "omega": omega, "s_star": s_star,
        "s_star_region": s_star_region, "tau": number_or("auto", tau, "--tau"), "b": b,
        "variance_window": variance_window, "kappa": kappa, "warmup_alpha": warmup_alpha,
        "alpha_floor": alpha_floor, "omega_floor": omega_floor,
        "detection": detection, "layers": parse_layers(layers), "background_latents": background_latents,
        "source_path": source_path, "inversion_solver": inversion_solver, "zero_init_steps": zero_init_steps,
        "guidance_batching": guidance_batching, "compute": compute, "alpha_snap": alpha_snap, "alpha_lag": alpha_lag,
        "halo": halo, "seam": seam, "method": method, "skip_steps": skip_steps, "source_guidance": source_guidance,
        "lock_share": lock_share, "foreground_mix": foreground_mix, "latents_shift": latents_shift,
        "noise_samples": noise_samples, "free_steps": free_steps, "inject_share": inject_share,
        "keyframe_stride": keyframe_stride,
    }  # fmt: skip
    lock = lock_config(preset, **overrides)
    kept = cache_config(
        tier=cache_tier, format=cache_format, step_stride=cache_stride, steps=cache_steps, path=cache, root=cache_root,
        quota=cache_quota, prompts_at_once=prompts_at_once,
    )  # fmt: skip
    made = CacheNotes.of(kept)
    settings = EditSettings(
        made.or_given("source_prompt", source_prompt, "--source-prompt"), prompt, negative_prompt,
        made.or_given("num_inference_steps", steps, "--steps", made.steps or 50), guidance, guidance_2,
        made.or_given("seed", seed, "--seed", 0 if cache is None else None), parse_size(size) or made.size,
        frames_policy.value, lock, composite, feather, kept, graph, compile, processors,
        mask_shape=MaskShape(mask_threshold, mask_invert, mask_grow, mask_feather),
        clip_frames=clip_frames, clip_overlap=clip_overlap,
    )  # fmt: skip
    max_frames = made.or_given("max_frames", max_frames, "--max-frames", None)
    files = EditFiles(
        source, mask, output, trace, report, json_file, max_frames,
        sheet=sheet, mask_preview=mask_preview, audio=not no_audio,
    )  # fmt: skip
    edit_files(files, settings, model, device, dtype, command_line(), quiet)
