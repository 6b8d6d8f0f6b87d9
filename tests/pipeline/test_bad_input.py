"""What is refused, as a table: exit status 2, a last line that names the offender, earlier outputs as they were."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from kvlock_fast import edit_files
from kvlock_fast.cli import main
from kvlock_fast.media import write_video
from tests.support.clipmaker import encode, noise
from tests.support.tiny import tiny_wan

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A clip of 6 frames of 48x64 and its mask, a tiny model, and outputs of an earlier edit."""
    folder = tmp_path_factory.mktemp("files")
    frames = noise(6, 48, 64)
    write_video(folder / "source.mkv", frames, Fraction(15))
    mask = np.zeros_like(frames)
    mask[:, 10:30, 20:45] = 255
    write_video(folder / "mask.mkv", mask, Fraction(15))
    tiny_wan().save_pretrained(folder / "model")
    (folder / "o.mkv").write_bytes(b"an earlier edit")
    (folder / "t.json").write_text("an earlier trace")
    (folder / "frames").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "frames/frame-00000.png")
    return folder


CLIP = "--source source.mkv --mask mask.mkv --model model"
BASE = {
    "edit": f"{CLIP} --source-prompt a --prompt b --output o.mkv --steps 2 -q",
    "invert": f"{CLIP} --source-prompt a --output cache --steps 2 -q",
    "mask": f"{CLIP} --output o.mkv",
    "plan": "--config wan-1.3b",
    "demo": "--output new -q",
}


# --- files that are made for a case --------------------------------------------------------------------------------


def cut(name, share):
    def make():
        data = Path(name).read_bytes()
        Path("cut.mkv").write_bytes(data[: int(len(data) * share)])

    return make


def words(name):
    return lambda: Path(name).write_text("these are words\n" * 40)


def array(name, values, **more):
    return lambda: np.save(name, values, **more)


def images(*sizes):
    def make():
        Path("pictures").mkdir()
        for i, size in enumerate(sizes):
            Image.new("L", size, 255).save(f"pictures/{i}.png")

    return make


def sound():
    with av.open("sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def two_sizes():
    small, large = (encode(f"{n}.mov", "png", "rgb24", list(noise(2, n, n))) for n in (16, 32))
    with av.open("two.mov", "w") as out, av.open(small) as first, av.open(large) as second:
        stream = out.add_stream_from_template(first.streams.video[0])
        for i, packet in enumerate(p for source in (first, second) for p in source.demux(video=0) if p.size):
            packet.pts = packet.dts = i * 60
            packet.stream = stream
            out.mux(packet)


def archive():
    np.savez("two.npz", a=np.ones((48, 64), bool), b=np.ones((48, 64), bool))


def huge_array():
    with Path("huge.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|b1", "fortran_order": False, "shape": (90_000, 90_000, 9)}
        )


def black():
    Image.new("L", (64, 48)).save("black.png")


def last_frame_only():
    mask = np.zeros((6, 48, 64), bool)
    mask[5, 10:20, 10:20] = True
    np.save("last.npy", mask)


def long_clip():
    write_video("long.mkv", np.zeros((300, 8, 8, 3), np.uint8), 16)


def other_model(name, text):
    def make():
        shutil.copytree("model", "other")
        Path("other", name).write_text(text)

    return make


def empty_folder():
    Path("empty").mkdir()


