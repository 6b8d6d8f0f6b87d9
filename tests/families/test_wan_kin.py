"""Wan's kin beyond the conformance suite: what each is shown of the source, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Transformer3DModel, WanPipeline

import kvlock_fast as kvf
from kvlock_fast.config import CacheConfig
from kvlock_fast.errors import InputError, InputWarning
from kvlock_fast.models.base import PerClip
from kvlock_fast.models.cogvideox_image import CogVideoXImageModel
from kvlock_fast.models.skyreels import SkyReelsModel
from kvlock_fast.models.wan import WanModel
from kvlock_fast.planning.any_family import transformer_size
from tests.families.cases.cogvideox_image import CASES as COGVIDEOX_IMAGE
from tests.families.cases.wan_kin import (
    CASES,
    chronoedit,
    of,
    skyreels,
    transformer,
    vace,
    wan_i2v,
)
from tests.support.conformance import NEGATIVE, PROMPT, SOURCE, Scene
from tests.support.locks import paper

BY_NAME = {case.name: case for case in CASES}


def asked(pipe, monkeypatch):
    """What the (first) transformer is asked, call by call."""
    calls, plain = [], pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda **given: calls.append(given) or plain(**given))
    return calls


def test_a_first_frame_that_is_held_cannot_change(monkeypatch):
    """TI2V-5B: clean latents at time 0 in the first frame, in every call, and in the end."""
    case = BY_NAME["wan-i2v-2.2-5b"]
    pipe = case.make()
    calls = asked(pipe, monkeypatch)
    out = case.edit(pipe, lock="paper")
    clean = kvf.KVLockPipeline.from_pipe(pipe).model.encode_video(torch.from_numpy(case.video()))
    assert not out.mask.tokens.view(3, 2, 3)[0].any() and out.mask.tokens.any()
    torch.testing.assert_close(out.latents[:, :, 0], clean[:, :, 0], rtol=1e-5, atol=1e-5)
    for given in calls:
        first = given["hidden_states"][:, :, 0]
        torch.testing.assert_close(first, clean[:, :, 0].expand_as(first), rtol=1e-5, atol=1e-5)
        assert (given["timestep"][:, :6] == 0).all() and (given["timestep"][:, 6:] > 0).all()
    mask = case.mask()
    mask[1:] = False
    with pytest.raises(InputError, match="mask marks the first frame only"):
        kvf.KVLockPipeline.from_pipe(pipe)(case.video(), mask, source_prompt=SOURCE, prompt=PROMPT)


def test_pictures_are_the_sources_first_and_last_frame(monkeypatch):
    case = BY_NAME["wan-i2v-2.1-first-last"]
    pipe, seen = case.make(), []
    plain = pipe.encode_image
    monkeypatch.setattr(pipe, "encode_image", lambda image, device: seen.append(image) or plain(image, device))
    calls = asked(pipe, monkeypatch)
    case.edit(pipe, [PROMPT, "a dog"], steps=1)
    assert len(seen) == 1, "encoded once for all prompts"
    for picture, frame in zip(seen[0], case.video()[[0, -1]], strict=True):
        assert np.array_equal(np.asarray(picture), frame)
    given = calls[0]["hidden_states"]
    assert given.shape[:2] == (5, 12), "source, two negative and two positive rows; noise, given frames, latents"
    assert given[:, 4:8, 0].eq(1).all() and given[:, 4:8, 1].eq(0).all()
    assert given[:, 4:8, 2].mean(dim=(0, 2, 3)).tolist() == [0, 0, 0, 1], "of the last four frames, the last"


def test_vace_shows_the_edit_a_hole_and_the_source_itself_whole(monkeypatch):
    case = BY_NAME["wan-vace"]
    pipe, scene = case.make(), Scene(case)
    calls = asked(pipe, monkeypatch)
    case.edit(pipe, steps=1)
    shown = calls[0]["control_hidden_states"]
    source, *edits = shown
    mean, std = scene.model._latent_statistics(shown)
    torch.testing.assert_close(source[:4], scene.source[0], rtol=1e-4, atol=1e-4)
    assert source[8:].eq(0).all(), "nothing of the source's own pass is to be made anew"
    inside = torch.from_numpy(case.mask()).float().mean().item()
    grey = pipe.vae.encode(torch.zeros(1, 3, *case.size)).latent_dist.mode()
    for row in edits:
        assert torch.equal(row, edits[0])
        torch.testing.assert_close(row[4:8], ((grey - mean) / std)[0], rtol=1e-4, atol=1e-4)
        assert row[8:].mean().item() == pytest.approx(inside) and row[8:].unique().tolist() == [0, 1]
        assert not torch.allclose(row[:4], source[:4], atol=1e-2)


def test_a_kept_vace_source_serves_a_grown_mask(tmp_path):
    """What the source is shown does not hang on the mask."""
    case, pipe = BY_NAME["wan-vace"], kvf.KVLockPipeline.from_pipe(vace())
    more = {"source_prompt": SOURCE, "num_inference_steps": 3}
    pipe.invert(case.video(), case.mask(), tmp_path, generator=torch.Generator().manual_seed(1), **more, lock=paper())
    grown = case.mask()
    grown[:, :, : case.size[2] // 2] = True
    more |= {"prompt": PROMPT, "negative_prompt": NEGATIVE, "output": "latent", "lock": paper()}
    kept = pipe(case.video(), grown, cache=CacheConfig(path=str(tmp_path)), **more)
    along = pipe(case.video(), grown, generator=torch.Generator().manual_seed(1), **more)
    error = (kept.latents - along.latents).norm() / along.latents.norm()
    assert error < 0.05 and kept.mask.share > 0.3


def test_chronoedit_encodes_the_last_frames_behind_the_first():
    """Of a longer clip; the autoencoder is causal, so the frames between would reach them otherwise."""
    case = BY_NAME["chronoedit-reasoning"]
    model = kvf.KVLockPipeline.from_pipe(chronoedit()).model
    video = torch.from_numpy(case.video())
    other = video.clone()
    other[1:5] = 255 - other[1:5]
    with torch.no_grad():
        one, two = model.encode_video(video), model.encode_video(other)
        wan = WanModel.encode_video(model, video)
    assert torch.equal(one[:, :, [0, 2]], two[:, :, [0, 2]]) and not torch.equal(one[:, :, 1], two[:, :, 1])
    torch.testing.assert_close(one[:, :, :2], wan[:, :, :2])
    assert not torch.allclose(one[:, :, 2], wan[:, :, 2])


def test_chronoedit_edits_a_picture():
    """As the clip of 5 frames that diffusers' own pipeline makes of it, of which the last is the edit."""
    case, pipe = BY_NAME["chronoedit"], chronoedit()
    picture, mask = case.video()[:1], case.mask()[:1]

    def edit(video, mask, **more):
        generator = torch.Generator().manual_seed(1)
        return kvf.KVLockPipeline.from_pipe(pipe)(
            video, mask, source_prompt=SOURCE, prompt=PROMPT, num_inference_steps=3, generator=generator, **more
        )

    with pytest.warns(InputWarning, match="1 frames padded to 5"):
        (one,) = edit(picture, mask).frames
    (clip,) = edit(np.repeat(picture, 5, axis=0), np.repeat(mask, 5, axis=0)).frames
    assert one.shape == (1, 32, 48, 3) and clip.shape[0] == 5
    assert np.array_equal(one[0], clip[-1]) and not np.array_equal(one[0], clip[0])
    for policy, words in (("error", "1 frames, which is not 5 or more"), ("trim", "the model takes 5 or more")):
        with pytest.raises(InputError, match=words):
            edit(picture, mask, frames_policy=policy)


