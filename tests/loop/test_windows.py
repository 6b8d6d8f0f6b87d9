"""Long clips in stretches: where they lie, how they blend, and that the edit stays what it is."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kvlock_fast as kvf
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.errors import InputWarning
from kvlock_fast.loop.windows import Windows, blend, places_of, stretches
from kvlock_fast.masks import Geometry, project_mask
from kvlock_fast.models.wan import WanModel
from tests.pipeline.test_pipeline import HEIGHT, WIDTH, a_mask, a_video, call, unipc
from tests.support.locks import paper
from tests.support.tiny import tiny_wan, untouched

FRAMES = 29  # 8 latent frames


def long(**changes):
    video, mask = a_video(FRAMES), a_mask(FRAMES)
    return {"video": video, "mask": mask, "clip_frames": 13, "clip_overlap": 4, **changes}


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 19))
def test_stretches_cover_the_clip_and_share_at_least_the_overlap(total, window, overlap):
    assume(overlap < window)
    places = places_of(total, window, overlap)
    covered = np.zeros(total, int)
    for place in places:
        covered[place] += 1
        assert place.stop - place.start == min(window, total)
    assert (covered >= 1).all() and places[0].start == 0 and places[-1].stop == total
    for a, b in pairwise(places):
        assert a.start < b.start and a.stop - b.start >= overlap
    least = 1 if total <= window else -(-(total - overlap) // (window - overlap))
    assert len(places) == least


@given(st.integers(1, 14), st.integers(2, 9), st.integers(1, 8), st.integers(0, 99))
def test_blending_is_a_weighted_mean(total, window, overlap, seed):
    """By brute force; stretches that agree give back what they agree on."""
    assume(overlap < window)
    mask = project_mask(torch.ones(total, 2, 3, dtype=torch.bool), Geometry(1, 1, (1, 1, 1)))
    found = stretches(mask, Windows(window, overlap), Geometry(1, 1, (1, 1, 1)))
    whole = torch.randn(2, 3, total, 2, 3, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(blend([part.of(whole) for part in found], found), whole, rtol=1e-5, atol=1e-6)
    said = [torch.randn(2, 3, *part.mask.latents.shape[1:]) for part in found]
    mixed = blend(said, found)
    for t in range(total):
        here = [(part, x) for part, x in zip(found, said, strict=True) if part.frames.start <= t < part.frames.stop]
        weights = [part.weights[t - part.frames.start].item() for part, _ in here]
        assert sum(weights) == pytest.approx(1) and min(weights) > 0
        expected = sum(w * x[:, :, t - part.frames.start] for w, (part, x) in zip(weights, here, strict=True))
        torch.testing.assert_close(mixed[:, :, t], expected, rtol=1e-5, atol=1e-5)


def test_weights_fall_towards_a_neighbour():
    mask = project_mask(torch.ones(10, 1, 1, dtype=torch.bool), Geometry(1, 1, (1, 1, 1)))
    first, second = stretches(mask, Windows(6, 2), Geometry(1, 1, (1, 1, 1)))
    assert first.weights.tolist() == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3])
    assert second.weights.tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


@given(
    st.integers(1, 40),
    st.integers(2, 40),
    st.integers(1, 39),
    st.sampled_from([(1, 2, 2), (2, 2, 2)]),
    st.integers(0, 9),
)
def test_a_stretchs_mask_is_the_masks_own(frames, window, overlap, patch, seed):
    geometry = Geometry(4, 2, patch)
    assume(overlap < window)
    windows = Windows(window, overlap)
    try:
        windows.latent_sizes(geometry)
    except kvf.InputError as error:
        assert "leaves a stretch nothing of its own" in str(error)
        return
    pixels = torch.rand(frames, 8, 12, generator=torch.Generator().manual_seed(seed)) < 0.05
    mask = project_mask(pixels, geometry)
    grid = mask.tokens.view(mask.grid)
    for part in stretches(mask, windows, geometry):
        first, last = part.frames.start // patch[0], -(-part.frames.stop // patch[0])
        assert part.frames.start % patch[0] == 0
        assert torch.equal(part.mask.tokens.view(-1, *mask.grid[1:]), grid[first:last])
        assert torch.equal(part.mask.latents, mask.latents[:, part.frames])
        again = part.mask.on_latents(part.mask.tokens)
        assert torch.equal(again, mask.on_latents(mask.tokens)[:, part.frames])


def test_a_window_as_long_as_the_clip_is_the_clip_bit_for_bit():
    whole = call(tiny_wan(unipc()), steps=4, **long(clip_frames=None, clip_overlap=None)).latents
    for window in (FRAMES, 1000):
        assert torch.equal(call(tiny_wan(unipc()), steps=4, **long(clip_frames=window)).latents, whole)


def test_a_window_that_the_clip_fits_into_forbids_nothing(tmp_path):
    cache = CacheConfig(tier="disk", root=str(tmp_path))
    whole = call(tiny_wan(), cache=cache, **long(clip_frames=None, clip_overlap=None)).latents
    assert torch.equal(call(tiny_wan(), cache=cache, **long(clip_frames=81)).latents, whole)


def test_memory_that_runs_out_in_stretches_is_tried_with_less(monkeypatch):
    """No plan, but fewer prompts at once, and the source along."""
    from kvlock_fast import edits

    tried, real = [], edits.denoise

    def little(task, *rest):
        tried.append((task.batch, rest[2][0].stored is not None))
        if task.batch > 1:
            raise torch.OutOfMemoryError("none left")
        return real(task, *rest)

    monkeypatch.setattr(edits, "denoise", little)
    prompts = ["a dog", "a cat"]
    with pytest.warns(InputWarning, match="one prompt at a time"):
        out = call(tiny_wan(), prompt=prompts, cache=CacheConfig(tier="resident"), steps=2, **long())
    assert tried == [(2, True), (2, False), (1, False), (1, False)]
    monkeypatch.undo()
    along = call(tiny_wan(), prompt=prompts, cache=CacheConfig(prompts_at_once=1), steps=2, **long())
    assert torch.equal(out.latents, along.latents)


def test_every_stretch_is_an_edit_of_its_own_before_it_is_blended():
    """One Euler step from the same noise: frames that only one stretch has are what an edit of them alone makes."""
    pipe, lock = tiny_wan(), paper(alpha=1.0, s_star=False, omega="constant")
    model = WanModel(pipe)
    noise = torch.randn(1, 4, 8, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(3))
    out = call(pipe, lock=lock, steps=1, latents=noise, **long())
    clean = model.encode_video(torch.from_numpy(a_video(FRAMES)))
    found = stretches(out.mask, Windows(13, 4), model.geometry)
    assert [(part.frames.start, part.frames.stop) for part in found] == [(0, 4), (3, 7), (4, 8)]
    once = torch.zeros(8, dtype=torch.int)
    for part in found:
        once[part.frames] += 1
    for part in found:
        alone = _edited(pipe, part, clean, noise, lock)
        frames = torch.arange(part.frames.start, part.frames.stop)
        single = frames[once[frames] == 1]
        torch.testing.assert_close(
            out.latents[:, :, single], alone[:, :, single - part.frames.start], rtol=1e-4, atol=1e-5
        )


def _edited(pipe, part, clean, noise, lock):
    """An edit of a stretch's latents, through the pipeline with the autoencoder left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanModel, "encode_video", lambda self, frames: part.of(clean))
        patch.setattr("kvlock_fast.models.base.project_mask", lambda *_: part.mask)
        frames = 4 * (part.mask.latents.shape[1] - 1) + 1
        return call(
            pipe, lock=lock, steps=1, video=a_video(frames), mask=a_mask(frames), latents=part.of(noise)
        ).latents


