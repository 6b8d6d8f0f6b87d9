"""The command line in process, on a tiny model saved to disk: files in, files out, and what is refused."""

import json
from fractions import Fraction

import numpy as np
import pytest
from tiny import tiny_wan

from kvlock_fast.cli import main
from kvlock_fast.media import read_video, write_video


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_wan().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A lossless clip of 6 frames, 50x70, and its mask."""
    folder = tmp_path_factory.mktemp("clip")
    ramp = np.linspace(0, 255, 70).astype(np.uint8)
    frames = np.broadcast_to(ramp[None, None, :, None], (6, 50, 70, 3)).copy()
    frames += np.arange(6, dtype=np.uint8)[:, None, None, None]
    mask = np.zeros_like(frames)
    mask[:, 10:30, 20:45] = 255
    write_video(folder / "source.mkv", frames, Fraction(15))
    write_video(folder / "mask.mkv", mask, Fraction(15))
    return folder


def edit(clip, model, output, *more, source=None, mask=None, prompts=("a blue circle",)):
    arguments = ["edit", "--source", str(source or clip / "source.mkv"), "--mask", str(mask or clip / "mask.mkv")]
    arguments += ["--source-prompt", "a red circle", "--model", str(model), "--output", str(output), "--steps", "2"]
    for prompt in prompts:
        arguments += ["--prompt", prompt]
    return main([*arguments, *map(str, more)])


def test_an_edit_from_files_to_files(clip, model, tmp_path, capsys):
    trace, report = tmp_path / "t.json", tmp_path / "r.html"
    status = edit(clip, model, tmp_path / "o.mp4", "--trace", trace, "--report", report, "--size", "32x48")
    captured = capsys.readouterr()
    assert status == 0, captured.err
    video = read_video(tmp_path / "o.mp4")
    assert video.frames.shape == (6, 32, 48, 3) and video.fps == 15
    assert "warning: 6 frames padded to 9" in captured.err and "denoising" in captured.err
    assert str(tmp_path / "o.mp4") in captured.out and "a blue circle" in captured.out
    data = json.loads(trace.read_text(), parse_constant=pytest.fail)
    assert data["samples"] == 1 and len(data["records"]) == 2 and data["settings"]["tau"] == 0.01
    assert set(data["records"][0]) == {
        "step", "sample", "timestep", "sigma", "variance", "alpha", "omega", "s_star", "seconds"
    }  # fmt: skip
    assert "<html" in report.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.mp4", "r.html", "t.json"]


def test_composite_has_the_sources_size_and_background(clip, model, tmp_path):
    assert edit(clip, model, tmp_path / "o.mkv", "--size", "32x48", "--composite", "--feather", 3, "--quiet") == 0
    source, out = read_video(clip / "source.mkv").frames, read_video(tmp_path / "o.mkv").frames
    assert out.shape == source.shape
    outside = np.ones(source.shape[:3], bool)
    outside[:, 7:33, 17:48] = False
    assert np.array_equal(out[outside], source[outside])
    assert (out[:, 10:30, 20:45] != source[:, 10:30, 20:45]).mean() > 0.5


def test_several_prompts_make_several_files(clip, model, tmp_path, capsys):
    status = edit(clip, model, tmp_path / "o.mkv", "--size", "32x48", prompts=["a dog", "a cat"])
    assert status == 0, capsys.readouterr().err
    one, two = (read_video(tmp_path / f"o-{i}.mkv").frames for i in (1, 2))
    assert one.shape == two.shape and not np.array_equal(one, two)


def test_same_seed_same_pixels_and_every_lock_parameter_arrives(clip, model, tmp_path):
    flags = (
        "--preset paper --alpha dynamic --omega constant --no-s-star --s-star-region foreground --tau auto --b 1.5 "
        "--window 4 --kappa 7 --warmup-alpha 0.5 --alpha-floor 0.1 --omega-floor 0.2 --detection global --layers 0,2 "
        "--background-latents source --source-path invert --inversion-solver heun --zero-init-steps 1 "
        "--guidance-batching separate"
    ).split()
    for name in ("a", "b"):
        paths = (tmp_path / f"{name}.mkv", "--trace", tmp_path / f"{name}.json")
        assert edit(clip, model, *paths, "--size", "16x32", "--seed", 3, *flags, "-q") == 0
    settings = json.loads((tmp_path / "a.json").read_text())["settings"]
    expected = {
        "alpha": "dynamic", "omega": "constant", "s_star": False, "s_star_region": "foreground", "tau": "auto",
        "b": 1.5, "window": 4, "kappa": 7, "warmup_alpha": 0.5, "alpha_floor": 0.1, "omega_floor": 0.2,
        "detection": "global", "layers": [0, 2], "background_latents": "source", "source_path": "invert",
        "inversion_solver": "heun", "zero_init_steps": 1, "guidance_batching": "separate", "seed": 3,
    }  # fmt: skip
    assert settings == {**settings, **expected}
    assert np.array_equal(read_video(tmp_path / "a.mkv").frames, read_video(tmp_path / "b.mkv").frames)


BAD = {
    "source missing": (["--source", "no.mp4"], "no.mp4"),
    "mask missing": (["--mask", "no.png"], "no.png"),
    "mask outside": (["--mask", "box:60,0,20,20"], "box:60,0,20,20"),
    "tau": (["--tau", "-1"], "tau must be greater than 0 or 'auto', got -1.0"),
    "tau word": (["--tau", "often"], "--tau must be a number or 'auto', got 'often'"),
    "kappa": (["--kappa", "-2"], "kappa must be a whole number of at least 0, got -2"),
    "window": (["--window", "1"], "window must be a whole number of at least 2, got 1"),
    "steps": (["--steps", "0"], "num_inference_steps must be a whole number of at least 1, got 0"),
    "steps text": (["--steps", "many"], "got 'many'"),
    "steps text joined": (["--steps=much"], "'--steps'"),
    "size": (["--size", "48"], "--size must be HEIGHTxWIDTH in pixels, like 480x832, got '48'"),
    "layers": (["--layers", "1-x"], "--layers must be numbers and ranges like 0,1,5-9, got '1-x'"),
    "no such layer": (["--layers", "9"], "layers names layer 9, but the model has layers 0 to 2"),
    "preset": (["--preset", "papr"], "unknown preset 'papr'"),
    "frames policy": (["--frames-policy", "drop"], "'drop' is not one of 'pad', 'trim', 'error'"),
    "frames": (["--frames-policy", "error"], "6 frames"),
    "model": (["--model", "no/such/model"], "no/such/model"),
    "output kind": (["--output", "o.txt"], "o.txt"),
    "output folder": (["--output", "no/o.mp4"], "no/o.mp4"),
    "trace folder": (["--trace", "no/t.json"], "no/t.json"),
    "device": (["--device", "cuda"], "device 'cuda'"),
    "feather": (["--feather", "-1"], "--feather"),
    "seed": (["--seed", "-1"], "--seed"),
    "unknown option": (["--taw", "1"], "--taw"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_sentence_and_exit_2(name, clip, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tmp_path / "o.mkv"
    before.write_bytes(b"an earlier result")
    changes, message = BAD[name]
    status = edit(clip, model, before, "--size", "32x48", *changes)
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and message in error[-1] and error[-1].startswith("error: ")
    assert not any("Traceback" in line for line in error)
    assert before.read_bytes() == b"an earlier result" and [p.name for p in tmp_path.iterdir()] == ["o.mkv"]


def test_missing_options_are_named(capsys):
    assert main(["edit", "--source", "a.mp4"]) == 2
    assert "Missing option '--mask'" in capsys.readouterr().err


def test_doctor_says_what_is_used(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "diffusers" in text and "demo" in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvlock-fast 0.")
