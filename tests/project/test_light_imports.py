"""What a fresh process loads. Heavy libraries cost seconds each, so --help and the bare import go without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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


PROMISED = {
    "LockConfig": "kvf.LockConfig.preset('paper')",
    "InputError": "kvf.InputError",
    "names": "dir(kvf)",
    "typed-names": "from kvlock_fast import CacheConfig, LockConfig, __version__",
}


@pytest.mark.parametrize("use", PROMISED.values(), ids=PROMISED)
def test_what_needs_no_model_loads_none(use):
    assert loaded_by(f"import kvlock_fast as kvf\n{use}", "torch", *HEAVY) == set()


def test_capabilities_load_no_model():
    said = "import kvlock_fast as kvf\nassert 'wan' in kvf.capabilities()['families']"
    assert loaded_by(said, *HEAVY) <= {"triton"}


def test_operations_load_no_models():
    assert loaded_by("import kvlock_fast as kvf\nkvf.ops.token_mask", *HEAVY) <= {"triton"}


def test_a_loop_of_ones_own_loads_no_pipelines():
    """Nor does asking for a lock load diffusers, which the caller has loaded for the transformer."""
    assert loaded_by("import kvlock_fast as kvf\nkvf.attach, kvf.ArchSpec", *HEAVY) <= {"triton"}


def test_the_rooms_for_media_are_light():
    names = ("media", "media.metrics", "report.page", "tools.doctor", "files")
    rooms = "import " + ", ".join(f"kvlock_fast.{name}" for name in names)
    assert loaded_by(rooms, "torch", "PIL", "matplotlib", "jinja2", *HEAVY) == set()


@pytest.mark.parametrize("command", [[], ["edit"], ["demo"], ["batch"]], ids=" ".join)
def test_help_is_light(command):
    run = f"from kvlock_fast.cli import main\nassert main({[*command, '--help']!r}) == 0"
    assert loaded_by(run, "torch", "matplotlib", "ray", "fsspec", "yaml", *HEAVY) == set()
