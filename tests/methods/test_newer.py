"""APG, RF-Solver, UniEdit-Flow and KV-Edit without inversion: each against its formula, or against diffusers."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlock_fast as kvf
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.locking.foreground import View, attend
from kvlock_fast.loop.reference import locked
from kvlock_fast.loop.solver import Solver
from kvlock_fast.methods.apg import ProjectedGuidance
from kvlock_fast.methods.rfsolver import with_values_of_source
from kvlock_fast.methods.uniedit import fused_velocity
from tests.families.cases.flux import CASES as FLUX
from tests.methods.test_neighbours import FROM_INVERTED, attention64, clean_of, lock
from tests.pipeline.test_pipeline import call
from tests.support.locks import paper
from tests.support.tiny import tiny_cogvideox, tiny_wan

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def setting(steps):
    """A tiny model in fp64, its sigmas, and what it says at x, step k and a text."""
    pipe, scheduler = tiny_wan(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    model = kvf.KVLockPipeline.from_pipe(pipe).model
    texts = model.encode_prompts(["a red circle", "a dog", "a blue circle"]).double().split(1)
    clean, transformer, sigmas = clean_of(pipe).double(), pipe.transformer.double(), scheduler.sigmas.double()

    @torch.no_grad()
    def velocity(x, sigma, text):
        return transformer(x, (1000 * sigma)[None].float(), encoder_hidden_states=text).sample

    return clean, sigmas, velocity, texts


# APG.


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.floats(1.1, 9),
    st.sampled_from([-0.5, 0.0, 0.3]),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([0.3, 1.0, 50.0]),
    st.integers(0, 10**6),
)
def test_apg_is_diffusers_own(samples, scale, momentum, parallel, norm, seed):
    """Three steps of diffusers' guider in the paper's form, where omega counts from the conditional prediction."""
    torch.manual_seed(seed)
    shape = (samples, 3, 2, 4, 4)
    size = (shape[1] * shape[2] * shape[3] * shape[4]) ** 0.5
    total = MomentumBuffer(momentum)
    ours = ProjectedGuidance(momentum, parallel, norm)
    for _ in range(3):
        cond, uncond = torch.randn(2, *shape)
        expected = normalized_guidance(cond, uncond, scale - 1, total, parallel, norm * size, True)
        torch.testing.assert_close(cond + ours(cond, uncond, scale), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_wan, tiny_cogvideox], ids=["flow", "diffusion"])
def test_apg_without_its_own_is_plain_guidance(make):
    plain = call(make(), lock="cfg", steps=4, guidance_scale=4.0)
    bare = lock("apg", apg_momentum=0.0, apg_parallel=1.0, apg_norm=1e6)
    out = call(make(), lock=bare, steps=4, guidance_scale=4.0)
    torch.testing.assert_close(out.latents, plain.latents, **CLOSE)
    assert out.trace.forwards == plain.trace.forwards
    other = call(make(), lock=lock("apg", apg_norm=0.5), steps=4, guidance_scale=4.0)
    assert not torch.allclose(other.latents, plain.latents, atol=1e-3)
    unguided = call(make(), lock="apg", steps=4, guidance_scale=1.0)
    torch.testing.assert_close(unguided.latents, call(make(), lock="cfg", steps=4, guidance_scale=1.0).latents, **CLOSE)


def test_apg_guides_the_clean_latents():
    """Both branches' clean latents go into diffusers' guider by hand, in fp64, and Euler steps from what comes out."""
    steps, scale = 4, 5.0
    ours = lock("apg", apg_norm=0.5)
    out = call(tiny_wan(), lock=ours, steps=steps, guidance_scale=scale, negative_prompt="a dog")
    clean, sigmas, velocity, (_, negative, prompt) = setting(steps)
    x = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).double()
    total, largest = MomentumBuffer(-0.5), 0.5 * clean.numel() ** 0.5
    for k in range(steps):
        both = (x - sigmas[k] * velocity(x, sigmas[k], text) for text in (prompt, negative))
        predicted = normalized_guidance(*both, scale - 1, total, 0.0, largest, True)
        x = x + (sigmas[k + 1] - sigmas[k]) * (x - predicted) / sigmas[k]
    torch.testing.assert_close(out.latents.double(), x, **CLOSE)


# RF-Solver.


def taylor(x, low, high, velocity):
    """RF-Solver's step from one sigma to another, as the paper writes it."""
    h, v = high - low, velocity(x, low)
    return x + h * v + h**2 / 2 * (velocity(x + h / 2 * v, low + h / 2) - v) / (h / 2)


