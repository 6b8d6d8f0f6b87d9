"""The method's table, small: cases have the answers they say, columns count what they should, a stopped run goes on."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.quality import __main__ as quality
from bench.quality import run, sweeps, vbench
from bench.quality.cases import KINDS, MASKS, quality_case
from bench.quality.measures import PeakMemory, background_figures, consistency, path_of_mask
from bench.quality.rows import CEILING, default_rows, lock_of
from bench.quality.run import CaseFile
from bench.quality.subject import read_clips
from bench.quality.summary import bootstrapped, markdown, summarise
from kvlock_fast.demo.world import grow
from kvlock_fast.errors import InputError
from kvlock_fast.media import write_video

ROOT = Path(__file__).resolve().parents[2]


# Cases.


@pytest.mark.parametrize("number", range(21))
def test_a_case_knows_its_answer(number):
    case = quality_case(number)
    assert (case.kind, case.form) == (KINDS[number % 7], MASKS[number // 7])
    edit = case.edit
    assert case.is_right(edit.target.video) and not case.is_right(edit.source.video)
    changed = (edit.source.video != edit.target.video).any(-1)
    assert (changed & ~edit.mask).mean() < 0.002, "the mask holds all that changes, but for softened edges"
    assert case.clear.sum() >= 5 and case.clear.shape == (17,)
    again = quality_case(number)
    assert np.array_equal(again.edit.source.video, edit.source.video) and again.edit.prompt == edit.prompt


def test_kinds_are_what_they_are_called():
    cases = {quality_case(i).kind: quality_case(i) for i in range(7)}
    assert cases["remove"].edit.target.scene.objects == () and cases["remove"].path is None
    assert cases["pan"].edit.source.scene.background.pan != (0, 0)
    for kind in ("several", "occlusion"):
        assert cases[kind].other == cases[kind].edit.target.scene.objects[1]
    hidden = cases["occlusion"]
    assert not hidden.clear.all()
    assert {quality_case(i).edit.mask.tobytes() for i in (0, 7, 14)} and quality_case(14).edit.mask.mean() > 0.05
    other = quality_case(0, first_seed=5)
    assert other.seed == 5 and not np.array_equal(other.edit.source.video, cases["recolour"].edit.source.video)


def test_an_object_that_is_lost_is_not_right():
    """The other object must stay: the answer without it is wrong."""
    case = quality_case(KINDS.index("several"))
    from dataclasses import replace

    from kvlock_fast.demo.world import render

    scene = case.edit.target.scene
    assert not case.is_right(render(replace(scene, objects=scene.objects[:1])).video)
    assert not case.is_right(render(replace(scene, objects=scene.objects[1:])).video)


# Columns.


def test_the_background_against_scikit_image():
    from skimage.metrics import structural_similarity

    random = np.random.default_rng(0)
    source = random.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    video = np.clip(source.astype(int) + random.integers(-20, 21, source.shape), 0, 255).astype(np.uint8)
    mask = np.zeros((3, 32, 32), bool)
    mask[:, 8:20, 10:22] = True
    found = background_figures(video, source, mask)
    difference = (video.astype(float) - source)[~mask]
    assert found["psnr"] == pytest.approx(20 * math.log10(255 / math.sqrt((difference**2).mean())))
    maps = [
        structural_similarity(
            a, b, channel_axis=-1, full=True, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )[1].mean(-1)
        for a, b in zip(video, source, strict=True)
    ]
    assert found["ssim"] == pytest.approx(np.mean(np.stack(maps)[~mask]), abs=1e-5)
    ring = np.zeros_like(mask)
    ring[:, 6:22, 8:24] = True
    seam = (video.astype(float) - source)[ring & ~mask]
    assert found["seam"] == pytest.approx(math.sqrt((seam**2).mean()))
    moves = [np.abs(v[1:].astype(float) - v[:-1])[~mask[1:]].mean() for v in (video, source)]
    assert found["flicker"] == pytest.approx(moves[0] - moves[1])


def test_equal_pixels_have_numbers_too():
    video = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    mask = np.zeros((2, 16, 16), bool)
    mask[:, 4:8, 4:8] = True
    found = background_figures(video, video, mask)
    assert (found["psnr"], found["seam"], found["flicker"]) == (100.0, 0.0, 0.0) and found["ssim"] == pytest.approx(1)
    assert background_figures(video, video, np.ones_like(mask)) == {}


@settings(max_examples=10)
@given(st.integers(2, 6), st.integers(0, 10**6))
def test_what_keeps_its_look_is_consistent(frames, seed):
    random = np.random.default_rng(seed)
    patch = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    video = random.integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8)
    path = np.full((frames, 2), np.nan)
    for i in range(frames):
        x, y = random.integers(0, 23, 2)
        video[i, y : y + 9, x : x + 9] = patch
        path[i] = x + 4.5, y + 4.5
    assert consistency(video, path, 4) == pytest.approx(1, abs=1e-5)
    other = random.integers(0, 256, video.shape, dtype=np.uint8)
    assert consistency(other, path, 4) < 0.6
    path[1:] = np.nan
    assert consistency(video, path, 4) is None


def test_consistency_by_hand():
    """Three frames of one row of pixels: a, b, a."""
    a, b = np.array([0.0, 0, 0, 90, 90, 90, 30, 30, 30]), np.array([90.0, 90, 90, 0, 0, 0, 30, 30, 30])
    video = np.stack([x.reshape(1, 3, 3) for x in (a, b, a)]).astype(np.uint8)
    u, v = a - a.mean(), b - b.mean()
    cosine = u @ v / (np.linalg.norm(u) * np.linalg.norm(v))
    frames = np.repeat(video, 3, axis=1)  # three equal rows, as windows are square
    assert consistency(frames, np.full((3, 2), 1.5), 1) == pytest.approx((cosine + (cosine + 1) / 2) / 2, abs=1e-5)


def test_the_path_of_a_mask():
    mask = np.zeros((3, 20, 30), bool)
    mask[0, 2:6, 4:10] = mask[2, 10:20, 0:2] = True
    middles, radius = path_of_mask(mask)
    assert middles[0].tolist() == [7, 4] and np.isnan(middles[1]).all() and middles[2].tolist() == [1, 15]
    assert radius == 5


def test_peak_memory_sees_what_was_freed():
    import torch

    with PeakMemory(torch.device("cpu")) as little:
        pass
    with PeakMemory(torch.device("cpu")) as much:
        np.ones(40_000_000).sum()
    assert much.bytes - little.bytes > 200_000_000


# Summary.


@settings(max_examples=20)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_bootstrap_against_scipy(values):
    from scipy.stats import bootstrap

    found = bootstrapped(values)
    assert found == bootstrapped(values), "seeded"
    assert found["low"] - 1e-9 <= found["mean"] <= found["high"] + 1e-9
    if len(values) > 5 and np.std(values) > 1:
        theirs = bootstrap([values], np.mean, n_resamples=5000, method="percentile", random_state=1).confidence_interval
        width = theirs.high - theirs.low
        assert abs(found["low"] - theirs.low) < 0.15 * width and abs(found["high"] - theirs.high) < 0.15 * width


def test_summary_pairs_ranks_and_leaves_out():
    rows = {
        CEILING: {"a": {"psnr": 40.0, "success": True}, "b": {"psnr": 42.0, "success": True}},
        "kvlock": {"a": {"psnr": 30.0, "success": True}, "b": {"psnr": 20.0, "success": False}},
        "cfg": {"b": {"psnr": 25.0, "success": False}},
        "vace": {"a": {"psnr": 50.0, "success": True}},
        "paper": {},
    }
    found = summarise(rows, {"a": "recolour, tight", "b": "pan, boxed"}, frozenset({"vace"}))
    assert set(found) == {CEILING, "kvlock", "cfg", "vace"}
    assert found["kvlock"]["psnr"]["mean"] == 25 and found["kvlock"]["success"]["mean"] == 0.5
    assert found["cfg"]["difference"]["psnr"] == {"mean": 5.0, "low": 5.0, "high": 5.0, "cases": 1}
    assert found["kvlock"]["difference"] == {}
    assert [found[row].get("rank") for row in (CEILING, "kvlock", "cfg", "vace")] == [None, 1, 2, None]
    assert found["kvlock"]["groups"]["recolour"] == {"cases": 1, "success": 1.0, "psnr": 30.0}
    text = markdown(found)
    assert "| the autoencoder (ceiling) |" in text and "`vace` (untrained, not ranked)" in text
    assert "+5.0 (+5.0 to +5.0)*" in text and "nan" not in text


def test_rows_are_all_that_the_table_needs():
    rows = default_rows()
    assert rows[0] == CEILING and len(set(rows)) == len(rows)
    for row in ("paper", "kvlock", "variance-kv", "omega-only", "s-star-only", "fixed-alpha", "global-detection", "cfg",
                "cfg-zero-star", "kv-edit", "proedit", "flowedit", "tokenflow", "fatezero", "vace"):  # fmt: skip
        assert row in rows
    assert lock_of("paper/source").background_latents == "source" and lock_of("kvlock/model").kappa == 20


# The commands.


SOME = "ceiling,kvlock,cfg,kv-edit,proedit/source,flowedit,tokenflow,fatezero,vace"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    options = ["--cases", "1", "--steps", "5", "--rows", SOME, "--workers", "1", "--work", str(folder / "work")]
    options += ["--output", str(folder / "o" / "q.json")]
    assert quality.main(options) == 0
    return folder, options


def test_the_table_has_a_number_everywhere(table):
    folder, _ = table
    found = json.loads((folder / "o" / "q.json").read_text(), parse_constant=pytest.fail)
    assert ",".join(found["rows"]) == SOME
    columns = ("success", "consistency", "psnr", "ssim", "seam", "flicker", "seconds", "peak_bytes")
    for row, summary in found["rows"].items():
        for column in columns:
            assert math.isfinite(summary[column]["mean"]), (row, column)
        assert summary["cases"] == 1 and (row == "kvlock") == (not summary["difference"])
    assert found["rows"]["vace"]["ranked"] and found["rows"]["vace"]["psnr"] != found["rows"]["cfg"]["psnr"]
    best = found["rows"][CEILING]["psnr"]["mean"]
    # Of edits that change something: what leaves the source as it is can be nearer to it.
    assert all(found["rows"][row]["psnr"]["mean"] < best for row in ("kvlock", "cfg", "proedit/source"))
    assert (folder / "o" / "q.md").read_text().count("\n| ") >= 2 * len(found["rows"]) - 1
    assert (folder / "o" / "q.png").read_bytes()[1:4] == b"PNG"
    assert not list((folder / "work").glob("*.source")), "what rows share is gone"


def test_a_vace_that_is_not_trained_is_the_demo_model_and_not_ranked(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "WEIGHTS", tmp_path / "none.safetensors")
    options = ["--cases", "1", "--steps", "3", "--rows", "cfg,vace", "--workers", "1", "--work", str(tmp_path / "work")]
    assert quality.main([*options, "--output", str(tmp_path / "q.json")]) == 0
    found = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert not found["vace"]["ranked"] and found["vace"]["psnr"] == found["cfg"]["psnr"]


@pytest.mark.large
def test_every_row_runs_by_several_processes(tmp_path):
    options = ["--quick", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "q.json")]
    assert quality.main(options) == 0
    found = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert tuple(found) == default_rows() and all(summary["cases"] == 2 for summary in found.values())


def test_the_same_command_again_makes_nothing(table, capsys, monkeypatch):
    folder, options = table
    before = (folder / "o" / "q.json").read_text()
    monkeypatch.setattr(run, "Worker", None)
    assert quality.main(options) == 0
    assert "0 edits to make" in capsys.readouterr().out
    assert (folder / "o" / "q.json").read_text() == before


def test_other_values_are_made_anew(table):
    folder, _ = table
    plan, _ = quality.make_plan(
        quality.parser().parse_args(["--cases", "1", "--steps", "5", "--work", str(folder / "work")]), ("kvlock",)
    )
    assert run.missing(plan, 0, {"kvlock": plan.digest_of("kvlock")}) == 0
    from dataclasses import replace

    for other in (replace(plan, steps=6), replace(plan, locks={"kvlock": lock_of("kvlock", tau=0.5)})):
        assert run.missing(other, 0, {"kvlock": other.digest_of("kvlock")}) == 1
    (folder / "work" / "bad.json").write_text("{")
    with pytest.raises(InputError, match="is not a file of finished rows"):
        CaseFile(folder / "work", "bad")


def test_a_killed_run_goes_on_to_the_same_table(tmp_path):
    """Killed as soon as a row is there; then to the end, beside a run that nobody stopped."""
    options = ["--cases", "1", "--steps", "2", "--rows", "ceiling,cfg,kvlock", "--workers", "1"]

    def command(name):
        return [sys.executable, "-m", "bench.quality", *options, "--work", str(tmp_path / name),
                "--output", str(tmp_path / f"{name}.json")]  # fmt: skip

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    stopped = subprocess.Popen(command("a"), env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "a").glob("0*.json")) and stopped.poll() is None:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGKILL)
    stopped.wait()
    kept = CaseFile(tmp_path / "a", "0000").rows
    assert kept and not (tmp_path / "a.json").exists()
    for name in ("a", "b"):
        assert quality.main([*options, "--work", str(tmp_path / name), "--output", str(tmp_path / f"{name}.json")]) == 0
    assert CaseFile(tmp_path / "a", "0000").rows["ceiling"] == kept["ceiling"], "not made again"
    tables = [json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("a", "b")]
    for row, column in itertools.product(tables[0], ("success", "consistency", "psnr", "ssim", "seam", "flicker")):
        assert tables[0][row][column] == tables[1][row][column]


def test_every_sweep_has_its_base_once():
    points = sweeps.points_of(["paper", "kvlock"], list(sweeps.SWEEPS), 20)
    of = {name: [value for (base, p, value), _ in points.values() if (base, p) == ("kvlock", name)]
          for name in sweeps.SWEEPS}  # fmt: skip
    assert of["tau"][-1] == "auto" and of["b"] == [0.5, 1.0, 2.0, 3.0] and 1.0 in of["omega_floor"]
    assert points["paper warmup_alpha=0.5"][1] == lock_of("paper", warmup_alpha=0.5, kappa=10)
    assert points["kvlock tau=auto"][1] == lock_of("kvlock", tau="auto")


def test_sweeps(tmp_path, capsys):
    options = ["--cases", "1", "--steps", "2", "--workers", "1", "--work", str(tmp_path / "w")]
    options += ["--bases", "paper", "--parameters", "alpha_floor", "--output", str(tmp_path / "s.json")]
    assert sweeps.main(options) == 0
    found = json.loads((tmp_path / "s.json").read_text())["sweeps"]["paper"]
    assert [point["value"] for point in found["alpha_floor"]] == [0.0, 0.5, 1.0]
    assert all(math.isfinite(point["psnr"]["mean"]) for point in found["alpha_floor"])
    assert (tmp_path / "s.png").read_bytes()[1:4] == b"PNG" and "alpha_floor = 0.5" in (tmp_path / "s.md").read_text()
    for wrong, said in (("--bases", "papr"), ("--parameters", "taw"), ("--cases", "0")):
        assert sweeps.main([*options, wrong, said]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--rows", "kvlok"], "--rows names 'kvlok'"),
        (["--rows", "cfg/moon"], "--rows names 'cfg/moon'"),
        (["--cases", "0"], "--cases must be at least 1, got 0"),
        (["--model", "M"], "--model 'M' needs --clips"),
        (["--clips", "nowhere"], "--clips 'nowhere' has no clips.json"),
    ],
)
def test_bad_arguments(arguments, said, capsys, tmp_path):
    assert quality.main([*arguments, "--work", str(tmp_path / "w"), "--output", str(tmp_path / "q.json")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "q.json").exists()


# Clips.


def make_clips(folder):
    from kvlock_fast.demo.scene import sample_scene
    from kvlock_fast.demo.world import render

    scene = render(sample_scene(3))
    write_video(folder / "one.mkv", scene.video, 8)
    mask = np.repeat(grow(scene.mask, 2)[..., None] * np.uint8(255), 3, axis=-1)
    write_video(folder / "mask.mkv", mask, 8)
    texts = {"source_prompt": scene.caption, "prompt": "a small red circle over a checked background standing still"}
    clips = [
        {"name": "one", "video": "one.mkv", "mask": "mask.mkv", "frames": 5, **texts},
        {"name": "two", "video": "one.mkv", "mask": "box:8,8,24,24", "frames": 5, "size": "32x32", "seed": 4, **texts},
    ]
    (folder / "clips.json").write_text(json.dumps(clips))
    return clips


def test_clips_of_a_folder(tmp_path):
    make_clips(tmp_path)
    options = ["--clips", str(tmp_path), "--rows", "ceiling,kvlock,tokenflow", "--steps", "2", "--workers", "1"]
    options += ["--work", str(tmp_path / "w"), "--videos", str(tmp_path / "v"), "--output", str(tmp_path / "q.json")]
    assert quality.main(options) == 0
    found = json.loads((tmp_path / "q.json").read_text())["rows"]
    for summary in found.values():
        assert "success" not in summary and summary["cases"] == 2
        assert all(math.isfinite(summary[c]["mean"]) for c in ("psnr", "ssim", "seam", "flicker", "consistency"))
    assert sorted(path.relative_to(tmp_path / "v").as_posix() for path in (tmp_path / "v").rglob("*.mp4")) == [
        f"{row}/{name}.mp4" for row in ("ceiling", "kvlock", "tokenflow") for name in ("one", "two")
    ]
    assert (tmp_path / "q.png").is_file()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"name": ""}, "edit 0 has '' as its name"),
        ({"name": "a/b"}, "edit 0 has 'a/b' as its name"),
        ({"name": "two"}, "edit 1 has the name 'two' of another"),
        ({"mask": 3}, "edit 0 has 3 as its mask"),
        ({"frames": 0}, "edit 0 has 0 as its frames"),
        ({"size": "big"}, "edit 0 has 'big' as its size"),
        ({"colour": "red"}, "edit 0 has an unknown field 'colour'"),
    ],
)
def test_clips_that_are_not(tmp_path, change, said):
    texts = {"video": "v", "mask": "m", "source_prompt": "a", "prompt": "b"}
    (tmp_path / "clips.json").write_text(json.dumps([{"name": "one", **texts, **change}, {"name": "two", **texts}]))
    with pytest.raises(InputError, match=said):
        read_clips(tmp_path)
    (tmp_path / "clips.json").write_text("[")
    with pytest.raises(InputError, match="is not valid JSON"):
        read_clips(tmp_path)


# VBench.

STAND_IN = '''
import json, os


class VBench:
    """Speaks VBench's format: <name>_eval_results.json with [mean, [{"video_path", "video_results"}]] a dimension."""

    def __init__(self, device, full_info_dir, output_path):
        assert json.load(open(full_info_dir)) == []
        self.output = output_path

    def evaluate(self, videos_path, name, dimension_list, local, read_frame, mode):
        assert mode == "custom_input"
        found = {}
        for i, dimension in enumerate(dimension_list):
            videos = [os.path.join(videos_path, video) for video in sorted(os.listdir(videos_path))]
            each = [{"video_path": path, "video_results": 0.1 * i + os.path.getsize(path) / 100} for path in videos]
            found[dimension] = [sum(v["video_results"] for v in each) / len(each), each]
        CHANGE
        json.dump(found, open(os.path.join(self.output, name + "_eval_results.json"), "w"))
