"""What every family's tiny pipelines are put through: cases (families/cases/, a file a family), and scenes of them."""

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kvlock_fast as kvf
from kvlock_fast.conditioning import Conditioning, Given
from kvlock_fast.locking.lock import KeptKV, Mode, TransformerLock, blend_weight
from kvlock_fast.loop.solver import Solver
from kvlock_fast.models import wrap_pipeline
from tests.families import cases
from tests.support.locks import paper

PROMPT, NEGATIVE, SOURCE = "a blue circle moves", "a dog", "a red circle"
OFF = paper(alpha=0.0, omega="constant", s_star=False)


@dataclass(frozen=True)
class Case:
    """A tiny pipeline of one kind.

    make: the pipeline, the same weights at each call; stock: diffusers' own latents of a call as our [B, C, T, h, w];
    size: frames, height, width in pixels; more: arguments of diffusers' own pipeline; guidance: a scale with an effect;
    guided: whether it means two branches; unguided: a scale that means one, None where there is none; dtypes: of all
    but the autoencoder; blend: where K and V at an attention call are not [B, H, tokens, D] with the video's tokens at
    one end, what does there as `blend_at_call`; calls: attention calls a layer; text_alone: a module whose attentions
    are of the text to itself; tolerance: of the lock against blending at the attention call, in fp32; frames:
    diffusers' own pixels, where a call's own output is not a list of videos;
    without: tests of the suite that the case cannot take, by name, each with the reason.
    """

    name: str
    make: Callable[[], Any]
    stock: Callable[[Any, "StockCall"], Tensor]
    size: tuple[int, int, int] = (9, 32, 48)
    more: dict[str, Any] = field(default_factory=dict)
    guidance: float = 4.0
    guided: bool = True
    unguided: float | None = 1.0
    steps: int = 4
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    blend: Callable[..., Tensor] | None = None
    calls: int = 1
    text_alone: str | None = None
    tolerance: float = 1e-6
    frames: Callable[[Any, "StockCall"], np.ndarray] | None = None
    without: dict[str, str] = field(default_factory=dict)

    @cached_property
    def transformer(self) -> str:
        """The name of the transformer's class."""
        return type(self.make().transformer).__name__

    def video(self) -> np.ndarray:
        """uint8 [F, H, W, 3]: noise on a ramp."""
        frames, height, width = self.size
        noise = np.random.default_rng(0).integers(0, 128, (frames, height, width, 3))
        return (noise + np.linspace(0, 127, width).astype(int)[:, None]).astype(np.uint8)

    def mask(self) -> np.ndarray:
        """bool [F, H, W]: the upper left, but for its corner."""
        frames, height, width = self.size
        mask = np.zeros((frames, height, width), bool)
        mask[:, : height // 2, width // 6 : width // 2] = True
        return mask

    def edit(
        self, pipe: Any, prompt: Any = PROMPT, lock: Any = "kvlock", steps: int | None = None, **changes: Any
    ) -> Any:
        """The edit of the video."""
        lock = lock if isinstance(lock, kvf.LockConfig) else kvf.LockConfig.preset(lock)
        arguments = {
            "source_prompt": SOURCE, "negative_prompt": NEGATIVE, "num_inference_steps": steps or self.steps,
            "guidance_scale": self.guidance, "output": "latent", "generator": torch.Generator().manual_seed(1),
        }  # fmt: skip
        return kvf.KVLockPipeline.from_pipe(pipe)(
            self.video(), self.mask(), prompt=prompt, lock=lock, **{**arguments, **changes}
        )


@dataclass(frozen=True)
class StockCall:
    """A call of diffusers' own pipeline: text to video (or whatever it takes), the same noise."""

    case: Case
    guidance: float
    output_type: str = "latent"

    @property
    def arguments(self) -> dict[str, Any]:
        """As most text-to-video pipelines of diffusers name them."""
        frames, height, width = self.case.size
        return {
            "prompt": PROMPT, "negative_prompt": NEGATIVE, "height": height, "width": width, "num_frames": frames,
            "num_inference_steps": self.case.steps, "guidance_scale": self.guidance, "output_type": self.output_type,
            "generator": torch.Generator().manual_seed(1), **self.case.more,
        }  # fmt: skip

    def latent_grid(self, pipe: Any) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        geometry = wrap_pipeline(pipe).geometry
        tokens = geometry.token_grid(*self.case.size)
        return tuple(n * patch for n, patch in zip(tokens, geometry.patch_size, strict=True))


class Scene:
    """A case's model with inputs for single forwards, at a step in the middle."""

    def __init__(self, case: Case):
        self.case, self.pipe = case, case.make()
        self.model = wrap_pipeline(self.pipe)
        self.transformer = self.model.transformers[0]
        frames, pixels = torch.from_numpy(case.video()), torch.from_numpy(case.mask())
        self.mask = self.model.project(pixels)
        self.inside = self.mask.tokens[0]
        self.given = Given(frames, pixels, self.mask, case.guidance)
        settings = self.model.timesteps_settings(case.steps, *case.size)
        self.solver = Solver(self.pipe.scheduler, case.steps, torch.device("cpu"), settings)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            self.source = self.model.encode_video(frames)
            self.latents = torch.randn(self.source.shape, generator=generator)

    @cached_property
    def told(self) -> tuple[Conditioning, Conditioning]:
        """Of the edit and of the source."""
        with torch.no_grad():
            return self.model.condition([PROMPT], self.given), self.model.condition_source([SOURCE], self.given)

    def predict(self, latents: Tensor, told: Conditioning) -> Tensor:
        """The first transformer's."""
        return self.model.predict(0, latents, self.model.time_at(self.solver, self.case.steps // 2), told).float()

    @property
    def tokens(self) -> int:
        return len(self.inside)

    @property
    def ahead(self) -> int | None:
        """How many tokens lie in front of the video's."""
        return self.model.tokens_ahead(self.latents)

    def lock(self, background: Tensor | None = None) -> TransformerLock:
        return TransformerLock(self.transformer, self.model.arch, background=background)

    def kept(self, latents: Tensor, background: Tensor | None = None) -> KeptKV:
        """Keys and values of a forward of the source at these latents."""
        lock, kept = self.lock(background), {}
        try:
            with torch.no_grad(), lock.forward(Mode.CAPTURE, kept=kept, tokens=self.tokens, ahead=self.ahead):
                self.predict(latents, self.told[1])
        finally:
            lock.detach()
        return kept

    def weight(self, alpha: float, rows: int = 1) -> Tensor:
        return blend_weight(torch.full((rows,), alpha), self.inside[None])


def blend_at_call(x: Tensor, source: Tensor, scene: Scene, alpha: float) -> Tensor:
    """K or V [B, H, tokens, D] at an attention call, blended by the definition in fp64."""
    others = x.shape[2] - scene.tokens
    first = others if scene.model.arch.text == "prefix" else scene.ahead or 0
    video = slice(first, first + scene.tokens)
    weight = torch.where(scene.inside, 0.0, alpha).double()[:, None]
    mixed = x.double().clone()
    mixed[:, :, video] = (1 - weight) * mixed[:, :, video] + weight * source[:, :, video].double()
    return mixed.to(x.dtype)


@contextmanager
def attention_calls(scene: Scene, change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]):
    """`change(number, k, v)` in front of each attention of the video's tokens to themselves; counts in the list."""
    plain, seen, aside = torch.nn.functional.scaled_dot_product_attention, [], []
    hooks = []
    if scene.case.text_alone is not None:
        module = scene.transformer.get_submodule(scene.case.text_alone)
        hooks.append(module.register_forward_pre_hook(lambda *_: aside.append(1)))
        hooks.append(module.register_forward_hook(lambda *_: aside.clear()))

    def attention(query, key, value, *args, **kwargs):
        if aside:
            return plain(query, key, value, *args, **kwargs)
        is_own = query.shape[-2] == key.shape[-2] and key.shape[-2] >= scene.tokens
        if is_own or (scene.case.blend is not None and query.shape[-2] == key.shape[-2]):
            changed = change(len(seen), key, value)
            if changed is not None:
                seen.append(1)
                key, value = changed
        return plain(query, key, value, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield seen
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
        for hook in hooks:
            hook.remove()


def case_modules() -> list[ModuleType]:
    """The files of cases, by name."""
    names = sorted(path.stem for path in Path(cases.__file__).parent.glob("[!_]*.py"))
    return [importlib.import_module(f"{cases.__name__}.{name}") for name in names]


def all_cases() -> list[Case]:
    """Of all files of cases, by name of the file."""
    return [case for module in case_modules() for case in module.CASES]