def test_rf_solver_is_the_papers_algorithm():
    steps, scale = 4, 3.0
    plain = lock("rf-solver", inject_share=0.0)
    out = call(tiny_wan(), lock=plain, steps=steps, guidance_scale=scale, negative_prompt="a dog")
    x, sigmas, velocity, (source, negative, prompt) = setting(steps)

    def guided(x, sigma):
        uncond = velocity(x, sigma, negative)
        return uncond + scale * (velocity(x, sigma, prompt) - uncond)

    for k in reversed(range(steps)):
        x = taylor(x, sigmas[k + 1], sigmas[k], lambda x, sigma: velocity(x, sigma, source))
    for k in range(steps):
        x = taylor(x, sigmas[k], sigmas[k + 1], guided)
    torch.testing.assert_close(out.latents.double(), x, **CLOSE)
    assert out.trace.forwards == steps * 2 + steps * 2 * 3


def test_values_are_the_sources():
    q, k, v = torch.randn(3, 3, 6, 2, 4, dtype=torch.float64)
    out = with_values_of_source(q, k, v, torch.zeros(0))
    for row in range(3):
        expected, _ = attention64(q[row].numpy(), k[row].numpy(), v[0].numpy())
        torch.testing.assert_close(out[row], torch.from_numpy(expected))


def test_the_first_steps_inject():
    none, some, all = (
        call(tiny_wan(), lock=lock("rf-solver", inject_share=share), steps=4).latents for share in (0.0, 0.5, 1.0)
    )
    assert not torch.allclose(none, some, atol=1e-4) and not torch.allclose(some, all, atol=1e-4)


# UniEdit-Flow.


def uni_edit(edited, source, strength):
    """The velocity as the paper's FLUX code has it, one sample at a time."""
    out = []
    for target, own in zip(edited, source, strict=True):
        d = target - own
        mean = d.abs().mean(0)
        m = (mean - mean.min()) / (mean.max() - mean.min())
        out.append(m * target + (1 - m) * own + (m + 1) * strength * d)
    return torch.stack(out)


def test_the_fused_velocity():
    edited, source = torch.randn(2, 3, 4, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(fused_velocity(edited, source, 5.0), uni_edit(edited, source, 5.0))
    assert torch.equal(fused_velocity(source, source, 5.0), source)


def test_uniedit_is_the_papers_algorithm():
    steps = 5
    out = call(tiny_wan(), lock="uniedit-flow", steps=steps, guidance_scale=7.0)
    x, sigmas, velocity, (source, _, prompt) = setting(steps)
    v = velocity(x, sigmas[steps], source)
    for k in reversed(range(2, steps)):
        h = sigmas[k] - sigmas[k + 1]
        v = velocity(x + h * v, sigmas[k], source)
        x = x + h * v
    for k in range(2, steps):
        fused = uni_edit(velocity(x, sigmas[k], prompt), velocity(x, sigmas[k], source), 5.0)
        x = x + (sigmas[k + 1] - sigmas[k]) * fused
    torch.testing.assert_close(out.latents.double(), x, **CLOSE)
    assert out.trace.steps == 3 and out.trace.forwards == 4 + 2 * 3


def test_with_equal_prompts_uniedit_returns_to_the_source():
    """Then it is the inversion undone."""
    out = call(tiny_wan(), "a red circle", lock="uniedit-flow", steps=40)
    clean = clean_of(tiny_wan())
    assert (out.latents - clean).square().mean() < 1e-3 * clean.square().mean()


# KV-Edit without inversion.


def test_kv_edit_without_inversion_is_the_papers_algorithm():
    """z_tgt = z + z_src - x_src, z += dt (v_tgt - v_src) on the foreground, K and V from the forward of v_src."""
    steps, pipe = 6, tiny_wan()
    out = call(pipe, lock=lock("kv-edit-inversion-free", background_bias=0.0), steps=steps, guidance_scale=1.0)
    model, solver = kvf.KVLockPipeline.from_pipe(pipe).model, Solver(pipe.scheduler, steps, torch.device("cpu"))
    clean, inside = clean_of(pipe), out.mask.latents[:, None]
    noise = model.draw_noise(clean.shape, torch.Generator().manual_seed(1), torch.device("cpu"))
    texts, z = model.encode_prompts(["a red circle", "a blue circle"]), clean
    for k in range(1, steps):  # one step of six is left out
        z_src = (1 - solver.sigmas[k]) * clean + solver.sigmas[k] * noise
        with torch.no_grad(), locked(model, (~out.mask.tokens).float()):
            rows = torch.cat([z_src, z + z_src - clean])
            v_src, v_tgt = pipe.transformer(rows, solver.timesteps[k].expand(2), encoder_hidden_states=texts).sample
        z = torch.where(inside, z + (solver.sigmas[k + 1] - solver.sigmas[k]) * (v_tgt - v_src), clean)
    torch.testing.assert_close(out.latents, z, **CLOSE)
    full = call(
        pipe, lock=lock("kv-edit-inversion-free", compute="full", background_bias=0.0), steps=steps, guidance_scale=1.0
    )
    torch.testing.assert_close(full.latents, z, **CLOSE)


# What cannot be.


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("uniedit-flow", "the method 'uniedit' cannot edit here: it follows a flow's velocity"),
        ("rf-solver", "the method 'rfsolver' cannot edit here: it follows a flow's velocity"),
    ],
)
def test_a_diffusion_is_refused(preset, said):
    with pytest.raises(InputError, match=said):
        call(tiny_cogvideox(), lock=preset, steps=4)


