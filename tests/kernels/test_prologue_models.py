"""The prologue against what diffusers' own attention modules hand to their attention, in fp32."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers import transformer_hunyuan_video as hunyuan_video
from diffusers.models.transformers import transformer_ltx as ltx
from diffusers.models.transformers import transformer_wan as wan

from kvlock_fast.kernels.language import HAS_TRITON
from kvlock_fast.kernels.prologue import Lock, QKNorm, RoPE, prologue
from tests.support.tiny import tiny_transformer

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = 5
backends = pytest.mark.parametrize("backend", ["reference", "triton"])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def with_random_norms(attention):
    for i, norm in enumerate((attention.norm_q, attention.norm_k)):
        for name, parameter in norm.named_parameters():
            parameter.data = 1 + 0.3 * normal(*parameter.shape, seed=i + 10 * len(name))
    return attention.to(DEVICE).eval()


def handed_over(attention, call, patch):
    """What `attention` projects (q, k, v [B, S, H*D]), and what then reaches the attention function ([B, S, H, D])."""
    projected, seen = [], []
    hooks = [
        getattr(attention, name).register_forward_hook(lambda module, given, out: projected.append(out.clone()))
        for name in ("to_q", "to_k", "to_v")
    ]
    target, name, token_dim = patch
    stock = getattr(target, name)

    def spy(query, key, value, *rest, **options):
        seen.extend(x.movedim(token_dim, 1).clone() for x in (query, key, value))
        return stock(query, key, value, *rest, **options)

    with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
        monkeypatch.setattr(target, name, spy)
        call()
    for hook in hooks:
        hook.remove()
    return projected[:3], seen[:3]


def weights(attention, kind, eps):
    biases = [norm.bias for norm in (attention.norm_q, attention.norm_k)] if kind == "layer" else []
    return QKNorm(kind, attention.norm_q.weight, attention.norm_k.weight, *biases, eps=eps)


def with_text(cos, sin, text_first):
    """cos, sin [S, 1, D / 2] with rows for text tokens, which are not rotated, in front or behind."""
    ones, zeros = (make(TEXT, *cos.shape[1:], device=cos.device) for make in (torch.ones, torch.zeros))
    pairs = ((ones, cos), (zeros, sin)) if text_first else ((cos, ones), (sin, zeros))
    return map(torch.cat, pairs)


def wan_case():
    model = tiny_transformer(num_layers=1, num_attention_heads=3, attention_head_dim=20).to(DEVICE)
    attention = with_random_norms(model.blocks[0].attn1)
    latents, text = normal(2, 4, 3, 4, 6), normal(2, 7, 16)
    cos, sin = model.rope(latents)
    call = lambda: model(latents, torch.full((2,), 300, device=DEVICE), text)  # noqa: E731
    rope = RoPE(cos[0, :, :, 0::2].contiguous(), sin[0, :, :, 1::2].contiguous())
    return attention, call, (wan, "dispatch_attention_fn", 1), weights(attention, "rms_across_heads", 1e-6), rope


def ltx_case(heads=3, dim=10):
    attention = with_random_norms(ltx.LTXAttention(query_dim=16, heads=heads, kv_heads=heads, dim_head=dim))
    tokens = normal(2, 12, 16)
    cos, sin = ltx.LTXVideoRotaryPosEmbed(heads * dim)(tokens, num_frames=3, height=2, width=2)
    call = lambda: attention(tokens, image_rotary_emb=(cos, sin))  # noqa: E731
    by_head = (x[0].unflatten(1, (heads, dim))[:, :, 0::2].contiguous() for x in (cos, sin))
    kind = weights(attention, "rms_across_heads", 1e-5)
    return attention, call, (ltx, "dispatch_attention_fn", 1), kind, RoPE(*by_head)


def ltx_padded_case():
    """32 channels: two are left over by the three axes, and not rotated."""
    return ltx_case(heads=2, dim=16)


def hunyuan_video_case():
    block = hunyuan_video.HunyuanVideoSingleTransformerBlock(2, 24).to(DEVICE)
    attention = with_random_norms(block.attn)
    cos, sin = hunyuan_video.HunyuanVideoRotaryPosEmbed(2, 1, [4, 10, 10])(normal(1, 4, 2, 6, 4))
    video, text = normal(2, 12, 48), normal(2, TEXT, 48, seed=1)
    call = lambda: block(video, text, normal(2, 48), None, (cos, sin))  # noqa: E731
    rope = RoPE(*with_text(cos[:, None, 0::2], sin[:, None, 0::2], text_first=False))
    return attention, call, (hunyuan_video, "dispatch_attention_fn", 1), weights(attention, "rms", 1e-6), rope


def cogvideox_case():
    attention = Attention(
        query_dim=32, dim_head=16, heads=2, qk_norm="layer_norm", eps=1e-6, processor=CogVideoXAttnProcessor2_0()
    )
    with_random_norms(attention)
    cos, sin = get_3d_rotary_pos_embed(16, ((0, 0), (2, 3)), (2, 3), 2, device=torch.device(DEVICE))
    video, text = normal(2, 12, 32), normal(2, TEXT, 32, seed=1)
    call = lambda: attention(video, encoder_hidden_states=text, image_rotary_emb=(cos, sin))  # noqa: E731
    rope = RoPE(*with_text(cos[:, None, 0::2], sin[:, None, 0::2], text_first=True))
    patch = torch.nn.functional, "scaled_dot_product_attention", 2
    return attention, call, patch, weights(attention, "layer", 1e-6), rope


MODELS = {
    "wan": wan_case,
    "ltx": ltx_case,
    "ltx-padded-rotation": ltx_padded_case,
    "hunyuan-video": hunyuan_video_case,
    "cogvideox": cogvideox_case,
}
models = pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)


@models
@backends
def test_gives_what_the_model_hands_to_its_attention(case, backend):
    attention, call, patch, norm, rope = case()
    (q, k, v), want = handed_over(attention, call, patch)
    got = prologue(q, k, v, want[0].shape[2], norm=norm, rope=rope, backend=backend)
    for mine, theirs in zip((got.q, got.k, got.v), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * theirs.abs().max().item())


@models
@backends
def test_blending_before_the_rotation_is_blending_what_the_model_hands_over(case, backend):
    """Sorted foreground first, and locked to row 0 of the batch: equal to a blend of the attention's own inputs."""
    attention, call, patch, norm, rope = case()
    (q, k, v), (_, full_k, full_v) = handed_over(attention, call, patch)
    q, k, v, full_k, full_v = (x.repeat(2, *[1] * (x.ndim - 1))[:2] for x in (q, k, v, full_k, full_v))
    order = torch.randperm(k.shape[1], generator=torch.Generator().manual_seed(3)).to(DEVICE)
    first, alpha = 4, 0.7
    sorted_rope = RoPE(rope.cos[order], rope.sin[order], rope.layout)
    got = prologue(
        *(x[:, order] for x in (q, k, v)), full_k.shape[2], norm=norm, rope=sorted_rope, foreground=first,
        lock=Lock(alpha), backend=backend,
    )  # fmt: skip
    for mine, full in ((got.k, full_k), (got.v, full_v)):
        want = full[:, order].clone()
        want[1, first:] = alpha * want[0, first:] + (1 - alpha) * want[1, first:]
        torch.testing.assert_close(mine, want, rtol=0, atol=2e-6 * want.abs().max().item())
