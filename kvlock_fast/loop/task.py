"""The task of one denoising run: prompts as the model takes them, the mask, guidance scales and the lock."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.config import LockConfig
from kvlock_fast.loop.schedule import in_interval
from kvlock_fast.masks import ProjectedMask

Combine = Callable[[Tensor, Tensor | None, float, Tensor, Tensor], Tensor]
"""Makes the scheduler's input of the conditional and the unconditional prediction (None without guidance), a guidance
scale, the latents and their sigma, in the family's own order of operations.
"""


def classifier_free(cond: Tensor, uncond: Tensor | None, scale: float, latents: Tensor, sigma: Tensor) -> Tensor:
    """Guide as most of diffusers' pipelines do."""
    return cond if uncond is None else uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class Task:
    """The prompts, mask, scales and lock of one run of the loop, on the device.

    Args:
        mask: where the edit may change the clip.
        prompt: what the model is told of each of B samples.
        negative: the same of the negative prompt; None without classifier-free guidance.
        source_prompt: what it is told of the source, one row.
        guidance: the guidance scale omega0 of each stage.
        lock: the lock's settings.
        latents_dtype: dtype of the latents between steps where they are diffusers' own.
        combine: how the family's pipeline guides.
        source_negative: the negative prompt's row where the source is guided by itself.
    """

    mask: ProjectedMask
    prompt: Conditioning
    negative: Conditioning | None
    source_prompt: Conditioning
    guidance: tuple[float, ...]
    lock: LockConfig
    latents_dtype: torch.dtype = torch.float32
    combine: Combine = classifier_free
    source_negative: Conditioning | None = None

    @property
    def batch(self) -> int:
        """The number of samples B."""
        return self.prompt.rows

    def scale(self, stage: int, num_steps: int, step: int) -> float:
        """The guidance scale omega0 of a step; 1 outside the lock's interval of guidance."""
        inside = self.negative is None or in_interval(self.lock.guidance_interval, num_steps, step)
        return self.guidance[stage] if inside else 1.0

    def guided(self, omega0: float) -> bool:
        """Whether guidance follows the lock's rules; a scale of 1 or less is left as it is."""
        return self.negative is not None and omega0 > 1


@dataclass(frozen=True)
class Texts:
    """The conditioning of each row of a batch. In a batch of both branches, unconditional rows come first, as in
    diffusers.

    both: negative and prompt in one batch; all: the source's in front of them; None where branches run one by one.
    alone: the source's and the prompt's in one batch, of steps without the unconditional branch.
    """

    prompt: Conditioning
    negative: Conditioning | None
    source: Conditioning
    both: Conditioning | None = None
    all: Conditioning | None = None
    alone: Conditioning | None = None

    @classmethod
    def of(cls, task: Task, both: bool, all: bool, alone: bool = False) -> "Texts":
        """The task's texts, each by itself and, where asked, those of several rows in one batch."""
        texts = cls(task.prompt, task.negative, task.source_prompt)
        together = texts._together() if both or all else None
        everything = Conditioning.cat([texts.source, together]) if all and together is not None else None
        unguided = Conditioning.cat([texts.source, texts.prompt]) if all and alone else None
        return replace(texts, both=together if both else None, all=everything, alone=unguided)

    @property
    def unguided(self) -> "Texts":
        """The texts of a step without the unconditional branch."""
        if self.negative is None:
            return self
        return Texts(self.prompt, None, self.source, None if self.both is None else self.prompt, self.alone)

    def samples(self, some: tuple[int, ...]) -> "Texts":
        """The edit's texts of some samples. By slices, as an index made here would be a copy from the host."""

        def part(x: Conditioning) -> Conditioning:
            return Conditioning.cat([x.part(i, i + 1) for i in some])

        texts = Texts(part(self.prompt), None if self.negative is None else part(self.negative), self.source)
        return texts if self.both is None else replace(texts, both=texts._together())

    def _together(self) -> Conditioning:
        return self.prompt if self.negative is None else Conditioning.cat([self.negative, self.prompt])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by name."""
        return {f"{f.name}.{name}": x for f in fields(self) for name, x in (getattr(self, f.name) or {}).items()}

    def use(self, tensors: dict[str, Tensor]) -> "Texts":
        """The same texts, read from these tensors."""
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        return Texts(**{
            field: x and x.replace(**{name: tensors[f"{field}.{name}"] for name in x}) for field, x in told.items()
        })  # fmt: skip
