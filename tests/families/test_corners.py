"""What families have of their own, beside what all go through in test_families.py."""

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXFunControlPipeline,
    CogVideoXVideoToVideoPipeline,
    ConsisIDPipeline,
    DDIMScheduler,
    EasyAnimateControlPipeline,
    EasyAnimateInpaintPipeline,
    EulerAncestralDiscreteScheduler,
    SanaPipeline,
    SanaVideoPipeline,
)
from hypothesis import given
from hypothesis import strategies as st

import kvlock_fast as kvf
from kvlock_fast import media
from kvlock_fast.errors import InputWarning
from kvlock_fast.locking.arch import place_by_place
from kvlock_fast.loop.graph import why_not_captured
from kvlock_fast.loop.windows import Windows
from kvlock_fast.masks import Geometry, project_mask
from kvlock_fast.models import wrap_pipeline
from tests.families.cases import allegro
from tests.families.cases.allegro import tiny_allegro
from tests.families.cases.cogvideox_image import tiny_cogvideox_image
from tests.families.cases.cogview4 import CASES as COGVIEW4
from tests.families.cases.cogview4 import tiny_cogview4
from tests.families.cases.easyanimate import tiny_easyanimate
from tests.families.cases.framepack import CASES as FRAMEPACK
from tests.families.cases.latte import CASES as LATTE
from tests.families.cases.latte import tiny_latte
from tests.families.cases.ltx2 import CASES as LTX2
from tests.families.cases.mochi import CASES as MOCHI
from tests.families.cases.mochi import tiny_mochi
from tests.support.conformance import OFF, PROMPT, Scene
from tests.support.locks import paper


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def edit(pipe, frames=9, height=32, width=48, **changes):
    mask = np.zeros((frames, height, width), bool)
    mask[:, : height // 2, : width // 2] = True
    arguments = {"prompt": PROMPT, "source_prompt": "", "num_inference_steps": 2, "output": "latent", **changes}
    return kvf.KVLockPipeline.from_pipe(pipe)(noise(frames, height, width, 3), mask, **arguments)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_a_clip_is_as_long_as_the_geometry_says(frames, stride, together, causal):
    """Also where no frame has a latent frame of its own."""
    geometry = Geometry(stride, 8, (1, 2, 2), causal=causal, latents_together=together)
    whole, rest = geometry.whole_frames(frames), 1 if causal else 0
    assert 0 <= whole - frames < stride * together and whole % (stride * together) == rest % (stride * together)
    padded, before = media.fit_frames(np.arange(frames), "pad", *geometry.frame_rule)
    assert len(padded) == whole and before == frames and set(padded[frames:]) <= {frames - 1}
    tokens, _, _ = geometry.token_grid(whole, 32, 32)
    assert tokens == len({-(-f // stride) if causal else f // stride for f in range(whole)})


def test_trimming_leaves_something():
    with pytest.raises(kvf.InputError, match=r"the video has 3 frames, and the model takes 4 or more"):
        media.fit_frames(np.zeros((3, 2)), "trim", 4, 0)
    with pytest.raises(kvf.InputError, match=r"the video has 6 frames, which is not 4n \(frames policy 'error'\)"):
        media.fit_frames(np.zeros((6, 2)), "error", 4, 0)
    assert len(media.fit_frames(np.zeros((6, 2)), "trim", 4, 0)[0]) == 4


def test_what_lies_beside_the_video_is_of_no_token():
    mask = torch.zeros(5, 32, 32, dtype=torch.bool)
    mask[2:, :12, :12] = True
    plain = project_mask(mask, Geometry(2, 8, (1, 2, 2)))
    longer = plain.with_beside(2)
    assert longer.grid == plain.grid and torch.equal(longer.tokens, plain.tokens)
    assert longer.latents.shape[1] == 5 and not longer.latents[:, 3:].any()
    values = torch.rand(1, plain.tokens.shape[1])
    assert torch.equal(longer.on_latents(values)[:, :3], plain.on_latents(values))
    assert not longer.on_latents(values)[:, 3:].any()
    assert torch.equal(longer.distance(2), plain.distance(2))


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_tokens_place_by_place(frames, places, data):
    tokens = torch.arange(frames * places)
    index = torch.tensor(data.draw(st.lists(st.sampled_from(tokens.tolist()), unique=True)), dtype=torch.long)
    turned = tokens.view(frames, places).T.flatten()
    assert torch.equal(turned[place_by_place(index, frames, len(tokens))], index)


@pytest.mark.parametrize("size", [(4, 32, 32), (8, 40, 56), (12, 48, 64), (16, 32, 48)], ids=str)
@torch.no_grad()
def test_allegro_covers_any_size_with_its_tiles(size):
    """Where tiles cover it as it is, the autoencoder's own latents; elsewhere no latent and no pixel is left out."""
    pipe = tiny_allegro()
    model, frames = wrap_pipeline(pipe), noise(*size, 3)
    latents = model.encode_video(frames)
    assert latents.shape[2:] == (size[0] // 4, size[1] // 8, size[2] // 8)
    tiles = zip(size, allegro.TILE, allegro.TILE_STRIDE, strict=True)
    if all(n >= tile and (n - tile) % stride == 0 for n, tile, stride in tiles):
        pixels = frames.permute(3, 0, 1, 2)[None] / 127.5 - 1
        assert torch.equal(latents, pipe.vae.encode(pixels).latent_dist.mode() * 0.7)
    pipe.vae.disable_tiling()
    video = model.decode(latents, size[0])
    assert video.shape == (1, *size, 3) and not pipe.vae.use_tiling
    assert video.float().std(dim=(2, 3)).min() > 0 and video.float().std(dim=(1, 3)).min() > 0


@torch.no_grad()
def test_decoding_in_tiles_leaves_easyanimates_autoencoder_as_it_was():
    """Its tiles switch on more than themselves, which would be there in the next call's encoding."""
    pipe = tiny_easyanimate()
    model, before = wrap_pipeline(pipe), dict(vars(pipe.vae))
    latents = model.encode_video(noise(5, 32, 48, 3))
    assert model.decode(latents, 5, tiled=True).shape == (1, 5, 32, 48, 3)
    assert {name: value for name, value in vars(pipe.vae).items() if name.startswith("use_")} == {
        name: value for name, value in before.items() if name.startswith("use_")
    }


def test_allegros_own_scheduler(tmp_path):
    """It adds noise: from a folder DDIM takes its place, and a pipeline that is there is not touched."""
    pipe = tiny_allegro(EulerAncestralDiscreteScheduler())
    refused = r"EulerAncestralDiscreteScheduler adds noise .* DDIMScheduler.from_config\(.*clip_sample=False\)"
    with pytest.raises(kvf.InputError, match=refused):
        edit(pipe, 8)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.warns(InputWarning, match="EulerAncestralDiscreteScheduler adds noise at every step: taking DDIM"):
        loaded = kvf.KVLockPipeline.from_pretrained(tmp_path / "model").pipe
    assert type(loaded.scheduler) is DDIMScheduler
    loaded.vae.kernel, loaded.vae.stride = allegro.TILE, allegro.TILE_STRIDE
    ours, theirs = (edit(p, 8, generator=torch.Generator().manual_seed(1)).latents for p in (loaded, tiny_allegro()))
    assert torch.equal(ours, theirs)


def test_clips_are_brought_to_lattes_length():
    """And longer ones go through it in windows of that length, no other."""
    with pytest.warns(InputWarning, match="3 frames padded to 5"):
        assert edit(tiny_latte(), 3, output="frames").frames[0].shape == (3, 32, 48, 3)
    with pytest.raises(kvf.InputError, match="it takes at most 5 frames: give clip_frames"):
        edit(tiny_latte(), 10)
    assert edit(tiny_latte(), 10, clip_frames=5, clip_overlap=2).latents.isfinite().all()
    with pytest.raises(kvf.InputError, match="the model takes 5 frames at once, and was given 4: give clip_frames 5"):
        edit(tiny_latte(), 10, clip_frames=4, clip_overlap=2)
    assert Windows(5, 2).latent_sizes(wrap_pipeline(tiny_latte()).geometry) == (5, 2)


def test_lattes_prompts_are_each_as_alone():
    """Texts of other lengths in a forward change nothing: what they are filled up with is masked."""
    pipe, case = tiny_latte(), LATTE[0]
    prompts = ["a dog", "a green square moves left over dark stripes"]
    together = case.edit(pipe, prompts, lock=OFF)
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(
            together.latents[i], case.edit(pipe, prompt, lock=OFF).latents[0], rtol=1e-4, atol=1e-4
        )


def test_mochi_takes_two_steps_or_more():
    assert edit(tiny_mochi(), 7, num_inference_steps=2).latents.isfinite().all()
    with pytest.raises(kvf.InputError, match="num_inference_steps must be at least 2 for the family mochi, got 1"):
        edit(tiny_mochi(), 7, num_inference_steps=1)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_reversed_time_is_inverted(method):
    """Inversion and replay: the closer to the source the more steps there are."""
    case = MOCHI[0]
    pipe, away = case.make(), {}
    with torch.no_grad():
        clean = Scene(case).source
    lock = paper(source_path="invert", inversion_solver=method, alpha=0.0, omega="constant", s_star=False)
    for steps in (10, 30):
        out = case.edit(pipe, "a red circle", lock=lock, steps=steps, guidance_scale=1.0)
        away[steps] = ((out.latents - clean).norm() / clean.norm()).item()
    assert away[30] < 0.4 and away[10] / away[30] > 2, away


@torch.no_grad()
def test_mochis_latents_need_no_statistics():
    frames = noise(7, 32, 48, 3)
    plain, own = (
        wrap_pipeline(tiny_mochi(**changes)).encode_video(frames)
        for changes in ({"latents_mean": None, "latents_std": None}, {})
    )
    config = tiny_mochi().vae.config
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(own, (plain / 0.8 - mean) * 0.8 / std)


def test_what_a_captured_step_would_miss_is_said():
    for pipe, reason in ((tiny_mochi(), "counts the text's tokens"), (tiny_easyanimate(), "positions on the host")):
        scene = Scene(MOCHI[0])
        why = why_not_captured(wrap_pipeline(pipe), kvf.LockConfig.preset("kvlock"), scene.solver)
        assert reason in why


REFUSED = {
    "control": (lambda: edit(tiny_easyanimate(channels=8)), "takes an image or a control video beside the text"),
    "size": (
        lambda: edit(tiny_cogvideox_image("5b"), height=32, width=64),
        "takes videos of 32x48 only, and was given one of 32x64",
    ),
    "window": (
        lambda: edit(tiny_cogvideox_image("1.5"), 17, clip_frames=9),
        "clip_frames does not go with the family cogvideox-i2v, which sees the whole clip",
    ),
    "sound": (lambda: edit(LTX2[0].make(), 9, width=64, clip_frames=5), "clip_frames does not go with the family ltx2"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_bad_calls_say_what_is_wrong(name):
    run, message = REFUSED[name]
    with pytest.raises(kvf.InputError, match=message):
        run()


def test_the_image_is_the_sources_first_frame():
    """Beside the first latent frame, and zeros beside the others; the same for edit and source."""
    pipe, seen = tiny_cogvideox_image("5b"), []
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda **kw: seen.append(kw["hidden_states"][:, :, 4:].clone()) or forward(**kw)
    edit(pipe, lock=paper())
    with torch.no_grad():
        pixels = noise(9, 32, 48, 3)[:1].permute(3, 0, 1, 2)[None] / 127.5 - 1
        image = pipe.vae.encode(pixels).latent_dist.mode()[0] * 0.7
    for rows in seen:
        assert rows.shape[0] == 3 and not rows[:, 1:].any()
        torch.testing.assert_close(rows[:, 0], image.transpose(0, 1).expand(3, -1, -1, -1), rtol=1e-4, atol=1e-5)


def test_the_sound_goes_along():
    """It is heard by the video, takes its steps, and is the source's (a mean one) where the background is."""
    case = LTX2[0]
    pipe = case.make()
    model = wrap_pipeline(pipe)
    free, kept = (case.edit(pipe, lock=paper(background_latents=where)) for where in ("model", "source"))
    shape = free.latents[:, :, 3:].shape
    assert shape[2] == free.mask.beside == model.sound_frames(*free.mask.grid) == 1
    assert free.latents[:, :, 3:].abs().max() > 0.1 and not kept.latents[:, :, 3:].any()
    sound = model._sound_of(free.latents, 3)
    assert sound.shape == (1, 5, 8) and torch.equal(model._joined(free.latents[:, :, :3], sound), free.latents)
    scene = Scene(case)
    with torch.no_grad():
        other = scene.latents.clone()
        other[:, :, 3:] += 1
        heard = (scene.predict(other, scene.told[0]) - scene.predict(scene.latents, scene.told[0]))[:, :, :3]
    assert heard.abs().max() > 1e-4


def test_texts_of_other_lengths_go_one_by_one():
    """Where the model has no mask for them: with "auto"; asked for together they are refused."""
    pipe, short = tiny_cogview4(), "a dog"
    long = "a red circle moves over a blue square and a green cat moves left over dark stripes"
    pipe.tokenizer.model_max_length = 40
    case = COGVIEW4[0]
    locks = (kvf.LockConfig(guidance_batching=batching, guidance_skip=False) for batching in ("auto", "separate"))
    auto, apart = (case.edit(pipe, short, lock=lock, source_prompt=long) for lock in locks)
    assert torch.equal(auto.latents, apart.latents) and auto.trace.forwards == case.steps * 3
    with pytest.raises(kvf.InputError, match=r"the model takes texts of one length .* \[16, 32\] tokens"):
        case.edit(pipe, short, lock=kvf.LockConfig.preset("kvlock", guidance_batching="batched"), source_prompt=long)


UNFIT = {
    SanaPipeline: "its self-attention is linear",
    SanaVideoPipeline: "its self-attention is linear",
    CogVideoXFunControlPipeline: "it is driven by a control video",
    CogVideoXVideoToVideoPipeline: "load the model by CogVideoXPipeline",
    ConsisIDPipeline: "it is told a face",
    EasyAnimateControlPipeline: "it is driven by a control video",
    EasyAnimateInpaintPipeline: "its transformer is shown a masked video",
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_cannot_be_followed_is_refused_with_the_reason(kind, tmp_path):
    """By a loaded pipeline, and by a folder before any weight is read."""
    with pytest.raises(kvf.InputError, match=f"{kind.__name__} is not supported: .*{UNFIT[kind]}"):
        kvf.KVLockPipeline.from_pipe(kind.__new__(kind))
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{kind.__name__}"}}')
    with pytest.raises(kvf.InputError, match=f"is a {kind.__name__}, which is not supported: .*{UNFIT[kind]}"):
        kvf.KVLockPipeline.from_pretrained(tmp_path)


def test_a_clip_that_is_too_long_is_told_of_windows_only_where_they_are_taken():
    case = FRAMEPACK[0]
    pipe, size = kvf.KVLockPipeline.from_pipe(case.make()), (81, 32, 48)
    mask = np.zeros(size, bool)
    mask[:, :16, :16] = True
    with pytest.raises(kvf.InputError, match=r"81 frames of 32x48 are too many .* at most 37 frames$"):
        pipe(np.zeros((*size, 3), np.uint8), mask, source_prompt="a circle", prompt=PROMPT)
