"""Every way of running a step gives what the loop's reference gives: the paper's formulas in plain torch."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvlock_fast import edits, pipeline
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.loop import reference
from kvlock_fast.loop.reference import denoise_reference
from tests.loop.test_graph import RecordedCapture
from tests.pipeline.test_pipeline import a_mask, a_video, call, unipc
from tests.support.tiny import tiny_wan


def keen_wan(scheduler=None, **changes):
    """A tiny Wan whose attentions count: what keys, values and texts are shows in the prediction."""
    pipe = tiny_wan(scheduler, **changes)
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("attn1", "attn2")):
            module.norm_q.weight.data *= 4
            module.to_out[0].weight.data *= 100
    return pipe


PROMPTS = ["a dog", "a blue circle", "a cat left"]


def latents_of(monkeypatch, model_of=lambda predict, parts: predict.model, **arguments):
    """An edit's latents as the loop makes them, and as the reference does of the same task and source."""
    runs, denoise = [], edits.denoise

    def kept(task, predict, source, parts, *rest):
        lock = replace(task.lock, compute="full", s_star_region=task.lock.projection_region)
        runs.append((replace(task, lock=lock), model_of(predict, parts), source.path, source.start, predict.solver))
        return denoise(task, predict, source, parts, *rest)

    monkeypatch.setattr(edits, "denoise", kept)
    out = call(arguments.pop("pipe", None) or keen_wan(), **arguments).latents
    return out, torch.cat([denoise_reference(*run) for run in runs])


def check(monkeypatch, **arguments) -> None:
    got, expected = latents_of(monkeypatch, **arguments)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


KVLOCK = LockConfig(kappa=4, tau=0.12, omega_floor=0.0, edit_path="free")
FORMAT = {"format": "native"}
INTERVALS = {"lock_interval": (0.2, 0.7), "guidance_interval": (0.1, 0.6)}
CALM = LockConfig(kappa=5, tau=0.4, min_predictions=2, edit_path="free")  # whose omega is 1 in some of the steps
WAYS = {
    "lockstep": {},
    "separate branches": {"lock": replace(KVLOCK, guidance_batching="separate")},
    "resident": {"cache": CacheConfig(tier="resident", **FORMAT)},
    "host": {"cache": CacheConfig(tier="host", **FORMAT)},
    "disk": {"cache": CacheConfig(tier="disk", **FORMAT)},
    "warm-up along": {"cache": CacheConfig(tier="resident", steps="dynamic", **FORMAT)},
    "several prompts": {"prompt": PROMPTS},
    "intervals": {"lock": replace(KVLOCK, **INTERVALS)},
    "intervals, separate branches": {"lock": replace(KVLOCK, **INTERVALS, guidance_batching="separate")},
    "intervals, stored": {"lock": replace(KVLOCK, **INTERVALS), "cache": CacheConfig(tier="resident", **FORMAT)},
    "intervals, foreground": {
        "lock": replace(KVLOCK, **INTERVALS, compute="foreground"),
        "cache": CacheConfig(tier="resident", **FORMAT),
    },
    "intervals, fast path": {"processors": "fast", "lock": replace(KVLOCK, **INTERVALS), "prompt": PROMPTS},
    "guidance of 1": {"lock": CALM},
    "guidance of 1, separate branches": {"lock": replace(CALM, guidance_batching="separate")},
    "guidance of 1, stored": {"lock": CALM, "cache": CacheConfig(tier="host", **FORMAT)},
    "guidance of 1, foreground": {
        "lock": replace(CALM, compute="foreground"),
        "cache": CacheConfig(tier="resident", **FORMAT),
    },
    "guidance of 1, several prompts": {"lock": CALM, "prompt": PROMPTS},
    "one prompt at a time": {"prompt": PROMPTS, "cache": CacheConfig(prompts_at_once=2)},
    "foreground": {"lock": replace(KVLOCK, compute="foreground"), "cache": CacheConfig(tier="resident", **FORMAT)},
    "foreground along": {"lock": replace(KVLOCK, compute="foreground"), "prompt": PROMPTS},
    "fast path": {"processors": "fast"},
    "fast path, stored": {"processors": "fast", "cache": CacheConfig(tier="resident", **FORMAT)},
    "no guidance": {"guidance_scale": 1.0},
    "two transformers": {"pipe": True},
    "unipc": {"pipe": unipc},
}


COUPLED = {"edit_path": "coupled", "source_noise": 2}


@pytest.mark.parametrize("path", ["free", "coupled"])
@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_is_the_reference(monkeypatch, tmp_path, way, path):
    arguments = {"lock": KVLOCK, "steps": 7} | WAYS[way]
    if path == "coupled":
        arguments["lock"] = replace(arguments["lock"], **COUPLED)
    pipe = arguments.pop("pipe", None)
    arguments["pipe"] = keen_wan(second=True) if pipe is True else keen_wan(pipe() if pipe else None)
    if "cache" in arguments and arguments["cache"].tier == "disk":
        arguments["cache"] = replace(arguments["cache"], root=str(tmp_path))
    check(monkeypatch, **arguments)


