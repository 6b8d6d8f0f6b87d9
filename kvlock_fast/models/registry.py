"""The known families, by the names of their classes; nothing of diffusers is loaded until one is asked for."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import ArchSpec
from kvlock_fast.models.protocols import Pipeline, Transformer, transformer_name

if TYPE_CHECKING:
    from kvlock_fast.models.base import PipelineModel


@dataclass(frozen=True)
class Family:
    """A family by the names of its classes.

    name: as users read it; model: "module.Class" in this room; pipelines, transformers: diffusers' classes.
    """

    name: str
    model: str
    pipelines: tuple[str, ...]
    transformers: tuple[str, ...]

    def load(self) -> "type[PipelineModel]":
        """The class of the family's models."""
        module, _, name = self.model.rpartition(".")
        return getattr(import_module(f"kvlock_fast.models.{module}"), name)


_TABLE = """
wan                   wan.Wan                           Wan                        WanTransformer3D
wan-i2v               wan_image.WanImage                WanImageToVideo            WanTransformer3D
wan-vace              wan_vace.WanVACE                  WanVACE                    WanVACETransformer3D
skyreels-v2           skyreels.SkyReels                 SkyReelsV2                 SkyReelsV2Transformer3D
skyreels-v2-i2v       skyreels.SkyReelsImage            SkyReelsV2ImageToVideo     SkyReelsV2Transformer3D
lucy-edit             lucy.Lucy                         LucyEdit                   WanTransformer3D
chronoedit            chronoedit.ChronoEdit             ChronoEdit                 ChronoEditTransformer3D
cogvideox             cogvideox.CogVideoX               CogVideoX                  CogVideoXTransformer3D
ltx                   ltx.LTX                           LTX                        LTXVideoTransformer3D
cogvideox-i2v         cogvideox_image.CogVideoXImage    CogVideoXImageToVideo      CogVideoXTransformer3D
ltx2                  ltx2.LTX2                         LTX2                       LTX2VideoTransformer3D
mochi                 mochi.Mochi                       Mochi                      MochiTransformer3D
easyanimate           easyanimate.EasyAnimate           EasyAnimate                EasyAnimateTransformer3D
latte                 latte.Latte                       Latte                      LatteTransformer3D
allegro               allegro.Allegro                   Allegro                    AllegroTransformer3D
hunyuan-video         hunyuan_video.HunyuanVideo        HunyuanVideo               HunyuanVideoTransformer3D
hunyuan-video-i2v     hunyuan_video_i2v.HunyuanVideoI2V HunyuanVideoImageToVideo   HunyuanVideoTransformer3D
hunyuan-video-1.5     hunyuan_video15.HunyuanVideo15    HunyuanVideo15             HunyuanVideo15Transformer3D
hunyuan-video-1.5-i2v hunyuan_video15.HunyuanVideo15I2V HunyuanVideo15ImageToVideo HunyuanVideo15Transformer3D
cogview4              cogview4.CogView4                 CogView4                   CogView4Transformer2D
aura-flow             aura_flow.AuraFlow                AuraFlow                   AuraFlowTransformer2D
sd3                   sd3.SD3                           StableDiffusion3           SD3Transformer2D
qwen-image            qwen_image.QwenImage              QwenImage                  QwenImageTransformer2D
flux                  flux.Flux                         Flux                       FluxTransformer2D
cosmos                cosmos.Cosmos                     CosmosTextToWorld          CosmosTransformer3D
cosmos2-image         cosmos.Cosmos2                    Cosmos2TextToImage         CosmosTransformer3D
cosmos2-video         cosmos.Cosmos2Video               Cosmos2VideoToWorld        CosmosTransformer3D
cosmos2.5             cosmos.Cosmos25                   Cosmos2_5_PredictBase      CosmosTransformer3D
kandinsky-5           kandinsky5.Kandinsky5             Kandinsky5T2V              Kandinsky5Transformer3D
kandinsky-5-image     kandinsky5.Kandinsky5Image        Kandinsky5T2I              Kandinsky5Transformer3D
chroma                chroma.Chroma                     Chroma                     ChromaTransformer2D
ovis-image            ovis_image.OvisImage              OvisImage                  OvisImageTransformer2D
longcat-image         longcat_image.LongCatImage        LongCatImage               LongCatImageTransformer2D
hunyuan-image         hunyuan_image.HunyuanImage        HunyuanImage               HunyuanImageTransformer2D
flux2                 flux2.Flux2                       Flux2                      Flux2Transformer2D
flux2-klein           flux2.Flux2Klein                  Flux2Klein                 Flux2Transformer2D
framepack             framepack.Framepack               HunyuanVideoFramepack      HunyuanVideoFramepackTransformer3D
motif                 motif.Motif                       MotifVideo                 MotifVideoTransformer3D
"""
REGISTRY: tuple[Family, ...] = tuple(
    Family(name, f"{model}Model", (f"{pipeline}Pipeline",), (f"{transformer}Model",))
    for name, model, pipeline, transformer in (row.split() for row in _TABLE.strip().split("\n"))
)
"""All families. The table above has names without their endings, which are alike."""
PIECES = "it makes a clip piece by piece, so that no step has one latent of the whole source"
MEAN_VELOCITY = "it predicts the mean velocity of a step, from which no clean latent follows"
FORCING = "every frame has a time of its own (diffusion forcing), so that no step has one latent of the source"
CONTROLLED = "it is driven by a control video, which an edit does not have"
LINEAR = (
    "its self-attention is linear: keys and values of all tokens end in one sum, where no token's can be the source's"
)
REFUSED = {
    "Cosmos2_5_TransferPipeline": "its transformer is led by a control network and by a clip beside the text",
    "SkyReelsV2DiffusionForcingPipeline": FORCING,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": FORCING,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": FORCING,
    "AnyFlowPipeline": MEAN_VELOCITY,
    "AnyFlowFARPipeline": MEAN_VELOCITY,
    "HeliosPipeline": PIECES,
    "HeliosPyramidPipeline": PIECES,
    "WanAnimatePipeline": "it is driven by videos of a pose and a face, which an edit does not have",
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


def family_of_transformer(name: str) -> Family | None:
    """The first family with a transformer class of this name."""
    return next((family for family in REGISTRY if name in family.transformers), None)


def family_of_pipeline(pipe: Pipeline) -> Family:
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


def arch_of(transformer: Transformer, name: str | None = None) -> ArchSpec:
    """The `ArchSpec` for a transformer: by the family's name, else by its class, or those it is made from.

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
