"""SkyReels-V2, text-to-video and image-to-video.

Facts of diffusers' `SkyReelsV2Pipeline` and `SkyReelsV2ImageToVideoPipeline`: as Wan 2.1's (wan.py, wan_image.py), with
a transformer class of their own. Its diffusion forcing, where every frame has a time of its own, or sees no later ones,
is refused: there a step has no one latent of the source.
"""

from dataclasses import replace

from kvlock_fast.errors import InputError
from kvlock_fast.models.wan import WAN, WanModel
from kvlock_fast.models.wan_image import WanImageModel

SKYREELS = replace(WAN, family="skyreels-v2", transformers=("SkyReelsV2Transformer3DModel",))
SKYREELS_IMAGE = replace(SKYREELS, family="skyreels-v2-i2v")


class Unforced(WanModel):
    """A model without diffusion forcing."""

    def check(self) -> None:
        super().check()
        for name, plain in (("num_frame_per_block", 1), ("inject_sample_info", False)):
            value = self.config.get(name, plain)
            if value != plain:
                raise InputError(f"the transformer is made for diffusion forcing ({name}={value}), which is not known")


class SkyReelsModel(Unforced):
    """A diffusers `SkyReelsV2Pipeline`."""

    arch = SKYREELS


class SkyReelsImageModel(Unforced, WanImageModel):
    """A diffusers `SkyReelsV2ImageToVideoPipeline`."""

    arch = SKYREELS_IMAGE
