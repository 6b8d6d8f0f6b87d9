"""The Stable Diffusion 3 family: SD3 and SD3.5, text-to-image.

Facts of diffusers' `StableDiffusion3Pipeline`: latents are drawn and kept in the text's dtype; both branches of
guidance are one forward, unconditional rows first; the shift by resolution is asked for by the scheduler, and the
sigmas are its own. Image and text are projected apart and attend together; in SD3.5 medium some blocks have a second
attention, of the image to itself. SD3's keys have no norm. Skip-layer guidance is off, as it is by default.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.base import TEXT
from kvlock_fast.models.images import ImageModel, padded_length
from kvlock_fast.models.protocols import Transformer
from kvlock_fast.models.schedulers import shift_of

SD3 = ArchSpec(
    family="sd3",
    transformers=("SD3Transformer2DModel",),
    attention=r"transformer_blocks\.\d+\.attn2?",
    token_dim=2,
    text="suffix",
    one_call=True,
    blocks=("JointTransformerBlock",),
)


class SD3Model(ImageModel):
    """A diffusers `StableDiffusion3Pipeline`."""

    arch = SD3
    shifts_by_size = True
    told_names = TEXT | {"pooled_projections": "pooled"}

    @classmethod
    def arch_of(cls, transformer: Transformer) -> ArchSpec:
        """Without norms keys are taken from their projection, before they are split into heads."""
        return replace(SD3, token_dim=1) if transformer.config.qk_norm is None else SD3

    @property
    def most_tokens(self) -> tuple[None, int, int]:
        """Positions are cut from a table."""
        most = self.config.pos_embed_max_size
        return None, most, most

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """The shift for so many tokens, where the scheduler asks for it."""
        asked = self.pipe.scheduler.config.get("use_dynamic_shifting")
        return {"mu": shift_of(self.pipe.scheduler, self.tokens(height, width))} if asked else {}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] of the CLIPs and T5, pooled [n, C] of the CLIPs, in the transformer's dtype."""
        length = padded_length(256, self.pipe.tokenizer_3)
        text, _, pooled, _ = self.words(prompts, prompt_2=None, prompt_3=None, max_sequence_length=length)
        return Conditioning(text=text.to(self.dtype), pooled=pooled.to(self.dtype))
