"""Sizes of a model, and what they make of memory: weights, activations, tokens."""

from dataclasses import dataclass

import torch

from kvlock_fast.masks import Geometry

CROSS_TOKENS = {"wan": 512, "ltx": 128}
"""Tokens that the family's pipeline pads a prompt to, where text is attended to by cross-attention."""
PEAKS = {
    "wan": ((4, 3.5, 0), (4, 0, 2)),
    "cogvideox": ((4, 0.5, 2),),
    "ltx": ((4, 2, 2),),
    "hunyuan-video": ((2, 2, 3),),
}
"""Memory alive per token at a block's peak, in the phases that can be it (self-attention, feed-forward): vectors of
the hidden size in the model's dtype, vectors of it in fp32 (rotary tables and products), vectors of the feed-forward
size. Counted by tracing diffusers' blocks; attention itself takes no S x S matrix.
"""


ANY_PEAK = ((6, 4, 3),)
"""The same for a family that nobody traced: more than any that was."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model.

    layers: video self-attention layers; text_tokens: in self-attention; channels: of the latents; frames, height,
    width: the pipeline's defaults, in pixels; parameters: of one of the `transformers`; dtype: what the weights are
    made for; two_branches: whether guidance runs one without the prompt, of itself.
    """

    name: str
    family: str
    layers: int
    heads: int
    head_dim: int
    feed_forward: int
    text_tokens: int
    channels: int
    geometry: Geometry
    frames: int
    height: int
    width: int
    parameters: int
    transformers: int = 1
    text_encoder_parameters: int = 0
    vae_parameters: int = 0
    dtype: torch.dtype = torch.bfloat16
    two_branches: bool = True

    @property
    def dim(self) -> int:
        """The hidden size, that of all heads together."""
        return self.heads * self.head_dim

    @property
    def cross_tokens(self) -> int:
        """Number of text tokens in cross-attention."""
        return CROSS_TOKENS.get(self.family, 0)

    @property
    def matrix_weights(self) -> int:
        """Weights of one layer that every token is multiplied by: 4 d^2 of self-attention, 2 d^2 of cross-attention
        (query and output), 2 d ffn. Keys and values of text are few tokens and left out, as in the formulas' source.
        """
        return (6 if self.cross_tokens else 4) * self.dim**2 + 2 * self.dim * self.feed_forward

    def activation_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a token at the peak inside a block; see PEAKS."""
        dim, ffn = self.dim, self.feed_forward
        phases = PEAKS.get(self.family, ANY_PEAK)
        return max(int(dtype.itemsize * (own * dim + wide * ffn) + 4 * fp32 * dim) for own, fp32, wide in phases)

    def weight_bytes(self, dtype: torch.dtype, encoders: bool = True) -> int:
        """Bytes of the transformers in `dtype`; with `encoders` also the text encoders, and the autoencoder in fp32."""
        transformers = self.transformers * self.parameters * dtype.itemsize
        return transformers + (self.text_encoder_parameters * dtype.itemsize + self.vae_parameters * 4) * encoders
