"""The bundled model: small, unpickled, loadable by plain diffusers, and as good as is claimed of it."""

import copy
import json

import numpy as np
import pytest
import torch

from bench.demo_model.data import round_trip, to_model
from bench.demo_model.networks import vocabulary
from bench.quality.judge import edit_is_right, judge
from kvlock_fast.demo import GUIDANCE, STEPS, demo_case
from kvlock_fast.demo.scene import HELD_OUT, sample_scene
from kvlock_fast.demo.world import render
from kvlock_fast.media.metrics import psnr
from kvlock_fast.models.bundled import model_path

pytestmark = pytest.mark.skipif(not model_path().exists(), reason="no bundled model yet")

SAFE = {".json", ".safetensors", ".txt", ".md"}


@pytest.fixture(scope="module")
def pipe():
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(model_path(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_files_are_few_small_and_never_pickles():
    files = [path for path in model_path().rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= SAFE
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    for path in files:
        if path.suffix == ".safetensors":
            header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
            kinds = {value["dtype"] for name, value in json.loads(header).items() if name != "__metadata__"}
            assert kinds == {"F16"}, path.name


def test_it_is_a_plain_wan_pipeline(pipe):
    parts = json.loads((model_path() / "model_index.json").read_text())
    assert parts["_class_name"] == "WanPipeline"
    assert {value[0] for name, value in parts.items() if isinstance(value, list) and value[0]} <= {
        "diffusers",
        "transformers",
    }
    assert pipe.vae.config.is_residual
    assert pipe.vae.config.patch_size == 2
    assert tuple(pipe.transformer.config.patch_size) == (1, 1, 1)


def test_the_tokenizer_knows_the_grammar_and_marks_other_words(pipe):
    ids = pipe.tokenizer(" ".join(vocabulary()))["input_ids"]
    assert pipe.tokenizer.unk_token_id not in ids
    assert ids[-1] == pipe.tokenizer.eos_token_id
    assert pipe.tokenizer.unk_token_id in pipe.tokenizer("A red zebra")["input_ids"]
    assert pipe.tokenizer("A RED circle")["input_ids"] == pipe.tokenizer("a red circle")["input_ids"]


def test_the_autoencoder_keeps_held_out_clips(pipe):
    clips = [render(sample_scene(HELD_OUT + 9000 + i)) for i in range(6)]
    with torch.inference_mode():
        back = [round_trip(pipe.vae, clip.video[None])[0] for clip in clips]
    assert np.mean([psnr(a, clip.video) for a, clip in zip(back, clips, strict=True)]) > 28.0
    for seen, clip in zip(map(judge, back), clips, strict=True):
        thing = clip.scene.objects[0]
        assert (seen.colour, seen.shape) == (thing.colour, thing.shape)


def test_normalised_latents_have_unit_variance(pipe):
    videos = np.stack([render(sample_scene(HELD_OUT + 9100 + i)).video for i in range(16)])
    with torch.inference_mode():
        latents = pipe.vae.encode(to_model(videos)).latent_dist.mode()
    assert latents.shape == (16, pipe.vae.config.z_dim, 5, 8, 8)
    config = pipe.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    normalised = (latents - mean) / std
    assert normalised.mean().abs() < 0.15
    assert 0.85 < normalised.std() < 1.15


@pytest.mark.parametrize("words", [48, 512])
def test_text_to_video_follows_the_caption(pipe, words):
    caption = "a large red circle staying at the centre over a gradient background standing still"
    generator = torch.Generator().manual_seed(0)
    out = pipe(
        caption,
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=12,
        max_sequence_length=words,
        generator=generator,
    )
    seen = judge((out.frames[0] * 255).round().astype(np.uint8))
    assert (seen.colour, seen.shape) == ("red", "circle")
    assert np.nanmax(np.abs(seen.centres - 0.5)) < 0.12


@pytest.mark.parametrize("total", [48, 512])
def test_training_sees_the_text_as_the_pipeline_does(pipe, total):
    """One empty token with a weight, as in training, against all the padding that the pipeline carries."""
    from bench.demo_model.networks import TRAINED_WORDS, TrainingProcessor, embed, padding_bias

    captions = ["a small blue ring staying at the top over a cloudy background panning up", ""]
    words = pipe.tokenizer(captions, padding="max_length", max_length=TRAINED_WORDS, return_tensors="pt")
    ids, mask = words.input_ids, words.attention_mask
    generator = torch.Generator().manual_seed(0)
    latents, t = torch.randn(2, 12, 2, 8, 8, generator=generator), torch.tensor([900.0, 300.0])
    transformer, processor = copy.deepcopy(pipe.transformer), TrainingProcessor()
    for block in transformer.blocks:
        block.attn1.set_processor(processor)
        block.attn2.set_processor(processor)
    with torch.inference_mode():
        embeddings, _ = pipe.encode_prompt(captions, max_sequence_length=total, do_classifier_free_guidance=False)
        expected = pipe.transformer(latents, t, embeddings, return_dict=False)[0]
        processor.bias = padding_bias(mask, total)
        got = transformer(latents, t, embed(pipe.text_encoder, ids, mask), return_dict=False)[0]
        processor.bias = padding_bias(mask, 25)
        other = transformer(latents, t, embed(pipe.text_encoder, ids, mask), return_dict=False)[0]
    assert torch.allclose(got, expected, atol=1e-4)
    assert not torch.allclose(other, expected, atol=1e-4)


def _small_state():
    from bench.demo_model.checkpoint import TrainState
    from bench.demo_model.optimisers import make_optimisers

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv3d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    modules = torch.nn.ModuleDict({"part": module})
    return TrainState(modules, make_optimisers(modules, lambda name: True, matrix_rate=0.01, rate=0.01))


def _train(state, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(2, 3, 3, 3, 3, generator=torch.Generator().manual_seed(state.step))
        for optimiser in state.optimisers:
            optimiser.zero_grad()
        state.modules["part"](x).square().mean().backward()
        for optimiser in state.optimisers:
            optimiser.step()
        state.step += 1
        state.update_average(0.9)


def test_training_resumes_as_if_it_had_never_stopped(tmp_path):
    from bench.demo_model.checkpoint import load_state, save_state

    straight, stopped, resumed = _small_state(), _small_state(), _small_state()
    assert not load_state(resumed, tmp_path)
    start = {name: value.clone() for name, value in straight.modules.state_dict().items()}
    _train(straight, 5)
    _train(stopped, 3)
    save_state(stopped, tmp_path)
    assert load_state(resumed, tmp_path)
    assert resumed.step == 3
    _train(resumed, 2)
    for name, value in straight.modules.state_dict().items():
        assert torch.equal(resumed.modules.state_dict()[name], value), name
        assert torch.equal(resumed.average[name], straight.average[name]), name
        assert not torch.equal(value, start[name]), name
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_a_latents_cover_is_the_largest_share_under_it():
    from bench.demo_model.data import latent_cover

    mask = np.zeros((9, 16, 16), bool)
    mask[0, :4, :8] = True
    mask[2, 8:16, :8] = True
    mask[4, 8:12, :8] = True
    mask[5, 0, 15] = True
    expected = np.zeros((3, 2, 2), int)
    expected[0, 0, 0], expected[1, 1, 0], expected[2, 0, 1] = 255 // 2, 255, 255 // 64
    assert np.array_equal(latent_cover(mask).numpy(), expected)


def test_the_demo_edit_shows_what_its_prompt_says_and_keeps_the_background(pipe):
    import kvlock_fast as kvf

    case, outside = demo_case(), ~demo_case().mask
    out = kvf.KVLockPipeline.from_pipe(pipe)(
        video=case.source.video,
        mask=case.mask,
        source_prompt=case.source_prompt,
        prompt=case.prompt,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
    )
    video = np.asarray(out.frames[0])
    assert edit_is_right(case, video)
    assert psnr(video, case.source.video, outside) > 22.0


def test_the_demo_case_is_a_held_out_edit():
    case = demo_case()
    assert case.source.scene.seed >= HELD_OUT
    assert case.source.video.shape == (17, 64, 64, 3)
    assert case.mask.any((1, 2)).all()
