"""The Stable Diffusion 3 family: SD3 and SD3.5, text-to-image.

Facts of diffusers' `StableDiffusion3Pipeline`: latents are drawn and kept in the text's dtype; both branches of
guidance are one forward, unconditional rows first; the shift by resolution is asked for by the scheduler, and the
sigmas are its own. Image and text are projected apart and attend together; in SD3.5 medium some blocks have a second
attention, of the image to itself. SD3's keys have no norm. Skip-layer guidance is off, as it is by default.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.images import ImageModel, shift_of

SD3 = ArchSpec(
    family="sd3",
    transformers=("SD3Transformer2DModel",),
    attention=r"transformer_blocks\.\d+\.attn2?",
    token_dim=2,
    text="suffix",
    one_call=True,
    blocks=("JointTransformerBlock",),
)
TEXT_TOKENS = 256
"""What StableDiffusion3Pipeline pads a prompt to for T5."""


class SD3Model(ImageModel):
    """What the loop needs of a diffusers `StableDiffusion3Pipeline`."""

    arch = SD3
    shifts_by_size = True

    def __init__(self, pipe: Any):
        """Raises InputError for a pipeline of another kind."""
        super().__init__(pipe)
        self.arch = self.arch_of(pipe.transformer)

    @classmethod
    def arch_of(cls, transformer: Any) -> ArchSpec:
        """Without norms keys are taken from their projection, before they are split into heads."""
        return replace(SD3, token_dim=1) if transformer.config.qk_norm is None else SD3

    @property
    def patch(self) -> int:
        """Latents a token, down and across."""
        return self.config.patch_size

    @property
    def most_tokens(self) -> tuple[None, int, int]:
        """Positions are cut from a table."""
        most = self.config.pos_embed_max_size
        return None, most, most

    def timesteps_settings(self, num_steps: int, frames: int, height: int, width: int) -> Mapping[str, Any]:
        """The shift for so many tokens, where the scheduler asks for it."""
        scheduler = self.pipe.scheduler
        asked = scheduler.config.get("use_dynamic_shifting")
        return {"mu": shift_of(scheduler, self.tokens(height, width))} if asked else {}

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] of the CLIPs and T5, pooled [n, C] of the CLIPs, in the transformer's dtype."""
        tokenizer = self.pipe.tokenizer_3
        length = TEXT_TOKENS if tokenizer is None else min(TEXT_TOKENS, int(tokenizer.model_max_length))
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, device=self.device, max_sequence_length=length
        )
        return Conditioning(text=text.to(self.latents_dtype), pooled=pooled.to(self.latents_dtype))

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, 1, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        prediction = self.transformers[which](
            hidden_states=latents[:, :, 0].to(self.latents_dtype),
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=told["text"],
            pooled_projections=told["pooled"],
            return_dict=False,
        )[0]
        return prediction[:, :, None]
