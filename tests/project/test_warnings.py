"""A warning names the caller's line: the first frame outside the package, however deep it was found."""

import ast
import warnings
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kvlock_fast as kvf
from kvlock_fast.errors import InputWarning
from kvlock_fast.media import write_video
from kvlock_fast.planning.command import PlanSettings, make_plan
from tests.pipeline.test_pipeline import a_mask, a_video
from tests.project.rooms import modules
from tests.support.tiny import tiny_wan


def test_one_helper_warns():
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            imported = isinstance(node, ast.ImportFrom) and node.module == "warnings"
            if called.startswith("warnings.warn") or (imported and any("warn" in name.name for name in node.names)):
                assert module == "kvlock_fast.errors", module


def _pipe_call():
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    arguments = dict(source_prompt="a", prompt="b", num_inference_steps=1, output="latent")
    return lambda: pipe(a_video(6), a_mask(6), **arguments)


def _sized_call():
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan())
    arguments = dict(source_prompt="a", prompt="b", num_inference_steps=1, output="latent", height=35, width=50)
    return lambda: pipe(a_video(), a_mask(), **arguments)


def _attach():
    transformer = tiny_wan().transformer
    foreground = torch.ones(1, 24, dtype=torch.bool)

    def attach():
        with kvf.attach(transformer, foreground, num_steps=2):
            pass

    return attach


def _plan():
    return lambda: make_plan(PlanSettings("wan-1.3b", size=(481, 833)))


CALLS = {"frames": _pipe_call, "size": _sized_call, "attach": _attach, "plan": _plan}


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
def test_a_warning_names_this_file(make):
    call = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    ours = [warning for warning in caught if issubclass(warning.category, InputWarning)]
    assert ours and {warning.filename for warning in ours} == {__file__}


def test_sound_that_a_file_cannot_hold(tmp_path):
    audio = SimpleNamespace(path="clip.mp4")  # a GIF leaves any sound out before it looks at it
    with pytest.warns(InputWarning) as caught:
        write_video(tmp_path / "a.gif", np.zeros((2, 16, 16, 3), np.uint8), Fraction(8), audio=audio)
    assert {warning.filename for warning in caught} == {__file__}
