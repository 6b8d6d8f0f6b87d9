"""The command line in process, on a tiny model saved to disk: files in, files out, and what is refused."""

import json
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kvlock_fast.cli import main
from kvlock_fast.media import read_video, write_video
from tests.support.tiny import tiny_wan


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
    flags = ("--trace", trace, "--report", report, "--size", "32x48", "--no-composite")
    status = edit(clip, model, tmp_path / "o.mp4", *flags)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    video = read_video(tmp_path / "o.mp4")
    assert video.frames.shape == (6, 32, 48, 3) and video.fps == 15
    assert "warning: 6 frames padded to 9" in captured.err and "denoising" in captured.err
    assert str(tmp_path / "o.mp4") in captured.out and "a blue circle" in captured.out
    data = json.loads(trace.read_text(), parse_constant=pytest.fail)
    assert data["samples"] == 1 and len(data["records"]) == 2 and data["settings"]["tau"] == 3.0
    assert set(data["records"][0]) == {
        "step", "sample", "timestep", "sigma", "variance", "alpha", "omega", "s_star", "seconds", "tokens"
    }  # fmt: skip
    assert "<html" in report.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.mp4", "r.html", "t.json"]


def test_composite_has_the_sources_size_and_background(clip, model, tmp_path):
    source = read_video(clip / "source.mkv").frames
    for name, grown, flags in (
        ("default", 0, ()), ("feather", 0, ("--feather", 2)), ("paste", 0, ("--paste", "harmonic")),
        ("soft", 3, ("--mask-feather", 3)), ("both", 3, ("--mask-feather", 3, "--feather", 1, "--paste", "hard")),
    ):  # fmt: skip
        file, figures = tmp_path / f"{name}.mkv", tmp_path / f"{name}.json"
        assert edit(clip, model, file, "--size", "32x48", "--quiet", "--json", figures, *flags) == 0
        out = read_video(file).frames
        outside = np.ones(source.shape[:3], bool)
        outside[:, 10 - grown : 30 + grown, 20 - grown : 45 + grown] = False
        assert out.shape == source.shape and np.array_equal(out[outside], source[outside]), name
        assert (out[:, 10:30, 20:45] != source[:, 10:30, 20:45]).mean() > 0.5
        assert grown == 0 or (out[:, 9, 20:45] != source[:, 9, 20:45]).any()
        [metrics] = json.loads(figures.read_text())["metrics"]
        assert metrics["delivered_psnr"] is None and metrics["delivered_seam"] > 0  # infinite: nothing changed
        assert metrics["background_psnr"] < 40 and metrics["seam"] > 1  # the model's own


def test_the_line_about_an_edit_tells_what_is_delivered_and_what_the_model_made(clip, model, tmp_path, capsys):
    number = r"\d+\.\d"
    for flags, delivered in (((), "background unchanged"), (("--no-composite",), f"background {number} dB")):
        assert edit(clip, model, tmp_path / "o.mkv", "--size", "32x48", *flags) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if "o.mkv" in line]
        wanted = rf"delivered: {delivered}, a step of {number} levels at the mask's edge; "
        assert re.search(
            wanted + rf"raw, by the model: background {number} dB, {number} levels off around the mask", line
        )


def test_several_prompts_make_several_files(clip, model, tmp_path, capsys):
    status = edit(clip, model, tmp_path / "o.mkv", "--size", "32x48", prompts=["a dog", "a cat"])
    assert status == 0, capsys.readouterr().err
    one, two = (read_video(tmp_path / f"o-{i}.mkv").frames for i in (1, 2))
    assert one.shape == two.shape and not np.array_equal(one, two)


