"""Rows about kernels that are bound by memory or by launches: blend, cache formats, the step's epilogue, guidance."""

import torch
from torch import Tensor

from bench.kernels import eager
from bench.kernels.attention_cases import random_normal
from bench.kernels.measure import Case, Contender, ceilings, input_sets
from bench.kernels.shapes import Shape
from kvlock_fast.kernels.blend import blend_, blend_reference
from kvlock_fast.kernels.dequantize import dequantize_kv_reference
from kvlock_fast.kernels.epilogue import launch_step_epilogue
from kvlock_fast.kernels.epilogue_reference import step_epilogue_reference
from kvlock_fast.kernels.epilogue_state import Schedule, new_step_state
from kvlock_fast.kernels.guidance import (
    cfg_projection_reference,
    guided_prediction_reference,
    launch_cfg_projection,
    launch_guided_prediction,
)
from kvlock_fast.kernels.quantize import QuantizedKV, quantize_kv, quantize_kv_reference
from kvlock_fast.kernels.variance import launch_windowed_variance, windowed_variance_reference

ALPHA, STEPS, FIRST_STEP = 0.7, 200, 100
# Relative errors that a format may have on normal data, with room to spare.
LOSS = {"bf16": 5e-3, "fp8_e4m3": 5e-2, "int8": 2e-2, "int4": 0.2}


def _keys(shape: Shape, device: str) -> Tensor:
    return random_normal(device, 1, shape.tokens, shape.heads, shape.dim)


def blend_case(shape: Shape, source: str, device: str) -> Case:
    """Keys of the background blended in place with the source's, in the format `source`."""
    first = shape.foreground
    background = torch.arange(first, shape.tokens, device=device)
    weight = torch.zeros(1, shape.tokens, device=device)
    weight[:, first:] = ALPHA
    count = input_sets(2 * 2 * shape.tokens * shape.heads * shape.dim)
    keys = [_keys(shape, device) for _ in range(count)]
    packed = [quantize_kv(_keys(shape, device)[:, first:], source) for _ in range(count)]
    plain = [ref.dequantize() for ref in packed]
    start = keys[0].clone()

    def by_hand(i: int) -> Tensor:
        keys[i][:, first:].lerp_(plain[i], ALPHA)
        return keys[i]

    def reference() -> Tensor:
        whole = torch.cat([start[:, :first], plain[0]], 1).float()
        return blend_reference(start.float(), whole, weight)

    blended = 2 * keys[0].nbytes * (shape.tokens - first) / shape.tokens  # read and written
    figures = dict(ceiling="copy", before=lambda: keys[0].copy_(start))
    case = Case(ceilings(device, ("copy",)), reference, count)
    case.contenders |= {
        "triton": Contender(
            lambda i: blend_(keys[i], packed[i], weight, index=background),
            "ours",
            bytes=blended + packed[0].nbytes,
            **figures,
        ),
        "eager": Contender(by_hand, "peer", bytes=blended + plain[0].nbytes, **figures),
    }
    return case


def _format(variant: str) -> tuple[str, str, int]:
    """format, kind and tokens a scale of "fp8_e4m3 k 128"."""
    format, kind, *per_scale = variant.split()
    return format, kind, int(*per_scale or (1,))


def _values(packed: QuantizedKV) -> Tensor:
    return dequantize_kv_reference(
        packed.codes, packed.scales, packed.format, packed.kind, packed.shape[3], packed.tokens_per_scale
    )


def quantize_case(shape: Shape, variant: str, device: str) -> Case:
    """Keys or values packed in a format."""
    format, kind, per_scale = _format(variant)
    keys = [_keys(shape, device) for _ in range(input_sets(2 * shape.tokens * shape.heads * shape.dim))]

    def ours(i: int) -> QuantizedKV:
        return quantize_kv(keys[i], format, kind, tokens_per_scale=per_scale)

    def by_hand(i: int) -> QuantizedKV:
        parts = (*quantize_kv_reference(keys[i], format, kind, per_scale), None, None)[:3]
        return QuantizedKV(format, kind, keys[i].shape, keys[i].dtype, *parts, tokens_per_scale=per_scale)

    figures = dict(bytes=float(keys[0].nbytes + ours(0).nbytes), ceiling="copy", tolerance=LOSS[format])
    case = Case(ceilings(device, ("copy",)), lambda: keys[0].float(), len(keys), view=_values)
    case.contenders |= {"triton": Contender(ours, "ours", **figures), "eager": Contender(by_hand, "peer", **figures)}
    return case


def dequantize_case(shape: Shape, variant: str, device: str) -> Case:
    """A format back to bf16."""
    format, kind, per_scale = _format(variant)
    count = input_sets(3 * shape.tokens * shape.heads * shape.dim)
    packed = [quantize_kv(_keys(shape, device), format, kind, tokens_per_scale=per_scale) for _ in range(count)]
    moved = float(packed[0].nbytes + 2 * packed[0].shape.numel())
    case = Case(ceilings(device, ("copy",)), lambda: _values(packed[0]).float(), count)
    figures = dict(bytes=moved, ceiling="copy")
    case.contenders |= {
        "triton": Contender(lambda i: packed[i].dequantize(torch.bfloat16), "ours", **figures),
        "eager": Contender(lambda i: _values(packed[i]).to(torch.bfloat16), "peer", **figures),
    }
    return case


