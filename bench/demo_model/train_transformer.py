"""The transformer's and the text encoder's training, jointly, on encoded clips.

First single latent frames (a fifth of a clip's tokens, and enough to learn what the words look like and where), then
the first few, then whole clips. Errors under the object count more: the background is most of a clip, and without this
the model spends its capacity there.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.demo_model.checkpoint import Log, TrainState, load_bundled, load_state, save_state
from bench.demo_model.data import LatentBank
from bench.demo_model.networks import (
    MAX_WORDS,
    SHIFT,
    TRAINED_WORDS,
    TrainingProcessor,
    embed,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    padding_bias,
)
from bench.demo_model.optimisers import make_optimisers, set_rate
from bench.demo_model.train_vae import trained_vae
from bench.demo_model.workers import Workers
from kvlock_fast.demo.scene import HELD_OUT

# (share of the time at which the phase ends, clips in a batch, latent frames)
PHASES = ((0.2, 96, 1), (0.32, 32, 3), (1.01, 24, 5))
LEARNING_RATE, MATRIX_RATE = 1e-3, 2e-3
OBJECT_WEIGHT = 4.0
TEXT_DROPOUT = 0.12
BANK, FIRST_BANK, BANK_PER_STEP = 10000, 1000, 4


class Example:
    """A batch ready for the model: noised latents, the velocity to predict, weights, timesteps, token ids."""

    def __init__(self, latents, cover, captions, tokenizer, rng: np.random.Generator) -> None:
        count = len(captions)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.sigmoid(torch.randn(count, generator=generator))
        self.sigma = SHIFT * t / (1 + (SHIFT - 1) * t)
        weight = self.sigma.view(-1, 1, 1, 1, 1)
        self.noisy, self.velocity = (1 - weight) * latents + weight * noise, noise - latents
        self.weight = (1 + OBJECT_WEIGHT * cover)[:, None]
        captions = ["" if rng.random() < TEXT_DROPOUT else caption for caption in captions]
        words = tokenizer(captions, padding="max_length", max_length=TRAINED_WORDS - 1, return_tensors="pt")
        self.ids = nn.functional.pad(words.input_ids, (0, 1))
        self.mask = nn.functional.pad(words.attention_mask, (0, 1))


def initialise(transformer: nn.Module) -> None:
    """Start as the identity plus small steps: output zero, modulation zero, gates at a half."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.condition_embedder.time_proj.weight)
    nn.init.zeros_(transformer.scale_shift_table)
    for block in transformer.blocks:
        nn.init.zeros_(block.scale_shift_table)
        block.scale_shift_table.data[:, [2, 5]] = 0.5