def test_same_seed_same_pixels_and_every_lock_parameter_arrives(clip, model, tmp_path):
    flags = (
        "--preset paper --alpha dynamic --omega constant --no-s-star --s-star-region foreground --tau auto --b 1.5 "
        "--variance-window 4 --kappa 7 --warmup-alpha 0.5 --alpha-floor 0.1 --omega-floor 0.2 --detection global "
        "--layers 0,2 "
        "--background-latents source --source-path invert --inversion-solver heun --zero-init-share 0.1 "
        "--guidance-batching separate"
    ).split()
    for name in ("a", "b"):
        paths = (tmp_path / f"{name}.mkv", "--trace", tmp_path / f"{name}.json")
        assert edit(clip, model, *paths, "--size", "16x32", "--seed", 3, *flags, "-q") == 0
    settings = json.loads((tmp_path / "a.json").read_text())["settings"]
    expected = {
        "alpha": "dynamic", "omega": "constant", "s_star": False, "s_star_region": "foreground", "tau": "auto",
        "b": 1.5, "variance_window": 4, "kappa": 7, "warmup_alpha": 0.5, "alpha_floor": 0.1, "omega_floor": 0.2,
        "detection": "global", "layers": [0, 2], "background_latents": "source", "source_path": "invert",
        "inversion_solver": "heun", "zero_init_share": 0.1, "guidance_batching": "separate", "seed": 3,
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
    "variance window": (["--variance-window", "1"], "window must be a whole number of at least 2, got 1"),
    "clip_frames": (["--clip-frames", "1"], "clip_frames must be at least 2, got 1"),
    "clip_overlap": (
        ["--clip-frames", "9", "--clip-overlap", "9"],
        "clip_overlap must be from 1 to 8, less than clip_frames, got 9",
    ),
    "steps": (["--steps", "0"], "num_inference_steps must be a whole number from 1 to 10000, got 0"),
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
    "seed too large": (["--seed", str(2**64)], str(2**64)),
    "steps beyond reason": (["--steps", "10000000000000"], "10000000000000"),
    "feather too large": (["--feather", "3"], "3 is not in the range 0<=x<=2"),
    "paste": (["--paste", "soft"], "paste must be one of hard, screened, harmonic, got 'soft'"),
    "size too large": (["--size", "99999999999x99999999999"], "99999999999x99999999999"),
    "size beyond the model": (["--size", "32x16384"], "1024x1024"),
    "layers backwards": (["--layers", "5-2"], "'5-2'"),
    "layers beyond reason": (["--layers", "0-99999999999"], "'0-99999999999'"),
    "layers twice": (["--layers", "0,0"], "'0,0'"),
    "nan": (["--tau", "nan"], "tau must be greater than 0 or 'auto', got nan"),
    "inf": (["--b", "inf"], "b must be greater than 0, got inf"),
    "guidance 2": (["--guidance-2", "nan"], "guidance_scale_2 must be a number of at least 0, got nan"),
    "guidance 2 for one": (["--guidance-2", "3"], "guidance_scale_2 is 3.0"),
    "device that is none": (["--device", "toaster"], "device 'toaster'"),
    "device without data": (["--device", "meta"], "device 'meta'"),
    "dtype": (["--dtype", "fp7"], "dtype 'fp7'"),
    "no source": (["--source", ""], "--source is empty"),
    "output is a folder": (["--output", "/"], "'/'"),
    "prompt that is no text": (["--prompt", "caf\udce9"], "--prompt is not valid UTF-8"),
    "trace over the output": (["--trace", "o.mkv"], "--trace 'o.mkv' is the same file as --output"),
    "report over the trace": (["--trace", "t.json", "--report", "./t.json"], "is the same file as --trace"),
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


def test_inputs_and_the_model_are_never_overwritten(clip, model, tmp_path, capsys):
    before = (clip / "source.mkv").read_bytes()
    assert edit(clip, model, clip / "source.mkv") == 2
    assert "is the same file as --source" in capsys.readouterr().err
    assert edit(clip, model, tmp_path / "o.mkv", "--trace", model / "model_index.json") == 2
    assert "lies in the model's folder" in capsys.readouterr().err
    assert edit(clip, model, "/", prompts=["a", "b"]) == 2
    assert "--output must name a file, got '/'" in capsys.readouterr().err
    assert (clip / "source.mkv").read_bytes() == before and not list(tmp_path.iterdir())


def _break(folder, name, text):
    (folder / name).write_text(text)


def _truncate(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


BAD_MODELS = {
    "no index": lambda m: (m / "model_index.json").unlink(),
    "broken index": lambda m: _break(m, "model_index.json", "{"),
    "index of a list": lambda m: _break(m, "model_index.json", "[]"),
    "another family": lambda m: _break(m, "model_index.json", '{"_class_name": "LTXPipeline"}'),
    "no tokenizer": lambda m: shutil.rmtree(m / "tokenizer"),
    "truncated text encoder": lambda m: _truncate(m, "text_encoder/model.safetensors"),
    "truncated transformer": lambda m: _truncate(m, "transformer/diffusion_pytorch_model.safetensors"),
    "missing weights": lambda m: save_file(
        {"proj_out.bias": torch.zeros(16)}, m / "transformer/diffusion_pytorch_model.safetensors"
    ),
    "pickled weights": lambda m: (m / "vae/diffusion_pytorch_model.safetensors").rename(
        m / "vae/diffusion_pytorch_model.bin"
    ),
    "bad number": lambda m: _break(m, "scheduler/scheduler_config.json", '{"shift": "a"}'),
    "shift by resolution": lambda m: _break(
        m,
        "scheduler/scheduler_config.json",
        '{"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true}',
    ),
}


@pytest.mark.parametrize("name", list(BAD_MODELS))
def test_a_model_that_cannot_be_used_is_named(name, clip, model, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    BAD_MODELS[name](broken)
    assert edit(clip, broken, tmp_path / "o.mkv", "--size", "32x48") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and ("broken" in error or "scheduler" in error), error
    assert not (tmp_path / "o.mkv").exists()


def test_what_is_asked_for_reaches_the_model(clip, model, tmp_path):
    """Each of these changes the pixels."""
    changes = [[], ["--seed", 1], ["--guidance", 9], ["--negative-prompt", "a dog"], ["--source-prompt", "cat"]]
    seen = set()
    for i, flags in enumerate(changes):
        assert edit(clip, model, tmp_path / f"{i}.mkv", "--size", "32x48", "--steps", 6, "-q", *flags) == 0
        seen.add(read_video(tmp_path / f"{i}.mkv").frames.tobytes())
    assert len(seen) == len(changes)


def test_sizes_that_do_not_fit_are_said(clip, model, tmp_path, capsys):
    assert edit(clip, model, tmp_path / "o.mkv", "--size", "33x50") == 0
    assert "warning: size 33x50 is not a multiple of 16x16: working at 32x48" in capsys.readouterr().err


def test_json_on_stdout_is_all_there_is(clip, model, tmp_path, capsys):
    assert edit(clip, model, tmp_path / "o.mkv", "--size", "32x48", "--json", "-") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["outputs"] == [str(tmp_path / "o.mkv")] and data["metrics"][0]["background_psnr"] > 0
    assert set(data["stage_seconds"]) >= {"encode", "text", "source path", "denoise", "decode"}
    assert main(["doctor", "--json", "-"]) == 0
    assert "torch" in json.dumps(json.loads(capsys.readouterr().out))


def test_a_refused_demo_leaves_no_folder(tmp_path, capsys):
    for flags in (["--preset", "nope"], ["--steps", "0"], ["--device", "toaster"]):
        assert main(["demo", "--output", str(tmp_path / "new"), *flags]) == 2
        assert flags[1] in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "new").exists()


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
