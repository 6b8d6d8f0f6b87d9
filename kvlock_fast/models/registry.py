"""Which families there are, by the names of their classes; nothing of diffusers is loaded until one is asked for."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kvlock_fast.errors import InputError


@dataclass(frozen=True)
class Family:
    """name: as users read it; model: "module.Class" in this room; pipelines, transformers: diffusers' classes."""

    name: str
    model: str
    pipelines: tuple[str, ...]
    transformers: tuple[str, ...]

    def load(self) -> type:
        """The family's model, a `PipelineModel`."""
        module, _, name = self.model.rpartition(".")
        return getattr(import_module(f"kvlock_fast.models.{module}"), name)


REGISTRY: tuple[Family, ...] = (
    Family("wan", "wan.WanModel", ("WanPipeline",), ("WanTransformer3DModel",)),
    Family("wan-i2v", "wan_image.WanImageModel", ("WanImageToVideoPipeline",), ("WanTransformer3DModel",)),
    Family("wan-vace", "wan_vace.WanVACEModel", ("WanVACEPipeline",), ("WanVACETransformer3DModel",)),
    Family("skyreels-v2", "skyreels.SkyReelsModel", ("SkyReelsV2Pipeline",), ("SkyReelsV2Transformer3DModel",)),
    Family(
        "skyreels-v2-i2v",
        "skyreels.SkyReelsImageModel",
        ("SkyReelsV2ImageToVideoPipeline",),
        ("SkyReelsV2Transformer3DModel",),
    ),
    Family("lucy-edit", "lucy.LucyModel", ("LucyEditPipeline",), ("WanTransformer3DModel",)),
    Family("chronoedit", "chronoedit.ChronoEditModel", ("ChronoEditPipeline",), ("ChronoEditTransformer3DModel",)),
    Family("cogvideox", "cogvideox.CogVideoXModel", ("CogVideoXPipeline",), ("CogVideoXTransformer3DModel",)),
    Family("ltx", "ltx.LTXModel", ("LTXPipeline",), ("LTXVideoTransformer3DModel",)),
    Family(
        "cogvideox-i2v",
        "cogvideox_image.CogVideoXImageModel",
        ("CogVideoXImageToVideoPipeline",),
        ("CogVideoXTransformer3DModel",),
    ),
    Family("ltx2", "ltx2.LTX2Model", ("LTX2Pipeline",), ("LTX2VideoTransformer3DModel",)),
    Family("mochi", "mochi.MochiModel", ("MochiPipeline",), ("MochiTransformer3DModel",)),
    Family("easyanimate", "easyanimate.EasyAnimateModel", ("EasyAnimatePipeline",), ("EasyAnimateTransformer3DModel",)),
    Family("latte", "latte.LatteModel", ("LattePipeline",), ("LatteTransformer3DModel",)),
    Family("allegro", "allegro.AllegroModel", ("AllegroPipeline",), ("AllegroTransformer3DModel",)),
    Family(
        "hunyuan-video",
        "hunyuan_video.HunyuanVideoModel",
        ("HunyuanVideoPipeline",),
        ("HunyuanVideoTransformer3DModel",),
    ),
    Family(
        "hunyuan-video-i2v",
        "hunyuan_video_i2v.HunyuanVideoI2VModel",
        ("HunyuanVideoImageToVideoPipeline",),
        ("HunyuanVideoTransformer3DModel",),
    ),
    Family(
        "hunyuan-video-1.5",
        "hunyuan_video15.HunyuanVideo15Model",
        ("HunyuanVideo15Pipeline",),
        ("HunyuanVideo15Transformer3DModel",),
    ),
    Family(
        "hunyuan-video-1.5-i2v",
        "hunyuan_video15.HunyuanVideo15I2VModel",
        ("HunyuanVideo15ImageToVideoPipeline",),
        ("HunyuanVideo15Transformer3DModel",),
    ),
    Family("cogview4", "cogview4.CogView4Model", ("CogView4Pipeline",), ("CogView4Transformer2DModel",)),
    Family("aura-flow", "aura_flow.AuraFlowModel", ("AuraFlowPipeline",), ("AuraFlowTransformer2DModel",)),
    Family("sd3", "sd3.SD3Model", ("StableDiffusion3Pipeline",), ("SD3Transformer2DModel",)),
    Family("qwen-image", "qwen_image.QwenImageModel", ("QwenImagePipeline",), ("QwenImageTransformer2DModel",)),
    Family("flux", "flux.FluxModel", ("FluxPipeline",), ("FluxTransformer2DModel",)),
    Family("cosmos", "cosmos.CosmosModel", ("CosmosTextToWorldPipeline",), ("CosmosTransformer3DModel",)),
    Family("cosmos2-image", "cosmos.Cosmos2Model", ("Cosmos2TextToImagePipeline",), ("CosmosTransformer3DModel",)),
    Family(
        "cosmos2-video",
        "cosmos.Cosmos2VideoModel",
        ("Cosmos2VideoToWorldPipeline",),
        ("CosmosTransformer3DModel",),
    ),
    Family("cosmos2.5", "cosmos.Cosmos25Model", ("Cosmos2_5_PredictBasePipeline",), ("CosmosTransformer3DModel",)),
    Family("kandinsky-5", "kandinsky5.Kandinsky5Model", ("Kandinsky5T2VPipeline",), ("Kandinsky5Transformer3DModel",)),
    Family(
        "kandinsky-5-image",
        "kandinsky5.Kandinsky5ImageModel",
        ("Kandinsky5T2IPipeline",),
        ("Kandinsky5Transformer3DModel",),
    ),
    Family("chroma", "chroma.ChromaModel", ("ChromaPipeline",), ("ChromaTransformer2DModel",)),
    Family("ovis-image", "ovis_image.OvisImageModel", ("OvisImagePipeline",), ("OvisImageTransformer2DModel",)),
    Family(
        "longcat-image",
        "longcat_image.LongCatImageModel",
        ("LongCatImagePipeline",),
        ("LongCatImageTransformer2DModel",),
    ),
    Family(
        "hunyuan-image",
        "hunyuan_image.HunyuanImageModel",
        ("HunyuanImagePipeline",),
        ("HunyuanImageTransformer2DModel",),
    ),
    Family("flux2", "flux2.Flux2Model", ("Flux2Pipeline",), ("Flux2Transformer2DModel",)),
    Family("flux2-klein", "flux2.Flux2KleinModel", ("Flux2KleinPipeline",), ("Flux2Transformer2DModel",)),
    Family(
        "framepack",
        "framepack.FramepackModel",
        ("HunyuanVideoFramepackPipeline",),
        ("HunyuanVideoFramepackTransformer3DModel",),
    ),
    Family("motif", "motif.MotifModel", ("MotifVideoPipeline",), ("MotifVideoTransformer3DModel",)),
)
PIECES = "it makes a clip piece by piece, so that no step has one latent of the whole source"
MEAN_VELOCITY = "it predicts the mean velocity of a step, from which no clean latent follows"
DRIVEN = "it is driven by videos of a pose and a face, which an edit does not have"
FORCING = "every frame has a time of its own (diffusion forcing), so that no step has one latent of the source"
CONTROLLED = "it is driven by a control video, which an edit does not have"
LINEAR = (
    "its self-attention is linear: keys and values of all tokens end in one sum, where no token's can be the source's"
)
COSMOS_CONTROL = "its transformer is led by a control network and by a clip beside the text"
REFUSED = {
    "Cosmos2_5_TransferPipeline": COSMOS_CONTROL,
    "SkyReelsV2DiffusionForcingPipeline": FORCING,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": FORCING,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": FORCING,
    "AnyFlowPipeline": MEAN_VELOCITY,
    "AnyFlowFARPipeline": MEAN_VELOCITY,
    "HeliosPipeline": PIECES,
    "HeliosPyramidPipeline": PIECES,
    "WanAnimatePipeline": DRIVEN,
    "CogVideoXFunControlPipeline": CONTROLLED,
    "EasyAnimateControlPipeline": CONTROLLED,
    "CogVideoXVideoToVideoPipeline": "it starts from a noised video of its own: load the model by CogVideoXPipeline",
    "ConsisIDPipeline": "it is told a face by models that find it in a picture, which an edit does not have",
    "EasyAnimateInpaintPipeline": "its transformer is shown a masked video: load a text-to-video model instead",
    "SanaPipeline": LINEAR,
    "SanaSprintPipeline": LINEAR,
    "SanaVideoPipeline": LINEAR,
    "SanaImageToVideoPipeline": LINEAR,
}
"""Pipelines that are known and cannot be followed, with the reason."""
FAMILIES = tuple(family.name for family in REGISTRY)
PIPELINES = tuple(name for family in REGISTRY for name in family.pipelines)