class Trainer:
    """Modules, bank, and one training step."""

    def __init__(self, vae: nn.Module, seed: int, workers: Workers) -> None:
        torch.manual_seed(seed)
        self.seed, self.workers, self.tokenizer = seed, workers, make_tokenizer()
        transformer, text_encoder = make_transformer(), make_text_encoder(len(self.tokenizer))
        initialise(transformer)
        self.processor = TrainingProcessor()
        for block in transformer.blocks:
            block.attn1.set_processor(self.processor)
            block.attn2.set_processor(self.processor)
            block.compile(dynamic=False)
        modules = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
        optimisers = make_optimisers(modules, is_inner, matrix_rate=MATRIX_RATE, rate=LEARNING_RATE)
        self.state = TrainState(modules, optimisers)
        # Seeds of different workers never meet: a worker's range is longer than any bank.
        self.bank = LatentBank(vae, 1 + 10**6 * (16 * seed + workers.rank))
        self.held_out = LatentBank(vae, HELD_OUT + 10**6)
        self.mean = self.std = None

    def fill(self, folder: Path) -> None:
        """Encode this worker's first clips (or read them), and fix the latents' statistics."""
        path = folder / f"bank_{self.workers.rank}.safetensors"
        if path.exists():
            self.bank.load(path)
        while len(self.bank) < FIRST_BANK // self.workers.count:
            self.bank.add(16)
        if not path.exists():
            self.bank.save(path)
        while len(self.held_out) < 64:
            self.held_out.add(16)
        self.mean, self.std = statistics(folder, self.bank, self.workers)

    def loss(self, bank: LatentBank, rng: np.random.Generator, count: int, times: int) -> torch.Tensor:
        """The squared error of the velocity on a random batch, weighted towards objects."""
        latents, cover, captions = bank.batch(rng, count, times)
        batch = Example((latents - self.mean) / self.std, cover, captions, self.tokenizer, rng)
        self.processor.bias = padding_bias(batch.mask, int(rng.choice([MAX_WORDS, 226, 512], p=[0.6, 0.2, 0.2])))
        modules = self.state.modules
        with torch.autocast("cpu", torch.bfloat16):
            text = embed(modules["text_encoder"], batch.ids, batch.mask)
            predicted = modules["transformer"](batch.noisy, batch.sigma * 1000, text, return_dict=False)[0]
        error = (predicted.float() - batch.velocity).square()
        return (error * batch.weight).sum() / (batch.weight.sum() * error.shape[1])

    def step(self, progress: float) -> torch.Tensor:
        """One update at this share of the time; the rate warms up, holds, and falls over the last 40 %."""
        state, workers = self.state, self.workers
        rng = np.random.default_rng([self.seed, workers.rank, state.step])
        _, count, times = next(phase for phase in PHASES if progress < phase[0])
        set_rate(state.optimisers, min(1.0, (state.step + 1) / 150) * float(np.clip((1 - progress) / 0.4, 0.02, 1)))
        for optimiser in state.optimisers:
            optimiser.zero_grad()
        loss = self.loss(self.bank, rng, max(1, count // workers.count), times)
        loss.backward()
        workers.average_gradients(state.modules.parameters())
        nn.utils.clip_grad_norm_(state.modules.parameters(), 1.0)
        for optimiser in state.optimisers:
            optimiser.step()
        state.step += 1
        if len(self.bank) < BANK // workers.count:
            self.bank.add(BANK_PER_STEP // workers.count)
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The loss on held-out clips with fixed noise."""
        return float(np.mean([self.loss(self.held_out, np.random.default_rng(i), 16, 5).item() for i in range(8)]))


def is_inner(name: str) -> bool:
    """Whether a weight is a matrix inside the transformer's blocks, which Muon suits."""
    return ".blocks." in name


def statistics(folder: Path, bank: LatentBank, workers: Workers) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents' mean and deviation per channel [1, C, 1, 1, 1], from the leader's bank; kept in a file."""
    path = folder / "statistics.safetensors"
    if workers.leads and not path.exists():
        mean, std = bank.statistics()
        save_file({"mean": torch.tensor(mean), "std": torch.tensor(std)}, path)
    workers.agree(0.0)
    tensors = load_file(path)
    return tuple(tensors[name].view(1, -1, 1, 1, 1) for name in ("mean", "std"))


def train_transformer(workers: Workers, work: Path, minutes: float, seed: int, resume: bool) -> None:
    """Train for `minutes` of wall time in total, on the autoencoder found below `work`."""
    # One shape of batch per phase, with and without gradients.
    torch._dynamo.config.recompile_limit = 64
    folder = work / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    log, budget = Log(folder / "log.jsonl"), minutes * 60
    trainer = Trainer(trained_vae(work), seed, workers)
    state = trainer.state
    if resume and not load_state(state, folder) and load_bundled(state.modules):
        state.reset_average()
    trainer.fill(folder)
    last, evaluated, losses = time.monotonic(), state.seconds, []
    while state.seconds < budget:
        losses.append(trainer.step(state.seconds / budget))
        now = time.monotonic()
        state.seconds, last = workers.agree(state.seconds + now - last), now
        if not workers.leads:
            continue
        state.update_average(0.998)
        if state.step % 50 == 0:
            loss = torch.stack(losses).mean().item()
            log(step=state.step, seconds=state.seconds, loss=loss, clips=len(trainer.bank) * workers.count)
            losses = []
        if state.seconds - evaluated > 240 or state.seconds >= budget:
            evaluated = state.seconds
            log(step=state.step, seconds=state.seconds, held_out_loss=trainer.held_out_loss())
            save_state(state, folder)
