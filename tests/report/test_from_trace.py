"""`kvlock-fast report`: a page made again from a trace, with all of its videos, some, none, or other ones."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from kvlock_fast.cli import main
from kvlock_fast.media import write_video
from kvlock_fast.report.drawing import as_pictures
from tests.report.test_page import Page, trace, videos
from tests.support.clipmaker import noise


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--output", str(folder), "--steps", "2", "-q"]) == 0
    return folder


def words(page):
    return " ".join(" ".join(page.text).split())


def remake(folder, *more):
    status = main(["report", str(folder / "trace.json"), "--output", str(folder / "new.html"), *map(str, more)])
    return Page((folder / "new.html").read_text()) if status == 0 else None


def test_the_page_of_a_demo_is_made_again(demo, tmp_path, capsys):
    """Other than by the videos' second compression, which may also move a difference's scale, it is the same page."""
    folder = tmp_path / "moved"
    shutil.copytree(demo, folder)
    page, before = remake(folder, "--sheet", folder / "new.png"), Page((demo / "report.html").read_text())
    assert capsys.readouterr().err == ""
    strip = [[tag for tag in one.tags if tag[0] != "video"] for one in (page, before)]
    told = [re.sub(r"\d+ levels( or more)?", "N levels", words(one)) for one in (page, before)]
    assert strip[0] == strip[1] and told[0] == told[1]
    new, old = videos(page, tmp_path), videos(before, tmp_path)
    assert [video.frames.shape for video in new] == [video.frames.shape for video in old] and new[3].fps == old[3].fps
    for i in range(3):
        assert np.abs(new[i].frames.astype(int) - old[i].frames).mean() < 6, i
    sheets = [np.asarray(Image.open(path)).astype(int) for path in (folder / "new.png", demo / "sheet.png")]
    assert sheets[0].shape == sheets[1].shape
    rows = [picture[: 3 * picture.shape[0] // 4 - 24] for picture in sheets]
    assert np.abs(rows[0] - rows[1]).mean() < 6


def test_an_edit_with_a_shaped_box_and_several_prompts(tmp_path, monkeypatch, capsys):
    """Paths are found from where the edit was called, the mask is shaped as it was, figures are the trace's."""
    monkeypatch.chdir(tmp_path)
    write_video("source.mkv", noise(9, 48, 64), 12)
    arguments = "edit --source source.mkv --source-prompt a --prompt b --prompt c --mask box:0=8,8,8,8;4=40,8,8,8"
    arguments += " --mask-grow 3 --max-frames 6 --steps 2 --output o.mkv --trace trace.json --report old.html -q"
    assert main([*arguments.split(), "--sheet", "s.png"]) == 0
    assert Image.open("s.png").height > 4 * 256
    page, before = remake(tmp_path), Page((tmp_path / "old.html").read_text())
    # The command line of a test is pytest's, and the same in both.
    assert words(page) == words(before)
    for new, old in zip(videos(page, tmp_path), videos(before, tmp_path), strict=True):
        assert np.array_equal(new.frames, old.frames)
    data = json.loads((tmp_path / "trace.json").read_text())
    assert data["files"] == {
        "source": "source.mkv", "mask": "box:0=8,8,8,8;4=40,8,8,8", "max_frames": 6, "outputs": ["o-1.mkv", "o-2.mkv"]
    }  # fmt: skip
    assert set(data["metrics"][0]) >= {"foreground_ssim", "foreground_flicker", "background_psnr"}


def test_files_that_are_gone_are_said_and_left_out(demo, tmp_path, capsys):
    folder = tmp_path / "left"
    folder.mkdir()
    shutil.copy(demo / "trace.json", folder)
    page = remake(folder)
    error = capsys.readouterr().err
    assert error.count("warning: ") == 3 and "'edited.mp4' of the trace (outputs) is not there any more" in error
    assert not page.all("video") and len(page.all("polyline")) == 4 and "Raw background SSIM" in words(page)
    page = remake(folder, "--edited", demo / "edited.mp4", "--source", demo / "source.mp4")
    assert [video["aria-label"] for video in page.all("video")] == ["Source", "Edit", "Difference"]
    assert remake(folder, "--sheet", folder / "s.png") is None
    assert "s.png' needs the source, the mask and the edit" in capsys.readouterr().err
    assert not (folder / "s.png").exists()


