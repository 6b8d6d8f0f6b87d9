"""One declaration: a parameter is said once, and is then an option, a field of a job and a row of the docs."""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from kvlock_fast.batch.fields import JobFields
from kvlock_fast.cli import main
from kvlock_fast.cli.options import ALL
from kvlock_fast.config import CacheConfig, LockConfig
from kvlock_fast.parameters import EDIT, PANELS, declared
from kvlock_fast.presets import PRESETS
from kvlock_fast.settings import JOB, BatchSettings, EditFiles, EditSettings, MaskShape
from tests.project import options

ROOT = Path(__file__).resolve().parents[2]
EDIT_COMMAND = ["edit", "--source", "no.mp4", "--mask", "no.png", "--prompt", "a", "--output", "o.mp4"]


def panels(text: str) -> dict[str, list[str]]:
    """The options of each panel of a help."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if title := re.match(r"╭─ (.+?) ─+╮", line):
            found[title[1]] = []
        elif option := re.match(r"│ (?:[* ]  )?(--[\w-]+)", line):
            list(found.values())[-1].append(option[1])
    return found


@pytest.mark.parametrize("columns", [80, 120])
def test_help_has_every_option_once_in_its_panel(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["edit", "--help"]) == 0
    found = panels(capsys.readouterr().out)
    assert list(found) == list(PANELS) and len(found[EDIT]) <= 12
    listed = [(panel, option) for panel in found for option in found[panel]]
    assert sorted({(one.panel, one.option) for one in ALL.values()} ^ set(listed)) == [
        ("Output", "--help"), ("Output", "--quiet")
    ]  # fmt: skip
    assert len(listed) == len(set(listed))


def test_choices_are_shown(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["edit", "--help"]) == 0
    text = capsys.readouterr().out
    for one in ALL.values():
        assert one.values in text, one.name


def test_every_parameter_says_what_it_is():
    for kind in (EditFiles, EditSettings, MaskShape, LockConfig, CacheConfig, BatchSettings):
        for one in declared(kind):
            assert one.help[0].isupper() or one.help.startswith(("torch.compile", "cuda")), one.name
            assert not one.help.endswith(".") and len(one.help) <= 180, one.name
            assert one.panel in PANELS or kind is BatchSettings
    assert [one.attribute for one in declared(LockConfig)] == [f.name for f in fields(LockConfig)]
    assert [one.attribute for one in declared(CacheConfig)] == [f.name for f in fields(CacheConfig)]
    for one in declared(LockConfig):
        assert f"{one.attribute}: {one.help}" in (LockConfig.__doc__ or "")


def test_defaults_and_presets_are_allowed_values():
    for kind in (*JOB, EditSettings):
        for one in declared(kind):
            assert one.required or one.problem(one.default) is None, one.name
    for name in PRESETS:
        LockConfig.preset(name)


def test_the_schema_describes_every_field():
    for name, schema in JobFields.model_json_schema()["properties"].items():
        assert schema.get("description"), name


def test_the_page_is_current():
    """Written anew by `make options`."""
    assert options.PAGE.read_text() == options.page()


def outside(one):
    """Values that a parameter does not allow, as typed, and that no check but its own refuses."""
    if one.words or one.values in ("0-11,15", "HEIGHTxWIDTH", "200GB"):
        yield "no-such-word"
    if one.is_number and not one.values.endswith("GB"):
        yield "text"
        for bound, step in ((one.low, -1), (one.above, 0), (one.high, 1), (one.below, 0)):
            if bound is not None:
                yield str(bound + step)


WRONG = [(one.option, value) for one in ALL.values() for value in outside(one)]


@pytest.mark.parametrize(("option", "value"), WRONG, ids=[f"{option}={value}" for option, value in WRONG])
def test_a_value_that_is_not_allowed_is_refused_before_any_file_is_read(capsys, monkeypatch, option, value):
    monkeypatch.setenv("COLUMNS", "40")
    assert main([*EDIT_COMMAND, "--source-prompt", "b", f"{option}={value}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and value in line and "no.mp4" not in line


@pytest.mark.parametrize("command", ["edit", "invert", "batch", "plan", "profile"])
def test_an_option_with_a_typo_is_refused_with_the_right_one(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "40")
    assert main([command, "--presett", "paper"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "--presett" in line and "--preset" in line.replace("--presett", "")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["batch", "m.jsonl", "--output", "o", "--tau", "often"], "--tau must be a number or 'auto', got 'often'"),
        (["batch", "m.jsonl", "--output", "o", "--kappa", "-1"], "--kappa: must be a whole number of at least 0"),
        (["batch", "m.jsonl", "--output", "o", "--cache-tier", "attic"], "--cache-tier: "),
        (["plan", "--model", "demo", "--cache-steps", "some"], "cache-steps must be all or dynamic"),
        (
            ["plan", "--model", "demo", "--lock-interval", "half"],
            "--lock-interval must be two shares of the steps",
        ),
        (["plan", "--model", "demo", "--guidance-interval", "0.9-0.1"], "guidance_interval must be two shares"),
        (["invert", *EDIT_COMMAND[1:5], "--source-prompt", "a", "--output", "o", "--store", "some"], "'some'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_commands_refuse_too(capsys, command, said):
    assert main(command) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_options_of_batch_are_defaults_of_jobs(tmp_path, monkeypatch):
    """As --set gives them; what a line says comes first."""
    from kvlock_fast.batch import command

    seen = []
    monkeypatch.setattr(command, "run", lambda asked: seen.append(asked) or 0)
    typed = "--tau auto --layers 0-2 --size 32x48 --no-audio --mask-grow=-3 --cache-tier host --steps 4 --graph auto"
    typed += " --lock-interval 0-0.55"
    assert main(["batch", "m.jsonl", "--output", str(tmp_path), *typed.split()]) == 0
    assert seen[0].flags == {
        "tau": "auto", "layers": [0, 1, 2], "size": "32x48", "audio": False, "mask_grow": -3, "cache_tier": "host",
        "steps": 4, "lock_interval": [0.0, 0.55],
    }  # fmt: skip
    assert seen[0].speed.graph == "auto" and seen[0].device == "auto" and seen[0].edits_per_pass == 8


def test_words_are_completed():
    run = "import sys; sys.argv = ['kvlock-fast']; from kvlock_fast.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_KVLOCK_FAST_COMPLETE": "complete_bash"}

    def completed(words):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - (not words.endswith(" ")))}
        done = subprocess.run([sys.executable, "-c", run], env={**environment, **asked}, capture_output=True, text=True)
        return done.stdout.split()

    assert set(completed("kvlock-fast edit --cache-t")) == {"--cache-tier"}
    assert completed("kvlock-fast edit --cache-tier ho") == ["host"]


def literals(path: Path) -> list[str]:
    """Parameters of functions whose default or type bound a file writes down though a declaration has it."""
    names = set(ALL)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            given = node.args.args[len(node.args.args) - len(node.args.defaults) :]
            for argument, default in zip(given, node.args.defaults, strict=True):
                if argument.arg in names and not (isinstance(default, ast.Constant) and default.value is None):
                    found.append(f"{path.name}: {node.name}({argument.arg}={ast.unparse(default)})")
    return found


OWN_DEFAULTS = {
    "demo.py: demo(output=Path('out/demo'))",
    "mask.py: show_mask(model='demo')",
}
"""Where a command means something else by the word, or something less."""


def test_no_default_is_written_down_again():
    found = {line for path in (ROOT / "kvlock_fast" / "cli").glob("*.py") for line in literals(path)}
    assert found == OWN_DEFAULTS
    for name in ("fields", "manifest", "jobs"):
        text = (ROOT / "kvlock_fast" / "batch" / f"{name}.py").read_text()
        assert not re.search(rf"^    ({'|'.join(ALL)}): .* = [\"'0-9TF]", text, re.M)


PROBE = """
import json
from kvlock_fast.batch.fields import JobFields
from kvlock_fast.cli import main
from kvlock_fast.config import LockConfig
from tests.project.options import page

