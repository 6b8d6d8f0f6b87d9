"""`kvlock-fast plan`: its options."""

from typing import Annotated

from kvlock_fast.cli.app import app
from kvlock_fast.cli.options import (
    STRIDE,
    CacheSteps,
    JsonFile,
    Kappa,
    ModelFrames,
    ModelSize,
    Preset,
    Steps,
    lock_config,
    number_or,
    option,
    parse_layers,
    parse_size,
)
from kvlock_fast.errors import InputError


@app.command()
def plan(
    config: Annotated[str | None, option("A known size like wan-1.3b, or a config file or model folder.")] = None,
    model: Annotated[str | None, option("The same; demo is the bundled model.")] = None,
    frames: ModelFrames = None,
    size: ModelSize = None,
    mask_share: Annotated[float | None, option("Share of the video that may change; else 0.2.")] = None,
    mask: Annotated[str | None, option("A mask's file or folder, to count that share.")] = None,
    steps: Steps = 50,
    prompts: Annotated[int, option("Edits of one source, made together.")] = 1,
    edits: Annotated[int, option("How often, with the same cache.")] = 1,
    guidance: Annotated[float, option("The guidance scale; 1 or less: no guidance.")] = 5.0,
    preset: Preset = "kvlock",
    alpha: Annotated[str | None, option("'dynamic' or a fixed ratio, 0 to 1.")] = None,
    kappa: Kappa = None,
    warmup_alpha: Annotated[float | None, option("Alpha before them; 0 stores the last kappa steps only.")] = None,
    layers: Annotated[str | None, option("Locked self-attention layers, like 0-11,15.")] = None,
    compute: Annotated[str | None, option("'foreground' or 'full', as of edit.")] = None,
    step_stride: Annotated[int, option(STRIDE, "--step-stride", "--cache-stride")] = 1,
    cache_steps: CacheSteps = "all",
    dtype: Annotated[str, option("bf16, fp16, fp32, or auto (the model's own).")] = "auto",
    format: Annotated[list[str] | None, option("Only this format; can be given several times.")] = None,
    gpu_memory: Annotated[str | None, option("Of the machine to plan for, like 24GB; else this one's.")] = None,
    host_memory: Annotated[str | None, option("Its host memory; else this one's.")] = None,
    disk: Annotated[str | None, option("Its free disk space; else this one's.")] = None,
    json_file: JsonFile = None,
) -> None:
    """What an edit needs in memory and time, and how the source's keys and values are best kept."""
    from kvlock_fast.files import check_json, write_json
    from kvlock_fast.planning.command import PlanSettings, make_plan
    from kvlock_fast.planning.render import as_json, render

    if (config is None) == (model is None):
        raise InputError(f"one of --config and --model must be given, not {'both' if config else 'neither'}")
    lock = lock_config(
        preset, alpha=number_or("dynamic", alpha, "--alpha"), kappa=kappa, warmup_alpha=warmup_alpha,
        layers=parse_layers(layers), compute=compute,
    )  # fmt: skip
    sides = parse_size(size)
    check_json(json_file)
    made = make_plan(
        PlanSettings(
            model=config or model or "", frames=frames, size=sides, mask_share=mask_share, mask=mask,
            steps=steps, lock=lock, prompts=prompts, edits=edits, guidance=guidance, step_stride=step_stride,
            cache_steps=cache_steps, dtype=dtype, formats=tuple(format or ()), memory=(gpu_memory, host_memory, disk),
        )
    )  # fmt: skip
    if json_file != "-":
        print(render(made))
    write_json(json_file, as_json(made))