def test_files_that_are_given_come_before_those_of_the_trace(demo, tmp_path):
    mask = np.zeros((17, 64, 64), bool)
    mask[:, :32] = True
    write_video(tmp_path / "other.mkv", as_pictures(mask), 8)
    shutil.copytree(demo, tmp_path / "copy")
    page = remake(tmp_path / "copy", "--mask", tmp_path / "other.mkv")
    assert "mask 50.0%" in words(page)


def test_a_trace_by_hand_needs_little(tmp_path):
    (tmp_path / "trace.json").write_text(json.dumps(trace(["<b>"])))
    page = remake(tmp_path)
    assert not page.all("video") and not page.all("b") and "<b>" in words(page) and len(page.all("polyline")) == 4


GOOD = trace()
BAD_TRACES = {
    "missing": (None, "does not exist"),
    "empty": (b"", "not valid JSON"),
    "words": (b"these are words", "not valid JSON"),
    "binary": (bytes(range(256)), "not valid JSON"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "nan": (json.dumps({**GOOD, "steps": float("nan")}).encode(), "it holds NaN"),
    "list": ([], "it holds a list"),
    "another file": ({"a": 1}, "it has no prompts"),
    "no prompts": ({**GOOD, "prompts": []}, "prompts is not a list of texts"),
    "prompts": ({**GOOD, "prompts": [1]}, "prompts is not a list of texts"),
    "steps": ({**GOOD, "steps": 0}, "steps is 0"),
    "steps beyond reason": ({**GOOD, "steps": 10**9}, "steps is 1000000000"),
    "warm-up": ({**GOOD, "warmup_steps": "x"}, 'warmup_steps is "x"'),
    "records": ({**GOOD, "records": {}}, "records is not a list"),
    "too many": ({**GOOD, "records": GOOD["records"] * 2}, "at most one of each step"),
    "record": ({**GOOD, "records": [3]}, "record 0 is 3"),
    "step": ({**GOOD, "records": [{**GOOD["records"][0], "step": 8}]}, "record 0 has 8 as its step"),
    "sample": ({**GOOD, "records": [{**GOOD["records"][0], "sample": 1}]}, "record 0 has 1 as its sample"),
    "alpha": ({**GOOD, "records": [{**GOOD["records"][0], "alpha": "x"}]}, 'record 0 has "x" as its alpha'),
    "seconds": ({**GOOD, "records": [{**GOOD["records"][0], "seconds": None}]}, "null as its seconds"),
    "huge": ({**GOOD, "records": [{**GOOD["records"][0], "omega": 10**400}]}, "as its omega"),
    "settings": ({**GOOD, "settings": []}, "settings is []"),
    "metrics": ({**GOOD, "metrics": [{"background_psnr": "x"}]}, "metrics holds"),
    "command": ({**GOOD, "command": 3}, "command is 3"),
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_what_is_no_trace(tmp_path, capsys, name):
    content, message = BAD_TRACES[name]
    (tmp_path / "new.html").write_text("an earlier page")
    if content is not None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / "trace.json").write_bytes(data)
    assert remake(tmp_path) is None
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "trace.json" in error[0] and message in error[0]
    assert (tmp_path / "new.html").read_text() == "an earlier page"


BAD_FILES = {
    "source": (["--source", "no.mp4"], "no.mp4"),
    "mask": (["--mask", "no.png"], "no.png"),
    "edited": (["--edited", "no.mp4"], "no.mp4"),
    "two edits": (["--edited", "edited.mp4", "--edited", "edited.mp4"], "--edited names 2 videos"),
    "another length": (["--source", "short.mp4"], "'mask.mp4' does not fit 'short.mp4'"),
    "output over the trace": (["--output", "trace.json"], "--output 'trace.json' is the same file as the trace"),
    "output over a video": (["--output", "source.mp4", "--source", "source.mp4"], "is the same file as --source"),
    "sheet over the page": (["--sheet", "new.html"], "--sheet 'new.html' is the same file as --output"),
    "no folder": (["--output", "no/r.html"], "no/r.html"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_do_not_fit(demo, tmp_path, capsys, monkeypatch, name):
    folder = tmp_path / "d"
    shutil.copytree(demo, folder)
    monkeypatch.chdir(folder)
    write_video("short.mp4", noise(3, 64, 64), 8)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    flags, message = BAD_FILES[name]
    assert main(["report", "trace.json", "--output", "new.html", *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
