"""Types of diffusers' objects, as far as this package uses them.

Pipelines, schedulers and autoencoders are described by Protocols. Names that only some of them have, such as a second
tokenizer, are found by `__getattr__`, since diffusers registers a pipeline's parts at run time. Transformers and their
parts are torch modules: `Transformer` and `Part` tell the checker what they hold beside that, and are plain `nn.Module`
at run time.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn


class Config(Protocol):
    """A diffusers config: values by key, and by attribute."""

    def get(self, key: str, default: Any = None, /) -> Any: ...
    def __getitem__(self, key: str, /) -> Any: ...
    def __contains__(self, key: object, /) -> bool: ...
    def __getattr__(self, name: str, /) -> Any: ...


if TYPE_CHECKING:

    class Part(nn.Module):
        """A module inside a transformer, such as an attention; its own parts are found by name."""

        def __getattr__(self, name: str) -> Any: ...

    class Transformer(Part):
        """A diffusers transformer, compiled or not."""

        config: Config
        dtype: torch.dtype

else:
    Part = Transformer = nn.Module


class Scheduler(Protocol):
    """A diffusers scheduler; `sigmas`, begin index and history are not common to all of them."""

    config: Config
    timesteps: Tensor
    sigmas: Tensor
    model_outputs: list[Tensor]
    last_sample: Tensor

    def set_timesteps(self, num_inference_steps: int = ..., *, device: torch.device, **settings: Any) -> None: ...
    def set_begin_index(self, begin_index: int = 0) -> None: ...
    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, *, return_dict: bool, **more: Tensor
    ) -> tuple[Tensor, ...]: ...
    def __getattr__(self, name: str, /) -> Any: ...


class Solver(Protocol):
    """The times of a run's steps, from loop/solver.py."""

    @property
    def sigmas(self) -> Tensor: ...
    def timestep_at(self, k: int) -> Tensor: ...


class Autoencoder(Protocol):
    """A diffusers autoencoder of images or videos."""

    config: Config
    dtype: torch.dtype

    def encode(self, x: Tensor, /) -> Any: ...
    def decode(self, z: Tensor, /, *, return_dict: bool, **told: Any) -> tuple[Tensor, ...]: ...
    def enable_tiling(self) -> None: ...
    def __getattr__(self, name: str, /) -> Any: ...


class Guider(Protocol):
    """A component that some pipelines guide by."""

    config: Config


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    model_max_length: int
    padding_side: str


class Pipeline(Protocol):
    """A diffusers pipeline, whose other parts and methods are its family's."""

    config: Config
    scheduler: Scheduler
    transformer: Transformer
    vae: Autoencoder
    tokenizer: Tokenizer
    guider: Guider | None

    @property
    def _execution_device(self) -> torch.device: ...
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any: ...
    def __getattr__(self, name: str, /) -> Any: ...


def transformer_name(transformer: Any) -> str:
    """The name of a transformer's class, compiled or not."""
    return type(getattr(transformer, "_orig_mod", transformer)).__name__