def transformer_name(transformer: Any) -> str:
    """Of its class, compiled or not."""
    return type(getattr(transformer, "_orig_mod", transformer)).__name__


def family_of_transformer(name: str) -> Family | None:
    """The first family with a transformer class of this name."""
    return next((family for family in REGISTRY if name in family.transformers), None)


def family_of_pipeline(pipe: Any) -> Family:
    """The family of a loaded pipeline: by its class, or those it is made from, else by its transformer's class.

    Raises InputError for a family that is not known, or cannot be followed.
    """
    kinds = [kind.__name__ for kind in type(pipe).__mro__]
    if kinds[0] in REFUSED:
        raise InputError(f"{kinds[0]} is not supported: {REFUSED[kinds[0]]}")
    for kind in kinds:
        for family in REGISTRY:
            if kind in family.pipelines:
                return family
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        transformer = getattr(pipe, "transformer_2", None)
    name = transformer_name(transformer)
    family = family_of_transformer(name)
    if family is None or kinds[0] != "SimpleNamespace":
        known = ", ".join(FAMILIES)
        raise InputError(f"unknown model family: {kinds[0]} with transformer {name}; known: {known}")
    return family


def arch_of(transformer: Any, name: str | None = None) -> Any:
    """The `ArchSpec` for a transformer: that of the family of this name, else by its class, or those it is made from.

    Raises InputError for a family that is not known.
    """
    kinds = [kind.__name__ for kind in type(getattr(transformer, "_orig_mod", transformer)).__mro__]
    found = [family for family in REGISTRY if family.name == name]
    if name is None:
        found = [family for kind in kinds for family in REGISTRY if kind in family.transformers]
    if not found:
        unknown = f"transformer {kinds[0]}" if name is None else f"family {name!r}"
        raise InputError(
            f"unknown {unknown}; known families: {', '.join(FAMILIES)}; family='auto' with a sample finds and checks "
            "the self-attentions of any transformer"
        )
    return found[0].load().arch_of(transformer)
