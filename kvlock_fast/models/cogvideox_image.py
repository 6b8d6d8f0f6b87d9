"""CogVideoX and CogVideoX 1.5 image-to-video.

Facts of diffusers' `CogVideoXImageToVideoPipeline`, beside those of cogvideox.py: the image's latent stands beside the
first latent frame's, zeros beside all others. Edit and source are both told the source's first frame. Diffusers draws
the image's latent from the autoencoder's posterior; here it is the posterior's mode, so that it is one for every edit
of a source, but its draw is made, so that the noise of a seed is diffusers' own.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.errors import InputError
from kvlock_fast.models.autoencoder import picture
from kvlock_fast.models.cogvideox import COGVIDEOX, CogVideoXModel


class CogVideoXImageModel(CogVideoXModel):
    """A diffusers `CogVideoXImageToVideoPipeline`."""

    arch = replace(COGVIDEOX, family="cogvideox-i2v")
    told_of_frames = True

    def check(self) -> None:
        if self.config.in_channels != 2 * self.pipe.vae.config.latent_channels:
            raise InputError("the model takes no image beside the text: load it by CogVideoXPipeline")

    def condition(self, prompts: list[str], given: Given) -> Conditioning:
        """text [n, L, C] and image [n, C, T, h, w], both in the transformer's dtype.

        Raises InputError for another size than the one that the model has learned positions of.
        """
        config, (_, frames, height, width) = self.config, given.mask.latents.shape
        learned = config.sample_height, config.sample_width
        if config.use_learned_positional_embeddings and (height, width) != learned:
            stride = self.geometry.spatial_stride
            raise InputError(
                f"the model takes videos of {learned[0] * stride}x{learned[1] * stride} only, and was given one of "
                f"{height * stride}x{width * stride}: give height and width"
            )
        image = self._made((given.frames,), "image", lambda: self._image(given.frames[0])).unsqueeze(2)
        image = torch.cat([image, image.new_zeros(*image.shape[:2], frames - 1, height, width)], dim=2)
        return self.text_and(prompts, image=image)

    def _image(self, frame: Tensor) -> Tensor:
        """The latent [1, C, h, w] of a frame uint8 [H, W, 3], in the transformer's dtype."""
        vae, (height, width) = self.pipe.vae, frame.shape[:2]
        pixels = self.pipe.video_processor.preprocess(picture(frame), height, width)
        mode = vae.encode(pixels.unsqueeze(2).to(self.device, vae.dtype)).latent_dist.mode()[:, :, 0]
        scale = vae.config.scaling_factor
        return (1 / scale if vae.config.invert_scale_latents else scale) * mode.to(self.dtype)

    def draw_noise(self, shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Noise [1, C, T, h, w] fp32, drawn after that for the image."""
        batch, channels, _, *size = shape
        self._drawn((batch, channels, 1, *size), generator, device, self.pipe.vae.dtype)
        return super().draw_noise(shape, generator, device)

    def seen(self, latents: Tensor, told: Conditioning) -> Tensor:
        return torch.cat([super().seen(latents, told), told["image"]], dim=1)
