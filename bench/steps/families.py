"""What a step is made of in each family, as its diffusers pipeline has it: for the contenders that are not ours.

Latents are [B, C, T, h, w] everywhere; a transformer may take them in another order.
"""

from typing import Any

import torch
from diffusers import CogVideoXPipeline
from torch import Tensor, nn

from kvlock_fast.profiling.subjects import usual_scheduler


class WanSteps:
    """Two forwards a step; the model predicts a flow's velocity."""

    blocks, text_tokens = "blocks", 0

    def __init__(self, model: Any, steps: int):
        self.model, self.scheduler = model, usual_scheduler(model.arch.family)
        self.scheduler.set_timesteps(steps, device=model.device)

    def forward(self, rows: Tensor, t: Tensor, text: Tensor, transformer: nn.Module) -> Tensor:
        """The prediction of rows [B, C, T, H, W]."""
        return transformer(rows.to(transformer.dtype), t.expand(len(rows)), text, return_dict=False)[0]

    def branches(
        self, x: Tensor, t: Tensor, prompt: Tensor, negative: Tensor, transformer: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional prediction, as the pipeline asks for them."""
        return self.forward(x, t, prompt, transformer), self.forward(x, t, negative, transformer)

    def levels(self, k: int) -> tuple[float, float]:
        """a and b of x = a x0 + b n at step k, read by the host."""
        sigma = self.scheduler.sigmas[k].item()
        return 1 - sigma, sigma

    def clean(self, k: int, x: Tensor, prediction: Tensor) -> Tensor:
        """The predicted clean latent."""
        return x - self.levels(k)[1] * prediction

    def advance(self, k: int, prediction: Tensor, x: Tensor) -> Tensor:
        """The scheduler's own step."""
        return self.scheduler.step(prediction, self.scheduler.timesteps[k], x, return_dict=False)[0]

    def video(self, x: Tensor) -> Tensor:
        """A view of the video's tokens of what leaves K-norm or V projection, tokens along dimension 1."""
        return x


class CogVideoXSteps(WanSteps):
    """One forward a step, unconditional rows first; text in front of the video; a prediction of type v."""

    blocks = "transformer_blocks"

    def __init__(self, model: Any, steps: int):
        super().__init__(model, steps)
        self.text_tokens = model.transformers[0].config.max_text_seq_length
        self.positions: tuple[Tensor, Tensor] | None = None

    def forward(self, rows: Tensor, t: Tensor, text: Tensor, transformer: nn.Module) -> Tensor:
        """As the pipeline's; positions are made once."""
        frames, height, width = rows.shape[2:]
        if transformer.config.use_rotary_positional_embeddings and self.positions is None:
            stride = self.model.geometry.spatial_stride
            self.positions = CogVideoXPipeline._prepare_rotary_positional_embeddings(
                self.model.pipe, height * stride, width * stride, frames, rows.device
            )
        rows = rows.transpose(1, 2).to(transformer.dtype).contiguous()
        out = transformer(rows, text, t.expand(len(rows)), image_rotary_emb=self.positions, return_dict=False)[0]
        return out.float().transpose(1, 2)

    def branches(
        self, x: Tensor, t: Tensor, prompt: Tensor, negative: Tensor, transformer: nn.Module
    ) -> tuple[Tensor, Tensor]:
        uncond, cond = self.forward(torch.cat([x, x]), t, torch.cat([negative, prompt]), transformer).chunk(2)
        return cond, uncond

    def levels(self, k: int) -> tuple[float, float]:
        kept = self.scheduler.alphas_cumprod[self.scheduler.timesteps[k].item()].item()
        return kept**0.5, (1 - kept) ** 0.5

    def clean(self, k: int, x: Tensor, prediction: Tensor) -> Tensor:
        a, b = self.levels(k)
        return a * x - b * prediction

    def video(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2) if x.ndim == 4 else x  # K has its heads in front of the tokens
        return x[:, self.text_tokens :]


STEPS = {"wan": WanSteps, "cogvideox": CogVideoXSteps}
