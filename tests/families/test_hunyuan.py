"""What HunyuanVideo and its kin have of their own: what they are shown, what stays, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance

import kvlock_fast as kvf
from kvlock_fast.config import LockConfig
from kvlock_fast.errors import InputError
from kvlock_fast.locking.arch import around_video, without_text
from kvlock_fast.locking.lock import Mode
from kvlock_fast.loop.graph import choose_capture, why_not_captured
from kvlock_fast.models import wrap_pipeline
from tests.families.cases.framepack import CASES as FRAMEPACK
from tests.families.cases.framepack import tiny_framepack
from tests.families.cases.hunyuan_video import CASES, tiny_hunyuan, tiny_hunyuan_i2v, tiny_hunyuan_transformer
from tests.families.cases.hunyuan_video15 import CASES as CASES_15
from tests.families.cases.hunyuan_video15 import tiny_hunyuan15
from tests.families.cases.motif import CASES as MOTIF
from tests.support.conformance import NEGATIVE, PROMPT, Scene

BY_NAME = {case.name: case for case in (*CASES, *CASES_15, *FRAMEPACK)}


def spied(monkeypatch, pipe):
    """What the transformer is called with."""
    calls, plain = [], pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: calls.append(k) or plain(*a, **k))
    return calls


@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-i2v-replace", "framepack"])
def test_a_distilled_model_is_told_the_scale(monkeypatch, name):
    case = BY_NAME[name]
    pipe = case.make()
    calls = spied(monkeypatch, pipe)
    out = case.edit(pipe, lock="kvlock", guidance_scale=3.5, steps=2)
    assert all((call["guidance"] == 3500.0).all() for call in calls)
    assert out.trace.forwards == 2 * 2, "the source and one branch"
    assert all(record.s_star == 1 for record in out.trace.records)
    other = case.edit(pipe, lock="kvlock", guidance_scale=6.0, steps=2)
    assert not torch.equal(out.latents, other.latents)


def test_another_scale_is_another_source(tmp_path):
    case = BY_NAME["hunyuan-video"]
    pipe = kvf.KVLockPipeline.from_pipe(case.make())
    arguments = {"source_prompt": "a cat", "num_inference_steps": 2}
    noise = torch.Generator().manual_seed(1)
    pipe.invert(case.video(), case.mask(), tmp_path, guidance_scale=3.0, generator=noise, **arguments)
    cache = kvf.CacheConfig(path=str(tmp_path))
    more = {"prompt": "a dog", "cache": cache, **arguments}
    pipe(case.video(), case.mask(), guidance_scale=3.0, **more)
    with pytest.raises(InputError, match="guidance_scale"):
        pipe(case.video(), case.mask(), guidance_scale=4.0, **more)


def test_a_negative_prompt_is_asked_for():
    """As diffusers' own: without one there is no second branch."""
    case = BY_NAME["hunyuan-video-cfg"]
    pipe = case.make()
    assert case.edit(pipe, lock="cfg", steps=2, negative_prompt=None).trace.forwards == 2
    assert case.edit(pipe, lock="cfg", steps=2, negative_prompt=NEGATIVE).trace.forwards == 4


@pytest.mark.parametrize("name", ["hunyuan-video-i2v-replace", "framepack"])
def test_a_first_frame_that_is_held_stays(name):
    """To the bit, whatever the mask marks; a mask of nothing else is refused."""
    case = BY_NAME[name]
    pipe, model = case.make(), wrap_pipeline(case.make())
    out = case.edit(pipe, lock=LockConfig.preset("free-path", background_latents="model"))
    with torch.no_grad():
        clean = model.encode_video(torch.from_numpy(case.video()))
    assert torch.equal(out.latents[:, :, 0], clean[:, :, 0])
    assert not torch.allclose(out.latents[:, :, 1:], clean[:, :, 1:], atol=0.1)
    first = np.zeros(case.size, bool)
    first[0, :8, :8] = True
    with pytest.raises(InputError, match="mask marks the first frame only"):
        kvf.KVLockPipeline.from_pipe(pipe)(
            case.video(), first, source_prompt="a cat", prompt=PROMPT, num_inference_steps=2
        )


@pytest.mark.parametrize("name", ["hunyuan-video-i2v-concat", "hunyuan-video-1.5-i2v", "framepack"])
def test_source_and_edit_see_the_first_frame(monkeypatch, name):
    """Its latents where the pipeline puts them, the same in every row; nothing of the other frames."""
    case = BY_NAME[name]
    pipe = case.make()
    calls = spied(monkeypatch, pipe)
    case.edit(pipe, lock="kvlock", steps=1)
    shown = torch.cat(
        [c["latents_clean"][:, :, :1] if name == "framepack" else c["hidden_states"][:, 4:8, :1] for c in calls]
    )
    assert len(shown) > 1 and shown.std() > 0 and torch.equal(shown, shown[:1].expand_as(shown))
    with torch.no_grad():
        first = wrap_pipeline(pipe).encode_video(torch.from_numpy(case.video()[:1]))
    torch.testing.assert_close(shown[:1], first, rtol=1e-4, atol=1e-5)
    if name != "framepack":
        whole = calls[0]["hidden_states"]
        assert (whole[:, 4:8, 1:] == 0).all() and (whole[:, 8, 0] == 1).all() and (whole[:, 8, 1:] == 0).all()


