"""torch.compile of the transformer's blocks: the same edit, and one graph for all blocks, locks, modes and alphas."""

import pytest
import torch
from torch._dynamo.utils import counters

import kvlock_fast as kvf
from kvlock_fast.config import CacheConfig
from kvlock_fast.locking.compatibility import compiled_blocks
from tests.pipeline.test_pipeline import a_mask, a_video, call
from tests.support.locks import paper
from tests.support.tiny import tiny_cogvideox, tiny_wan, untouched


@pytest.fixture
def graphs(monkeypatch):
    """Compiles without a C++ compiler; how many graphs have been made."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend="aot_eager", fullgraph=True))
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


def edit(pipe, compile="regional", steps=4, prompt="a dog", **changes):
    return pipe(
        a_video(), a_mask(), source_prompt="a cat", prompt=prompt, num_inference_steps=steps, compile=compile,
        generator=torch.Generator().manual_seed(3), output="latent", **changes,
    ).latents  # fmt: skip


def test_every_edit_is_the_same_and_takes_one_graph(graphs, tmp_path):
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan(num_layers=12))  # more than torch compiles anew before it gives up
    eager = edit(pipe, "off")
    torch.testing.assert_close(edit(pipe), eager, rtol=1e-5, atol=1e-5)
    assert graphs() == 1, "of a locked block"
    for lock in (
        paper(alpha=0.3),
        paper(tau=0.5),
        paper(tau="auto"),
        paper(layers=tuple(range(12))),
    ):
        torch.testing.assert_close(edit(pipe, lock=lock), edit(pipe, "off", lock=lock), rtol=1e-5, atol=1e-5)
    assert graphs() == 1, "whatever the lock"
    assert untouched(pipe.pipe.transformer)
    assert all(block._compiled_call_impl is None for block in pipe.pipe.transformer.blocks)


def test_a_stored_source_takes_a_graph_for_each_batch_size(graphs, tmp_path):
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan(num_layers=12))
    for format in ("native", "int8"):
        cache = CacheConfig(tier="host", format=format)
        torch.testing.assert_close(edit(pipe, cache=cache), edit(pipe, "off", cache=cache), rtol=1e-4, atol=1e-4)
    assert graphs() <= 3, "the source alone, both branches, and any other number of rows"
    edit(pipe, cache=CacheConfig(tier="resident"), prompt=["a dog", "a cat", "a circle"])
    edit(pipe, cache=CacheConfig(tier="resident"), prompt=["a dog", "a cat"])
    assert graphs() <= 3


def test_blocks_without_a_lock_are_other_blocks(graphs):
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan(num_layers=12))
    cfg = kvf.LockConfig.preset("cfg")
    torch.testing.assert_close(edit(pipe, lock=cfg), edit(pipe, "off", lock=cfg), rtol=1e-5, atol=1e-5)
    edit(pipe, lock=paper(layers=(0, 5)))
    assert graphs() <= 3


@pytest.mark.parametrize("kind", ["2b", "1.5"])
def test_text_in_self_attention(graphs, kind):
    pipe = kvf.KVLockPipeline.from_pipe(tiny_cogvideox(kind, num_layers=12))
    every = kvf.LockConfig(guidance_skip=False)  # a step without its other branch has a graph of its own
    for lock in (every, paper(alpha=0.3)):
        torch.testing.assert_close(edit(pipe, lock=lock), edit(pipe, "off", lock=lock), rtol=1e-5, atol=1e-5)
    assert graphs() == 2, "of the first block, whose inputs are slices of one tensor, and of all others"
    cache = {"cache": CacheConfig(tier="resident"), "lock": every}
    torch.testing.assert_close(edit(pipe, **cache), edit(pipe, "off", **cache), rtol=1e-4, atol=1e-4)
    edit(pipe, **cache, prompt=["a dog", "a cat", "a circle"])
    edit(pipe, **cache, prompt=["a dog", "a cat"])
    assert graphs() <= 6, "those of the source alone, of both branches, and of any other number of rows"
    assert untouched(pipe.pipe.transformer)


def test_with_two_transformers(graphs):
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan(second=True))
    torch.testing.assert_close(edit(pipe), edit(pipe, "off"), rtol=1e-5, atol=1e-5)
    assert graphs() == 1


def test_what_the_user_compiled_stays_compiled(graphs):
    pipe = tiny_wan()
    for block in pipe.transformer.blocks[:2]:
        block.compile()
    before = [block._compiled_call_impl for block in pipe.transformer.blocks]
    with compiled_blocks([pipe.transformer], "regional"):
        now = [block._compiled_call_impl for block in pipe.transformer.blocks]
        assert now[:2] == before[:2] and now[2] is not None
    assert [block._compiled_call_impl for block in pipe.transformer.blocks] == before


def test_what_cannot_be_compiled_is_said(monkeypatch):
    pipe = tiny_wan()
    with pytest.raises(kvf.InputError, match="compile must be one of off, regional, got True"):
        call(pipe, compile=True)
    monkeypatch.setattr(type(pipe.transformer), "_repeated_blocks", None)
    with pytest.raises(kvf.InputError, match="WanTransformer3DModel does not say which of its blocks are alike"):
        call(pipe, compile="regional")

    def fail(*_, **__):
        raise torch._dynamo.exc.Unsupported("no compiler here")

    monkeypatch.undo()
    monkeypatch.setattr(type(pipe.transformer), "forward", fail)
    with pytest.raises(kvf.InputError, match="blocks cannot be compiled: no compiler here"):
        call(pipe, compile="regional")


@pytest.mark.large
def test_by_inductor():
    pipe = kvf.KVLockPipeline.from_pipe(tiny_wan(num_layers=12))
    torch.testing.assert_close(edit(pipe), edit(pipe, "off"), rtol=1e-4, atol=1e-4)
    cache = CacheConfig(tier="resident")
    torch.testing.assert_close(edit(pipe, cache=cache), edit(pipe, "off", cache=cache), rtol=1e-4, atol=1e-4)