@pytest.mark.parametrize("tier", ["lockstep", "resident", "host"])
@pytest.mark.parametrize(
    "lock",
    [
        LockConfig.preset("kvlock"),
        paper(tau="auto"),
        paper(source_path="invert"),
        paper(kappa=2, warmup_alpha=0.0),
        LockConfig.preset("cfg"),
    ],
    ids=["kvlock", "auto", "invert", "window", "cfg"],
)
def test_tiers_agree_and_the_background_is_exact(tier, lock):
    pipe = tiny_wan(unipc())
    cache = CacheConfig(tier=tier, format="native")
    out = call(pipe, lock=lock, cache=cache, prompt=["a dog", "a cat"], **long())
    along = call(pipe, lock=lock, prompt=["a dog", "a cat"], **long())
    torch.testing.assert_close(out.latents, along.latents, rtol=1e-4, atol=1e-4)
    assert untouched(pipe.transformer) and not torch.equal(out.latents[0], out.latents[1])
    if lock.background_latents == "source":
        clean = WanModel(pipe).encode_video(torch.from_numpy(a_video(FRAMES)))
        outside = ~out.mask.latents[:, None].expand_as(out.latents)
        assert torch.equal(out.latents[outside], clean.expand_as(out.latents)[outside])


def test_foreground_alone_skips_stretches_that_the_mask_does_not_touch():
    mask = np.zeros((FRAMES, HEIGHT, WIDTH), bool)
    mask[:9, :16, :16] = True
    lock = {"alpha": 1.0, "s_star_region": "foreground", "background_latents": "source"}
    edits = [
        call(tiny_wan(), lock=paper(**lock, compute=compute), cache=cache, **long(mask=mask))
        for cache in (CacheConfig(), CacheConfig(tier="resident", format="native"))
        for compute in ("full", "foreground")
    ]
    for full, sparse in (edits[:2], edits[2:]):
        torch.testing.assert_close(sparse.latents, full.latents, rtol=1e-5, atol=1e-5)
    assert {record.tokens for record in edits[3].trace} == {3} and edits[3].trace.forwards < edits[2].trace.forwards
    assert edits[1].trace.forwards < edits[0].trace.forwards