@pytest.mark.parametrize("path", ["free", "coupled"])
@pytest.mark.parametrize("tier", ["lockstep", "resident"])
def test_captured_steps_are_the_reference(monkeypatch, tier, path):
    capture = RecordedCapture()
    monkeypatch.setattr(pipeline, "choose_capture", lambda wish, device, why: None if why else capture)
    lock = replace(KVLOCK, **COUPLED) if path == "coupled" else KVLOCK
    check(monkeypatch, lock=lock, steps=9, graph="on", cache=CacheConfig(tier=tier, **FORMAT), prompt=PROMPTS[:2])
    assert capture.replays > 3


class InStretches:
    """A model whose predictions are those of overlapping stretches, mixed by their weights in fp64."""

    def __init__(self, predict, parts):
        self.model, self.stretches, self.weight = predict.model, [part.stretch for part in parts], None

    def __getattr__(self, name):
        return getattr(self.model, name)

    def predict(self, which, latents, timestep, told):
        whole = torch.zeros(latents.shape, dtype=torch.float64)
        tokens = self.weight.view(len(self.weight), latents.shape[2], -1)
        for stretch in self.stretches:
            with reference.locked(self.model, tokens[:, stretch.frames].flatten(1)):
                part = self.model.predict(which, latents[:, :, stretch.frames], timestep, told)
            whole[:, :, stretch.frames] += stretch.weights.double()[:, None, None] * part
        return whole.float()


def test_stretches_are_the_reference(monkeypatch):
    weighted = reference.locked

    @contextmanager
    def remembered(model, weight):
        if isinstance(model, InStretches):
            model.weight = weight
            yield
            return
        with weighted(model, weight):
            yield

    monkeypatch.setattr(reference, "locked", remembered)
    clip = {"video": a_video(17), "mask": a_mask(17), "clip_frames": 9, "clip_overlap": 3}
    for cache in (CacheConfig(tier="lockstep"), CacheConfig(tier="resident", **FORMAT)):
        for lock in (KVLOCK, replace(KVLOCK, **COUPLED)):
            check(monkeypatch, model_of=InStretches, lock=lock, steps=6, cache=cache, **clip)


LOCKS = st.builds(
    dict,
    alpha=st.sampled_from(["dynamic", 0.0, 0.3, 1.0]),
    omega=st.sampled_from(["dynamic", "constant"]),
    s_star=st.booleans(),
    s_star_region=st.sampled_from(["all", "foreground"]),
    tau=st.sampled_from([0.03, 0.12, 1.0]),
    b=st.sampled_from([0.7, 2.0]),
    variance_window=st.integers(2, 6),
    min_predictions=st.integers(2, 4),
    reduction=st.sampled_from(["elements", "mean"]),
    kappa=st.integers(0, 8),
    warmup_alpha=st.sampled_from([0.0, 0.6, 1.0]),
    alpha_floor=st.sampled_from([0.0, 0.2]),
    omega_floor=st.sampled_from([0.0, 1.0]),
    alpha_snap=st.sampled_from([0.5, 1.0]),
    detection=st.sampled_from(["foreground", "global"]),
    background_latents=st.sampled_from(["model", "source"]),
    zero_init_share=st.sampled_from([0.0, 0.2, 0.35]),
    foreground_mix=st.sampled_from([0.0, 0.5]),
    lock_interval=st.sampled_from([None, (0.0, 0.5), (0.3, 0.8)]),
    guidance_interval=st.sampled_from([None, None, (0.0, 0.5), (0.25, 1.0)]),
    guidance_skip=st.booleans(),
    edit_path=st.sampled_from(["free", "coupled"]),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(LOCKS, st.integers(2, 8), st.integers(1, 2), st.sampled_from([1.0, 4.0]))
def test_any_lock_is_the_reference(lock, steps, prompts, guidance_scale):
    config = LockConfig(**lock)
    with pytest.MonkeyPatch.context() as patch:
        check(patch, lock=config, steps=steps, prompt=PROMPTS[:prompts], guidance_scale=guidance_scale)


def test_the_reference_can_tell(monkeypatch):
    """A wrong alpha, mask or guidance shows."""
    _, expected = latents_of(monkeypatch, lock=KVLOCK, steps=6)
    size = float(expected.abs().max())
    alike = {"tau": 0.2}, {"alpha": 1.0}, {"variance_window": 3}, {"kappa": 2}, {"s_star": False}, {"reduction": "mean"}
    for changes in (*alike, {"background_latents": "model"}, COUPLED):
        other, _ = latents_of(monkeypatch, lock=replace(KVLOCK, **changes), steps=6)
        assert (other - expected).abs().max() > 1e-3 * size, changes
    moved, _ = latents_of(monkeypatch, lock=KVLOCK, steps=6, mask=np.roll(a_mask(), 8, axis=1))
    assert (moved - expected).abs().max() > 1e-3 * size
