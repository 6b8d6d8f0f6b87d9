"""CogVideoX image-to-video as the conformance suite takes it."""

from functools import partial

import pytest
from diffusers import CogVideoXImageToVideoPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from tests.support.conformance import Case
from tests.support.tiny import tiny_cogvideox

KINDS = {
    "5b": {"use_learned_positional_embeddings": True},
    "1.5": {"ofs_embed_dim": 8},
}  # fmt: skip


def tiny_cogvideox_image(kind: str = "5b") -> CogVideoXImageToVideoPipeline:
    """A `CogVideoXImageToVideoPipeline` of 3 layers: with learned positions, or an embedded "ofs"."""
    plain = tiny_cogvideox(kind, in_channels=8, sample_width=6, sample_height=4, **KINDS[kind])
    pipe = CogVideoXImageToVideoPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def first_frame(call):
    return Image.fromarray(call.case.video()[0])


def stock(pipe, call):
    """diffusers' own latents, with the mode of the image's posterior in the place of a draw that is made too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiagonalGaussianDistribution, "sample", drawn_and_left)
        own = pipe.vae.encode
        patch.setattr(pipe.vae, "encode", lambda image: own(as_wide(pipe, image, call)))
        return pipe(image=first_frame(call), **call.arguments).frames.transpose(1, 2)


def as_wide(pipe, image, call):
    """The image in the autoencoder's dtype, which it would not take in the text's."""
    plain = pipe.video_processor.preprocess(first_frame(call), *image.shape[-2:])
    return plain.unsqueeze(2).to(pipe.vae.dtype)


def drawn_and_left(posterior, generator=None):
    randn_tensor(posterior.mean.shape, generator=generator, dtype=posterior.parameters.dtype)
    return posterior.mode()


def pixels(pipe, call):
    """diffusers' own, [F, H, W, 3]."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiagonalGaussianDistribution, "sample", drawn_and_left)
        return pipe(image=first_frame(call), **call.arguments).frames[0]


CASES = [
    Case(
        f"cogvideox-i2v-{kind}", partial(tiny_cogvideox_image, kind), stock, size=(9, 32, 48),
        more={"max_sequence_length": 7}, frames=pixels,
    )
    for kind in KINDS
]  # fmt: skip
