"""Trains the small VACE of the table: blocks that show the demo model what an edit must keep.

    python -m bench.quality.vace_training --minutes 25          # --resume goes on where it was stopped
    python -m bench.quality.vace_training --export              # averaged weights to bench/quality/vace.safetensors

arXiv 2503.07598's context adapter: the demo model stays as it is, and copies of every second block learn to hand it
hints. They see the clip outside the mask, grey inside, and the mask, on edits of the table's own kinds and masks
(bench/quality/cases.py) drawn from the seeds that the demo model was trained on; the table's are held out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.demo_model.checkpoint import Log, TrainState, load_state, save_state
from bench.demo_model.data import latent_cover, to_model
from bench.demo_model.networks import MAX_WORDS, SHIFT, TrainingProcessor, embed, padding_bias
from bench.demo_model.optimisers import set_rate
from bench.quality.cases import QualityCase, quality_case
from bench.quality.run import weights_of
from bench.quality.vace_model import WEIGHTS, untrained_vace, vace_parts
from kvlock_fast.demo.scene import HELD_OUT
from kvlock_fast.edit import load_pipeline

# (share of the time at which the phase ends, clips in a batch, latent frames)
PHASES = ((0.35, 48, 1), (1.01, 12, 5))
LEARNING_RATE = 1e-3
OBJECT_WEIGHT, TEXT_DROPOUT = 4.0, 0.12
FIRST_BANK, BANK, BANK_EVERY = 320, 4000, 2
FIRST_SEED, HELD_OUT_SEED = 5 * 10**8, HELD_OUT + 3 * 10**6


class EditBank:
    """Encoded edits: of each the answer's latents, the kept part's, the mask, what to weigh, and the caption.

    Latents float16 [C, T, 8, 8], normalised as the pipeline does; masks bool [64, T, 8, 8].
    """

    def __init__(self, pipe, first_seed: int) -> None:
        self.pipe, self.first_seed = pipe, first_seed
        config = pipe.vae.config
        self.mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
        self.items: list[tuple[Tensor, Tensor, Tensor, Tensor, str]] = []
        self.grey: Tensor | None = None

    def __len__(self) -> int:
        return len(self.items)

    def encode(self, videos: Tensor) -> Tensor:
        """fp32 [B, 3, F, H, W] in -1..1 to normalised latents fp32."""
        with torch.no_grad():
            mode = self.pipe.vae._encode(videos).chunk(2, dim=1)[0]
        return (mode - self.mean) / self.std

    def add(self, count: int) -> None:
        """The next `count` edits."""
        number = len(self)
        cases = [quality_case(number + i, self.first_seed) for i in range(count)]
        answers = to_model(np.stack([case.edit.target.video for case in cases]))
        masks = torch.from_numpy(np.stack([case.edit.mask for case in cases]))[:, None]
        if self.grey is None:
            self.grey = self.encode(torch.zeros_like(answers[:1]))
        wanted, kept = self.encode(answers), self.encode(answers * ~masks)
        for case, *latents in zip(cases, wanted.half(), kept.half(), strict=True):
            self.items.append((*latents, self._as_channels(case), latent_cover(case.edit.target.mask),
                               case.whole_captions[1]))  # fmt: skip

    def _as_channels(self, case: QualityCase) -> Tensor:
        """As `WanVACEPipeline.prepare_masks` has them: every pixel under a latent is a channel."""
        mask = torch.from_numpy(case.edit.mask).float().expand(1, 3, -1, -1, -1)
        return self.pipe.prepare_masks(mask, [[]])[0].bool()

    def batch(self, rng: np.random.Generator, count: int, times: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Random edits' first latent frames: answers [B, C, T, 8, 8], shown [B, c, T, 8, 8], cover, captions."""
        picks = [self.items[i] for i in rng.integers(0, len(self), count)]
        wanted, kept, masks, cover = (torch.stack([item[i] for item in picks]) for i in range(4))
        grey = self.grey.expand(count, -1, -1, -1, -1)
        shown = torch.cat([kept.float(), grey, masks.float()], 1)[:, :, :times]
        return wanted[:, :, :times].float(), shown, cover[:, :times].float() / 255, [item[4] for item in picks]


def start_from_base(transformer: nn.Module) -> None:
    """VACE blocks begin as copies of those they hand their hints to, and say nothing yet."""
    for layer, block in zip(transformer.config.vace_layers, transformer.vace_blocks, strict=True):
        block.load_state_dict(transformer.blocks[layer].state_dict(), strict=False)
        nn.init.zeros_(block.proj_out.weight)
        nn.init.zeros_(block.proj_out.bias)


