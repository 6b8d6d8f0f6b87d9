"""What other people's code relies on: names, types, operators' signatures, and what the docs say of them."""

import inspect
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import kvlock_fast as kvf
from kvlock_fast import ops
from kvlock_fast.config import FORMATS, PRESETS, TIERS
from kvlock_fast.models.registry import FAMILIES, REGISTRY

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "kvlock_fast" / "docs"

OPERATORS = {
    "attention": "(Tensor q, Tensor k, Tensor v, float scale, str backend, str route) -> Tensor",
    "attention_fp8": "(Tensor q, Tensor q_scale, Tensor k, Tensor k_scale, Tensor v_t, Tensor v_scale, float scale, "
    "ScalarType dtype, str backend) -> Tensor",
    "blend_": "(Tensor(a0!) x, Tensor codes, Tensor[] scales, Tensor weight, Tensor? index, SymInt token_dim, "
    "str format, str kind, SymInt tokens_per_scale, str backend) -> ()",
    "cfg_projection": "(Tensor cond, Tensor uncond, float eps, str backend) -> Tensor",
    "dequantize_kv": "(Tensor codes, Tensor[] scales, str format, str kind, SymInt channels, SymInt tokens_per_scale, "
    "ScalarType dtype, str backend) -> Tensor",
    "guided_prediction": "(Tensor cond, Tensor uncond, Tensor omega, Tensor s_star, str backend) -> Tensor",
    "locked_attention": "(Tensor q, Tensor k, Tensor v, Tensor k_codes, Tensor[] k_scales, str k_format, str k_kind, "
    "SymInt k_per_scale, Tensor v_codes, Tensor[] v_scales, str v_format, str v_kind, SymInt v_per_scale, "
    "Tensor foreground, Tensor alpha, float scale, str backend, str route) -> Tensor",
    "quantize_kv": "(Tensor x, Tensor? tokens, str format, str kind, SymInt tokens_per_scale, str backend) -> Tensor[]",
    "windowed_variance": "(Tensor history, Tensor foreground, str backend) -> Tensor",
}
"""A promise: an operator that takes other arguments gets another name. (`prologue` and `step_epilogue` are called by
their Python functions, and `kvlock_fast.locking` registers three for itself.)"""
BY_FUNCTION = {"prologue", "step_epilogue"}
OURS_ALONE = {"lock_output_", "attend_kept", "locked_qkv"}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_their_signatures(name):
    schema = str(getattr(torch.ops.kvlock_fast, name).default._schema)
    assert schema == f"kvlock_fast::{name}{OPERATORS[name]}"


def test_every_operator_is_spoken_for():
    code = (
        "import torch, kvlock_fast.ops, kvlock_fast.integrations.attach\n"
        "print(*(s.name.split('::')[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith('kvlock_fast::')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert set(found.split()) == {*OPERATORS, *BY_FUNCTION, *OURS_ALONE}


def test_the_docs_speak_of_all_of_them():
    page = (DOCS / "ops.md").read_text()
    code = "\n".join(part.split("```")[0] for part in page.split("```python")[1:])
    for name in ops.__all__:
        assert f"**`{name}`**" in page, name
        assert f"kvf.ops.{name}" in code, name
    for name in OPERATORS:
        assert f"own.{name}(" in code, name
    assert all(f"`{name}`" in page for name in BY_FUNCTION | OURS_ALONE)


PUBLIC = [name for name in kvf.__all__ if not name.startswith("__")]


def callables():
    """(name, function) of the public surface: functions, constructors and the methods of public classes."""
    for home, names in ((kvf, PUBLIC), (ops, ops.__all__)):
        for name in names:
            value = getattr(home, name)
            if inspect.isclass(value):
                for member, function in vars(value).items():
                    if isinstance(function, property):
                        function = function.fget
                    if isinstance(function, classmethod):
                        function = function.__func__
                    own = inspect.isfunction(function) and function.__qualname__.startswith(value.__name__)
                    if own and (not member.startswith("_") or member == "__call__"):
                        yield f"{name}.{member}", function
            elif inspect.isfunction(value):
                yield name, value


CALLABLES = dict(callables())


def test_the_surface_is_not_lost():
    assert {"attach", "AttachedLock.edit", "KVLockPipeline.__call__", "KVLockGuidance.forward", "prologue"} <= {
        *CALLABLES
    }


@pytest.mark.parametrize("name", CALLABLES)
def test_everything_public_is_typed_and_documented(name):
    function = inspect.unwrap(CALLABLES[name])
    hints = typing.get_type_hints(function)
    # Diffusers' own interface has `components` and `state` untyped in name only: ours are.
    expected = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    assert [p for p in expected if p not in hints] == [] and "return" in hints
    assert inspect.getdoc(CALLABLES[name]) or name.rpartition(".")[2] in ("device", "default")


@pytest.mark.parametrize("name", PUBLIC)
def test_names_are_there_and_no_module_hides_one(name):
    value = getattr(kvf, name)
    assert name in dir(kvf) and (name == "ops" or not inspect.ismodule(value))
    assert not (ROOT / "kvlock_fast" / f"{name}.py").exists() or name == "ops"


def test_the_package_is_marked_as_typed():
    assert (ROOT / "kvlock_fast" / "py.typed").exists()


USER = """
import torch
import kvlock_fast as kvf

def loop(transformer: torch.nn.Module, foreground: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with kvf.attach(transformer, foreground, num_steps=3, lock=paper()) as kv:
        with kv.source(1), kv.edit(0.5, 1):
            y: torch.Tensor = kv.guide(x, x)
    packed: kvf.ops.QuantizedKV = kvf.ops.quantize_kv(x)
    number: int = packed.nbytes
    families: list[str] = kvf.capabilities()["families"]
    kvf.attach(transformer, 3)
    kv.edit("all")
    return y
"""


@pytest.mark.large
@pytest.mark.skipif(shutil.which("mypy") is None, reason="mypy is not installed")
def test_a_type_checker_sees_the_types(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    options = ["--ignore-missing-imports", "--follow-imports=silent", f"--cache-dir={tmp_path / 'cache'}"]
    command = ["mypy", "--python-executable", sys.executable, *options, "user.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}  # an editable install is none that it can see
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout
    errors = [line for line in said.splitlines() if ": error:" in line]
    assert [line.split("[")[-1] for line in errors] == ["arg-type]"] * 2, said
    assert '"attach"' in errors[0] and '"edit"' in errors[1]


def test_capabilities_say_all_there_is():
    can = kvf.capabilities()
    assert list(can) == ["versions", "device", "families", "transformers", "backends", "formats", "tiers", "presets"]
    assert can["families"] == list(FAMILIES) and len(set(FAMILIES)) == len(FAMILIES)
    known = {name for family in REGISTRY for name in family.transformers}
    assert set(can["transformers"]) == known and set(can["transformers"].values()) <= set(FAMILIES)
    assert (can["formats"], can["tiers"], can["presets"]) == (list(FORMATS), list(TIERS), list(PRESETS))
    assert can["versions"]["kvlock_fast"] == kvf.__version__ and can["versions"]["torch"] == torch.__version__
    assert can["backends"][0] == "reference" and "sdpa" in can["backends"]
    assert (can["device"] == "cpu") == (not torch.cuda.is_available())


def test_capabilities_are_plain_values():
    import json

    assert json.loads(json.dumps(kvf.capabilities())) == kvf.capabilities()