'''


def other_python(folder, change=""):
    """A Python of its own with a stand-in for vbench, and for what of torch the bridge's program asks."""
    (folder / "vbench.py").write_text(STAND_IN.replace("CHANGE", change))
    (folder / "torch.py").write_text(
        textwrap.dedent("""
        class cuda:
            is_available = staticmethod(lambda: False)
        device = str
    """)
    )
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def make_videos(folder):
    for row, sizes in (("cfg", (10, 30)), ("kvlock", (50, 70))):
        (folder / row).mkdir(parents=True)
        for i, size in enumerate(sizes):
            (folder / row / f"{i:04d}.mp4").write_bytes(b"x" * size)
    return folder


def test_vbench_by_a_stand_in(tmp_path, capsys):
    python, videos = other_python(tmp_path), make_videos(tmp_path / "videos")
    output = tmp_path / "o" / "vbench.json"
    asked = ["--dimensions", "subject_consistency,imaging_quality", "--output", str(output)]
    assert vbench.main(["--python", python, "--videos", str(videos), *asked]) == 0
    found = json.loads(output.read_text())
    assert list(found) == ["cfg", "kvlock"]
    assert found["cfg"]["subject_consistency"]["mean"] == pytest.approx(0.2)
    assert found["kvlock"]["imaging_quality"]["videos"] == pytest.approx({"0000": 0.6, "0001": 0.8})
    assert "| `kvlock` | 0.6000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, said",
    [
        ('raise RuntimeError("no weights")', "failed on .* with status 1: RuntimeError: no weights"),
        ("return", "VBench left no results"),
        ('del found["subject_consistency"]', "have no 'subject_consistency' that can be read"),
        ('found["subject_consistency"][1][0]["video_results"] = float("nan")', "without finite scores"),
        ('found["subject_consistency"] = [0.5, []]', "without finite scores"),
    ],
)
def test_vbench_that_fails(tmp_path, change, said):
    python, videos = other_python(tmp_path, change), make_videos(tmp_path / "videos")
    with pytest.raises(InputError, match=said):
        vbench.score(python, videos / "cfg", ("subject_consistency",))


def test_vbench_that_is_not_there(tmp_path, capsys):
    videos = make_videos(tmp_path / "videos")
    arguments = ["--videos", str(videos), "--output", str(tmp_path / "v.json")]
    assert vbench.main(["--python", str(tmp_path / "none"), *arguments]) == 2
    assert "cannot be run" in capsys.readouterr().err
    assert vbench.main(["--python", sys.executable, *arguments, "--dimensions", "colour"]) == 2
    assert "--dimensions names 'colour'" in capsys.readouterr().err
    (videos / "cfg" / "0001.mp4").unlink()
    with pytest.raises(InputError, match="less than two videos"):
        vbench.score(sys.executable, videos / "cfg", ("subject_consistency",))
