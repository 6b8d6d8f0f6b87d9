"""Edits in context parallelism, as one of several gloo processes on the CPU: for locking/test_context_parallel.py.

    python -m tests.support.parallel_worker RANK COUNT STORE OUTPUT

Runs every case and writes what came out to OUTPUT, a file of safetensors and one of JSON.

Three things are lent to diffusers and gloo, which have them on GPUs only: a number of accelerators to divide by, an
attention that gives the log-sum-exp that a ring needs, and a gathering of parts of different sizes.
"""

import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, LTXVideoTransformer3DModel
from diffusers.models import attention_dispatch
from safetensors.torch import save_file

import kvlock_fast as kvf
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.locking.lock import Mode, TransformerLock, blend_weight
from kvlock_fast.loop.parallel import share_video
from kvlock_fast.models.ltx import LTX
from tests.families.cases.ltx import tiny_ltx
from tests.pipeline.test_pipeline import a_mask, a_video, call
from tests.support.locks import paper
from tests.support.tiny import tiny_wan

ULYSSES, RING = {"ulysses_degree": 2}, {"ring_degree": 2}
RESIDENT = CacheConfig(tier="resident", format="native")
SEPARATE = LockConfig.preset("kvlock", guidance_batching="separate")


def configured(parallel):
    return ContextParallelConfig(**parallel)


def pipeline(parallel=None, family="wan", **settings):
    if family == "wan":
        return wan(parallel, **settings)
    pipe = tiny_ltx()
    if parallel is not None:
        share_video(pipe.transformer, configured(parallel))
    return pipe


def wan(parallel=None, second=False, expanded=False, **transformer):
    pipe = tiny_wan(second=second, **transformer)
    pipe.register_to_config(expand_timesteps=expanded)
    for model in (pipe.transformer, pipe.transformer_2):
        if model is not None and parallel is not None:
            model.enable_parallelism(config=configured(parallel))
    return pipe


def half_covered():
    """All tokens of the first of two processes, and one of the second's."""
    mask = a_mask()
    mask[:5] = True
    return mask


def a_moving_mask(*size):
    """Another one for each of two processes."""
    mask = a_mask(*size)
    mask[1:, :, : size[2] // 4] = False
    return mask


LTX_CLIP = {"video": a_video(5, 64, 64), "mask": a_moving_mask(5, 64, 64)}
EDITS = {
    "lockstep": ({}, {"lock": "paper"}),
    "lockstep, one after the other": ({}, {"lock": SEPARATE}),
    "several prompts": ({}, {"lock": "kvlock", "prompt": ["a blue circle", "a green square"]}),
    "resident": ({}, {"lock": "kvlock", "cache": RESIDENT}),
    "resident, int8": ({}, {"lock": "paper", "cache": CacheConfig(tier="resident", format="int8")}),
    "host": ({}, {"lock": "kvlock", "cache": CacheConfig(tier="host", format="bf16")}),
    "a process without background": ({}, {"lock": "kvlock", "cache": RESIDENT, "mask": half_covered()}),
    "some layers": ({}, {"lock": paper(layers=(0, 2))}),
    "two transformers": ({"second": True}, {"lock": "kvlock", "cache": RESIDENT}),
    "a timestep a token": ({"expanded": True}, {"lock": "kvlock"}),
    "inverted": ({}, {"lock": LockConfig.preset("kvlock", source_path="invert"), "cache": RESIDENT}),
    "compiled blocks": ({}, {"lock": "kvlock", "compile": "regional"}),
    "in stretches": (
        {},
        {
            "lock": "kvlock",
            "video": a_video(17),
            "mask": a_moving_mask(17, 32, 48),
            "clip_frames": 13,
            "clip_overlap": 4,
        },
    ),
    "unlocked": ({}, {"lock": "cfg"}),
    "ltx": ({"family": "ltx"}, {"lock": "kvlock", **LTX_CLIP}),
    "ltx, resident": ({"family": "ltx"}, {"lock": "kvlock", "cache": RESIDENT, **LTX_CLIP}),
}
"""By name: the pipeline, and the call."""
KINDS = {
    "ulysses": (ULYSSES, tuple(EDITS)),
    "ring": (RING, ("lockstep", "resident", "a process without background", "ltx", "ltx, resident")),
    "ulysses, odd": (ULYSSES | {"ulysses_anything": True}, ("lockstep", "resident")),
    "ring, odd": (RING | {"ring_anything": True}, ("lockstep", "resident")),
}
"""By name: the settings, and the edits that run so; "odd" on 27 tokens."""
ODD = {"video": a_video(9, 48, 48), "mask": a_mask(9, 48, 48)}


def edit(name, kind=None, odd=False):
    """The edit's latents, and its trace but for the seconds."""
    pipe, arguments = EDITS[name]
    out = call(pipeline(kind, **pipe), steps=3, **(arguments | (ODD if odd else {})))
    return out.latents, [{k: v for k, v in asdict(record).items() if k != "seconds"} for record in out.trace.records]


REFUSED = {
    "foreground": ({}, {"lock": LockConfig.preset("fixed-alpha", alpha=1.0, compute="foreground")}),
    "disk": ({}, {"cache": CacheConfig(tier="disk")}),
    "path": ({}, {"cache": CacheConfig(path="nowhere")}),
    "unseeded": ({}, {"generator": None}),
    "graph": ({}, {"graph": "on"}),
    "tokens": ({}, ODD),
    "stretches": ({}, {"video": a_video(17, 48, 48), "mask": a_mask(17, 48, 48), "clip_frames": 9, "clip_overlap": 4}),
    "heads": ({"num_attention_heads": 3}, {}),
    "fast processors": ({}, {"processors": "fast"}),
    "invert": ({}, {}),
    "one of two": ({"second": True}, {}),
    "text mask": ({"family": "ltx"}, LTX_CLIP),
}


def refused(name, folder):
    """The sentence; of "invert", that of making a cache."""
    pipe, arguments = REFUSED[name]
    arguments = {"generator": torch.Generator().manual_seed(0)} | arguments
    video, mask = arguments.pop("video", a_video()), arguments.pop("mask", a_mask())
    if "family" in pipe:  # as diffusers has it
        pipe = tiny_ltx()
        pipe.transformer.enable_parallelism(config=configured(ULYSSES))
    else:
        pipe = wan(ULYSSES, **pipe)
    if name == "one of two":
        pipe.transformer_2 = tiny_wan(second=True).transformer_2
    pipe = kvf.KVLockPipeline.from_pipe(pipe)
    try:
        if name == "invert":
            pipe.invert(video, mask, folder, source_prompt="a cat", **arguments)
        else:
            pipe(video, mask, source_prompt="a cat", prompt="a dog", num_inference_steps=2, **arguments)
    except kvf.InputError as error:
        return str(error)
    return "done"


def ltx(parallel=None, masked=False):
    """What an LTX transformer predicts in each mode of the lock, from 24 tokens; with K and V kept of the first row.

    masked: with texts of different lengths, and where processes share the video, the whole text in each of them.
    """
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=12,
    ).eval()  # fmt: skip
    if parallel is not None:
        share_video(transformer, configured(parallel)) if masked else transformer.enable_parallelism(
            config=configured(parallel)
        )
    size, rows, text = (2, 3, 4), torch.randn(3, 24, 4), torch.randn(3, 6, 12)
    text_mask = torch.arange(6)[None] < torch.tensor([[4], [6], [1]]) if masked else None
    foreground = torch.rand(1, 24) < 0.4
    weight = blend_weight(torch.tensor([0.7, 1.0]), foreground)
    lock, kept = TransformerLock(transformer, LTX, background=(~foreground[0]).nonzero()[:, 0]), {}

    def predict(samples, *mode):
        mask, times = None if text_mask is None else text_mask[samples].float(), torch.full((3,), 500.0)[samples]
        with torch.no_grad(), lock.forward(*mode, tokens=24):
            return transformer(rows[samples], text[samples], times, mask, *size, return_dict=False)[0]

    predictions = {
        "off": predict(slice(0, 3), Mode.OFF),
        "capture": predict(slice(0, 1), Mode.CAPTURE, None, kept),
        "stored": predict(slice(1, 3), Mode.STORED, weight, kept),
        "in batch": predict(slice(0, 3), Mode.IN_BATCH, weight),
    }
    lock.detach()
    return predictions


