"""The AuraFlow family, text-to-image.

Facts of diffusers' `AuraFlowPipeline`: text and image share the self-attention, the text first, with learned tokens in
front of it, in the first blocks with projections of its own; a text has always as many tokens as it is filled up to,
and no mask; both branches of guidance are one forward, unconditional rows first; noise, latents, timesteps (from 1 to
0) and predictions are in the model's dtype. Positions are cut from the middle of a table.
"""

import inspect
from math import isqrt

from diffusers import AuraFlowPipeline
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.images import ImageModel

AURA_FLOW = ArchSpec(
    family="aura-flow",
    transformers=("AuraFlowTransformer2DModel",),
    attention=r"(joint|single)_transformer_blocks\.\d+\.attn",
    text="prefix",
    one_call=True,
    blocks=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
)
DEFAULTS = inspect.signature(AuraFlowPipeline.__call__).parameters
TIMESTEPS = 1000
"""What AuraFlowPipeline divides a timestep by, whatever the scheduler counts to."""


class AuraFlowModel(ImageModel):
    """What the loop needs of a diffusers `AuraFlowPipeline`."""

    arch = AURA_FLOW
    shifted = False

    @property
    def patch(self) -> int:
        """Latents a token, down and across."""
        return self.config.patch_size

    @property
    def most_tokens(self) -> tuple[None, int, int]:
        """The sides of the table of positions."""
        side = isqrt(self.config.pos_embed_max_size)
        return None, side, side

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """[len(prompts), L, C] in the transformer's dtype."""
        length = min(DEFAULTS["max_sequence_length"].default, int(self.pipe.tokenizer.model_max_length))
        text, *_ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=length
        )
        return text.to(self.latents_dtype)

    def _latent_statistics(self) -> tuple[float, float]:
        return 0.0, self.pipe.vae.config.scaling_factor

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, 1, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        prediction = self.transformers[which](
            latents[:, :, 0].to(self.latents_dtype).contiguous(),
            encoder_hidden_states=told["text"],
            timestep=(timestep / TIMESTEPS).expand(len(latents)).to(self.latents_dtype),
            return_dict=False,
        )[0]
        return prediction[:, :, None]
