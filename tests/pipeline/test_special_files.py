"""Pipes and devices: a reader does not wait for one, and no output takes the place of one."""

import os
from pathlib import Path

import numpy as np
import pytest

from kvlock_fast.cli import main
from kvlock_fast.errors import OutputError
from kvlock_fast.files import atomic_path, check_writable, refuse_special
from kvlock_fast.media import write_video

pytestmark = [pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names"), pytest.mark.timeout(60)]

EDIT = "edit --source-prompt a --prompt b --output o.mp4 --model demo --source {source} --mask {mask}"
READERS = {
    "source": ("p.mp4", EDIT.format(source="p.mp4", mask="box:0,0,8,8")),
    "source, an image": ("p.png", EDIT.format(source="p.png", mask="box:0,0,8,8")),
    "source, an image of a folder": ("frames/b.png", EDIT.format(source="frames", mask="box:0,0,8,8")),
    "mask, a video": ("p.mkv", EDIT.format(source="clip.mkv", mask="p.mkv")),
    "mask, an image": ("p.png", EDIT.format(source="clip.mkv", mask="p.png")),
    "mask, an array": ("p.npy", EDIT.format(source="clip.mkv", mask="p.npy")),
    "mask, packed arrays": ("p.npz", EDIT.format(source="clip.mkv", mask="p.npz")),
    "model": ("model/model_index.json", EDIT.format(source="clip.mkv", mask="box:0,0,8,8").replace("demo", "model")),
    "cache": ("cache/manifest.json", EDIT.format(source="clip.mkv", mask="box:0,0,8,8") + " --cache cache"),
    "cache ls": ("cache/manifest.json", "cache ls cache"),
    "config": ("p.json", "plan --config p.json"),
    "trace": ("p.json", "report p.json --output r.html"),
    "manifest": ("p.jsonl", "batch p.jsonl --output out"),
    "manifest, a table": ("p.csv", "batch p.csv --output out"),
    "defaults": ("p.yaml", "batch m.jsonl --output out --defaults p.yaml"),
    "migrate": ("p.jsonl", "migrate p.jsonl"),
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mkv", np.zeros((5, 32, 48, 3), np.uint8), 8)
    write_video(tmp_path / "frames", np.zeros((1, 32, 48, 3), np.uint8), 8)
    (tmp_path / "m.jsonl").write_text('{"id": "a", "source": "clip.mkv", "mask": "box:0,0,8,8", "prompt": "b"}')
    return tmp_path


@pytest.mark.parametrize(("pipe", "command"), READERS.values(), ids=READERS)
def test_no_reader_waits_for_a_pipe(here, capsys, pipe, command):
    (here / pipe).parent.mkdir(exist_ok=True)
    os.mkfifo(here / pipe)
    assert main(command.split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and Path(pipe).parts[0].split(".")[0] in last
    assert not (here / "o.mp4").exists()


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/null", "/proc/self/fd/1", "/dev/fd/1", "/dev/../dev/stdout"])
def test_devices_stay_devices(here, capsys, place):
    for write in (check_writable, lambda path: atomic_path(path).__enter__()):
        with pytest.raises(OutputError, match="it is not a regular file"):
            write(place)
    assert main(["plan", "--model", "demo", "--json", place]) == 2
    assert "is not a regular file" in capsys.readouterr().err


def test_memory_that_looks_like_a_folder_of_devices():
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm")
    check_writable("/dev/shm/kvlock-test.json")


@pytest.mark.parametrize("output", ["..", ".", "frames/..", "/"])
def test_an_output_names_a_file(here, capsys, output):
    before = sorted(path.name for path in here.parent.iterdir())
    command = EDIT.format(source="clip.mkv", mask="box:0,0,8,8").replace("o.mp4", output)
    assert main(command.split()) == 2
    assert f"--output must name a file, got '{output}'" in capsys.readouterr().err
    assert sorted(path.name for path in here.parent.iterdir()) == before


def test_files_and_folders_and_nothing_pass(tmp_path):
    for path in (tmp_path, tmp_path / "none", Path(__file__)):
        refuse_special(path)
