"""torch.compile of blocks whose locked attention goes by the fast path: the same edit, one graph for all locks."""

import pytest
import torch
from torch._dynamo.utils import counters

import kvlock_fast as kvf
from kvlock_fast.config import CacheConfig
from tests.pipeline.test_pipeline import a_mask, a_video
from tests.support.conformance import all_cases
from tests.support.locks import paper
from tests.support.tiny import tiny_wan


@pytest.fixture
def graphs(monkeypatch):
    """Compiles without a C++ compiler; how many graphs have been made."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="aot_eager", fullgraph=True))
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


def test_compiled_blocks_take_one_graph_for_all_locks(graphs):
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan(num_layers=12))

    def edit(wish, compile, **changes):
        return pipe(
            a_video(), a_mask(), source_prompt="a cat", prompt="a dog", num_inference_steps=2, output="latent",
            generator=torch.Generator().manual_seed(0), compile=compile, processors=wish, **changes,
        ).latents  # fmt: skip

    for lock in (
        paper(),
        paper(alpha=0.3),
        paper(tau=0.5),
    ):
        compiled = edit("fast", "regional", lock=lock)
        torch.testing.assert_close(compiled, edit("generic", "off", lock=lock), rtol=1e-5, atol=1e-5)
    assert graphs() == 1, "of a locked block"
    cache = CacheConfig(tier="resident", format="int8")
    compiled = edit("fast", "regional", cache=cache)
    torch.testing.assert_close(compiled, edit("generic", "off", cache=cache), rtol=1e-4, atol=1e-4)
    assert graphs() <= 3, "the source alone, both branches, and any other number of rows"
    edit("generic", "regional")
    edit("fast", "regional", lock=paper(layers=(0, 5)))
    assert graphs() <= 6, "diffusers' own attention is another block"


CASES = {case.name: case for case in all_cases() if case.name in ("ltx", "hunyuan-video", "cogvideox-5b")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiled_blocks_of_every_family(graphs, case):
    pipe = case.make()
    compiled = case.edit(pipe, processors="fast", compile="regional", steps=2).latents
    before = graphs()
    torch.testing.assert_close(compiled, case.edit(pipe, processors="generic", steps=2).latents, rtol=1e-3, atol=1e-3)
    case.edit(pipe, processors="fast", compile="regional", steps=2, lock=paper(alpha=0.3))
    assert 0 < before == graphs()
