"""Foreground-only computation against the whole: the same foreground, the source's background, less work."""

import itertools
import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import kvlock_fast as kvf
from kvlock_fast.conditioning import Conditioning
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputWarning
from kvlock_fast.locking.lock import Mode, TransformerLock, blend_weight
from kvlock_fast.loop.epilogue import DeviceStepper
from kvlock_fast.loop.foreground import Saturation, edit_region, mix_seam, seam_weights, sparse_steps
from kvlock_fast.masks import Geometry, project_mask
from kvlock_fast.models.wan import WanModel
from tests.pipeline.test_pipeline import a_mask, a_video, call, unipc
from tests.support.locks import paper
from tests.support.tiny import tiny_wan, untouched

SATURATED = {"alpha": 1.0, "s_star_region": "foreground", "background_latents": "source"}
"""Of a lock whose foreground does not see the background's hidden states."""
FORMATS = ("native", "bf16", "fp8_e4m3", "int8", "int4")


def both(pipe, steps=6, **changes):
    """The edit in full and by the foreground alone."""
    lock, arguments = {}, {}
    for name, value in changes.items():
        (lock if name in LockConfig.__dataclass_fields__ else arguments)[name] = value
    return [
        call(pipe, lock=paper(**{**SATURATED, **lock, "compute": compute}), steps=steps, **arguments)
        for compute in ("full", "foreground")
    ]


def assert_same(full, sparse, tolerance=1e-5):
    torch.testing.assert_close(sparse.latents, full.latents, rtol=tolerance, atol=tolerance)
    for a, b in zip(full.trace, sparse.trace, strict=True):
        assert (a.alpha, a.omega) == (pytest.approx(b.alpha, rel=1e-3), pytest.approx(b.omega, rel=1e-3))
        assert a.s_star == pytest.approx(b.s_star, rel=1e-3)


def tokens(out):
    """Computed of each sample at each step: [steps, B]."""
    return np.array([record.tokens for record in out.trace]).reshape(out.trace.steps, -1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tier", ["resident", "host", "disk"])
def test_a_stored_sources_edit_is_the_same(tmp_path, tier, format):
    cache = CacheConfig(tier=tier, format=format, root=str(tmp_path))
    full, sparse = both(tiny_wan(unipc()), prompt=["a dog", "a cat"], cache=cache)
    assert_same(full, sparse)
    inside = int(full.mask.tokens.sum())
    assert (tokens(sparse) == inside).all() and (tokens(full) == full.mask.tokens.shape[1]).all()
    assert sparse.trace.tokens == full.mask.tokens.shape[1] > inside


@pytest.mark.parametrize("batching", ["batched", "separate"])
@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["no-cfg", "cfg"])
@pytest.mark.parametrize("solver", [FlowMatchEulerDiscreteScheduler, unipc], ids=["euler", "unipc"])
def test_a_source_that_runs_along_is_the_same(solver, guidance, batching):
    full, sparse = both(tiny_wan(solver()), guidance_scale=guidance, guidance_batching=batching)
    assert_same(full, sparse)
    assert sparse.trace.forwards == full.trace.forwards


@pytest.mark.parametrize(
    "model",
    [{"second": True}, {"patch_size": (1, 1, 1)}, {"cross_attn_norm": False}, {"num_attention_heads": 3}],
    ids=lambda model: next(iter(model)),
)
def test_other_models_are_the_same(model):
    assert_same(*both(tiny_wan(**model), cache=CacheConfig(tier="resident")))


def test_expanded_timesteps_are_the_same():
    pipe = tiny_wan()
    pipe.register_to_config(expand_timesteps=True)
    assert_same(*both(pipe))


def test_half_precision_is_as_close_as_its_rounding():
    pipe = tiny_wan()
    pipe.transformer.to(torch.bfloat16)
    full, sparse = both(pipe)
    rounding = (call(tiny_wan(), lock=paper(**SATURATED), steps=6).latents - full.latents).abs().max()
    assert (full.latents - sparse.latents).abs().max() <= 2 * rounding


