"""What a fresh process loads. Heavy libraries cost seconds each, so --help and the bare import go without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("diffusers", "transformers", "triton", "av")


def loaded_by(code: str, *watched: str) -> set[str]:
    """The watched modules that are loaded after `code` ran in a fresh process."""
    program = f"import sys\n{code}\nprint('LOADED', *[m for m in {watched!r} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("LOADED")[2].split())


def test_the_probe_sees_what_is_loaded():
    assert loaded_by("import av", *HEAVY) == {"av"}


def test_import_is_light():
    assert loaded_by("import kvlock_fast", "torch", *HEAVY) == set()


def test_the_rooms_for_media_are_light():
    rooms = "import kvlock_fast.media, kvlock_fast.metrics, kvlock_fast.report, kvlock_fast.doctor, kvlock_fast.files"
    assert loaded_by(rooms, "torch", "PIL", "matplotlib", "jinja2", *HEAVY) == set()


@pytest.mark.parametrize("command", [[], ["edit"], ["demo"], ["batch"]], ids=" ".join)
def test_help_is_light(command):
    run = f"from kvlock_fast.cli import main\nassert main({[*command, '--help']!r}) == 0"
    assert loaded_by(run, "torch", "matplotlib", "ray", "fsspec", "yaml", *HEAVY) == set()