def broken_image():
    images((64, 48), (64, 48))()
    data = Path("pictures/1.png").read_bytes()
    Path("pictures/1.png").write_bytes(data[: len(data) // 2])


# --- the table -----------------------------------------------------------------------------------------------------
# Name: (arguments, what the last line must name, what makes the files). Refused before a model is loaded.

SOURCES = {
    "no such file": ("--source no.mp4", "'no.mp4' does not exist", None),
    "no name": (["--source", ""], "--source is empty", None),
    "an address": ("--source https://example.com/a.mp4", "https:/example.com/a.mp4", None),
    "empty": ("--source e.mp4", "'e.mp4' is empty", lambda: Path("e.mp4").touch()),
    "words": ("--source w.mp4", "'w.mp4'", words("w.mp4")),
    "a text file": ("--source w.txt", "'w.txt'", words("w.txt")),
    "truncated": ("--source cut.mkv", "'cut.mkv'", cut("source.mkv", 0.6)),
    "only a header": ("--source cut.mkv", "'cut.mkv'", cut("source.mkv", 0.02)),
    "sound alone": ("--source sound.mp4", "'sound.mp4' has no video stream", sound),
    "a still image": ("--source black.png", "'black.png'", black),
    "a playlist": ("--source l.m3u8", "'l.m3u8'", lambda: Path("l.m3u8").write_text("#EXTM3U\nsource.mkv\n")),
    "a device": ("--source d.mp4", "'d.mp4' is not a file", lambda: Path("d.mp4").symlink_to("/dev/zero")),
    "an empty folder": ("--source empty", "'empty' holds no images", empty_folder),
    "a broken image": ("--source pictures", "'pictures/1.png'", broken_image),
    "images of two sizes": ("--source pictures", "'pictures/1.png' is 48x65", images((64, 48), (65, 48))),
    "pictures of two sizes": ("--source two.mov", "'two.mov' changes its size at frame 2", two_sizes),
    "a name too long": ("--source " + "x" * 300, "x" * 300, None),
    "no frames": ("--max-frames 0", "'--max-frames'", None),
}
MASKS = {
    "no such file": ("--mask no.png", "'no.png' does not exist", None),
    "no name": (["--mask", ""], "--mask is empty", None),
    "a text file": ("--mask w.txt", "'w.txt'", words("w.txt")),
    "truncated": ("--mask cut.mkv", "'cut.mkv'", cut("mask.mkv", 0.6)),
    "black": ("--mask black.png", "'black.png' is empty: no pixel is marked", black),
    "another length": ("--mask long.npy", "4 frames", array("long.npy", np.ones((4, 48, 64), bool))),
    "another length, cut": ("--mask m.npy --max-frames 5", "4 frames", array("m.npy", np.ones((4, 48, 64), bool))),
    "another shape": ("--mask wide.npy", "48x100", array("wide.npy", np.ones((48, 100), bool))),
    "pickled": ("--mask p.npy", "'p.npy'", array("p.npy", np.array([[{}]], object), allow_pickle=True)),
    "nan": ("--mask n.npy", "'n.npy' has values", array("n.npy", np.full((48, 64), np.nan))),
    "negative": ("--mask n.npy", "'n.npy' has values", array("n.npy", np.full((48, 64), -1))),
    "colours": ("--mask c.npy", "'c.npy' has the shape", array("c.npy", np.ones((6, 48, 64, 3), bool))),
    "two arrays": ("--mask two.npz", "'two.npz' holds 2 arrays", archive),
    "an archive of words": ("--mask w.npz", "'w.npz'", words("w.npz")),
    "larger than memory": ("--mask huge.npy", "'huge.npy' has the shape (90000, 90000, 9)", huge_array),
    "images, too few": ("--mask pictures", "2 frames", images((64, 48), (64, 48))),
    "a box of three": ("--mask box:1,2,3", "'box:1,2,3' is not of the form", None),
    "a box of words": ("--mask box:a,b,c,d", "'box:a,b,c,d' is not of the form", None),
    "a box outside": ("--mask box:60,0,20,20", "'box:60,0,20,20' does not lie within", None),
    "a box of no size": ("--mask box:1,1,0,5", "'box:1,1,0,5' does not lie within", None),
    "a box that leaves": (["--mask", "box:0=1,1,5,5;4=62,1,5,5"], "does not lie within", None),
    "a keyframe twice": (["--mask", "box:1=1,1,5,5;1=2,1,5,5"], "gives the box at frame 1 twice", None),
    "a keyframe missing": (["--mask", "box:1,1,5,5;2,1,5,5"], "'box:1,1,5,5;2,1,5,5' is not of the form", None),
    "threshold": ("--mask-threshold 1", "threshold must be at least 0 and below 1, not 1", None),
    "threshold nan": ("--mask-threshold nan", "not nan", None),
    "threshold text": ("--mask-threshold half", "'half'", None),
    "grow text": ("--mask-grow much", "'much'", None),
    "grow too far": ("--mask-grow 5000", "--mask-grow", None),
    "shrunk to nothing": ("--mask-grow=-20", "'mask.mkv' is empty once it is shrunk by 20 pixels", None),
    "feather": ("--mask-feather -1", "--mask-feather", None),
    "all inverted": ("--mask box:0,0,64,48 --mask-invert", "'box:0,0,64,48' is empty: every pixel", None),
}
SIZES = {
    "one number": ("--size 48", "--size must be HEIGHTxWIDTH in pixels, like 480x832, got '48'", None),
    "zero": ("--size 0x48", "'0x48'", None),
    "negative": ("--size=-16x48", "'-16x48'", None),
    "three numbers": ("--size 16x16x3", "'16x16x3'", None),
    "beyond reason": ("--size 99999999999x16", "'99999999999x16'", None),
    "policy": ("--frames-policy drop", "'drop' is not one of 'pad', 'trim', 'error'", None),
}
PARAMETERS = {
    "steps text": ("--steps many", "'many'", None),
    "tau": ("--tau 0", "tau must be greater than 0 or 'auto', got 0.0", None),
    "tau word": ("--tau often", "--tau must be a number or 'auto', got 'often'", None),
    "b": ("--b 0", "b must be greater than 0, got 0.0", None),
    "variance window": ("--variance-window 1", "window must be a whole number of at least 2, got 1", None),
    "clip_frames": ("--clip-frames 1", "clip_frames must be at least 2, got 1", None),
    "clip_overlap": (
        "--clip-frames 9 --clip-overlap 9",
        "clip_overlap must be from 1 to 8, less than clip_frames, got 9",
        None,
    ),
    "clip_overlap alone": ("--clip-overlap 3", "clip_overlap is 3, but clip_frames is not given", None),
    "kappa": ("--kappa -1", "kappa must be a whole number of at least 0, got -1", None),
    "alpha": ("--alpha 1.5", "alpha must be between 0 and 1 or 'dynamic', got 1.5", None),
    "alpha word": ("--alpha strong", "--alpha must be a number or 'dynamic', got 'strong'", None),
    "warm-up": ("--warmup-alpha=-0.1", "warmup_alpha", None),
    "alpha floor": ("--alpha-floor 2", "alpha_floor", None),
    "omega": ("--omega sometimes", "'sometimes'", None),
    "omega floor": ("--omega-floor nan", "omega_floor", None),
    "region": ("--s-star-region sky", "'sky'", None),
    "detection": ("--detection local", "'local'", None),
    "layers": ("--layers 1-x", "'1-x'", None),
    "layers twice": ("--layers 0,0", "'0,0'", None),
    "latents": ("--background-latents mine", "'mine'", None),
    "source path": ("--source-path guess", "'guess'", None),
    "solver": ("--inversion-solver rk9", "'rk9'", None),
    "first zeros": ("--zero-init-share -1", "zero_init_share", None),
    "batching": ("--guidance-batching both", "'both'", None),
    "preset": ("--preset papr", "unknown preset 'papr'", None),
    "seed": ("--seed -1", "--seed", None),
    "feather": ("--feather 257", "--feather", None),
    "tier": ("--cache-tier attic", "'attic'", None),
    "format": ("--cache-format int3", "'int3'", None),
    "stride": ("--cache-stride 0", "stride", None),
    "stored steps": ("--cache-steps some", "'some'", None),
    "quota": ("--cache-quota lots", "'lots'", None),
    "prompts at once": ("--prompts-at-once 0", "prompts_at_once", None),
    "device": ("--device toaster", "device 'toaster'", None),
    "bytes": (["--prompt", "caf\udce9"], "--prompt is not valid UTF-8", None),
    "unknown": ("--taw 1", "--taw", None),
    "cache": ("--cache no/cache", "no/cache", None),
    "cache of words": ("--cache c", "c/manifest.json", lambda: (Path("c").mkdir(), words("c/manifest.json")())),
    "not in the cache": ("--cache empty", "no cache in 'empty': it has no manifest.json", empty_folder),
}
OUTPUTS = {
    "kind": ("--output o.xyz", "'o.xyz': a video is written as .mp4", None),
    "no folder": ("--output no/o.mp4", "'no/o.mp4': the folder 'no' does not exist", None),
    "a folder": ("--output folder.mp4", "'folder.mp4'", lambda: Path("folder.mp4").mkdir()),
    "a file, not a folder": ("--output file", "the folder 'file': a file has this name", lambda: Path("file").touch()),
    "a pipe": ("--output pipe.mp4", "'pipe.mp4': it is not a regular file", lambda: os.mkfifo("pipe.mp4")),
    "a trace into a pipe": ("--trace pipe", "'pipe': it is not a regular file", lambda: os.mkfifo("pipe")),
    "no name": ("--output /", "--output must name a file, got '/'", None),
    "the source": ("--output source.mkv", "--output 'source.mkv' is the same file as --source", None),
    "the source by another way": ("--output model/../source.mkv", "is the same file as --source", None),
    "the mask": ("--output mask.mkv", "is the same file as --mask", None),
    "a source that is a folder": ("--source frames --output frames", "is the same file as --source", None),
    "trace": ("--trace no/t.json", "'no/t.json'", None),
    "trace over the edit": ("--trace o.mkv", "--trace 'o.mkv' is the same file as --output", None),
    "page over the trace": ("--trace t.json --report ./t.json", "is the same file as --trace", None),
    "sheet over the trace": ("--trace t.json --sheet t.json", "is the same file as --trace", None),
    "preview over the edit": ("--mask-preview o.mkv", "--mask-preview 'o.mkv' is the same file as --output", None),
    "preview kind": ("--mask-preview p.png", "'p.png'", None),
    "preview over the source": ("--mask-preview source.mkv", "is the same file as --source", None),
    "sheet": ("--sheet no/s.png", "'no/s.png'", None),
    "figures": ("--json no/f.json", "'no/f.json'", None),
    "figures over the mask": ("--json mask.mkv", "--json 'mask.mkv' is the same file as --mask", None),
    "into the model": ("--trace model/model_index.json", "lies in the model's folder", None),
    "preview into the model": ("--mask-preview model/p.mkv", "lies in the model's folder", None),
    "one of several": (["--prompt", "c", "--output", "no/o.mkv"], "'no/o-1.mkv'", None),
}
# Known only once a model's configs, or the model, are read.
MODELS = {
    "no such model": ("--model no/such/model", "no/such/model", None),
    "a file": ("--model source.mkv", "source.mkv", None),
    "an empty folder": ("--model empty", "'empty'", empty_folder),
    "another family": (
        "--model other",
        "is a StableDiffusionPipeline, of no known family",
        other_model("model_index.json", '{"_class_name": "StableDiffusionPipeline"}'),
    ),
    "a broken index": ("--model other", "'other'", other_model("model_index.json", "{")),
    "a broken config": ("--model other", "'other'", other_model("transformer/config.json", "{")),
    "dtype": ("--dtype fp7", "dtype 'fp7' is not one of", None),
    "steps": ("--steps 0", "num_inference_steps must be a whole number from 1 to 10000, got 0", None),
    "too many steps": ("--steps 10001", "got 10001", None),
    "guidance": ("--guidance -1", "guidance_scale must be a number of at least 0, got -1.0", None),
    "guidance nan": ("--guidance nan", "got nan", None),
    "a second scale": ("--guidance-2 3", "guidance_scale_2 is 3.0", None),
    "no such layer": ("--layers 9", "layers names layer 9, but the model has layers 0 to 2", None),
    "size beyond the model": ("--size 32x16384", "1024x1024", None),
    "frames beyond the model": ("--source long.mkv --mask box:0,0,8,8", "at most 253 frames", long_clip),
    "frame count": ("--frames-policy error", "6 frames", None),
    "a trimmed mask": ("--frames-policy trim --mask last.npy", "mask is empty on the 5 frames", last_frame_only),
    "graph": ("--graph perhaps", "graph must be one of", None),
}  # fmt: skip
OTHERS = {
    "invert: mask": ("invert", "--mask no.png", "'no.png'", None),
    "invert: shape": ("invert", "--mask-grow=-30", "shrunk by 30 pixels", None),
    "invert: preview": ("invert", "--mask-preview no/p.mp4", "'no/p.mp4'", None),
    "invert: preview over the source": ("invert", "--mask-preview source.mkv", "is the same file as --source", None),
    "invert: output is a file": ("invert", "--output source.mkv", "'source.mkv'", None),
    "invert: into the model": ("invert", "--output model", "lies in the model's folder", None),
    "invert: format": ("invert", "--format int3", "'int3'", None),
    "mask: source": ("mask", "--source no.mp4", "'no.mp4'", None),
    "mask: output": ("mask", "--output source.mkv", "is the same file as --source", None),
    "mask: kind": ("mask", "--output p.png", "'p.png'", None),
    "mask: model": ("mask", "--model empty", "empty", empty_folder),
    "mask: size": ("mask", "--size x", "'x'", None),
    "mask: figures": ("mask", "--json no/f.json", "'no/f.json'", None),
    "plan: config": ("plan", "--config wan-2b", "'wan-2b'", None),
    "plan: share": ("plan", "--mask-share 2", "--mask-share", None),
    "plan: mask": ("plan", "--mask no.png", "'no.png'", None),
    "plan: memory": ("plan", "--gpu-memory much", "'much'", None),
    "demo: steps": ("demo", "--steps 0", "'--steps'", None),
    "demo: preset": ("demo", "--preset nope", "'nope'", None),
    "demo: a file": ("demo", "--output o.mkv", "'o.mkv'", None),
    "demo: world": ("demo", "--world 0", "--world must be at least 1, got 0", None),
    "cache: no folder": ("cache", "verify no", "no", None),
    "kernels: architecture": ("kernels", "--arch sm_1", "sm_1", None),
    "no such command": ("edits", "", "edits", None),
}


def snapshot(folder):
    return {
        p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size
    }


def refusal(files, folder, monkeypatch, capsys, command, arguments, make):
    """The last line on stderr of a refused command, run in a copy of the files, none of which it may change."""
    shutil.copytree(files, folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    if make is not None:
        make()
    before, entries = snapshot(folder), sorted(folder.iterdir())
    capsys.readouterr()
    more = arguments if isinstance(arguments, list) else arguments.split()
    status = main([command, *BASE.get(command, "").split(), *more])
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2, error
    assert error[-1].startswith("error: ") and not any("Traceback" in line for line in error)
    assert sorted(folder.iterdir()) == entries and snapshot(folder) == before
    return error[-1]


EARLY = {
    f"{kind}: {name}": case
    for kind, table in
    (("source", SOURCES), ("mask", MASKS), ("size", SIZES), ("parameter", PARAMETERS), ("output", OUTPUTS))
    for name, case in table.items()
}  # fmt: skip


@pytest.mark.parametrize("name", EARLY)
def test_refused_before_a_model_is_loaded(files, tmp_path, monkeypatch, capsys, name):
    arguments, named, make = EARLY[name]
    monkeypatch.setattr(edit_files, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    line = refusal(files, tmp_path, monkeypatch, capsys, "edit", arguments, make)
    assert named in line, line


@pytest.mark.parametrize("name", MODELS)
def test_refused_by_the_model(files, tmp_path, monkeypatch, capsys, name):
    arguments, named, make = MODELS[name]
    line = refusal(files, tmp_path, monkeypatch, capsys, "edit", arguments, make)
    assert named in line, line


@pytest.mark.parametrize("name", OTHERS)
def test_refused_by_other_commands(files, tmp_path, monkeypatch, capsys, name):
    command, arguments, named, make = OTHERS[name]
    line = refusal(files, tmp_path, monkeypatch, capsys, command, arguments, make)
    assert named in line, line


# --- caches, and what shows only while it runs ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def inverted(files, tmp_path_factory):
    """The files with a cache of the source beside them."""
    folder = tmp_path_factory.mktemp("inverted")
    shutil.copytree(files, folder, dirs_exist_ok=True)
    with contextlib.chdir(folder):
        assert main(["invert", *BASE["invert"].split(), "--seed", "3"]) == 0
    return folder


def spoil_shard():
    shard = next(Path("cache").glob("data-*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(bytes(data))


def change_manifest(old, new):
    def make():
        text = Path("cache/manifest.json").read_text()
        assert old in text
        Path("cache/manifest.json").write_text(text.replace(old, new, 1))

    return make


def another_video():
    write_video("other.mkv", noise(6, 48, 64, seed=9), Fraction(15))


def another_weight():
    path = next(Path("model/transformer").glob("*.safetensors"))
    weights = load_file(path)
    weights["proj_out.bias"] += 1
    save_file(weights, path)


CACHES = {
    "seed": ("--seed 4", "--seed is 4, but the cache 'cache' was made with 3", None),
    "steps": ("--steps 3", "--steps is 3, but the cache 'cache' was made with 2", None),
    "source prompt": ("--source-prompt c", "--source-prompt is 'c', but the cache 'cache' was made with 'a'", None),
    "video": ("--source other.mkv", "cache", another_video),
    "size": ("--size 32x32", "cache", None),
    "a smaller mask": ("--mask box:22,12,4,4", "cache", None),
    "model": ("", "cache", another_weight),
    "a damaged shard": ("", "cache/data-", spoil_shard),
    "a truncated manifest": ("", "cache/manifest.json", change_manifest("{", "")),
    "a shard that is gone": ("", "cache/", lambda: next(Path("cache").glob("data-*/*.safetensors")).unlink()),
    "output into it": ("--output cache/o.mkv", "lies in the folder of the cache 'cache'", None),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_does_not_fit(inverted, tmp_path, monkeypatch, capsys, name):
    arguments, named, make = CACHES[name]
    more = ["--cache", "cache", "--seed", "3", *arguments.split()]
    line = refusal(inverted, tmp_path, monkeypatch, capsys, "edit", more, make)
    assert named in line, line


def test_latents_that_become_nan(files, tmp_path, monkeypatch, capsys):
    def poisoned():
        path = next(Path("model/transformer").glob("*.safetensors"))
        weights = load_file(path)
        weights["proj_out.bias"][0] = float("nan")
        save_file(weights, path)

    line = refusal(files, tmp_path, monkeypatch, capsys, "edit", "--trace t.json --report r.html", poisoned)
    assert "the latents became NaN or inf at step 0 of 2, prompt 'b'" in line, line


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize(("name", "flag"), [("source.mkv", None), ("mask.mkv", None), (".", "--output")])
def test_without_permission(files, tmp_path, monkeypatch, capsys, name, flag):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Path(name).chmod(0o500 if flag else 0)
    try:
        assert main(["edit", *BASE["edit"].split()]) == 2
    finally:
        Path(name).chmod(0o700)
    assert ("o.mkv" if flag else name) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("arguments", "named"), [
    ("--source no.mp4", "'no.mp4'"), ("--tau -1", "tau"), ("--output no/o.mkv", "'no/o.mkv'"),
    ("--size 0x5", "'0x5'"), ("--mask box:0,0,99,99", "'box:0,0,99,99'"),
])  # fmt: skip
def test_in_a_real_process(files, tmp_path, arguments, named):
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    before = snapshot(tmp_path)
    command = [sys.executable, "-m", "kvlock_fast.cli", "edit", *BASE["edit"].split(), *arguments.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert named in result.stderr.splitlines()[-1] and snapshot(tmp_path) == before


def test_what_is_allowed_is_said_and_done(files, tmp_path, monkeypatch, capsys):
    """An all-foreground mask, a frame count that is not 4n+1, a size the model cannot take."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    more = "--mask box:0,0,64,48 --size 33x50 --kappa 50 --clip-frames 40 --json f.json"
    assert main(["edit", *BASE["edit"].split(), *more.split()]) == 0
    error = capsys.readouterr().err
    for words in ("mask covers every token", "6 frames padded to 9", "33x50 is not a multiple of 16x16"):
        assert f"warning: {words}" in error or words in error
    assert json.loads(Path("f.json").read_text())["foreground_share"] == 1
