"""The AuraFlow family, text-to-image.

Facts of diffusers' `AuraFlowPipeline`: latents are the autoencoder's times its `scaling_factor`, drawn and kept in the
text's dtype; both branches of guidance are one forward, unconditional rows first; the sigmas are the scheduler's own;
timesteps are given divided by 1000, in the latents' dtype. Blocks with two streams project text and image apart, blocks
with one stream together, the text first, and eight tokens that the model has learned in front of it.
"""

from math import isqrt

from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.models.arch import ArchSpec
from kvlock_fast.models.image import ImageModel

AURA_FLOW = ArchSpec(
    family="aura-flow",
    transformers=("AuraFlowTransformer2DModel",),
    attention=r"(joint|single)_transformer_blocks\.\d+\.attn",
    text="prefix",
    one_call=True,
    blocks=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
)
TEXT_TOKENS = 256
"""What AuraFlowPipeline pads a prompt to."""


class AuraFlowModel(ImageModel):
    """What the loop needs of a diffusers `AuraFlowPipeline`."""

    arch = AURA_FLOW

    @property
    def patch(self) -> int:
        """Latents a token, down and across."""
        return self.config.patch_size

    @property
    def most_tokens(self) -> tuple[None, int, int]:
        """Positions are cut from a square table."""
        most = isqrt(self.config.pos_embed_max_size)
        return None, most, most

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] in the transformer's dtype."""
        length = min(TEXT_TOKENS, int(self.pipe.tokenizer.model_max_length))
        text, *_ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=length
        )
        return Conditioning(text=text.to(self.latents_dtype))

    def predict(self, which: int, latents: Tensor, timestep: Tensor, told: Conditioning) -> Tensor:
        """The velocity [B, C, 1, h, w] in the transformer's dtype, at latents [B, ...], timestep []."""
        dtype = self.latents_dtype
        prediction = self.transformers[which](
            latents[:, :, 0].to(dtype).contiguous(),
            encoder_hidden_states=told["text"],
            timestep=(timestep / 1000).expand(len(latents)).to(dtype),
            return_dict=False,
        )[0]
        return prediction[:, :, None]
