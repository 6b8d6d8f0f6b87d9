"""The lock for other people's denoising loops: `with kvf.attach(transformer, foreground) as kv`.

The loop stays theirs. It says whose forward is whose: `kv.source()` around the one of the source, `kv.edit()` around
those of the edit, or `kv.along()` around one in which the source rides along. Outside of these the transformer computes
as ever, bit for bit, and after the `with` nothing of the lock is left.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from kvlock_fast.config import FORMATS, LockConfig
from kvlock_fast.errors import InputError, warn
from kvlock_fast.integrations.loop_schedule import LoopSchedule
from kvlock_fast.locking.arch import ArchSpec, refuse_linear
from kvlock_fast.locking.compatibility import device_of
from kvlock_fast.locking.discover import Sample, find_and_check
from kvlock_fast.locking.lock import KeptKV, Mode, TransformerLock, blend_weight
from kvlock_fast.masks import tokens_of
from kvlock_fast.models.registry import arch_of
from kvlock_fast.parameters import is_whole

if TYPE_CHECKING:
    from kvlock_fast.models.protocols import Transformer


def attach(
    transformer: nn.Module | Sequence[nn.Module],
    foreground: Tensor,
    *,
    family: str | ArchSpec | None = None,
    layers: tuple[int, ...] | None = None,
    lock: LockConfig | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    patch_size: tuple[int, int, int] | None = None,
    format: str | None = None,
    sample: Sample | None = None,
    processors: str = "generic",
    ahead: int | None = None,
) -> "AttachedLock":
    """Lock a video transformer (or several that take turns, as Wan 2.2's two) while a `with` is open.

        with kvf.attach(pipe.transformer, foreground) as kv:
            for t in scheduler.timesteps:
                with kv.source():                      # the source at this noise, under its own prompt
                    transformer(source_latents, t, source_text)
                with kv.edit(alpha):                   # both branches of guidance, in any number of forwards
                    cond, uncond = transformer(latents, t, text), transformer(latents, t, negative)

    For inference: gradients do not pass through what is locked. lock, num_steps, guidance_scale and patch_size are for
    a schedule by the variance (`kv.alpha`, `kv.omega`, `kv.guide`, `kv.observe`).

    Args:
        transformer: one model, or those that take turns.
        foreground: bool [S], [1, S] or [B, S] in the model's order of tokens, as `kvf.ops.token_mask` makes it; or bool
            [T, h, w] or [B, T, h, w] of latents, as `kvf.ops.latent_mask` makes it: the schedule and
            `kv.keep_background` then go by these, and the tokens are those with any such latent.
        family: None (by the transformer's class), a name of `kvf.capabilities()["families"]`, a description
            (`ArchSpec`), or "auto" for an unknown class: its self-attentions are found and checked by `sample`.
        layers: the locked layers by number; None: `lock`'s.
        lock: the configuration; None: the preset "kvlock". An edit of your own loop is never coupled: `edit_path` is
            "free".
        num_steps: number of the loop's steps.
        guidance_scale: omega0.
        patch_size: the latents (t, h, w) of a token; None: by the transformer's config.
        format: how the source's K and V are kept, one of `kvf.capabilities()["formats"]`; None: as they are.
        sample: for family "auto", the arguments of one forward by name, or a function that makes one, of as many tokens
            as the foreground.
        processors: "fast" has one kernel do the norms, rotation, blending and keeping of Wan, CogVideoX, LTX and
            HunyuanVideo; "generic" works around diffusers' own attention; "auto" is "fast" on a GPU where the model has
            it.
        ahead: number of tokens of other frames in front of the video's, which only FramePack has.

    Raises InputError for a transformer that cannot be locked (unknown, linear attention, fused projections, locked
    already; at `with`, processors "fast" where that cannot be) and for a foreground that is not one; then nothing is
    attached.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if lock is not None and not isinstance(lock, LockConfig):
        raise InputError(f"lock must be a LockConfig, got {type(lock).__name__}")
    transformers = tuple(transformer) if isinstance(transformer, Sequence) else (transformer,)
    patch_size = _patch_size(transformers[0]) if patch_size is None else patch_size
    foreground, latents = _foreground(foreground, patch_size, device_of(transformers[0]))
    lock = LockConfig() if lock is None else lock
    layers = lock.layers if layers is None else layers
    # Tokens that are foreground in all samples are not cached.
    background = (~foreground).any(0).nonzero()[:, 0]
    kv = AttachedLock(lock, foreground, num_steps, guidance_scale, patch_size, latents)
    for each in transformers:
        arch = _arch(each, family, sample, foreground.shape[1], ahead)
        kv.attachments.append(partial(TransformerLock, each, arch, layers, background, processors, format))
    kv.ahead = ahead
    return kv


class AttachedLock(LoopSchedule):
    """A lock attached by `attach`: a context manager, with the forwards and the schedule of a locked loop."""

    def __init__(
        self,
        lock: LockConfig,
        foreground: Tensor,
        num_steps: int | None,
        guidance_scale: float | None,
        patch_size: tuple[int, int, int] | None,
        latents: Tensor | None,
    ):
        """Made by `attach`, whose arguments these are; foreground: bool [B or 1, S]; latents: [B or 1, T, h, w]."""
        super().__init__(lock, foreground, num_steps, guidance_scale, patch_size, latents)
        self.attachments: list[Callable[[], TransformerLock]] = []
        self.ahead: int | None = None
        self._locks: list[TransformerLock] = []
        self._kept: dict[Hashable, list[KeptKV]] = {}
        self._exit = ExitStack()

    def __enter__(self) -> "AttachedLock":
        if self._locks:
            raise InputError("the lock is attached already: open one `with` at a time")
        locks = []
        with ExitStack() as attached:
            for attachment in self.attachments:
                locks.append(attachment())
                attached.callback(locks[-1].detach)
            self._exit = attached.pop_all()
        self._locks = locks
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the lock off and free what is kept, as the end of the `with` does; nothing where it is off already."""
        self._exit.close()
        self._locks = []
        self.forget()

    @contextmanager
    def source(self, name: Hashable = None) -> Iterator[None]:
        """Run one forward of the source; its K and V are kept for `edit` until the next of the same name.

        The forward has one row, or one for each row of the edit. name: for example a step's number, to keep K and V of
        several steps; see `nbytes`.
        """
        self._kept.pop(name, None)
        kept: list[KeptKV] = [{} for _ in self._locks]
        with self._forwards(Mode.CAPTURE, None, kept) as forwards:
            yield
        if sum(forwards) != 1:
            raise RuntimeError(f"source() is for one forward, and {sum(forwards)} ran")
        self._kept[name] = kept

    @contextmanager
    def edit(self, alpha: float | Tensor | None = None, name: Hashable = None) -> Iterator[None]:
        """Run forwards of the edit, their background locked to the source's K and V by alpha.

        alpha: a number in [0, 1], or a tensor [] or [B]; None for the schedule's. A forward may have a multiple of B
        rows, branch by branch: [uncond, cond] of all samples. name: as given to `source`. Raises InputError where that
        has not run.
        """
        if name not in self._kept:
            raise InputError(f"no K and V of the source are kept under the name {name!r}: run it in source() first")
        kept = self._kept[name]
        with self._forwards(Mode.STORED, self._weight(alpha), kept) as forwards:
            yield
        if not sum(forwards):
            raise RuntimeError("edit() is for forwards of the edit, and none ran")
        if any(n and not layers for n, layers in zip(forwards, kept, strict=True)):
            raise RuntimeError("the source ran through another of the transformers than the edit")

    @contextmanager
    def along(self, alpha: float | Tensor | None = None) -> Iterator[None]:
        """Run forwards whose row 0 is the source; the other rows are locked to it by alpha, as in `edit`."""
        with self._forwards(Mode.IN_BATCH, self._weight(alpha), None) as forwards:
            yield
        if not sum(forwards):
            raise RuntimeError("along() is for forwards of the source with the edit, and none ran")

    def forget(self, name: Hashable = None) -> None:
        """Free the source's K and V of a name, or (None) all."""
        if name is None:
            self._kept.clear()
        else:
            self._kept.pop(name, None)

    @property
    def nbytes(self) -> int:
        """Size of the source's kept K and V, in bytes."""
        return sum(x.nbytes for kept in self._kept.values() for layers in kept for x in layers.values())

    def _weight(self, alpha: float | Tensor | None) -> Tensor:
        if alpha is None:
            alpha = self.alpha
        if not isinstance(alpha, torch.Tensor):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
                raise InputError(f"alpha must be a number between 0 and 1 or a tensor, got {alpha!r}")
            alpha = torch.full((1,), float(alpha))
        if alpha.ndim > 1:
            raise InputError(f"alpha must be a number or a tensor [] or [B], got one of {list(alpha.shape)}")
        return blend_weight(alpha.to(self.foreground.device).reshape(-1), self.foreground)

    @contextmanager
    def _forwards(self, mode: Mode, weight: Tensor | None, kept: list[KeptKV] | None) -> Iterator[list[int]]:
        """Run forwards in a mode; the list then has how many each of the transformers made."""
        if not self._locks:
            raise InputError("the lock is not attached: use it as `with kvf.attach(...) as kv`")
        if any(lock.state.mode is not Mode.OFF for lock in self._locks):
            raise InputError("source(), edit() and along() cannot be inside one another")
        ran: list[int] = []
        with ExitStack() as stack:
            for i, lock in enumerate(self._locks):
                places = None if kept is None else kept[i]
                # A transformer that the source did not run through has nothing to lock to, and must not run.
                own = Mode.OFF if mode is Mode.STORED and not places else mode
                stack.enter_context(lock.forward(own, weight, places, self.foreground.shape[1], True, self.ahead))
            yield ran
        ran += [lock.forwards for lock in self._locks]


def _foreground(
    foreground: Any, patch_size: tuple[int, int, int] | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The foreground's tokens bool [B or 1, S], and its latents [B or 1, T, h, w] where it was given by these."""
    if not isinstance(foreground, torch.Tensor) or foreground.dtype != torch.bool or not 1 <= foreground.ndim <= 4:
        given = f"{foreground.dtype} {list(foreground.shape)}" if isinstance(foreground, torch.Tensor) else foreground
        raise InputError(
            "foreground must be a bool tensor [S] or [B, S] of tokens, or [T, h, w] or [B, T, h, w] of latents, got "
            f"{given!s:.80}"
        )
    latents, foreground = None, (foreground if foreground.ndim in (2, 4) else foreground[None]).to(device)
    if foreground.ndim == 4:
        if patch_size is None:
            raise InputError("patch_size must be given for a foreground of latents: the transformer's config has none")
        latents, foreground = foreground, tokens_of(foreground, patch_size)
    if not foreground.numel() or not foreground.any(1).all():
        raise InputError(f"foreground {list(foreground.shape)} has a sample without any foreground token")
    if foreground.all():
        warn("the foreground is every token: nothing is locked")
    return foreground, latents


def _patch_size(transformer: nn.Module) -> tuple[int, int, int] | None:
    """Latents (t, h, w) of a token by the transformer's config, None where it does not say."""
    config = getattr(transformer, "config", None)
    size, time = getattr(config, "patch_size", None), getattr(config, "patch_size_t", None) or 1
    if isinstance(size, int):
        return time, size, size
    if isinstance(size, (tuple, list)) and len(size) in (2, 3):
        time, height, width = size if len(size) == 3 else (time, *size)
        return time, height, width
    return None


def _arch(
    transformer: nn.Module, family: str | ArchSpec | None, sample: Sample | None, tokens: int, ahead: int | None
) -> ArchSpec:
    """The description of the transformer. Raises InputError where it is not known."""
    if ahead is not None and not is_whole(ahead, 0):
        raise InputError(f"ahead must be a number of tokens of at least 0, got {ahead!r}")
    if family == "auto":
        if sample is None:
            raise InputError("family 'auto' needs sample: one forward's arguments by name, to check the lock with")
        return find_and_check(transformer, sample, tokens, ahead or 0)
    refuse_linear(transformer)
    arch = family if isinstance(family, ArchSpec) else arch_of(cast("Transformer", transformer), family)
    if arch.ahead and ahead is None:
        raise InputError(f"ahead must be given: {type(transformer).__name__} has tokens of other frames in front")
    return arch
