"""`kvf.attach`: the lock for other people's loops, against blending at the attention call and the pipeline's edit."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

import kvlock_fast as kvf
from kvlock_fast.errors import InputWarning
from kvlock_fast.models.wan import WanModel
from tests.support.locks import paper
from tests.support.tiny import tiny_cogvideox_transformer, tiny_transformer, tiny_wan, untouched

pytestmark = pytest.mark.numeric

SIZE = (4, 3, 4, 8)  # latents of 3 x 2 x 4 tokens
TOKENS = 24
TIME = torch.tensor([500.0])


@pytest.fixture
def transformer():
    return tiny_transformer()


@pytest.fixture
def scene():
    return Scene()


class Scene:
    """A source, an edit's latents, texts of the source and of both branches, and a mask."""

    def __init__(self, rows=1, tokens=TOKENS, size=SIZE, text=(6, 16), seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.source = torch.randn(1, *size, generator=generator)
        self.latents = torch.randn(rows, *size, generator=generator)
        self.texts = torch.randn(3, 1, *text, generator=generator)
        self.foreground = torch.rand(1, tokens, generator=generator) < 0.4
        self.foreground[0, 3] = True


@torch.no_grad()
def forward(transformer, latents, text):
    rows = len(latents)
    return transformer(
        hidden_states=latents, timestep=TIME.expand(rows), encoder_hidden_states=text.expand(rows, -1, -1),
        return_dict=False,
    )[0]  # fmt: skip


class Blended:
    """Wan's attention with K and V blended where they enter it: the oracle."""

    def __init__(self, foreground, alpha):
        self.outside, self.alpha, self.kept, self.captures = ~foreground, alpha, [], True

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        original, calls = torch.nn.functional.scaled_dot_product_attention, self

        def attention(query, key, value, *args, **kwargs):
            if calls.captures:
                calls.kept.append((key, value))
            else:
                where = calls.outside[:, None, :, None]
                theirs = calls.kept[calls.layer]
                key, value = (
                    torch.where(where, calls.alpha * old + (1 - calls.alpha) * new, new)
                    for new, old in zip((key, value), theirs, strict=True)
                )
                calls.layer += 1
            return original(query, key, value, *args, **kwargs)

        torch.nn.functional.scaled_dot_product_attention = attention
        try:
            return WanAttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        finally:
            torch.nn.functional.scaled_dot_product_attention = original


def oracle(transformer, scene, alpha):
    """Both branches by blending at the attention call."""
    stock = {block: block.attn1.processor for block in transformer.blocks}
    blended = Blended(scene.foreground, alpha)
    for block in transformer.blocks:
        block.attn1.processor = blended
    forward(transformer, scene.source, scene.texts[0])
    blended.captures, results = False, []
    for text in scene.texts[1:]:
        blended.layer = 0
        results.append(forward(transformer, scene.latents, text))
    for block, processor in stock.items():
        block.attn1.processor = processor
    return results


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_the_three_ways_are_blending_at_the_attention_call(transformer, scene, alpha):
    wanted = oracle(transformer, scene, alpha)
    stock = [forward(transformer, scene.latents, text) for text in scene.texts[1:]]
    with kvf.attach(transformer, scene.foreground) as kv:
        with kv.source():
            forward(transformer, scene.source, scene.texts[0])
        with kv.edit(alpha):  # two calls
            two = [forward(transformer, scene.latents, text) for text in scene.texts[1:]]
        with kv.edit(alpha):  # [uncond, cond] in one
            one = forward(transformer, torch.cat([scene.latents] * 2), scene.texts[1:, 0])
        with kv.along(torch.tensor(alpha)):  # the source in row 0
            rows = torch.cat([scene.source, scene.latents, scene.latents])
            along = forward(transformer, rows, scene.texts[:, 0])[1:]
    for got in (two, one.split(1), along.split(1)):
        for mine, theirs, plain in zip(got, wanted, stock, strict=True):
            close(mine, theirs)
            assert alpha == 0 or (mine - plain).abs().max() > 1e-4
    assert all(torch.equal(a, b) for a, b in zip(two, stock, strict=True)) == (alpha == 0)


def test_outside_of_its_contexts_and_afterwards_the_model_is_its_own(transformer, scene):
    before, names = forward(transformer, scene.latents, scene.texts[1]), list(transformer.state_dict())
    with kvf.attach(transformer, scene.foreground) as kv:
        with kv.source():
            forward(transformer, scene.source, scene.texts[0])
        assert torch.equal(forward(transformer, scene.latents, scene.texts[1]), before)
        with kv.edit(1.0):
            assert not torch.equal(forward(transformer, scene.latents, scene.texts[1]), before)
        assert torch.equal(forward(transformer, scene.latents, scene.texts[1]), before)
        assert list(transformer.state_dict()) == names
    assert untouched(transformer) and torch.equal(forward(transformer, scene.latents, scene.texts[1]), before)


def test_samples_have_alphas_of_their_own_in_every_branch(transformer):
    scene, alphas = Scene(rows=2), torch.tensor([0.2, 0.9])
    with kvf.attach(transformer, scene.foreground) as kv:
        with kv.source():
            forward(transformer, scene.source, scene.texts[0])
        with kv.edit(alphas):
            texts = torch.cat([scene.texts[1].expand(2, -1, -1), scene.texts[2].expand(2, -1, -1)])
            together = forward(transformer, torch.cat([scene.latents] * 2), texts)
        for i, alpha in enumerate(alphas.tolist()):
            with kv.edit(alpha):
                for branch in (0, 1):
                    alone = forward(transformer, scene.latents[i : i + 1], scene.texts[1 + branch])
                    close(together[2 * branch + i : 2 * branch + i + 1], alone)


def test_samples_have_masks_of_their_own(transformer):
    scene, other = Scene(rows=2), Scene(seed=5).foreground
    masks = torch.cat([scene.foreground, other])
    with kvf.attach(transformer, masks) as kv:
        with kv.source():
            forward(transformer, scene.source, scene.texts[0])
        with kv.edit(0.8):
            together = forward(transformer, scene.latents, scene.texts[1])
    for i in (0, 1):
        with kvf.attach(transformer, masks[i]) as kv:
            with kv.source():
                forward(transformer, scene.source, scene.texts[0])
            with kv.edit(0.8):
                close(together[i : i + 1], forward(transformer, scene.latents[i : i + 1], scene.texts[1]))


@pytest.mark.parametrize("text", [7, 3])
def test_text_in_the_self_attention_keeps_its_own(text):
    """CogVideoX, of any length of text: one call as of two."""
    transformer = tiny_cogvideox_transformer(max_text_seq_length=text)
    scene = Scene(size=(3, 4, 4, 6), tokens=18, text=(text, 16))
    with kvf.attach(transformer, scene.foreground) as kv:
        with kv.source():
            forward(transformer, scene.source, scene.texts[0])
        with kv.edit(1.0):
            one = forward(transformer, torch.cat([scene.latents] * 2), scene.texts[1:, 0])
            two = [forward(transformer, scene.latents, words) for words in scene.texts[1:]]
    close(one, torch.cat(two))
    assert (two[0] - forward(transformer, scene.latents, scene.texts[1])).abs().max() > 1e-4


def test_layers_are_locked_by_number(transformer, scene):
    with kvf.attach(transformer, scene.foreground, layers=(2,)) as kv:
        with kv.source():
            forward(transformer, scene.source, scene.texts[0])
        assert kv.nbytes == 2 * int((~scene.foreground).sum()) * 24 * 4
        with kv.edit(1.0):
            last = forward(transformer, scene.latents, scene.texts[1])
    stock = forward(transformer, scene.latents, scene.texts[1])
    with kvf.attach(transformer, scene.foreground, lock=paper(layers=(0, 1, 2))) as kv:
        with kv.source():
            forward(transformer, scene.source, scene.texts[0])
        with kv.edit(1.0):
            every = forward(transformer, scene.latents, scene.texts[1])
    assert not torch.equal(last, stock) and not torch.equal(last, every)


@pytest.mark.parametrize(
    ("format", "smaller", "error"), [("int8", 2.9, 0.02), ("fp8_e4m3", 2.9, 0.05), ("bf16", 2, 0.02)]
)
def test_kept_in_a_format(transformer, scene, format, smaller, error):
    results = []
    for kept in (None, format):
        with kvf.attach(transformer, scene.foreground, format=kept) as kv:
            with kv.source("step 3"):
                forward(transformer, scene.source, scene.texts[0])
            with kv.edit(0.9, "step 3"):
                results.append((forward(transformer, scene.latents, scene.texts[1]), kv.nbytes))
    (exact, native), (packed, small) = results
    assert native / small >= smaller
    assert 0 < (exact - packed).abs().max() < error


def test_the_source_of_several_steps_is_kept_by_name(transformer, scene):
    sources = [scene.source, scene.source * 0.5]
    with kvf.attach(transformer, scene.foreground) as kv:
        for step, source in enumerate(sources):
            with kv.source(step):
                forward(transformer, source, scene.texts[0])
        both = kv.nbytes
        edits = []
        for step in (1, 0):
            with kv.edit(1.0, step):
                edits.append(forward(transformer, scene.latents, scene.texts[1]))
        kv.forget(1)
        assert kv.nbytes == both // 2
        with pytest.raises(kvf.InputError, match="name 1"), kv.edit(1.0, 1):
            pass
        with kv.source():
            forward(transformer, sources[1], scene.texts[0])
        with kv.edit(1.0):
            assert torch.equal(forward(transformer, scene.latents, scene.texts[1]), edits[0])
    assert not torch.equal(*edits)


def test_two_transformers_that_take_turns(scene):
    pair = tiny_transformer(), tiny_transformer(seed=5)
    with kvf.attach(pair, scene.foreground) as kv:
        results = []
        for transformer in pair:
            with kv.source():
                forward(transformer, scene.source, scene.texts[0])
            with kv.edit(1.0):
                results.append(forward(transformer, scene.latents, scene.texts[1]))
        with pytest.raises(RuntimeError, match="another of the transformers"), kv.edit(1.0):
            forward(pair[1], scene.latents, scene.texts[1])
            forward(pair[0], scene.latents, scene.texts[1])
    for transformer, result in zip(pair, results, strict=True):
        with kvf.attach(transformer, scene.foreground) as kv:
            with kv.source():
                forward(transformer, scene.source, scene.texts[0])
            with kv.edit(1.0):
                assert torch.equal(forward(transformer, scene.latents, scene.texts[1]), result)
        assert untouched(transformer)


@pytest.mark.parametrize("where", ["with", "source", "edit"])
def test_an_exception_leaves_nothing(transformer, scene, where):
    before = forward(transformer, scene.latents, scene.texts[1])

    def fail(at):
        if where == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), kvf.attach(transformer, scene.foreground) as kv:
        with kv.source():
            fail("source")
            forward(transformer, scene.source, scene.texts[0])
        fail("with")
        with kv.edit(1.0):
            forward(transformer, scene.latents, scene.texts[1])
            fail("edit")
    assert untouched(transformer) and torch.equal(forward(transformer, scene.latents, scene.texts[1]), before)


