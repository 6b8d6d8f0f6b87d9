"""Forwards of some of the tokens: as `WanTransformer3DModel.forward` and its kin, on rows of the sequence.

All but self-attention works token by token; self-attention sees the rest of the sequence as the source's keys and
values, which are kept (models/foreground.py). The blocks are the model's own, compiled or not.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kvlock_fast.models.foreground import View, processors, rotate
from kvlock_fast.models.locking import TransformerLock, attend_kept


class ForegroundProcessor:
    """In place of diffusers' `WanAttnProcessor`, while not all tokens are there. The attention is locked."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        out = attend_kept(rotate(q, *rotary_emb), rotate(k, *rotary_emb), v, attn.norm_k)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(hidden_states)))


PROCESSOR = ForegroundProcessor()


def foreground_forward(
    lock: TransformerLock,
    latents: Tensor,
    timestep: Tensor,
    beside: Mapping[str, Tensor],
    computed: Tensor,
    foreground: int,
    background: Tensor,
    rows: Tensor | None,
) -> Tensor:
    """The velocity [B, C, T, h, w] of the tokens `computed` [N]; 0 elsewhere.

    latents: [B, C, T, h, w] whole, in the transformer's dtype; timestep: [B], or [B, N]; beside: what else the
    transformer's forward is given, by its names; foreground: how many of the tokens have keys and values of their own,
    from the first on; background: indices of the kept tokens, of which `rows` (None: all) are seen.
    """
    transformer = lock.transformer
    cos, sin = transformer.rope(latents)
    rope = cos.index_select(1, computed), sin.index_select(1, computed)
    seen = background if rows is None else background.index_select(0, rows)
    lock.state.view = View(foreground, rows, (cos.index_select(1, seen), sin.index_select(1, seen)))
    x = transformer.patch_embedding(latents).flatten(2).transpose(1, 2)
    tokens = x.shape[1]
    x = x.index_select(1, computed)
    per_token = timestep.shape[1] if timestep.ndim == 2 else None
    more = {} if per_token is None else {"timestep_seq_len": per_token}
    temb, timestep_proj, text, picture = transformer.condition_embedder(
        timestep.flatten(), beside["encoder_hidden_states"], beside.get("encoder_hidden_states_image"), **more
    )
    text = text if picture is None else torch.cat([picture, text], dim=1)
    timestep_proj = timestep_proj.unflatten(-1, (6, -1))
    with processors(lock.attentions, PROCESSOR):
        x = _blocks(transformer, x, text, timestep_proj, rope, _control(transformer, beside, computed))
    table = transformer.scale_shift_table.to(temb.device)
    if per_token is None:
        shift, scale = (table + temb.unsqueeze(1)).chunk(2, dim=1)
    else:
        shift, scale = (part.squeeze(2) for part in (table.unsqueeze(0) + temb.unsqueeze(2)).chunk(2, dim=2))
    x = transformer.proj_out((transformer.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
    whole = x.new_zeros(x.shape[0], tokens, x.shape[2]).index_copy_(1, computed, x)
    return _unpatchify(whole, latents.shape, transformer.config.patch_size)


def _control(transformer: nn.Module, beside: Mapping[str, Tensor], computed: Tensor) -> Tensor | None:
    """What VACE is shown of the tokens `computed`."""
    shown = beside.get("control_hidden_states")
    if shown is None:
        return None
    return transformer.vace_patch_embedding(shown).flatten(2).transpose(1, 2).index_select(1, computed)


def _blocks(
    transformer: nn.Module, x: Tensor, text: Tensor, temb: Tensor, rope: tuple[Tensor, Tensor], control: Tensor | None
) -> Tensor:
    """Through all blocks; the hints of VACE's own blocks are added after those that they belong to."""
    hints: dict[int, Tensor] = {}
    if control is not None:
        for layer, block in zip(sorted(transformer.config.vace_layers), transformer.vace_blocks, strict=True):
            hints[layer], control = block(x, text, control, temb, rope)
    # SkyReels' blocks take an attention mask too, of frames that do not see later ones: there is none.
    more = (None,) if "num_frame_per_block" in transformer.config else ()
    for layer, block in enumerate(transformer.blocks):
        x = block(x, text, temb, rope, *more)
        if layer in hints:
            x = x + hints[layer]
    return x


def _unpatchify(x: Tensor, shape: torch.Size, patch: tuple[int, int, int]) -> Tensor:
    """Tokens [B, S, pt * ph * pw * C] as latents [B, C, T, h, w] of this shape (C may differ)."""
    t, h, w = (size // p for size, p in zip(shape[2:], patch, strict=True))
    x = x.view(x.shape[0], t, h, w, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