def own_loop(parallel=None):
    """What a loop of one's own predicts for an edit of two samples, locked to its source."""
    transformer = wan(parallel).transformer
    torch.manual_seed(1)
    latents, text = torch.randn(3, 4, 3, 4, 6), torch.randn(3, 5, 16)
    with torch.no_grad(), kvf.attach(transformer, torch.rand(18) < 0.4) as kv:
        with kv.source():
            transformer(latents[:1], torch.tensor([500.0]), text[:1], return_dict=False)
        with kv.edit(0.7):
            return transformer(latents[1:], torch.tensor([500.0, 500.0]), text[1:], return_dict=False)[0]


def attention_with_lse(ctx, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, **_):
    """[B, S, H, D] and log-sum-exp [B, S, H], as diffusers' forward operators of attention."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores + attn_mask
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v
    return out.transpose(1, 2), lse.transpose(1, 2)


def all_gather(places, tensor, group=None):
    """Also of tensors of different sizes."""
    for rank, place in enumerate(places):
        if rank == dist.get_rank(group):
            place.copy_(tensor)
        dist.broadcast(place, dist.get_global_rank(group, rank), group)


def lend_to_diffusers():
    torch.accelerator.device_count = lambda: 1
    dist.all_gather = all_gather
    own = attention_dispatch._native_attention_forward_op

    def forward(ctx, *args, **kwargs):
        return (attention_with_lse if args[8] else own)(ctx, *args, **kwargs)

    attention_dispatch._native_attention_forward_op = forward


def main(rank, count, store, output):
    torch.set_num_threads(1)
    compiled = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self: compiled(self, backend="eager")
    lend_to_diffusers()
    dist.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=int(rank), world_size=int(count), timeout=timedelta(minutes=5)
    )
    tensors, said = {}, {}
    for kind, (settings, names) in KINDS.items():
        for name in names:
            tensors[f"{kind}: {name}"], said[f"{kind}: {name}"] = edit(name, settings, "odd" in kind)
        if "odd" not in kind:
            tensors[f"{kind}: own loop"] = own_loop(settings)
            for masked in (False, True):
                tensors |= {f"{kind}: ltx {masked} {mode}": x for mode, x in ltx(settings, masked).items()}
    said |= {f"refused: {name}": refused(name, Path(output, "cache")) for name in REFUSED}
    # A sum waits for what was gathered; what comes out of a collective is no plain tensor.
    save_file({name: x + 0 for name, x in tensors.items()}, Path(output, f"{rank}.safetensors"))
    Path(output, f"{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
