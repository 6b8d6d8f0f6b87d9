"""The AuraFlow family, text-to-image.

Facts of diffusers' `AuraFlowPipeline`: text and image share the self-attention, the text first, with learned tokens in
front of it, in the first blocks with projections of its own; a text has always as many tokens as it is filled up to,
and no mask; both branches of guidance are one forward, unconditional rows first; noise, latents, timesteps (from 1 to
0) and predictions are in the model's dtype. Positions are cut from the middle of a table.
"""

import inspect
from math import isqrt

from diffusers.pipelines.aura_flow.pipeline_aura_flow import AuraFlowPipeline
from torch import Tensor

from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.images import ImageModel, padded_length

AURA_FLOW = ArchSpec(
    family="aura-flow",
    transformers=("AuraFlowTransformer2DModel",),
    attention=r"(joint|single)_transformer_blocks\.\d+\.attn",
    text="prefix",
    one_call=True,
    blocks=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
)
DEFAULTS = inspect.signature(AuraFlowPipeline.__call__).parameters


class AuraFlowModel(ImageModel):
    """A diffusers `AuraFlowPipeline`."""

    arch = AURA_FLOW
    shifted = False

    @property
    def most_tokens(self) -> tuple[None, int, int]:
        """The sides of the table of positions."""
        side = isqrt(self.config.pos_embed_max_size)
        return None, side, side

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        length = padded_length(DEFAULTS["max_sequence_length"].default, self.pipe.tokenizer)
        text, *_ = self.words(prompts, max_sequence_length=length)
        return text.to(self.dtype)

    def times(self, timestep: Tensor, latents: Tensor) -> Tensor:
        # By 1000 whatever the scheduler counts to, and in this order: it decides how they are rounded.
        return (timestep / 1000).expand(len(latents)).to(self.dtype)
