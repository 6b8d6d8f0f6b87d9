"""The loop of methods that change self-attention: the source rides along in the batch's first row, at its inversion.

Every step is one forward of [source, unconditional, conditional] with a processor of the method's in each
self-attention of the transformer; all else is plain classifier-free guidance and the scheduler's own step.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.locking.foreground import rotate, swapped
from kvlock_fast.loop.epilogue import new_stepper
from kvlock_fast.loop.solver import Solver
from kvlock_fast.methods.job import Job
from kvlock_fast.models.base import PipelineModel
from kvlock_fast.models.protocols import Part
from kvlock_fast.nvtx import span

FAMILIES = ("wan",)
"""Whose self-attention is written down here."""

Rope = tuple[Tensor, Tensor]


class Mixer(Protocol):
    """What a method makes of a self-attention."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        """The attention's output [R, S, H, D] of rotated q, k and v; hidden: what it came from, [R, S, C].

        Row 0 is the source's, the others the edits'.
        """
        ...


def why_not(model: PipelineModel, solver: Solver) -> str | None:
    """See the package."""
    if model.arch.family not in FAMILIES:
        return f"it changes the attention of {', '.join(FAMILIES)}, and the model is of the family {model.arch.family}"
    for transformer in model.transformers:
        for name, attention in model.arch.attentions(transformer):
            own = type(attention.processor)
            if not own.__module__.startswith("diffusers."):
                return f"{name} has an attention processor that is not diffusers' own, {own.__name__}"
    return None


def edit_with(job: Job, mixer: Callable[[int], Mixer]) -> Tensor:
    """The clean latents [B, C, T, h, w]; mixer(k): of step k."""
    task, predict, solver = job.task, job.predict, job.solver
    model, stepper = predict.model, new_stepper(task, solver, job.path, [job.scale(k) for k in range(solver.num_steps)])
    attentions = [a for transformer in model.transformers for _, a in model.arch.attentions(transformer)]
    branches = [task.prompt] if task.negative is None else [task.negative, task.prompt]
    texts = Conditioning.cat([task.source_prompt, *branches])
    tokens = [task.mask.tokens.shape[1]] * task.batch
    run = job.recorder.begin()
    for k in range(solver.num_steps):
        rows = torch.cat([job.path.at(k), *[stepper.latents.float()] * len(branches)])
        with span("step", k), swapped(attentions, [Processor(mixer(k))] * len(attentions)):
            said = predict(k, rows, texts)
        source, *uncond, cond = said.split([1, *[task.batch] * len(branches)])
        stepper.advance(k, source, cond, uncond[0] if uncond else None)
        run.mark(tokens)
        job.done(k)
    job.recorder.end(stepper.trace())
    return stepper.latents


class Processor:
    """In place of diffusers' `WanAttnProcessor` in a self-attention."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, mixer: Mixer):
        self.mixer = mixer

    def __call__(
        self,
        attn: Part,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rope | None = None,
    ) -> Tensor:
        assert rotary_emb is not None  # of a Wan's self-attention
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        out = self.mixer(q, k, v, hidden_states)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(hidden_states)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of [R, S, H, D]; of one row or as many."""
    rows = max(len(x) for x in (q, k, v))
    q, k, v = (x.expand(rows, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
