"""Context parallelism: two processes, each with half of the tokens, edit as one process does."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvlock_fast.locking.parallel import Shard
from tests.support.parallel_worker import KINDS, REFUSED, edit, ltx, own_loop

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes has made: tensors, and all that is not a tensor."""
    folder = tmp_path_factory.mktemp("parallel")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.support.parallel_worker"]
    workers = [
        subprocess.Popen([*command, str(rank), "2", str(folder / "store"), str(folder)], env=environment,
                         stdout=subprocess.DEVNULL, stderr=(folder / f"{rank}.err").open("w"))
        for rank in range(2)
    ]  # fmt: skip
    try:
        while any(worker.poll() is None for worker in workers) and not any(worker.poll() for worker in workers):
            time.sleep(0.1)  # one that has failed leaves the other waiting for it
        failed = [worker.poll() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    errors = "\n".join((folder / f"{rank}.err").read_text()[-3000:] for rank in range(2))
    assert failed == [0, 0], errors
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in range(2)
    ]


EDITED = [(kind, name) for kind, (_, names) in KINDS.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), EDITED, ids=[f"{kind}: {name}" for kind, name in EDITED])
def test_two_processes_edit_as_one(monkeypatch, ranks, kind, name):
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled(self, backend="eager"))
    latents, trace = edit(name, odd="odd" in kind)
    (first, said), (second, said_too) = ranks
    case = f"{kind}: {name}"
    assert torch.equal(first[case], second[case])
    torch.testing.assert_close(first[case], latents, rtol=1e-5, atol=1e-5)
    assert said[case] == said_too[case]
    for ours, alone in zip(said[case], trace, strict=True):
        assert {**ours, "variance": ours["variance"] or 0} == pytest.approx(
            {**alone, "variance": alone["variance"] or 0}, rel=1e-4
        )


def test_the_edits_differ_from_unlocked_ones(ranks):
    """So that the comparisons above cannot pass by a lock that does nothing."""
    first, _ = ranks[0]
    for kind, name in EDITED:
        if name == "lockstep" and "odd" not in kind:
            assert not torch.allclose(first[f"{kind}: {name}"], first["ulysses: unlocked"], atol=1e-2)


@pytest.mark.parametrize("masked", [False, True], ids=["split text", "whole text with a mask"])
@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_ltx_predicts_as_in_one_process(ranks, kind, masked):
    alone = ltx(masked=masked)
    for rank, _ in ranks:
        for mode, prediction in alone.items():
            torch.testing.assert_close(rank[f"{kind}: ltx {masked} {mode}"], prediction, rtol=1e-5, atol=1e-5)
    for locked in ("stored", "in batch"):
        assert not torch.allclose(alone[locked][-2:], alone["off"][1:], atol=1e-3)


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_a_loop_of_ones_own_predicts_as_in_one_process(ranks, kind):
    alone = own_loop()
    for rank, _ in ranks:
        torch.testing.assert_close(rank[f"{kind}: own loop"], alone, rtol=1e-5, atol=1e-5)


SENTENCES = {
    "foreground": "compute 'foreground' does not go with context parallelism",
    "disk": "cache tier 'disk' does not go with context parallelism",
    "path": "cache path 'nowhere' does not go with context parallelism",
    "unseeded": "context parallelism needs the same noise in every process",
    "graph": "graph is 'on', but the steps cannot be captured",
    "tokens": r"the video has 27 tokens (3x3x3), which 2 processes cannot share",
    "stretches": r"the video has 27 tokens (3x3x3), which 2 processes cannot share",
    "heads": "the transformer's 3 heads cannot be shared by ulysses_degree 2",
    "fast processors": "processors is 'fast', but blocks.0.attn1 shares its tokens with other processes",
    "one of two": "one of the model's transformers runs in context parallelism and the other does not",
    "text mask": "context parallelism splits the text's mask, which diffusers' attention cannot follow",
    "invert": "cache tier 'disk' does not go with context parallelism",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_processes_cannot_share_is_refused(ranks, name):
    for _, said in ranks:
        assert said[f"refused: {name}"].startswith(SENTENCES[name]), said[f"refused: {name}"]


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("tokens", "count"), [(18, 2), (27, 3), (7, 2), (11, 4), (5, 5)])
def test_parts_lie_as_diffusers_has_them(tokens, count, uneven):
    if not uneven and tokens % count:
        assert not Shard(0, count).divides(tokens)
        return
    everything, indices = torch.arange(tokens), torch.arange(0, tokens, 2)
    parts = everything.tensor_split(count) if uneven else everything.chunk(count)
    for rank, part in enumerate(parts):
        shard = Shard(rank, count, uneven)
        assert shard.divides(tokens)
        assert torch.equal(torch.arange(*shard.bounds(tokens)), part)
        own = shard.indices(indices, tokens)
        assert torch.equal(part[own], torch.tensor([i for i in part.tolist() if i % 2 == 0], dtype=torch.int64))