def test_a_second_lock_is_refused_and_the_first_goes_on(transformer, scene):
    with kvf.attach(transformer, scene.foreground) as kv:
        with kv.source():
            forward(transformer, scene.source, scene.texts[0])
        with pytest.raises(kvf.InputError, match="locked already"), kvf.attach(transformer, scene.foreground):
            pass
        with pytest.raises(kvf.InputError, match="attached already"), kv:
            pass
        with kv.edit(1.0):
            locked = forward(transformer, scene.latents, scene.texts[1])
    assert not torch.equal(locked, forward(transformer, scene.latents, scene.texts[1]))
    pair = tiny_transformer(), transformer
    with kvf.attach(transformer, scene.foreground):
        with pytest.raises(kvf.InputError, match="locked already"), kvf.attach(pair, scene.foreground):
            pass
        assert untouched(pair[0])


def test_forwards_that_the_lock_would_miss(transformer, scene):
    def run(text=0):
        return forward(transformer, scene.source, scene.texts[text])

    with kvf.attach(transformer, scene.foreground) as kv:
        with pytest.raises(RuntimeError, match="for one forward, and 2 ran"), kv.source():
            run(), run()
        with pytest.raises(RuntimeError, match="for one forward, and 0 ran"), kv.source():
            pass
        with kv.source():
            run()
        with pytest.raises(RuntimeError, match="none ran"), kv.edit(1.0):
            pass
        with pytest.raises(RuntimeError, match="layers were skipped"), kv.edit(1.0):
            blocks, transformer.blocks = transformer.blocks, transformer.blocks[:2]
            run()
            transformer.blocks = blocks
            run()
        transformer.blocks = blocks
        with pytest.raises(kvf.InputError, match="inside one another"), kv.edit(1.0), kv.source():
            pass
    with pytest.raises(kvf.InputError, match="not attached"), kv.source():
        pass