assert main(["edit", "--help"]) == 0
assert "wobble" in page() and "How much the lock wobbles" in page()
assert "wobble: How much the lock wobbles (default: 0.25) [0..1]" in LockConfig.__doc__
field = JobFields.model_json_schema()["properties"]["wobble"]
assert field["anyOf"][0] == {"maximum": 1, "minimum": 0, "type": "number"} and "How much" in field["description"]
assert LockConfig(wobble=0.5).as_dict()["wobble"] == 0.5
common = "edit --source no.mp4 --mask no.png --prompt a --source-prompt b --output o.mp4".split()
assert main([*common, "--wobble", "2"]) == 2
assert main([*common, "--wobbel", "1"]) == 2
assert main(["batch", "m.jsonl", "--output", "o", "--set", "wobbel=1"]) == 2
"""


def test_a_parameter_is_added_in_one_file(tmp_path):
    """In a copy of the package: one line in config.py, and it is in the help, the schema and the docs."""
    shutil.copytree(
        ROOT / "kvlock_fast",
        tmp_path / "kvlock_fast",
        symlinks=False,
        ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"),
    )
    (tmp_path / "tests" / "project").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "project" / "options.py", tmp_path / "tests" / "project")
    path = tmp_path / "kvlock_fast" / "config.py"
    text, line = path.read_text(), "    b: float = _lock("
    assert text.count(line) == 1
    path.write_text(text.replace(line, f'    wobble: float = _lock(0.25, "0..1", "How much the lock wobbles")\n{line}'))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"--wobble +0\.\.1 +How much the lock wobbles \(default: 0\.25\)", done.stdout)
    said = done.stderr.splitlines()
    assert said[0] == "error: wobble must be between 0 and 1, got 2.0"
    assert "--wobbel" in said[1] and "--wobble" in said[1]
    assert said[2] == "error: --set: wobbel: is no field of a job; did you mean 'wobble'?"


HUGE = "1" + "0" * 400


@pytest.mark.parametrize("option", [one.option for one in ALL.values() if one.is_number])
def test_a_number_beyond_all_floats_is_one_sentence(capsys, option):
    """Or it is taken: what has no upper bound is refused by the files that are not there."""
    assert main([*EDIT_COMMAND, option, HUGE]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("name", [one.attribute for one in declared(LockConfig) if one.is_number])
def test_and_in_python(name):
    for value in (10**400, -(10**400), float("inf"), float("nan")):
        try:
            LockConfig(**{name: value})
        except ValueError as error:
            assert str(error).startswith(name)
        else:
            kinds = LockConfig.__dataclass_fields__[name].metadata["parameter"].types
            assert isinstance(value, int) and float not in kinds