def test_the_bundled_model_is_the_same():
    pipe = kvf.KVLockPipeline.from_pretrained("demo", torch_dtype=torch.float32).pipe
    video = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    for cache in (CacheConfig(), CacheConfig(tier="resident", format="int4")):
        full, sparse = both(pipe, steps=4, cache=cache, video=video, prompt="a red circle moves left")
        assert_same(full, sparse, 1e-4)


@st.composite
def scenes(draw):
    """A mask that neither is empty nor covers every token, and latents of a size of its own."""
    patch = draw(st.sampled_from([(1, 2, 2), (1, 1, 1)]))
    grid = tuple(draw(st.integers(1, most)) for most in (3, 4, 5))
    total = int(np.prod(grid))
    inside = np.zeros(total, bool)
    inside[draw(st.permutations(range(total)))[: draw(st.integers(1, max(1, total - 1)))]] = True
    return patch, grid, torch.from_numpy(inside)


@given(scenes(), st.integers(0, 2), st.integers(0, 99))
def test_every_layer_of_every_forward_is_the_same(scene, halo, seed):
    """Block by block, both on the same source: rows of the foreground, and what the model says at the end."""
    patch, grid, inside = scene
    pipe = tiny_wan(patch_size=patch)
    model, transformer = WanModel(pipe), pipe.transformer
    mask = token_mask(grid, patch, inside)
    region = edit_region(mask, paper(**SATURATED, halo=halo))
    background = (~inside).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    latents, source = torch.randn(2, 1, 4, *(n * p for n, p in zip(grid, patch, strict=True)), generator=generator)
    text, timestep = torch.randn(1, 3, 16, generator=generator), torch.tensor(400.0)
    lock, seen = TransformerLock(transformer, model.arch, background=background), []
    handles = [block.register_forward_hook(lambda m, i, out: seen.append(out)) for block in transformer.blocks]
    kept = {}
    with torch.no_grad():
        with lock.forward(Mode.CAPTURE, kept=kept):
            model.predict(0, source, timestep, Conditioning(text=text))
        seen.clear()
        weight = blend_weight(torch.ones(1), inside[None])
        with lock.forward(Mode.STORED, weight, kept):
            whole = model.predict(0, latents, timestep, Conditioning(text=text))
        blocks, seen[:] = list(seen), []
        with lock.forward(Mode.FOREGROUND, kept=kept):
            part = model.predict_foreground(lock, latents, timestep, Conditioning(text=text), region, background, None)
    for full, sparse in zip(blocks, seen, strict=True):
        torch.testing.assert_close(sparse, full[:, region.computed], rtol=1e-4, atol=1e-5)
    computed = mask.on_latents((mask.distance(halo) <= halo).float())[:, None] > 0
    torch.testing.assert_close(part, torch.where(computed, whole, 0.0), rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    lock.detach()
    assert untouched(transformer) and type(transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def token_mask(grid, patch, inside):
    """A mask of these tokens."""
    pixels = inside.view(grid)
    for dim, size in enumerate(patch):
        pixels = pixels.repeat_interleave(size, dim)
    mask = project_mask(pixels, Geometry(1, 1, patch, causal=False))
    assert torch.equal(mask.tokens[0], inside)
    return mask


def test_the_background_is_the_source_path_in_every_step():
    pipe, seen = tiny_wan(), []
    advance = DeviceStepper.advance

    def watch(self, k, *rest):
        advance(self, k, *rest)
        seen.append((self.state.latents.clone(), self.path[k + 1].clone()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceStepper, "advance", watch)
        out = call(pipe, lock=paper(alpha=1.0, compute="foreground"))
    outside = ~out.mask.latents[:, None].expand(out.latents.shape)
    assert len(seen) == 5
    for latents, source in seen:
        assert torch.equal(latents[outside], source.expand_as(latents)[outside])


def test_steps_below_one_run_whole():
    """The warm-up is sparse, the window whole as alpha is small there; a sample at a time where they differ."""
    full, sparse = both(tiny_wan(), alpha="dynamic", tau=0.5, kappa=3, steps=8, prompt=["a dog", "a cat"])
    assert_same(full, sparse)
    few, every = int(full.mask.tokens.sum()), full.mask.tokens.shape[1]
    assert (tokens(sparse)[:5] == few).all() and (tokens(sparse)[5:] == every).all()


@pytest.mark.parametrize("cache", [CacheConfig(), CacheConfig(tier="resident", format="native")], ids=["along", "kept"])
def test_samples_differ_in_what_is_computed(cache):
    """tau between the samples' variances: one is saturated, the other is not."""
    prompts = ["a dog", "a cat right over dark stripes", "a red circle"]
    changes = {"alpha": "dynamic", "kappa": 6, "steps": 8, "prompt": prompts, "cache": cache}
    tau = float(np.median([r.variance for r in call(tiny_wan(), steps=8, prompt=prompts).trace if r.step == 5]))
    full, sparse = both(tiny_wan(), tau=tau, **changes)
    assert_same(full, sparse, 1e-4)
    counts = tokens(sparse)
    assert any(len(set(row)) == 2 for row in counts), "some step has samples of both kinds"
    alphas = np.array([r.alpha for r in sparse.trace]).reshape(counts.shape)
    assert np.array_equal(counts < full.mask.tokens.shape[1], alphas == 1)


@pytest.mark.parametrize("solver", [FlowMatchEulerDiscreteScheduler, unipc], ids=["euler", "unipc"])
@pytest.mark.parametrize(
    "changes", [{"alpha_lag": 2}, {"alpha_snap": 0.6}, {"alpha_lag": 2, "alpha_snap": 0.3}], ids=str
)
def test_lag_and_snap(solver, changes):
    tau = float(np.median([r.variance for r in call(tiny_wan(), steps=9).trace if r.step >= 3])) * 1.1
    full, sparse = both(tiny_wan(solver()), alpha="dynamic", tau=tau, kappa=6, steps=9, **changes)
    assert_same(full, sparse, 1e-4)
    variance = {r.step: r.variance for r in sparse.trace}
    lag, snap = changes.get("alpha_lag", 1), changes.get("alpha_snap", 1.0)
    for record in sparse.trace:
        ratio = variance.get(record.step - lag)
        expected = 1.0 if record.step < 3 or ratio is None or ratio / tau >= snap else ratio / tau
        assert record.alpha == pytest.approx(expected, rel=1e-3)
        assert (record.tokens < sparse.trace.tokens) == (record.alpha == 1)


def test_tau_auto_still_watches_the_source():
    for cache in (CacheConfig(), CacheConfig(tier="resident", format="native")):
        full, sparse = both(tiny_wan(), alpha="dynamic", tau="auto", kappa=3, steps=7, cache=cache)
        assert_same(full, sparse, 1e-4)


def test_a_scheduler_that_is_called_itself_is_the_same(monkeypatch):
    from kvlock_fast.loop import solver

    monkeypatch.setattr(solver, "_table", lambda *_: None)
    with pytest.warns(InputWarning, match="has no table"):
        assert_same(*both(tiny_wan(unipc()), alpha="dynamic", tau=0.5, kappa=3, alpha_lag=2))


def test_a_cache_that_holds_more_than_the_background(tmp_path):
    """The mask grew since: tokens that are kept, but foreground now, are not seen as background."""
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    arguments = {"source_prompt": "a red circle", "num_inference_steps": 5}
    generator = torch.Generator().manual_seed(1)
    lock = paper(alpha=1.0)
    pipe.invert(a_video(), a_mask(), tmp_path / "cache", generator=generator, lock=lock, **arguments)
    larger = a_mask()
    larger[:, :, :32] = True
    edits = [
        pipe(a_video(), larger, prompt="a dog", lock=paper(**SATURATED, compute=compute), output="latent",
             cache=CacheConfig(path=str(tmp_path / "cache")), **arguments)
        for compute in ("full", "foreground")
    ]  # fmt: skip
    assert_same(*edits)
    assert tokens(edits[1]).max() == int(edits[0].mask.tokens.sum()) > int(project(a_mask()).tokens.sum())


def project(mask):
    return project_mask(torch.from_numpy(mask), WanModel(tiny_wan()).geometry)


@pytest.mark.parametrize("seam", ["cut", "blend"])
@pytest.mark.parametrize("tier", ["lockstep", "resident"])
def test_a_halo_is_the_same_in_full(seam, tier):
    cut = both(tiny_wan())[1]
    full, sparse = both(tiny_wan(), halo=1, seam=seam, cache=CacheConfig(tier=tier, format="native"))
    assert_same(full, sparse)
    near = (full.mask.distance(1) == 1)[0]
    assert tokens(sparse).max() == int((full.mask.tokens[0] | near).sum()) > tokens(cut).max()
    ring = full.mask.on_latents(near[None])[:, None].expand(full.latents.shape)
    assert not torch.allclose(sparse.latents[ring], cut.latents[ring], atol=1e-3)
    beyond = ~(ring | full.mask.on_latents(full.mask.tokens)[:, None])
    assert torch.equal(sparse.latents[beyond], cut.latents[beyond])


@given(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)), st.integers(0, 4), st.integers(0, 999))
def test_distance_by_brute_force(grid, most, seed):
    inside = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < 0.15
    mask = token_mask(grid, (1, 1, 1), inside.flatten())
    found = mask.distance(most).view(grid)
    for t, i, j in itertools.product(*map(range, grid)):
        near = [max(abs(i - y), abs(j - x)) for y, x in inside[t].nonzero().tolist()]
        assert found[t, i, j] == min([*near, most + 1])
    lock = paper(**SATURATED, halo=most, seam="blend")
    weights = seam_weights(mask, lock)
    if most == 0:
        assert weights is None
    else:
        torch.testing.assert_close(weights[0, 0], 1 - found.float() / (most + 1))
        assert torch.equal(seam_weights(mask, paper(**SATURATED, halo=most))[0, 0], (found <= most).float())


def test_a_mixed_seam_is_one_of_both_at_its_ends():
    latents, source = torch.randn(2, 1, 3, 1, 2, 4).unbind(0)
    weights = torch.tensor([0.0, 0.25, 0.5, 1.0]).expand(1, 1, 1, 2, 4)
    mixed = mix_seam(latents, source, weights)
    assert torch.equal(mixed[..., 0], source[..., 0]) and torch.equal(mixed[..., 3], latents[..., 3])
    torch.testing.assert_close(mixed, torch.lerp(source, latents, weights))


def test_it_computes_less():
    """The transformer's products and attention, counted by torch: the share of the tokens, and what text costs."""
    pipe, counts = tiny_wan(ffn_dim=256, num_layers=4), []
    mask = np.zeros((9, 64, 96), bool)
    mask[:, 16:32, 16:48] = True
    for compute in ("full", "foreground"):
        lock = paper(**SATURATED, compute=compute)
        with FlopCounterMode(display=False) as flops:
            out = call(pipe, lock=lock, video=a_video(9, 64, 96), mask=mask, cache=CacheConfig(tier="resident"))
        counts.append(sum(flops.get_flop_counts()["Global"].values()))
        share = out.mask.share
    with FlopCounterMode(display=False) as flops, pytest.raises(KeyboardInterrupt):
        call(pipe, lock=lock, video=a_video(9, 64, 96), mask=mask, progress=stop_at("denoise", 1),
             cache=CacheConfig(tier="resident"))  # fmt: skip
    before = sum(flops.get_flop_counts()["Global"].values())  # encoding, the source's pass, a first step
    full, sparse = (count - before for count in counts)
    assert share < 0.2 and sparse / full < share + 0.1


def stop_at(stage, step):
    def progress(name, done, total):
        if (name, done) == (stage, step):
            raise KeyboardInterrupt

    return progress


REFUSED = {
    "layers": ({"layers": (0, 2)}, r"needs every layer locked: layers \[0, 2\] leaves out some of 3"),
    "s-star": ({"s_star_region": "all"}, "does not go with s_star_region 'all'"),
    "detection": ({"detection": "global"}, "does not go with detection 'global'"),
    "alpha": ({"alpha": 0.5}, "does not go with alpha 0.5"),
    "unlocked": ({"alpha": 0.0}, "does not go with alpha 0.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_go_with_is_refused(case):
    changes, reason = REFUSED[case]
    with pytest.raises(ValueError, match=f"compute 'foreground' {reason}"):
        call(tiny_wan(), lock=paper(compute="foreground", **changes))
    if case in ("detection", "unlocked"):
        preset = {"detection": "global-detection", "unlocked": "cfg"}[case]
        with pytest.raises(ValueError, match=reason):
            LockConfig.preset(preset, compute="foreground")


def test_without_s_star_its_region_does_not_matter():
    assert paper(compute="foreground", s_star=False, s_star_region="all").projection_region == "all"
    assert paper(compute="foreground").projection_region == "foreground"
    assert paper(compute="foreground").as_dict()["s_star_region"] == "foreground"
    assert paper().as_dict()["s_star_region"] == "all"


def test_a_replaced_forward_is_refused():
    pipe = tiny_wan()
    own = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(kvf.InputError, match="whose forward was replaced"):
        call(pipe, lock=paper(compute="foreground"))
    assert untouched(pipe.transformer)


def test_accelerates_hook_brings_the_weights():
    """As `enable_model_cpu_offload` has it: the hook's work is done around the parts."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Bring(ModelHook):
        calls = ()

        def pre_forward(self, module, *args, **kwargs):
            self.calls += ("before",)
            return args, kwargs

        def post_forward(self, module, output):
            self.calls += ("after",)
            return output

    pipe, hook = tiny_wan(), Bring()
    expected = call(pipe, lock=paper(alpha=1.0, compute="foreground")).latents
    add_hook_to_module(pipe.transformer, hook)
    assert torch.equal(call(pipe, lock=paper(alpha=1.0, compute="foreground")).latents, expected)
    assert hook.calls == ("before", "after") * (len(hook.calls) // 2) and len(hook.calls) == 2 * 2 * 5


def test_a_mask_of_everything_goes_with_a_halo():
    everything, full = np.ones_like(a_mask()), paper(background_latents="source")
    with pytest.warns(InputWarning, match="compute 'foreground' has nothing to leave out"):
        found = call(tiny_wan(), mask=everything, lock=paper(compute="foreground", halo=1))
    assert torch.equal(found.latents, call(tiny_wan(), mask=everything, lock=full).latents)


def test_a_mask_of_everything_runs_whole():
    everything = np.ones_like(a_mask())
    with pytest.warns(InputWarning, match="compute 'foreground' has nothing to leave out"):
        out = call(tiny_wan(), lock=paper(compute="foreground"), mask=everything)
    assert (tokens(out) == out.trace.tokens).all()


def test_captured_and_compiled_it_is_the_same(monkeypatch):
    from kvlock_fast import pipeline
    from tests.loop.test_graph import RecordedCapture

    lock = paper(tau=0.5, kappa=3, compute="foreground", halo=1, seam="blend")
    arguments = {"lock": lock, "steps": 9, "prompt": ["a dog", "a cat"]}
    for cache in (CacheConfig(), CacheConfig(tier="resident")):
        pipe = tiny_wan(unipc())
        eager = call(pipe, cache=cache, **arguments)
        capture = RecordedCapture()
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "choose_capture", lambda wish, device, why, capture=capture: capture)
            replayed = call(pipe, cache=cache, **arguments)
        assert capture.captures == 2 and capture.replays >= 4
        assert torch.equal(replayed.latents, eager.latents)
        assert np.array_equal(tokens(replayed), tokens(eager)) and replayed.trace.forwards == eager.trace.forwards
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="aot_eager", fullgraph=True))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = call(tiny_wan(unipc(), num_layers=12), cache=cache, compile="regional", **arguments)
    expected = call(tiny_wan(unipc(), num_layers=12), cache=cache, **arguments)
    torch.testing.assert_close(compiled.latents, expected.latents, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_who_is_saturated():
    lock = paper(kappa=3)
    watch = Saturation(lock, 6, 2, torch.device("cpu"))
    assert watch.samples(0) == watch.samples(2) == (0, 1)
    watch.publish(3, torch.tensor([1.0, 0.999]))
    assert watch.samples(3) == (0,)
    late = Saturation(paper(kappa=3, alpha_lag=2, warmup_alpha=0.5), 6, 1, torch.device("cpu"))
    assert late.samples(0) == ()
    late.publish(3, torch.ones(1)), late.publish(4, torch.zeros(1))
    assert late.samples(3) == (0,) and late.samples(4) == ()


@given(
    st.integers(1, 12),
    st.integers(0, 14),
    st.sampled_from([0.0, 1.0]),
    st.integers(1, 2),
    st.sampled_from(["dynamic", 1.0]),
)
def test_the_plan_counts_what_a_run_computes(steps, kappa, warmup, lag, alpha):
    """By an outside count: of the steps whose alpha is decided before, and of those that the variance may saturate."""
    lock = paper(alpha=alpha, kappa=kappa, warmup_alpha=warmup, alpha_lag=lag, compute="foreground")
    decided = [k for k in range(steps) if k < steps - kappa or k < 1 + lag]
    surely = steps if alpha == 1.0 else len(decided) * (warmup == 1.0)
    most = steps if alpha == 1.0 else surely + steps - len(decided)
    assert sparse_steps(lock, steps) == (surely, most)
    assert sparse_steps(paper(alpha=alpha, kappa=kappa), steps) is None


def test_plan_says_how_many_tokens(capsys):
    from kvlock_fast.cli import main

    arguments = ["plan", "--config", "wan-1.3b", "--mask-share", "0.2", "--compute", "foreground", "--json"]
    assert main([*arguments, "-"]) == 0
    found = json.loads(capsys.readouterr().out)["tokens_computed"]
    assert found == {"full_step": 32760, "foreground_step": 6552, "foreground_steps_at_least": 25,
                     "foreground_steps_at_most": 45}  # fmt: skip
    assert main(arguments[:-1]) == 0
    assert "tokens 6552 of 32760 computed in 25 to 45 steps, as alpha turns out, of 45" in capsys.readouterr().out


def test_a_source_along_keeps_a_step_of_its_keys():
    from kvlock_fast.planning.find_model import find_model
    from kvlock_fast.planning.job import Job

    sizes = find_model("wan-1.3b"), 81, 480, 832, 26208, 50, 50
    sparse, full = Job(*sizes, sparse_steps=(30, 50)), Job(*sizes)
    more = sparse.needed("lockstep", None, 1, True).gpu - full.needed("lockstep", None, 1, True).gpu
    assert more >= 26208 * 1536 * 2 * 2 * 30 and more < 1.001 * 26208 * 1536 * 2 * 2 * 30
    assert sparse.needed("host", "int4", 1, True) == full.needed("host", "int4", 1, True)


def test_a_processor_of_the_users_own_is_refused():
    pipe = tiny_wan()

    class Mine(type(pipe.transformer.blocks[1].attn1.processor)):
        pass

    pipe.transformer.blocks[1].attn1.set_processor(Mine())
    with pytest.raises(kvf.InputError, match="would leave out Mine, an attention processor"):
        call(pipe, lock=paper(compute="foreground"))
    assert untouched(pipe.transformer)


def test_steps_without_a_forward_compute_nothing():
    out = call(tiny_wan(), lock=paper(zero_init_share=0.5))
    assert tokens(out)[:2].max() == 0 and tokens(out)[2:].min() == out.trace.tokens


def test_nan_far_from_the_mask_is_the_sources_again_with_a_halo_too(monkeypatch):
    predict = WanModel.predict

    def broken(self, which, latents, timestep, text):
        velocity = predict(self, which, latents, timestep, text).clone()
        velocity[..., -1, -1] = float("nan")
        return velocity

    monkeypatch.setattr(WanModel, "predict", broken)
    mask = np.zeros((9, 64, 96), bool)
    mask[:, :16, :16] = True
    for halo in (0, 1):
        lock = paper(alpha=1.0, s_star=False, background_latents="source", halo=halo)
        assert call(tiny_wan(), lock=lock, video=a_video(9, 64, 96), mask=mask).latents.isfinite().all()