@pytest.mark.parametrize("name", list(BY_NAME))
def test_sizes_by_config_are_the_models(name):
    """What the planner counts on: parameters, and every layer that is kept."""
    pipe = BY_NAME[name].make()
    size = transformer_size({**pipe.transformer.config, "_class_name": type(pipe.transformer).__name__})
    assert size.parameters == sum(p.numel() for p in pipe.transformer.parameters())
    model = kvf.KVLockPipeline.from_pipe(pipe).model
    assert size.layers == len(model.arch.attentions(pipe.transformer)) and size.geometry == model.geometry
    assert size.channels == pipe.vae.config.z_dim


@pytest.mark.parametrize("name", ["wan-i2v-2.1", "wan-vace", "chronoedit"])
def test_clips_are_not_cut_into_windows(name):
    case = BY_NAME[name]
    with pytest.raises(InputError, match="clip_frames does not go with the family"):
        case.edit(case.make(), clip_frames=5)


@pytest.mark.parametrize(
    "config, words",
    [({"num_frame_per_block": 2}, "num_frame_per_block=2"), ({"inject_sample_info": True}, "inject_sample_info=True")],
)
def test_diffusion_forcing_is_refused(tmp_path, config, words):
    pipe = skyreels()
    pipe.register_modules(transformer=transformer(SkyReelsV2Transformer3DModel, **config))
    with pytest.raises(InputError, match=f"diffusion forcing .{words}"):
        SkyReelsModel(pipe)
    forcing = of(SkyReelsV2DiffusionForcingPipeline, transformer(SkyReelsV2Transformer3DModel))
    (tmp_path / "model_index.json").write_text('{"_class_name": "SkyReelsV2DiffusionForcingPipeline"}')
    for way in (lambda: kvf.KVLockPipeline.from_pipe(forcing), lambda: kvf.KVLockPipeline.from_pretrained(tmp_path)):
        with pytest.raises(InputError, match=r"SkyReelsV2DiffusionForcingPipeline.*every frame has a time of its own"):
            way()


def test_channels_that_do_not_fit_are_refused():
    pipe = wan_i2v("2.2-5b")
    pipe.register_to_config(expand_timesteps=False)
    with pytest.raises(InputError, match="takes 4 channels, and image-to-video with this autoencoder has 12"):
        kvf.KVLockPipeline.from_pipe(pipe)
    with pytest.raises(InputError, match="load it by WanImageToVideoPipeline"):
        kvf.KVLockPipeline.from_pipe(of(WanPipeline, wan_i2v("2.2").transformer))
    blind = wan_i2v("2.1")
    blind.image_encoder = None
    with pytest.raises(InputError, match="no image_encoder"):
        kvf.KVLockPipeline.from_pipe(blind)


def test_the_picture_of_cogvideox_is_encoded_once_for_all_prompts(monkeypatch):
    case, seen = COGVIDEOX_IMAGE[0], []
    plain = CogVideoXImageModel._image
    monkeypatch.setattr(CogVideoXImageModel, "_image", lambda self, frame: seen.append(frame) or plain(self, frame))
    case.edit(case.make(), [PROMPT, "a dog"], steps=1)
    assert len(seen) == 1 and np.array_equal(seen[0].numpy(), case.video()[0])


def test_what_is_made_of_a_clip_is_made_once():
    keep, made = PerClip(), []

    def make():
        made.append(1)
        return len(made)

    one, other = torch.zeros(2), torch.zeros(2)
    assert [keep((one,), "a", make), keep((one,), "a", make), keep((one,), "b", make)] == [1, 1, 2]
    assert keep((one, other), "a", make) == 3 and keep((other,), "a", make) == 4 and keep((one,), "a", make) == 5
    del one
    assert keep((torch.zeros(2),), "a", make) == 6