def test_a_multistep_scheduler_steps_apg():
    """Its own second-order steps, as plain guidance takes them."""

    def scheduler():
        return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)

    bare = lock("apg", apg_momentum=0.0, apg_parallel=1.0, apg_norm=1e6, **FROM_INVERTED)
    out = call(tiny_wan(scheduler()), lock=bare, steps=5, guidance_scale=4.0).latents
    plain = call(tiny_wan(scheduler()), lock=lock("cfg", **FROM_INVERTED), steps=5, guidance_scale=4.0).latents
    torch.testing.assert_close(out, plain, **CLOSE)


# KV-Edit on FLUX, its own model.


@pytest.mark.parametrize("case", FLUX, ids=lambda case: case.name)
def test_kv_edit_on_flux_computes_every_token(case):
    """Said in one line, and the same as a full computation; the source is told a scale of its own."""
    with pytest.warns(
        InputWarning, match="the family flux cannot compute the foreground alone: every token is computed"
    ):
        out = case.edit(case.make(), lock=lock("kv-edit"), guidance_scale=5.5)
    full = case.edit(case.make(), lock=lock("kv-edit", compute="full", background_bias=0.0), guidance_scale=5.5)
    assert torch.equal(out.latents, full.latents)
    outside = ~out.mask.latents[:, None].expand_as(out.latents)
    free = case.edit(
        case.make(), lock=lock("kv-edit-inversion-free", compute="full", background_bias=0.0), guidance_scale=5.5
    )
    assert torch.equal(out.latents[outside], free.latents[outside])  # the clean source's
    other = case.edit(
        case.make(), lock=lock("kv-edit", compute="full", background_bias=0.0, source_guidance=None), guidance_scale=5.5
    )
    assert not torch.equal(other.latents, full.latents)


def test_s_star_stays_the_foregrounds_where_every_token_is_computed():
    case = FLUX[1]  # with two branches
    with pytest.warns(InputWarning, match="cannot compute the foreground alone"):
        out = case.edit(case.make(), lock=paper(compute="foreground"), guidance_scale=4.0)
    full = paper(s_star_region="foreground", background_latents="source")
    assert torch.equal(out.latents, case.edit(case.make(), lock=full, guidance_scale=4.0).latents)


# KV-Edit's bias.


def test_the_bias_is_added_to_the_backgrounds_logits():
    q, k, v = torch.randn(3, 2, 5, 2, 4, dtype=torch.float64)
    kept = torch.randn(2, 1, 6, 2, 4, dtype=torch.float64)
    for bias in (0.0, 1.0, 2.5):
        out = attend(q, k, v, (kept[0], kept[1]), View(3, None, None), bias)
        for row in range(2):
            keys, values = torch.cat([k[row, :3], kept[0, 0]]), torch.cat([v[row, :3], kept[1, 0]])
            logits = torch.einsum("nhd,mhd->hnm", q[row], keys) / 2
            logits[..., 3:] += bias
            torch.testing.assert_close(out[row], torch.einsum("hnm,mhd->nhd", logits.softmax(-1), values))


@pytest.mark.parametrize("make", [tiny_wan, tiny_cogvideox], ids=["wan", "cogvideox"])
def test_kv_edit_is_biased_in_every_tier(make):
    out = call(make(), lock="kv-edit", steps=4).latents
    stored = call(make(), lock="kv-edit", steps=4, cache=kvf.CacheConfig(tier="resident", format="native")).latents
    torch.testing.assert_close(out, stored, **CLOSE)
    assert not torch.allclose(out, call(make(), lock=lock("kv-edit", background_bias=0.0), steps=4).latents, atol=1e-4)


@pytest.mark.parametrize("changes", [{"compute": "full"}, {"alpha": "dynamic"}], ids=str)
def test_a_bias_needs_attention_of_the_foreground_alone(changes):
    with pytest.raises(ValueError, match=r"background_bias 1\.0 needs compute 'foreground' and alpha 1"):
        lock("kv-edit", **changes)
