"""An image as a video of one frame: files in and out, pages, and models that make nothing else."""

import json
import re
import warnings
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

import kvlock_fast as kvf
from kvlock_fast.cli import main
from kvlock_fast.conditioning import Conditioning
from kvlock_fast.errors import InputError, InputWarning, OutputError
from kvlock_fast.media import read_video, write_video
from kvlock_fast.models import wrap_pipeline
from tests.families.cases.cogview4 import CASES as COGVIEW4_CASES
from tests.families.cases.flux import tiny_flux
from tests.families.cases.flux2 import tiny_klein
from tests.families.cases.hunyuan_image import tiny_hunyuan_image
from tests.families.cases.qwen_image import tiny_qwen_image
from tests.support.tiny import tiny_wan

COGVIEW4 = COGVIEW4_CASES[0]

HEIGHT, WIDTH = 32, 48


def picture(seed=0, height=HEIGHT, width=WIDTH):
    """uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def spot():
    """bool [H, W]."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[8:24, 12:30] = True
    return mask


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A photo, its mask, and a tiny FLUX on disk."""
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(picture()).save(folder / "photo.png")
    Image.fromarray(spot().astype(np.uint8) * 255).save(folder / "mask.png")
    tiny_flux().save_pretrained(folder / "flux")
    return folder


def edit(files, *more, output="edited.png", source="photo.png", mask="mask.png", model="flux"):
    arguments = ["edit", "--source", files / source, "--mask", files / mask, "--model", files / model]
    arguments += ["--source-prompt", "a red circle", "--prompt", "a blue circle", "--output", output, "--steps", "3"]
    return main([*map(str, arguments), *map(str, more)])


def test_a_photo_from_file_to_file(files, tmp_path, capsys):
    out, trace, report, sheet = (tmp_path / name for name in ("edited.png", "t.json", "r.html", "s.png"))
    more = ("--trace", trace, "--report", report, "--sheet", sheet, "--json", "-")
    assert edit(files, *more, output=out) == 0
    captured = capsys.readouterr()
    assert "warning" not in captured.err, captured.err
    edited = np.asarray(Image.open(out))
    assert edited.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(edited[~spot()], picture()[~spot()]) and not np.array_equal(edited[spot()], picture()[spot()])
    metrics = json.loads(captured.out)["metrics"][0]
    assert metrics["background_flicker"] is None and metrics["foreground_psnr"] > 0
    page = report.read_text()
    assert page.count('<img src="data:image/png') == 4 and "<video" not in page and "Flicker" not in page
    assert "<script" not in page and "fps" not in re.sub(r"data:[^\"]*", "", page)
    assert Image.open(sheet).size[0] > WIDTH
    again = tmp_path / "again.html"
    assert main(["report", str(trace), "--output", str(again)]) == 0
    assert again.read_text().count('<img src="data:image/png') == 4


@pytest.mark.parametrize("composite", [True, False])
def test_the_pixels_are_those_of_the_python_call(files, tmp_path, composite):
    flag = "--composite" if composite else "--no-composite"
    assert edit(files, "--seed", 4, "--guidance", 3, "-q", flag, output=tmp_path / "o.png") == 0
    pipe = kvf.KVLockPipeline.from_pretrained(files / "flux")
    out = pipe(
        picture()[None], spot()[None], source_prompt="a red circle", prompt="a blue circle", num_inference_steps=3,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(4), composite=composite,
    )  # fmt: skip
    assert out.frames[0].shape == (1, HEIGHT, WIDTH, 3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "o.png")), out.frames[0][0])
    assert np.array_equal(out.frames[0][0][~spot()], picture()[~spot()]) == composite


def test_a_saved_source_and_a_preview(files, tmp_path):
    cache, preview = tmp_path / "cache", tmp_path / "p.png"
    inputs = ["--source", files / "photo.png", "--mask", files / "mask.png", "--model", files / "flux", "-q"]
    arguments = ["invert", *inputs, "--source-prompt", "a red circle", "--steps", "3", "--output", cache]
    assert main([*map(str, arguments), "--mask-preview", str(preview), "--cache-format", "native"]) == 0
    assert Image.open(preview).size[0] >= WIDTH
    along, kept = tmp_path / "along.png", tmp_path / "kept.png"
    assert edit(files, "-q", output=along) == 0 and edit(files, "--cache", cache, "-q", output=kept) == 0
    difference = np.asarray(Image.open(along)).astype(int) - np.asarray(Image.open(kept))
    assert np.abs(difference).max() <= 1
    # The scale that the transformer is told is part of what was kept.
    assert edit(files, "--cache", cache, "--guidance", 2, "-q", output=tmp_path / "other.png") == 2
    assert not (tmp_path / "other.png").exists()


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "mkv", "mp4", ""])
def test_a_video_model_edits_a_photo(files, tmp_path, suffix):
    if not (files / "wan").exists():
        tiny_wan().save_pretrained(files / "wan")
    out = tmp_path / ("o." + suffix if suffix else "folder")
    assert edit(files, "-q", output=out, model="wan") == 0
    assert read_video(out).frames.shape == (1, HEIGHT, WIDTH, 3)


def test_bad_input_of_images(files, tmp_path, capsys):
    frames = np.stack([picture(i) for i in range(5)])
    write_video(files / "five.mkv", frames, Fraction(8))
    cases = [
        ({"source": "five.mkv", "output": tmp_path / "o.mkv"}, "the model makes images", "5 frames"),
        ({"source": "five.mkv", "output": tmp_path / "o.png"}, "'" + str(tmp_path / "o.png"), "has 5"),
        ({"output": tmp_path / "o.bmp"}, "o.bmp", "a video is written as"),
    ]
    for changes, *said in cases:
        assert edit(files, "-q", **changes) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert all(words in last for words in said), last
        assert not list(tmp_path.iterdir())
    assert edit(files, "-q", "--clip-frames", "4", source="five.mkv", output=tmp_path / "o.mkv") == 2
    assert "the model makes images" in capsys.readouterr().err


def test_pictures_are_exact_and_whole(tmp_path):
    write_video(tmp_path / "a.png", picture()[None], 16)
    assert np.array_equal(read_video(tmp_path / "a.png").frames[0], picture())
    smooth = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None], (40, 64, 3))
    write_video(tmp_path / "a.jpg", smooth[None], 16)
    assert np.abs(read_video(tmp_path / "a.jpg").frames[0].astype(int) - smooth).max() <= 4
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(OutputError, match="one frame, and the video has 2"):
        write_video(tmp_path / "a.png", np.stack([picture(), picture()]), 16)
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_images_that_move_are_videos(tmp_path):
    pictures = [Image.fromarray(picture(i)) for i in range(3)]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], duration=100)
    assert len(read_video(tmp_path / "a.png").frames) == 3


def test_guidance_that_is_told_is_no_second_branch():
    arguments = {"source_prompt": "a red circle", "prompt": "a cat", "num_inference_steps": 2, "output": "latent"}
    image = picture()[None], spot()
    for embeds, negative, forwards in ((True, "a dog", 2), (False, "a dog", 4), (False, None, 2)):
        pipe = kvf.KVLockPipeline.from_pipe(tiny_flux(embeds))
        out = pipe(*image, negative_prompt=negative, lock=kvf.LockConfig.preset("cfg"), guidance_scale=4.0, **arguments)
        assert out.trace.forwards == forwards
    pipe = kvf.KVLockPipeline.from_pipe(tiny_klein(distilled=True))
    assert pipe(*image, lock=kvf.LockConfig.preset("cfg"), guidance_scale=4.0, **arguments).trace.forwards == 2


def test_what_is_not_supported_is_refused():
    with pytest.raises(InputError, match="takes an image beside the text"):
        kvf.KVLockPipeline.from_pipe(tiny_flux(in_channels=24))
    pipe = tiny_qwen_image()
    pipe.transformer.register_to_config(use_layer3d_rope=True)
    with pytest.raises(InputError, match="of another kind"):
        kvf.KVLockPipeline.from_pipe(pipe)


def test_texts_of_other_lengths_have_a_mask_only_together():
    short, long = (Conditioning("text", text=torch.ones(1, n, 2)) for n in (3, 5))
    assert set(Conditioning.cat([short, short])) == {"text"}
    both = Conditioning.cat([short, long])
    assert both["text"].shape == (2, 5, 2) and both["mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    three = Conditioning.cat([both.part(0, 1), short.expand(2)])
    assert three["mask"].tolist() == [[True] * 3 + [False] * 2] * 3
    with pytest.raises(InputError, match="texts of one length"):
        Conditioning.cat([Conditioning(text=torch.ones(1, n, 2)) for n in (3, 5)])


def test_texts_that_cannot_be_together_go_one_after_the_other():
    """CogView4 fills its texts up to multiples of 16 tokens, and has no mask for them."""
    case = replace(COGVIEW4, steps=3)
    long = " ".join(["a red circle moves left over dark stripes"] * 3)
    pipe, lock = case.make(), kvf.LockConfig.preset("kvlock", kappa=3)
    out = case.edit(pipe, prompt=long, lock=lock)
    assert out.trace.forwards == 3 * 3 and out.latents.isfinite().all()
    with pytest.raises(InputError, match="texts of one length"):
        batched = kvf.LockConfig.preset("kvlock", kappa=3, guidance_batching="batched")
        case.edit(pipe, prompt=long, lock=batched)
    with pytest.raises(InputError, match=r"texts of one length.*give one prompt at a time"):
        case.edit(pipe, prompt=[long, "a dog"], lock=lock)
    together, apart = (
        case.edit(pipe, lock=kvf.LockConfig.preset("kvlock", kappa=3, guidance_batching=batching)).latents
        for batching in ("auto", "separate")
    )
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_a_guider_that_an_edit_replaces_is_said():
    from diffusers.guiders import AdaptiveProjectedMixGuidance, SkipLayerGuidance

    with pytest.warns(InputWarning, match="AdaptiveProjectedMixGuidance is left out"):
        model = wrap_pipeline(tiny_hunyuan_image(guider=AdaptiveProjectedMixGuidance()))
    assert model.guided(3.0) and not model.guided(1.0)
    assert not wrap_pipeline(tiny_hunyuan_image(guider=None)).guided(3.0)
    with pytest.raises(InputError, match="guider SkipLayerGuidance is not supported"):
        wrap_pipeline(tiny_hunyuan_image(guider=SkipLayerGuidance(skip_layer_guidance_layers=[0])))


def test_a_size_that_does_not_fit_is_said():
    pipe = kvf.KVLockPipeline.from_pipe(tiny_flux())
    arguments = {"source_prompt": "a", "prompt": "b", "num_inference_steps": 1, "output": "latent"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = pipe(picture(height=30, width=50)[None], spot()[:30].repeat(2, 1)[:, :50], **arguments)
    assert out.latents.shape == (1, 4, 1, 8, 12)
    assert any(w.category is InputWarning and "working at 32x48" in str(w.message) for w in said)


def test_batches_of_images(files, tmp_path, capsys):
    jobs = [
        {"id": "a", "source": "photo.png", "output": "a.png", "model": str(files / "flux")},
        {"id": "b", "source": "two.mkv", "output": "b.png", "model": str(files / "flux")},
    ]
    write_video(files / "two.mkv", np.stack([picture(1), picture(2)]), Fraction(8))
    told = {"mask": "mask.png", "source_prompt": "a red circle", "prompt": "a cat", "steps": 2}
    manifest = files / "jobs.jsonl"
    manifest.write_text("\n".join(json.dumps({**job, **told}) for job in jobs))
    batch = ["batch", str(manifest), "--output", str(tmp_path / "out")]
    assert main([*batch, "--check"]) == 2
    said = capsys.readouterr()
    assert "b.png" in said.out + said.err and "holds one frame" in said.out + said.err
    manifest.write_text(json.dumps({**jobs[0], **told}))
    assert main([*batch, "-q"]) == 0
    assert Image.open(tmp_path / "out/a.png").size == (WIDTH, HEIGHT)
