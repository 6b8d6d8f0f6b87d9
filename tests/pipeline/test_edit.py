"""From files to files with the bundled model: the demo command, real footage, compositing, progress."""

import io
import json

import numpy as np
import pytest

from kvlock_fast.cli import main
from kvlock_fast.edit import working_size
from kvlock_fast.edit_files import output_names
from kvlock_fast.errors import InputWarning
from kvlock_fast.media import read_video
from kvlock_fast.progress import duration, progress_bar

DEMO_FILES = ["edited.mp4", "mask.mp4", "report.html", "sheet.png", "source.mp4", "trace.json"]


def test_demo_writes_its_six_files_and_leaves_others(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("stays")
    assert main(["demo", "--output", str(tmp_path), "--steps", "3"]) == 0
    captured = capsys.readouterr()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*DEMO_FILES, "mine.txt"])
    assert "report.html" in captured.out and "denoising: step 3 of 3" in captured.err
    source, edited = (read_video(tmp_path / f"{name}.mp4").frames for name in ("source", "edited"))
    assert source.shape == edited.shape and not np.array_equal(source, edited)
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["steps"] == 3 and trace["settings"]["background_latents"] == "source"


@pytest.mark.parametrize(("name", "frames", "fps"), [("tennis", 70, 15), ("dog", 81, 16)])
def test_real_footage(clips, tmp_path, capsys, request, name, frames, fps):
    """Odd sizes, frame counts that are not 4n+1 and video-compressed masks, through the bundled model.

    The whole clip with --all, else its first frames.
    """
    frames = frames if request.config.getoption("--all") else 22
    arguments = ["edit", "--source", str(clips / f"{name}.mp4"), "--mask", str(clips / f"{name}_mask.mp4")]
    arguments += ["--source-prompt", "a video", "--prompt", "a red circle", "--steps", "2", "--model", "demo"]
    small, whole = tmp_path / "small.mp4", tmp_path / "whole.mkv"
    assert main([*arguments, "--output", str(small), "--max-frames", "18", "--no-composite"]) == 0
    assert "18 frames padded to 21" in capsys.readouterr().err
    beginning = ["--max-frames", str(frames)]
    assert main([*arguments, "--output", str(whole), "--size", "48x88", *beginning]) == 0
    source, edited = read_video(clips / f"{name}.mp4", max_frames=frames), read_video(whole)
    assert edited.frames.shape == source.frames.shape and len(edited.frames) == frames and edited.fps == fps
    changed = (edited.frames != source.frames).any(-1)
    mask = read_video(clips / f"{name}_mask.mp4", max_frames=frames).frames.max(-1) > 127
    assert changed[mask].mean() > 0.5
    assert not changed[~mask].any()
    raw = read_video(small).frames
    assert len(raw) == 18 and raw.shape[1:3] == working_size("demo", source.frames, None)


def test_the_bundled_model_works_small_unless_told_otherwise():
    video = np.zeros((1, 480, 854, 3), np.uint8)
    with pytest.warns(InputWarning, match="working at 72x128, not the source's 480x854"):
        height, width = working_size("demo", video, None)
    assert height * width <= 96 * 97 and width / height == pytest.approx(854 / 480, rel=0.02)
    assert working_size("demo", video, (64, 64)) == (64, 64)
    assert working_size("demo", video[:, :64, :64], None) is None
    assert working_size("elsewhere", video, None) is None


def test_names_for_several_prompts():
    assert [str(p) for p in output_names("a/b.mp4", 1)] == ["a/b.mp4"]
    assert [str(p) for p in output_names("a/b.x.mp4", 2)] == ["a/b.x-1.mp4", "a/b.x-2.mp4"]


def test_progress_is_plain_lines_off_a_terminal_and_nothing_when_quiet():
    stream = io.StringIO()
    with progress_bar(stream=stream) as report:
        report("load", 0, 1)
        report("load", 1, 1)
        report("denoise", 0, 1)
        for k in range(1, 101):
            report("denoise", k, 100)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["loading the model", "denoising"] and len(lines) == 12
    assert lines[-1] == "denoising: step 100 of 100, 0 s left"
    with progress_bar(quiet=True, stream=stream) as report:
        report("load", 0, 1)
    assert stream.getvalue().splitlines() == lines


def test_the_time_left_is_what_the_pace_so_far_says(monkeypatch):
    clock = iter([0.0, 0.0, 500.0])
    monkeypatch.setattr("kvlock_fast.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with progress_bar(stream=stream) as report:
        report("source pass", 0, 1)
        report("denoise", 0, 50)
        report("denoise", 5, 50)
    assert stream.getvalue().splitlines() == [
        "running the source", "denoising", "denoising: step 5 of 50, 1 h 15 min left"
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0, 59.4, 59.6, 200, 3599.6)] == [
        "0 s", "59 s", "1 min 0 s", "3 min 20 s", "1 h 0 min"
    ]  # fmt: skip


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress_bar(stream=stream) as report:
        report("denoise", 3, 10)
    assert "denoising" in stream.getvalue() and "3/10" in stream.getvalue()