BAD = {
    "not-bool": (dict(foreground=torch.ones(1, 24)), "foreground must be a bool tensor.*float32"),
    "no-tensor": (dict(foreground=[True]), "foreground must be a bool tensor"),
    "empty": (dict(foreground=torch.zeros(1, 24, dtype=torch.bool)), "without any foreground"),
    "format": (dict(format="fp4"), "format must be one of.*'fp4'"),
    "family": (dict(family="wann"), "unknown family 'wann'; known families: wan, "),
    "layers": (dict(layers=(3,)), "names layer 3, but the model has layers 0 to 2"),
    "lock": (dict(lock="kvlock"), "lock must be a LockConfig, got str"),
    "steps": (dict(num_steps=0), "num_steps must be.*0"),
    "other-family": (dict(family="cogvideox"), "no self-attention named"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(transformer, scene, given, message):
    given = {"foreground": scene.foreground, **given}
    with pytest.raises(kvf.InputError, match=message), kvf.attach(transformer, **given):
        pass
    assert untouched(transformer)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), "dynamic", True, torch.ones(1, 2)], ids=str)
def test_bad_alphas(transformer, scene, alpha):
    with kvf.attach(transformer, scene.foreground) as kv:
        with kv.source():
            forward(transformer, scene.source, scene.texts[0])
        with pytest.raises(kvf.InputError, match="alpha must be"), kv.edit(alpha):
            pass