def _latents(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_normal(device, 1, *shape.latents, dtype=dtype)


def _foreground(shape: Shape, device: str) -> Tensor:
    """A box over a fifth of the picture, in every frame."""
    mask = torch.zeros(1, *shape.latents[1:], dtype=torch.bool, device=device)
    height, width = shape.latents[2:]
    mask[:, :, height // 4 : height // 4 + max(1, height // 2), width // 4 : width // 4 + max(1, 2 * width // 5)] = True
    return mask


def epilogue_case(shape: Shape, variant: str, device: str) -> Case:
    """Everything after a step's forwards: guidance, the flow-Euler step, the variance, the next alpha and omega."""
    sigma = torch.linspace(1, 0, STEPS + 1)
    table = torch.zeros(STEPS, 3, 3)
    table[:, :2, 0] = 1
    table[:, 0, 1], table[:, 1, 1] = -sigma[:-1], sigma[1:] - sigma[:-1]
    schedule = Schedule(tau=2.0, b=1.0)  # random predictions have a variance of 1
    state = new_step_state(_latents(shape, device), table, 5.0, schedule)
    start = {name: getattr(state, name).clone() for name in ("latents", "window", "alpha", "omega")}
    start["window"].normal_()
    predictions = [[_latents(shape, device, torch.bfloat16) for _ in range(2)] for _ in range(4)]
    foreground, path = (
        _foreground(shape, device),
        random_normal(device, STEPS + 1, 1, *shape.latents, dtype=torch.float32),
    )
    now = [FIRST_STEP]

    def restore() -> None:
        now[0] = FIRST_STEP
        state.step.fill_(FIRST_STEP)
        for name, value in start.items():
            getattr(state, name).copy_(value)

    def ours(i: int) -> tuple[Tensor, ...]:
        launch_step_epilogue(state, *predictions[i], foreground, schedule, path)
        return state.latents, state.alpha, state.omega

    def by_hand(i: int) -> tuple[Tensor, ...]:
        now[0] += 1
        return eager.step_epilogue(state, *predictions[i], foreground, schedule, path[now[0]], now[0] - 1)

    def reference() -> Tensor:
        restore()
        step_epilogue_reference(state, *predictions[0], foreground, schedule, path)
        return view((state.latents, state.alpha, state.omega))

    def view(out: tuple[Tensor, ...]) -> Tensor:
        latents, *scales = out  # all of them weigh the same
        return torch.cat([latents.flatten(), *(latents.numel() ** 0.5 * x for x in scales)]).clone()

    case = Case({}, reference, len(predictions), view, counts_launches=True)
    case.contenders |= {
        "triton": Contender(ours, "ours", 1e-4, before=restore),
        "eager": Contender(by_hand, "peer", 1e-4, before=restore),
    }
    return case


def guidance_case(shape: Shape, operation: str, device: str) -> Case:
    """One of the operations that the epilogue has inside, on its own."""
    cond, uncond = (
        [_latents(shape, device, torch.bfloat16) for _ in range(input_sets(4 * _latents(shape, "meta").numel()))]
        for _ in range(2)
    )
    omega, s_star = torch.full((1,), 5.0, device=device), torch.full((1,), 0.9, device=device)
    moved = 2.0 * cond[0].nbytes
    if operation == "windowed_variance":
        history, foreground = (
            random_normal(device, 10, 1, *shape.latents, dtype=torch.float32),
            _foreground(shape, device),
        )
        # Reads its history in blocks that hold foreground, so its bytes are not the history's.
        ours, by_hand, moved = launch_windowed_variance, windowed_variance_reference, 0.0
        arguments = [(history, foreground)] * len(cond)
    elif operation == "guided_prediction":
        ours, by_hand, moved = launch_guided_prediction, _guided, 1.5 * moved
        arguments = [(c, u, omega, s_star) for c, u in zip(cond, uncond, strict=True)]
    else:
        ours, by_hand = launch_cfg_projection, cfg_projection_reference
        arguments = list(zip(cond, uncond, strict=True))
    figures = dict(bytes=moved, ceiling="copy" if moved else "")
    case = Case(ceilings(device, ("copy",)), lambda: by_hand(*_wide(arguments[0])), len(cond), counts_launches=True)
    case.contenders |= {
        "triton": Contender(lambda i: ours(*arguments[i]), "ours", **figures),
        "eager": Contender(lambda i: by_hand(*arguments[i]), "peer", **figures),
    }
    return case


def _guided(cond: Tensor, *others: Tensor) -> Tensor:
    return guided_prediction_reference(cond, *others).to(cond.dtype)


def _wide(arguments: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in arguments]
