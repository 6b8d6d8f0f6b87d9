"""The schedule of `loop/schedule.py` for other people's loops, whose tensors have layouts of their own."""

from typing import Any

import torch
from torch import Tensor

from kvlock_fast.config import LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.kernels.epilogue_reference import cfg_projection_reference
from kvlock_fast.loop.schedule import Controller, compares_with_source, in_interval, zeroed_steps
from kvlock_fast.masks import ProjectedMask
from kvlock_fast.ops import guided_prediction
from kvlock_fast.parameters import is_whole


class LoopSchedule:
    """The loop's step, and alpha and omega in it.

    step: its number from 0, which `observe` counts on; s_star: that of the last `guide`, [B] fp32, None before one and
    where guidance is not calibrated; variance: that of the last `observe`, [B] fp32, None before one.
    """

    def __init__(
        self,
        lock: LockConfig,
        foreground: Tensor,
        num_steps: int | None,
        guidance_scale: float | None,
        patch_size: tuple[int, int, int] | None,
        latents: Tensor | None = None,
    ):
        """foreground: bool [B or 1, S]; latents: bool [B or 1, T, h, w], that of its latents, None for those of its
        tokens; num_steps, guidance_scale: None where the loop decides by itself.
        """
        if num_steps is not None and not is_whole(num_steps, 1):
            raise InputError(f"num_steps must be a whole number of at least 1, got {num_steps!r}")
        if lock.compute != "full" or lock.halo:
            raise InputError(
                f"compute {lock.compute!r}, halo {lock.halo}: only KVLockPipeline computes a part of the tokens"
            )
        if lock.edit_path == "coupled":
            raise InputError(f"edit_path {lock.edit_path!r}: only KVLockPipeline couples an edit to the source's path")
        if lock.source_noise not in (None, 1):
            raise InputError(f"source_noise {lock.source_noise!r}: a loop of your own draws the source's noise itself")
        others = lock.neighbour_values | ({"skip_share": lock.skip_share} if lock.skip_share else {})
        for name, value in others.items():
            raise InputError(
                f"{name} is {value!r}, which only KVLockPipeline has: a loop of your own decides it itself"
            )
        intervals = {"lock_interval": lock.lock_interval, "guidance_interval": lock.guidance_interval}
        for name, interval in intervals.items():
            if num_steps is None and interval is not None:
                raise InputError(f"num_steps must be given: {name} {interval} is a share of the steps")
        self.lock, self.num_steps = lock.in_own_loop(), num_steps
        self.foreground, self.latents = foreground, latents
        self.guidance_scale, self.patch_size = guidance_scale, patch_size
        self.restart()

    def restart(self, step: int = 0) -> None:
        """Begin another edit with nothing observed; step: its first, of a loop that others have begun."""
        self.step = self._first = step
        self.s_star: Tensor | None = None
        self.variance: Tensor | None = None
        self._controller: Controller | None = None

    @property
    def alpha(self) -> Tensor:
        """Weight of the source's K and V on the background in this step, [B] fp32; [1] before a batch is known."""
        return self._known().alpha(self.step)

    @property
    def omega(self) -> Tensor:
        """The guidance scale of this step, [B] fp32; [1] before a batch is known."""
        return self._known().omega(self.step, self._scale(), self._scale() > 1)

    def guide(self, cond: Tensor, uncond: Tensor | None = None) -> Tensor:
        """Guide by the lock's configuration: s* uncond + omega (cond - s* uncond), in cond's dtype.

        Predictions [B, ...] as the model gives them, laid out as for `observe`. Without uncond, cond as it is.
        """
        if self._is_zeroed:
            return torch.zeros_like(cond)
        if uncond is None:
            return cond
        if self.lock.stock_guidance or self._scale() <= 1:  # in the order of diffusers, whose bits they then are
            return uncond + self._scale() * (cond - uncond)
        self.s_star = torch.ones(cond.shape[0], device=cond.device)
        if self.lock.s_star:
            inside = self._where(cond) if self.lock.projection_region == "foreground" else None
            self.s_star = cfg_projection_reference(cond, uncond, inside=inside)
        return guided_prediction(cond, uncond, self.omega.expand(len(cond)), self.s_star)

    def observe(self, x0hat: Tensor, source_x0hat: Tensor | None = None) -> Tensor:
        """End a step: take in the clean latents that the guided prediction implies.

        x0hat: [B, C, T, h, w], an image's [B, C, h, w], or tokens [B, S, C]; source_x0hat: [1, ...], the source's own,
        where tau is "auto". Returns the variance [B] fp32 as `kvf.ops.windowed_variance`, NaN before there are two.
        """
        if self._controller is None or len(self._controller.ones) != x0hat.shape[0]:
            if self.step > self._first:
                raise InputError(f"x0hat is of {x0hat.shape[0]} samples, and those before of another number")
            self._controller = self._new(x0hat.shape[0], self._region(x0hat))
            for _ in range(self._first):
                self._controller.skip()
        self._check_step()
        if self._is_zeroed:
            self._controller.skip()
            self.step += 1
            return self._controller.no_variance
        if compares_with_source(self.lock):
            if source_x0hat is None:
                raise InputError("tau is 'auto', which needs source_x0hat: what the source's own forward predicts")
            source_x0hat = _as_video(source_x0hat)
        self.variance = self._controller.observe(_as_video(x0hat), source_x0hat)
        self.step += 1
        return self.variance

    def keep_background(self, latents: Tensor, source_latents: Tensor) -> Tensor:
        """The latents with the source's outside of the foreground; both laid out as for `observe`."""
        return torch.where(self._where(latents), latents, source_latents.to(latents.dtype))

    @property
    def _is_zeroed(self) -> bool:
        """Whether this step's prediction is taken as 0."""
        if self.num_steps is None:
            if self.lock.zero_init_share:
                raise InputError("num_steps must be given: zero_init_share is a share of the loop's steps")
            return False
        return self.step < zeroed_steps(self.lock, self.num_steps)

    def _known(self) -> Controller:
        if self._controller is not None:
            return self._controller
        # Nothing has been observed: of any one element what is asked now is the same.
        return self._new(1, self.foreground.new_ones((1, 1, 1, 1)))

    def _new(self, batch: int, region: Tensor) -> Controller:
        if self.num_steps is None:
            if self.lock.follows_variance:
                raise InputError("num_steps must be given: the schedule is one of the last steps of the loop")
            return Controller(self.lock, self.lock.variance_window, batch, region)
        self._check_step()
        return Controller(self.lock, self.num_steps, batch, region)

    def _check_step(self) -> None:
        if self.num_steps is not None and self.step >= self.num_steps:
            raise InputError(f"num_steps is {self.num_steps}, and that many steps have been observed: restart() first")

    def _scale(self) -> float:
        if self.guidance_scale is None:
            raise InputError("guidance_scale must be given: omega and guide() go by it")
        if self.num_steps is not None and not in_interval(self.lock.guidance_interval, self.num_steps, self.step):
            return 1.0
        return self.guidance_scale

    def _region(self, x: Tensor) -> Tensor:
        """The foreground bool [B or 1, T, h, w] of latents laid out as `_as_video` gives them."""
        video = _as_video(x)
        if x.ndim == 3:
            self._check_tokens(x, x.shape[1])
            return self.foreground[:, :, None, None]
        if self.patch_size is None:
            raise InputError(
                "patch_size must be given: the transformer's config does not say of what latents a token is"
            )
        latents = torch.zeros((1, *video.shape[2:]), dtype=torch.bool, device=x.device)
        mask = ProjectedMask(latents, self.foreground, self.patch_size)
        self._check_tokens(x, mask.grid[0] * mask.grid[1] * mask.grid[2])
        if self.latents is None:
            return mask.on_latents(self.foreground)
        if self.latents.shape[1:] != latents.shape[1:]:
            raise InputError(f"latents {list(x.shape)} do not fit the foreground's, {list(self.latents.shape)}")
        return self.latents

    def _check_tokens(self, x: Tensor, tokens: int) -> None:
        if tokens != self.foreground.shape[1]:
            raise InputError(
                f"latents {list(x.shape)} have {tokens} tokens (of patch_size {self.patch_size}), and the foreground "
                f"has {self.foreground.shape[1]}: latents are [B, C, T, h, w], [B, C, h, w] or [B, S, C]"
            )

    def _where(self, x: Tensor) -> Tensor:
        """The foreground, to be broadcast over latents in their own layout."""
        if x.ndim == 3:
            self._check_tokens(x, x.shape[1])
            return self.foreground[:, :, None]
        region = self._region(x)[:, None]
        return region if x.ndim == 5 else region[:, :, 0]


def _as_video(x: Any) -> Tensor:
    """Latents [B, C, T, h, w] of any layout; tokens as frames of one latent."""
    if not isinstance(x, Tensor) or x.ndim not in (3, 4, 5):
        given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"latents must be [B, C, T, h, w], [B, C, h, w] or [B, S, C], got {given}")
    if x.ndim == 3:
        return x.transpose(1, 2)[..., None, None]
    return x if x.ndim == 5 else x[:, :, None]