def test_an_unknown_transformer_is_refused_with_the_way_out(scene):
    with pytest.raises(kvf.InputError, match=r"unknown transformer Linear; known families: wan, .*family='auto'"):
        kvf.attach(torch.nn.Linear(2, 2), scene.foreground)


def test_a_subclass_is_of_its_familys(scene):
    class Mine(type(tiny_transformer())):
        pass

    transformer = tiny_transformer()
    transformer.__class__ = Mine
    with kvf.attach(transformer, scene.foreground) as kv, kv.source():
        forward(transformer, scene.source, scene.texts[0])


def test_a_description_of_ones_own(transformer, scene):
    arch = kvf.ArchSpec(family="mine", transformers=("Mine",), attention=r"blocks\.[12]\.attn1")
    with kvf.attach(transformer, scene.foreground, family=arch) as kv:
        with kv.source():
            forward(transformer, scene.source, scene.texts[0])
        assert kv.nbytes == 2 * 2 * int((~scene.foreground).sum()) * 24 * 4


def test_a_foreground_of_everything_warns(transformer):
    with pytest.warns(InputWarning, match="nothing is locked"):
        kvf.attach(transformer, torch.ones(TOKENS, dtype=torch.bool))


def test_compiled_blocks_give_the_same(scene):
    transformer = tiny_transformer()
    results = []
    for compiles in (False, True):
        if compiles:
            transformer.compile_repeated_blocks(backend="aot_eager")
        with kvf.attach(transformer, scene.foreground) as kv:
            with kv.source():
                forward(transformer, scene.source, scene.texts[0])
            with kv.edit(0.7):
                results.append(forward(transformer, scene.latents, scene.texts[1]))
    close(*results)


# A whole loop with the schedule


