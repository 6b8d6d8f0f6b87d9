"""Models that are shown the source, in the loop: nothing asks the device, and captured steps see each call's own."""

import numpy as np
import pytest
import torch

import kvlock_fast as kvf
from kvlock_fast import pipeline
from kvlock_fast.config import LockConfig
from tests.families.cases.kandinsky5 import CASES as KANDINSKY
from tests.families.cases.wan_kin import CASES as KIN
from tests.loop.test_graph import captured
from tests.loop.test_sync_free import guarded
from tests.support.conformance import NEGATIVE, PROMPT, SOURCE

__all__ = ["captured", "guarded"]
CASES = {case.name: case for case in (*KIN, *KANDINSKY)}
NAMES = ["wan-i2v-2.1", "wan-i2v-2.2", "wan-i2v-2.2-5b", "wan-vace", "lucy-edit", "kandinsky-5"]


def edit(case, pipe, video, prompt=PROMPT):
    return pipe(
        video, case.mask(), source_prompt=SOURCE, prompt=prompt, negative_prompt=NEGATIVE, num_inference_steps=4,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(3), output="latent",
        lock=LockConfig.preset("kvlock", kappa=3, guidance_skip=False),  # which the host would wait for
    ).latents  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_captured_steps_see_the_video_of_their_own_call(monkeypatch, captured, name):
    case = CASES[name]
    pipe = kvf.KVLockPipeline.from_pipe(case.make())
    one = case.video()
    other = np.ascontiguousarray(255 - one[:, ::-1])
    first = edit(case, pipe, one)
    count = captured.captures
    second = edit(case, pipe, other, PROMPT.replace("blue", "red"))
    assert captured.captures == count > 0 and captured.replays
    monkeypatch.setattr(pipeline, "choose_capture", lambda *_: None)
    assert torch.equal(first, edit(case, pipe, one))
    assert torch.equal(second, edit(case, pipe, other, PROMPT.replace("blue", "red")))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_asks_the_device_for_nothing(guarded, name):
    case = CASES[name]
    edit(case, kvf.KVLockPipeline.from_pipe(case.make()), case.video())
    assert guarded