class Trainer:
    """Modules, banks, and one training step."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.pipe = untrained_vace(load_pipeline("demo").pipe)
        self.transformer = self.pipe.transformer.float().requires_grad_(False)
        start_from_base(self.transformer)
        parts = vace_parts(self.transformer).requires_grad_(True)
        self.processor = TrainingProcessor()
        for block in (*self.transformer.blocks, *self.transformer.vace_blocks):
            block.attn1.set_processor(self.processor)
            block.attn2.set_processor(self.processor)
        optimiser = torch.optim.AdamW(parts.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        optimiser.param_groups[0]["full_rate"] = LEARNING_RATE
        self.state = TrainState(parts, [optimiser])
        self.bank, self.held_out = EditBank(self.pipe, FIRST_SEED), EditBank(self.pipe, HELD_OUT_SEED)

    def loss(self, bank: EditBank, rng: np.random.Generator, count: int, times: int) -> Tensor:
        """The squared error of the velocity on a random batch, weighted towards objects."""
        latents, shown, cover, captions = bank.batch(rng, count, times)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62))))
        t = torch.sigmoid(torch.randn(count, generator=torch.Generator().manual_seed(int(rng.integers(2**62)))))
        sigma = SHIFT * t / (1 + (SHIFT - 1) * t)
        share = sigma.view(-1, 1, 1, 1, 1)
        captions = ["" if rng.random() < TEXT_DROPOUT else caption for caption in captions]
        words = self.pipe.tokenizer(captions, padding="max_length", max_length=MAX_WORDS - 1, return_tensors="pt")
        ids, mask = nn.functional.pad(words.input_ids, (0, 1)), nn.functional.pad(words.attention_mask, (0, 1))
        self.processor.bias = padding_bias(mask, 512)
        with torch.no_grad():
            text = embed(self.pipe.text_encoder, ids, mask)
        noisy = (1 - share) * latents + share * noise
        predicted = self.transformer(
            noisy, sigma * 1000, encoder_hidden_states=text, control_hidden_states=shown, return_dict=False
        )[0]
        weight = (1 + OBJECT_WEIGHT * cover)[:, None]
        error = (predicted - (noise - latents)).square()
        return (error * weight).sum() / (weight.sum() * error.shape[1])

    def step(self, progress: float) -> Tensor:
        """One update at this share of the time; the rate warms up, holds, and falls over the last 40 %."""
        state = self.state
        rng = np.random.default_rng([self.seed, state.step])
        _, count, times = next(phase for phase in PHASES if progress < phase[0])
        set_rate(state.optimisers, min(1.0, (state.step + 1) / 50) * float(np.clip((1 - progress) / 0.4, 0.02, 1)))
        for optimiser in state.optimisers:
            optimiser.zero_grad()
        loss = self.loss(self.bank, rng, count, times)
        loss.backward()
        nn.utils.clip_grad_norm_(state.modules.parameters(), 1.0)
        for optimiser in state.optimisers:
            optimiser.step()
        state.step += 1
        state.update_average(0.995)
        if len(self.bank) < BANK:
            self.bank.add(BANK_EVERY)
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The loss on held-out edits with fixed noise."""
        return float(np.mean([self.loss(self.held_out, np.random.default_rng(i), 12, 5).item() for i in range(4)]))


def train(work: Path, minutes: float, seed: int, resume: bool) -> None:
    """Train for `minutes` of wall time in total."""
    torch._dynamo.config.recompile_limit = 64
    trainer, log, budget = Trainer(seed), Log(work / "log.jsonl"), minutes * 60
    state = trainer.state
    if resume:
        load_state(state, work)
    while len(trainer.bank) < FIRST_BANK:
        trainer.bank.add(16)
    trainer.held_out.add(42)
    log(step=state.step, held_out_loss=trainer.held_out_loss())
    last, evaluated, losses = time.monotonic(), state.seconds, []
    while state.seconds < budget:
        losses.append(trainer.step(state.seconds / budget))
        now = time.monotonic()
        state.seconds, last = state.seconds + now - last, now
        if state.step % 20 == 0:
            log(step=state.step, seconds=state.seconds, loss=torch.stack(losses).mean().item(), edits=len(trainer.bank))
            losses = []
        if state.seconds - evaluated > 120 or state.seconds >= budget:
            evaluated = state.seconds
            log(step=state.step, seconds=state.seconds, held_out_loss=trainer.held_out_loss())
            save_state(state, work)


def export(work: Path, path: Path) -> None:
    """The averaged weights, in half precision."""
    weights = {name: value.half().contiguous() for name, value in load_file(work / "average.safetensors").items()}
    save_file(weights, path, metadata={"base": weights_of("demo")})


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="wall time in total")
    parser.add_argument("--work", type=Path, default=Path("out/train/vace"), help="folder for the state and the log")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--export", action="store_true", help="write the weights and train no further")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if not options.export:
        train(options.work, options.minutes, options.seed, options.resume)
    export(options.work, options.output)


if __name__ == "__main__":
    main()
