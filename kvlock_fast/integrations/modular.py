"""KV-Lock as blocks of diffusers' modular pipelines for Wan: a modular pipeline that edits.

`KVLockSourceStep` encodes the source; `KVLockDenoiseStep` is diffusers' denoising loop with two blocks more: in front
of the denoiser the source's own forward, whose keys and values are kept, and behind the scheduler's step the
background's latents. The stock denoiser runs in between, locked by its guider, a `KVLockGuidance`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.wan.before_denoise import (
    WanPrepareLatentsStep,
    WanSetTimestepsStep,
    WanTextInputStep,
)
from diffusers.modular_pipelines.wan.decoders import WanVaeDecoderStep
from diffusers.modular_pipelines.wan.denoise import (
    Wan22LoopDenoiser,
    WanDenoiseLoopWrapper,
    WanLoopAfterDenoiser,
    WanLoopBeforeDenoiser,
    WanLoopDenoiser,
)
from diffusers.modular_pipelines.wan.encoders import WanTextEncoderStep, get_t5_prompt_embeds
from torch import Tensor

from kvlock_fast.errors import InputError
from kvlock_fast.integrations.guider import KVLockGuidance
from kvlock_fast.integrations.modular_run import LockedRun
from kvlock_fast.loop.inputs import fit_to_model
from kvlock_fast.masks import project_mask

SOURCE = (
    InputParam("source_latents", required=True, type_hint=Tensor, description="Clean latents [1, C, T, h, w]."),
    InputParam("source_prompt_embeds", required=True, type_hint=Tensor, description="What the source is, [1, L, C]."),
    InputParam(
        "foreground", required=True, type_hint=Tensor, description="Latents that may change, bool [1, T, h, w]."
    ),
)


class _Described:
    """Blocks whose `words` diffusers shows as their description."""

    words = ""

    @property
    def description(self) -> str:
        """Purpose of the blocks."""
        return self.words


class KVLockSourceStep(_Described, ModularPipelineBlocks):
    """Encodes the source and its prompt, and projects the mask."""

    model_name = "wan"
    words = "Encodes the source video and its prompt, and projects the mask of what may change to latents."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Components that the pipeline must have."""
        return [
            spec for step in (WanTextEncoderStep(), WanVaeDecoderStep(), WanTextInputStep())
            for spec in step.expected_components if spec.name in ("text_encoder", "tokenizer", "vae", "transformer")
        ]  # fmt: skip

    @property
    def inputs(self) -> list[InputParam]:
        """The block's inputs."""
        return [
            InputParam("video", required=True, description="The source: uint8 [F, H, W, 3], or a list of frames."),
            InputParam(
                "mask", required=True, description="bool [F, H, W], [1, H, W] or [H, W], True where it may change."
            ),
            InputParam("source_prompt", required=True, type_hint=str, description="What the source shows in the mask."),
            InputParam("height", type_hint=int, description="To work at; default: the source's."),
            InputParam("width", type_hint=int, description="To work at; default: the source's."),
            InputParam("max_sequence_length", default=512),
            InputParam("latents", type_hint=Tensor, description="The starting noise [1, C, T, h, w]."),
            InputParam("generator", description="What draws the noise, where no latents are given."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """Values for the blocks behind it."""
        named = [OutputParam(param.name, type_hint=param.type_hint, description=param.description) for param in SOURCE]
        return [
            *named,
            OutputParam("num_frames", type_hint=int, description="Of the source."),
            OutputParam("latents", type_hint=Tensor, description="The starting noise."),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Encode the source. Raises InputError on bad input, as KVLockPipeline does."""
        from kvlock_fast.models.wan import WanModel

        block: Any = self.get_block_state(state)
        if not isinstance(block.source_prompt, str):
            raise InputError(f"source_prompt must be a text, got {block.source_prompt!r}")
        model, device = WanModel(components), components._execution_device
        video, mask, _ = fit_to_model(
            block.video, block.mask, model.geometry, block.height, block.width, "error", can_be_cut=False
        )
        block.num_frames, block.height, block.width = video.shape[:3]
        block.source_latents = model.encode_video(video)
        if block.latents is None:
            block.latents = model.draw_noise(block.source_latents.shape, block.generator, device)
        block.foreground = project_mask(mask, model.geometry).latents.to(device)
        block.source_prompt_embeds = get_t5_prompt_embeds(
            components.text_encoder, components.tokenizer, block.source_prompt, block.max_sequence_length, device
        )
        self.set_block_state(state, block)
        return components, state


class KVLockLoopSource(_Described, ModularPipelineBlocks):
    """Loop block in front of the denoiser: the source's own forward."""

    model_name = "wan"
    words = "Runs the source through the transformer; the keys and values of its background are kept."

    @property
    def inputs(self) -> list[InputParam]:
        """The block's inputs."""
        return [InputParam("attention_kwargs"), InputParam("dtype", required=True, type_hint=torch.dtype)]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        """Run the source's forward of step i."""
        components.guider.run.forward_source(i, t, block_state.dtype, block_state.attention_kwargs)
        return components, block_state


class KVLockLoopBackground(_Described, ModularPipelineBlocks):
    """Loop block behind the scheduler's step: the background's latents."""

    model_name = "wan"
    words = "Sets the background's latents to the source's, where the lock keeps it."

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        """Set the background after step i."""
        block_state.latents = components.guider.run.background(i + 1, block_state.latents)
        return components, block_state


class KVLockDenoiseStep(_Described, WanDenoiseLoopWrapper):
    """Diffusers' denoising loop for Wan 2.1, locked to a source."""

    model_name = "wan"
    block_names = ["before_denoiser", "source", "denoiser", "after_denoiser", "background"]  # noqa: RUF012
    block_classes = [  # noqa: RUF012
        WanLoopBeforeDenoiser, KVLockLoopSource, WanLoopDenoiser, WanLoopAfterDenoiser, KVLockLoopBackground,
    ]  # fmt: skip

    words = "Denoises step by step, the background locked to the source's keys and values (KV-Lock)."

    @property
    def loop_inputs(self) -> list[InputParam]:
        """Inputs of the loop beside those of its blocks."""
        return [*super().loop_inputs, *SOURCE]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Denoise. Raises InputError for a guider of another kind and for a model that cannot be locked."""
        block: Any = self.get_block_state(state)
        guiders = [getattr(components, name, None) for name in ("guider", "guider_2")]
        guiders = [guider for guider in guiders if guider is not None]
        for guider in guiders:
            if not isinstance(guider, KVLockGuidance):
                raise InputError(f"the guider must be a KVLockGuidance, got {type(guider).__name__}")
        source = SimpleNamespace(**{param.name: getattr(block, param.name) for param in SOURCE})
        run = LockedRun(components, guiders[0], block.num_inference_steps, block.latents, source)
        state.set("latents", run.start(len(block.prompt_embeds)))
        with _held(run, guiders):
            return super().__call__(components, state)


@contextmanager
def _held(run: LockedRun, guiders: list[KVLockGuidance]) -> Iterator[None]:
    """Hold the lock attached, and the guiders with it."""
    with run.kv:
        for guider in guiders:
            guider.run = run
        try:
            yield
        except BaseException as error:
            for guider in guiders:
                guider.leave(error)
            raise
        finally:
            for guider in guiders:
                guider.run = None


class KVLock22DenoiseStep(KVLockDenoiseStep):
    """The same for Wan 2.2, of two transformers and guiders."""

    block_classes = [  # noqa: RUF012
        WanLoopBeforeDenoiser, KVLockLoopSource, Wan22LoopDenoiser, WanLoopAfterDenoiser, KVLockLoopBackground,
    ]  # fmt: skip


def _guider(name: str, scale: float) -> ComponentSpec:
    config = FrozenDict({"guidance_scale": scale})
    return ComponentSpec(name, KVLockGuidance, config=config, default_creation_method="from_config")


class _WithGuiders(_Described, SequentialPipelineBlocks):
    """Blocks whose guiders are KVLockGuidance from the start."""

    guiders = (_guider("guider", 5.0),)

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Components that the pipeline must have."""
        specs = super().expected_components
        return [next((own for own in self.guiders if own.name == spec.name), spec) for spec in specs]


class KVLockCoreDenoiseStep(_WithGuiders):
    """Denoising from encoded texts and source to latents."""

    block_names = ["input", "set_timesteps", "prepare_latents", "denoise"]  # noqa: RUF012
    block_classes = [WanTextInputStep, WanSetTimestepsStep, WanPrepareLatentsStep, KVLockDenoiseStep]  # noqa: RUF012

    words = "Denoising of encoded texts, locked to an encoded source."

    @property
    def outputs(self) -> list[OutputParam]:
        """The blocks' outputs."""
        return [OutputParam.template("latents")]


class KVLockWanBlocks(_WithGuiders):
    """A modular pipeline that edits a video with Wan 2.1: `KVLockWanBlocks().init_pipeline(...)`.

    pipe = kvf.KVLockWanBlocks().init_pipeline("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    pipe.load_components(torch_dtype=torch.bfloat16)
    pipe.update_components(guider=kvf.KVLockGuidance(guidance_scale=6.0, lock="paper"))
    videos = pipe(video=frames, mask=mask, source_prompt="...", prompt="...", output="videos")
    """

    block_names = ["text_encoder", "source", "denoise", "decode"]  # noqa: RUF012
    block_classes = [WanTextEncoderStep, KVLockSourceStep, KVLockCoreDenoiseStep, WanVaeDecoderStep]  # noqa: RUF012

    words = "Edits the masked region of a video with Wan 2.1, the background locked to the source (KV-Lock)."

    @property
    def outputs(self) -> list[OutputParam]:
        """The pipeline's outputs."""
        return [OutputParam.template("videos")]


class KVLockWan22CoreDenoiseStep(KVLockCoreDenoiseStep):
    """The same for Wan 2.2."""

    guiders = (_guider("guider", 4.0), _guider("guider_2", 3.0))
    block_classes = [WanTextInputStep, WanSetTimestepsStep, WanPrepareLatentsStep, KVLock22DenoiseStep]  # noqa: RUF012


class KVLockWan22Blocks(KVLockWanBlocks):
    """The same for Wan 2.2, of two transformers."""

    guiders = (_guider("guider", 4.0), _guider("guider_2", 3.0))
    block_classes = [WanTextEncoderStep, KVLockSourceStep, KVLockWan22CoreDenoiseStep, WanVaeDecoderStep]  # noqa: RUF012