def test_a_stretch_that_the_mask_covers_whole():
    mask = np.zeros((FRAMES, HEIGHT, WIDTH), bool)
    mask[:13] = True
    for cache in (CacheConfig(), CacheConfig(tier="resident"), CacheConfig(tier="host")):
        for compute in ("full", "foreground"):
            lock = paper(alpha=1.0, compute=compute)
            assert call(tiny_wan(), lock=lock, cache=cache, **long(mask=mask)).latents.isfinite().all()


def test_longer_than_the_models_position_codes():
    pipe = tiny_wan(rope_max_seq_len=6)
    with pytest.raises(
        kvf.InputError, match=r"29 frames of 32x48 are too many .* at most 21 frames .*: give clip_frames"
    ):
        call(pipe, **long(clip_frames=None, clip_overlap=None))
    with pytest.raises(kvf.InputError, match="29 frames of 32x48 are too many"):
        call(pipe, **long(clip_frames=29))
    assert call(pipe, steps=2, output="frames", **long(clip_frames=21)).frames[0].shape == (FRAMES, HEIGHT, WIDTH, 3)


REFUSED = {
    "short": ({"clip_frames": 1}, "clip_frames must be at least 2, got 1"),
    "whole": ({"clip_frames": 13.0}, "clip_frames must be a whole number, got 13.0"),
    "overlap": ({"clip_overlap": 13}, "clip_overlap must be from 1 to 12, less than clip_frames, got 13"),
    "none": ({"clip_overlap": 0}, "clip_overlap must be from 1 to 12"),
    "nothing": ({"clip_frames": 5, "clip_overlap": 4 + 1 - 1}, None),
    "own": (
        {"clip_frames": 8, "clip_overlap": 7},
        "clip_frames 8 with clip_overlap 7 leaves a stretch nothing of its own",
    ),
    "disk": ({"cache": CacheConfig(tier="disk")}, "clip_frames does not go with the cache tier disk"),
    "no window": ({"clip_frames": None, "clip_overlap": 3}, "clip_overlap is 3, but clip_frames is not given"),
    "graph": ({"graph": "on"}, "graph is 'on', but the steps cannot be captured"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_windows_are_refused(case):
    changes, reason = REFUSED[case]
    if reason is None:
        assert call(tiny_wan(), steps=1, **long(**changes)).latents.isfinite().all()
        return
    with pytest.raises(kvf.InputError, match=reason):
        call(tiny_wan(), **long(**changes))


def test_auto_does_not_capture(monkeypatch):
    from kvlock_fast import pipeline

    said = []
    monkeypatch.setattr(pipeline, "choose_capture", lambda wish, device, why: said.append(why))
    call(tiny_wan(), steps=1, graph="auto", **long())
    assert said == ["the clip goes through the model in stretches"]


def test_a_padded_clip(recwarn):
    video, mask = a_video(26), a_mask(26)
    out = call(tiny_wan(), steps=1, output="frames", video=video, mask=mask, clip_frames=13, clip_overlap=4)
    assert len(out.frames[0]) == 26 and any(w.category is InputWarning for w in recwarn)


def test_from_the_command_line(tmp_path):
    """A clip longer than the model's positions, by its flags."""
    from kvlock_fast.cli import main
    from kvlock_fast.media import read_video, write_video

    tiny_wan(rope_max_seq_len=6).save_pretrained(tmp_path / "model")
    write_video(tmp_path / "clip.mkv", a_video(FRAMES), 10)
    arguments = ["edit", "--source", tmp_path / "clip.mkv", "--mask", "box:0,0,16,16", "--model", tmp_path / "model",
                 "--source-prompt", "a cat", "--prompt", "a dog", "--steps", "2", "--variance-window", "2",
                 "--output", tmp_path / "edit.mkv"]  # fmt: skip
    assert main([*map(str, arguments)]) == 2 and not (tmp_path / "edit.mkv").exists()
    assert main([*map(str, arguments), "--clip-frames", "13", "--clip-overlap", "4"]) == 0
    assert read_video(tmp_path / "edit.mkv").frames.shape == (FRAMES, HEIGHT, WIDTH, 3)


def test_a_named_cache_does_not_go_with_stretches(tmp_path):
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    video, mask = a_video(FRAMES), a_mask(FRAMES)
    arguments = {"source_prompt": "a cat", "num_inference_steps": 2}
    pipe.invert(video, mask, tmp_path / "cache", generator=torch.Generator().manual_seed(0), **arguments)
    with pytest.raises(kvf.InputError, match="clip_frames does not go with the cache '"):
        pipe(video, mask, prompt="a dog", clip_frames=13, cache=CacheConfig(path=str(tmp_path / "cache")), **arguments)