def pixel_mask():
    mask = torch.zeros(9, 32, 64, dtype=torch.bool)
    mask[2:6, 8:24, 16:40] = True
    return mask


PRESETS = ["kvlock", "paper", "fixed-alpha", "cfg-zero-star", "omega-only", "intervals"]
INTERVALS = {"lock_interval": (0.0, 0.7), "guidance_interval": (0.2, 0.9)}


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_a_loop_of_ones_own_is_the_pipelines_edit(preset):
    """With the schedule by `observe` and `guide`: the same latents as KVLockPipeline's."""
    steps, scale = 6, 4.0
    fields = dict(kappa=4, variance_window=3, guidance_batching="separate")
    if preset == "intervals":
        preset, fields = "kvlock", {**fields, **INTERVALS}
    lock = kvf.LockConfig.preset(preset, **fields).in_own_loop()
    pipe = tiny_wan(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    video = torch.randint(0, 256, (9, 32, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    noise = torch.randn(1, 4, 3, 4, 8, generator=torch.Generator().manual_seed(1))
    said = dict(source_prompt="a red circle", prompt="a blue square", negative_prompt="dark")
    wanted = kvf.KVLockPipeline.from_pipe(pipe)(
        video, pixel_mask(), **said, num_inference_steps=steps, guidance_scale=scale, latents=noise, lock=lock,
        cache=kvf.CacheConfig(tier="lockstep"), output="latent",
    )  # fmt: skip

    model, scheduler, transformer = WanModel(pipe), pipe.scheduler, pipe.transformer
    source, texts = (
        model.encode_video(video),
        dict(zip(said, model.encode_prompts([*said.values()]).split(1), strict=True)),
    )
    scheduler.set_timesteps(steps)
    foreground = kvf.ops.latent_mask(pixel_mask())

    def predict(latents, name, t):
        return transformer(latents, t.expand(1), texts[name], return_dict=False)[0]

    latents, trace = noise, []
    with kvf.attach(transformer, foreground, lock=lock, num_steps=steps, guidance_scale=scale) as kv:
        for k, t in enumerate(scheduler.timesteps):
            sigma = scheduler.sigmas[k]
            with kv.source():
                predict((1 - sigma) * source + sigma * noise, "source_prompt", t)
            alpha, omega = kv.alpha, kv.omega
            with kv.edit():
                cond, uncond = predict(latents, "prompt", t), predict(latents, "negative_prompt", t)
            prediction = kv.guide(cond, uncond)
            kv.observe(latents - sigma * prediction)
            latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
            if lock.keeps_background:
                sigma = scheduler.sigmas[k + 1]
                latents = kv.keep_background(latents, (1 - sigma) * source + sigma * noise)
            trace.append((float(alpha), float(omega)))
    close(latents, wanted.latents, atol=2e-5)
    assert lock.alpha != "dynamic" or len({alpha for alpha, _ in trace}) > 1  # the schedule did something
    assert untouched(transformer)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_latents_in_any_layout_say_the_same(batch, height, width, frames, seed):
    """As a video's, as tokens and as an image's: variance, s* and the kept background."""
    generator = torch.Generator().manual_seed(seed)
    foreground = torch.rand(1, frames * height * width, generator=generator) < 0.5
    foreground[0, 0], foreground[0, -1] = False, True
    videos = torch.randn(3, batch, 2, frames, height, width, generator=generator)
    layouts = {"video": videos, "tokens": videos.flatten(3).transpose(2, 3)}
    if frames == 1:
        layouts["image"] = videos[:, :, :, 0]
    lock = paper(s_star_region="foreground", kappa=9)
    said = {}
    for name, (a, b, c) in layouts.items():
        transformer = tiny_transformer(num_layers=1)
        kv = kvf.attach(transformer, foreground, lock=lock, num_steps=9, guidance_scale=3.0, patch_size=(1, 1, 1))
        assert kv.observe(a).isnan().all() and kv.step == 1
        assert kv.variance.isnan().all() and kv.s_star is None
        variance, guided, kept = kv.observe(b), kv.guide(b, c), kv.keep_background(a, c)
        assert torch.equal(kv.variance, variance)
        flat = [x.reshape(batch, 2, -1) if name != "tokens" else x.transpose(1, 2) for x in (guided, kept)]
        said[name] = [variance, kv.alpha, kv.omega, kv.s_star, *flat]
    inside = foreground[0].nonzero()[:, 0]
    history = videos[:2].flatten(3)[..., inside].double()
    close(said["video"][0].double(), history.var(0, unbiased=True).flatten(1).mean(1), 1e-5)
    c, u = (videos[i].flatten(2)[..., inside].flatten(1).double() for i in (1, 2))
    torch.testing.assert_close(
        said["video"][3].double(), (c * u).sum(1) / ((u * u).sum(1) + 1e-8), rtol=1e-4, atol=1e-5
    )
    for values in said.values():
        for mine, theirs in zip(values, said["video"], strict=True):
            close(mine, theirs, 1e-4)


def under(foreground, videos):
    """Values [n, ...] of the latents under the foreground's tokens of 1 x 2 x 2."""
    where = foreground.view(3, 2, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return videos[..., where]


def test_the_schedule_says_what_it_needs(transformer, scene):
    x = torch.randn(1, *SIZE)
    kv = kvf.attach(transformer, scene.foreground)
    with pytest.raises(kvf.InputError, match="num_steps must be given"):
        kv.observe(x)
    with pytest.raises(kvf.InputError, match="num_steps must be given"):
        _ = kv.alpha
    assert kv.variance is None
    fixed = kvf.attach(transformer, scene.foreground, lock=kvf.LockConfig.preset("cfg", variance_window=4, alpha=0.3))
    said = torch.stack([torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    for i, one in enumerate(said):  # watched all the same, over the last four
        inside = under(scene.foreground, said[max(0, i - 3) : i + 1])
        variance = fixed.observe(one)
        assert i == 0 or torch.allclose(variance, inside.var(0).mean(), rtol=1e-4)
    assert float(fixed.alpha) == pytest.approx(0.3)
    kv = kvf.attach(transformer, scene.foreground, num_steps=2)
    with pytest.raises(kvf.InputError, match="guidance_scale must be given"):
        kv.guide(x, x)
    with pytest.raises(kvf.InputError, match=r"\[1, 4, 3, 4, 6\] have 18 tokens.*foreground has 24"):
        kv.observe(x[..., :6])
    with pytest.raises(kvf.InputError, match=r"latents must be \[B, C, T, h, w\].*got \[4\]"):
        kv.observe(x[0, :, 0, 0, 0])
    kv.observe(x), kv.observe(x)
    with pytest.raises(kvf.InputError, match=r"num_steps is 2.*restart\(\)"):
        kv.observe(x)
    kv.restart()
    assert kv.step == 0 and kv.observe(x).isnan().all()
    with pytest.raises(kvf.InputError, match="of 2 samples"):
        kv.observe(torch.cat([x, x]))
    auto = kvf.attach(transformer, scene.foreground, num_steps=2, lock=paper(tau="auto"))
    with pytest.raises(kvf.InputError, match="source_x0hat"):
        auto.observe(x)
    auto.observe(x, x)


def test_rows_that_do_not_go_together_are_refused(transformer, scene):
    text, two = scene.texts[0], scene.foreground.expand(2, -1)
    with kvf.attach(transformer, two) as kv:
        with kv.source():
            forward(transformer, scene.source.expand(2, -1, -1, -1, -1), text)
        with kv.edit(0.5):
            forward(transformer, scene.latents.expand(2, -1, -1, -1, -1), text)
        with (
            pytest.raises(kvf.InputError, match=r"source ran with 2 rows, and .* has 4"),
            kv.edit(0.5),
        ):
            forward(transformer, scene.latents.expand(4, -1, -1, -1, -1), text)
        with kv.source():
            forward(transformer, scene.source, text)
        with (
            pytest.raises(kvf.InputError, match=r"3 rows, which is no multiple of .* 2"),
            kv.edit(0.5),
        ):
            forward(transformer, scene.latents.expand(3, -1, -1, -1, -1), text)
    assert untouched(transformer)
