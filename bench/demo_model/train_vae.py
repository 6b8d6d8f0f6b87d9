"""The autoencoder's training: crops of single frames, crops of short clips, whole clips; then the decoder alone.

The order is what makes it affordable on a CPU: a crop of one frame costs a seventieth of a clip, and most of what the
autoencoder has to know is in it. The decoder can be trained further once the transformer has learned the latents.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from bench.demo_model.checkpoint import Log, TrainState, load_bundled, load_state, save_state
from bench.demo_model.data import ClipPool, round_trip
from bench.demo_model.networks import make_vae
from bench.demo_model.optimisers import make_optimisers, set_rate
from bench.demo_model.workers import Workers
from kvlock_fast.demo.scene import HELD_OUT, sample_scene
from kvlock_fast.demo.world import render
from kvlock_fast.media.metrics import psnr

# (share of the time at which the phase ends, clips in a batch, frames, side): nine frames are the fewest that pass
# through every state of the causal caches.
PHASES = ((0.12, 64, 1, 32), (0.4, 12, 9, 32), (1.01, 4, 17, 64))
LEARNING_RATE, MATRIX_RATE = 2e-3, 3e-3
# An ELBO's weight for a decoder noise of about 26 dB; more makes latents easier to model and pictures softer.
KL_WEIGHT = 5e-5
# How much more an error in and around an object counts: small shapes are few pixels, and the judge looks at them.
OBJECT_WEIGHT = 3.0


def held_out_psnr(vae: nn.Module, clips: int) -> float:
    """Mean PSNR over the first held-out clips, one by one."""
    videos = [render(sample_scene(HELD_OUT + i)).video for i in range(clips)]
    return float(np.mean([psnr(round_trip(vae, v[None])[0], v) for v in videos]))


def channels_last(module: nn.Module) -> nn.Module:
    """Lay out convolution weights as oneDNN likes them (15 % faster steps here)."""
    for p in module.parameters():
        if p.ndim == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
    return module


def vae_loss(vae: nn.Module, video: torch.Tensor, *, encoder: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted squared error + weighted KL, plain squared error) of a batch in -1..1, sampling the posterior."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(encoder):
            mean, logvar = vae._encode(video).float().chunk(2, dim=1)
        logvar = logvar.clamp(-20, 10)
        latent = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        decoded = vae._decode(latent).sample
    error = (decoded.float() - video).square().mean(1, keepdim=True)
    weight = 1 + OBJECT_WEIGHT * near_strong_colour(video)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return (error * weight).sum() / weight.sum() + KL_WEIGHT * kl, error.mean()


def near_strong_colour(video: torch.Tensor) -> torch.Tensor:
    """Whether a pixel is within three pixels of one as saturated as only objects are; float [B, 1, F, H, W]."""
    high, low = video.amax(1, keepdim=True), video.amin(1, keepdim=True)
    strong = (high - low > 0.5 * (high + 1)).float()
    return F.max_pool3d(strong, (1, 7, 7), stride=1, padding=(0, 3, 3))


def train_vae(
    workers: Workers, work: Path, minutes: float, seed: int, resume: bool, decoder_only: bool = False
) -> None:
    """Train for `minutes` of wall time in total (resumed time counts); the state goes to `work`/vae.

    With `decoder_only`, start from what is there, leave the encoder as it is, and write to `work`/decoder.
    """
    torch.manual_seed(seed)
    folder = work / ("decoder" if decoder_only else "vae")
    vae = channels_last(make_vae())
    if decoder_only:
        vae.load_state_dict(trained_vae(work).state_dict())
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    scale = 0.5 if decoder_only else 1.0
    optimisers = make_optimisers(vae, is_inner, matrix_rate=scale * MATRIX_RATE, rate=scale * LEARNING_RATE)
    state = TrainState(nn.ModuleDict({"vae": vae}), optimisers)
    if resume and not load_state(state, folder) and load_bundled(state.modules):
        state.reset_average()
    torch.manual_seed(seed + 1000 * workers.rank + state.step)
    pool = ClipPool(seed + state.step + 10**6 * workers.rank)
    log, budget, last, evaluated = Log(folder / "log.jsonl"), minutes * 60, time.monotonic(), state.seconds
    while (progress := state.seconds / budget) < 1:
        error = vae_step(state, pool, workers, progress, decoder_only)
        now = time.monotonic()
        state.seconds, last = workers.agree(state.seconds + now - last), now
        if not workers.leads:
            continue
        state.update_average(0.995)
        if state.step % 50 == 0:
            log(step=state.step, seconds=state.seconds, train_psnr=float(-10 * torch.log10(error / 4)))
        if state.seconds - evaluated > 90 or state.seconds >= budget:
            evaluated = state.seconds
            log(step=state.step, seconds=state.seconds, held_out_psnr=held_out_psnr(state.averaged()["vae"], 8))
            save_state(state, folder)


def trained_vae(work: Path) -> nn.Module:
    """The autoencoder below `work` (averaged weights, the decoder's later training if any), else the bundled one."""
    vae = channels_last(make_vae())
    paths = [work / stage / "average.safetensors" for stage in ("decoder", "vae")]
    for path in filter(Path.exists, paths):
        vae.load_state_dict({name.removeprefix("vae."): value for name, value in load_file(path).items()})
        return vae.eval().requires_grad_(False)
    if not load_bundled(nn.ModuleDict({"vae": vae})):
        raise FileNotFoundError(f"no trained autoencoder: {paths[1]} is missing; run --stage vae first")
    return vae.eval().requires_grad_(False)


def is_inner(name: str) -> bool:
    """Whether a weight is neither the first nor the last of its half, which Muon should leave to AdamW."""
    return "conv_in" not in name and "conv_out" not in name and "quant_conv" not in name


def vae_step(state: TrainState, pool: ClipPool, workers: Workers, progress: float, decoder_only: bool) -> torch.Tensor:
    """One update at this share of the time; returns the squared error."""
    vae = state.modules["vae"]
    _, count, frames, side = PHASES[-1] if decoder_only else next(phase for phase in PHASES if progress < phase[0])
    set_rate(state.optimisers, min(1, (state.step + 1) / 100) * max(0.02, np.cos(np.pi / 2 * progress)))
    for optimiser in state.optimisers:
        optimiser.zero_grad()
    loss, error = vae_loss(vae, pool.batch(max(1, count // workers.count), frames, side), encoder=not decoder_only)
    loss.backward()
    workers.average_gradients(vae.parameters())
    nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    for optimiser in state.optimisers:
        optimiser.step()
    state.step += 1
    pool.add(2)
    return error.detach()