def test_the_negative_words_are_told_a_black_picture():
    case = BY_NAME["hunyuan-video-i2v-concat"]
    scene = Scene(case)
    plain, negative = (
        scene.model.condition([NEGATIVE], scene.given),
        scene.model.condition_negative(NEGATIVE, [PROMPT, PROMPT], scene.given),
    )
    assert negative.rows == 2 and torch.equal(negative["image"][:1], plain["image"])
    pictures = 288  # every second one of 576
    assert not torch.allclose(negative["text"][0, :pictures], plain["text"][0, :pictures], atol=1e-4)


def test_tokens_ahead_are_left_as_they_are():
    """History in front of a section: neither blended nor kept, whatever the lock."""
    scene = Scene(BY_NAME["framepack"])
    assert scene.ahead == (4 // 2) * (6 // 2) + 1 * 1 * 2 + 4 * 1 * 1  # the image; patches of 2 x 4 x 4; of 4 x 8 x 8
    kept = scene.kept(scene.source)
    assert all(x.shape[1] == scene.tokens for x in kept.values())
    attention = scene.model.arch.attentions(scene.transformer)[0][1]
    other, values, lock = {key: torch.full_like(x, 7.0) for key, x in kept.items()}, [], scene.lock()
    hook = attention.to_v.register_forward_hook(lambda module, inputs, output: values.append(output))
    with torch.no_grad(), lock.forward(Mode.STORED, scene.weight(1.0), other, scene.tokens, ahead=scene.ahead):
        scene.predict(scene.latents, scene.told[0])
    hook.remove()
    is_source = (values[0] == 7).all(2)[0]
    assert is_source[scene.ahead :].tolist() == (~scene.inside).tolist() and not is_source[: scene.ahead].any()
    forward = lock.forward(Mode.STORED, scene.weight(1.0), kept, scene.tokens)
    with pytest.raises(RuntimeError, match="in front of the video's, whose number was not said"), forward:
        pass
    lock.detach()


@pytest.mark.parametrize(
    ("text", "ahead", "expected"),
    [("none", 0, (0, 0)), ("suffix", 0, (0, 3)), ("prefix", 0, (3, 0)), ("suffix", 2, (2, 1)), ("prefix", 2, (3, 0))],
)
def test_what_is_around_a_video(text, ahead, expected):
    total = 5 if text == "none" else 8
    assert around_video(total, text, 5, ahead) == expected
    x = torch.arange(total)[None, :, None]
    assert without_text(x, 1, text, 5, ahead).flatten().tolist() == list(range(total))[expected[0] :][:5]
    with pytest.raises(RuntimeError, match="of a video of"):
        around_video(4, text, 5, ahead)


def test_framepack_is_of_one_section():
    case, pipe = BY_NAME["framepack"], kvf.KVLockPipeline.from_pipe(tiny_framepack())
    more = {"source_prompt": "a cat", "prompt": PROMPT, "num_inference_steps": 2}
    long = np.zeros((41, 32, 48, 3), np.uint8)
    with pytest.raises(InputError, match="at most 37 frames"):
        pipe(long, np.ones((41, 32, 48), bool), **more)
    with pytest.raises(InputError, match="the video has 1 frame"):
        pipe(case.video()[:1], case.mask()[:1], **more)
    with pytest.raises(InputError, match="sees the whole clip"):
        pipe(long, np.ones((41, 32, 48), bool), clip_frames=9, **more)


def swapped(pipe, **changes):
    pipe.register_modules(**changes)
    return pipe


REFUSED = {
    "image for text": (
        lambda: swapped(tiny_hunyuan(), transformer=tiny_hunyuan_transformer(image_condition_type="token_replace")),
        "load it by HunyuanVideoImageToVideoPipeline",
    ),
    "text for image": (
        lambda: swapped(tiny_hunyuan_i2v("token_replace"), transformer=tiny_hunyuan_transformer()),
        "load it by HunyuanVideoPipeline",
    ),
    "two frames a token": (lambda: tiny_hunyuan(patch_size_t=2), "2 latent frames"),
    "meanflow": (lambda: tiny_hunyuan15(use_meanflow=True), "use_meanflow=True"),
    "guider": (lambda: swapped(tiny_hunyuan15(), guider=AdaptiveProjectedGuidance()), "AdaptiveProjectedGuidance"),
    "rescaled": (
        lambda: swapped(tiny_hunyuan15(), guider=ClassifierFreeGuidance(guidance_rescale=0.7)),
        "guidance_rescale=0.7",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_followed_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        kvf.KVLockPipeline.from_pipe(make())


@pytest.mark.parametrize("name", ["hunyuan-video-1.5", "framepack"])
def test_steps_that_wait_for_values_are_not_captured(name):
    scene = Scene(BY_NAME[name])
    reason = why_not_captured(scene.model, LockConfig.preset("kvlock"), scene.solver)
    with pytest.raises(InputError, match=r"graph is 'on', but the steps cannot be captured: a forward of .* waits"):
        choose_capture("on", torch.device("cuda"), reason)


@pytest.mark.parametrize("case", [CASES_15[0], MOTIF[0]], ids=lambda case: case.name)
def test_a_guider_that_is_off_does_not_guide(case):
    off = swapped(case.make(), guider=ClassifierFreeGuidance(enabled=False))
    ours, guided, unguided = (
        case.edit(pipe, steps=2, guidance_scale=scale) for pipe, scale in ((off, 4.0), (case.make(), 4.0), (off, 1.0))
    )
    assert torch.equal(ours.latents, unguided.latents) and not torch.equal(ours.latents, guided.latents)
    assert ours.trace.forwards < guided.trace.forwards
