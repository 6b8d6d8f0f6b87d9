"""What a transformer is told: samples go in and out of a batch whole, texts of any lengths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlock_fast.conditioning import Conditioning
from kvlock_fast.errors import InputError
from kvlock_fast.models.registry import PIPELINES, REGISTRY, family_of_transformer


def told(rows, length, seed, masked=True):
    generator = torch.Generator().manual_seed(seed)
    text, pooled = torch.randn(rows, length, 3, generator=generator), torch.randn(rows, 5, generator=generator)
    mask = {"mask": torch.ones(rows, length, dtype=torch.bool)} if masked else {}
    return Conditioning(text=text, pooled=pooled, **mask)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=4), st.integers(0, 10**6))
def test_parts_of_a_batch_are_what_went_in(sizes, seed):
    parts = [told(rows, length, seed + i) for i, (rows, length) in enumerate(sizes)]
    whole, first = Conditioning.cat(parts), 0
    assert whole.rows == sum(part.rows for part in parts) and set(whole) == {"text", "pooled", "mask"}
    for part in parts:
        mine, first = whole.part(first, first + part.rows), first + part.rows
        length = part["text"].shape[1]
        assert torch.equal(mine["text"][:, :length], part["text"]) and torch.equal(mine["pooled"], part["pooled"])
        assert mine["mask"][:, :length].all() and not mine["mask"][:, length:].any()
        assert not mine["text"][:, length:].any() and mine["mask"].dtype == torch.bool


def test_a_sample_for_several_is_no_copy():
    one = told(1, 4, 0)
    several = one.expand(3)
    assert several.rows == 3 and several["text"].data_ptr() == one["text"].data_ptr()
    assert torch.equal(several["pooled"][2], one["pooled"][0])
    other = one.replace(pooled=torch.zeros(1, 2))
    assert other["pooled"].shape == (1, 2) and other["text"] is one["text"]


def test_what_no_forward_could_take_is_refused():
    with pytest.raises(InputError, match=r"the prompts have \[2, 3\] tokens: give one prompt at a time"):
        Conditioning.cat([told(1, 2, 0, masked=False), told(1, 3, 0, masked=False)])
    assert Conditioning.cat([told(1, 2, 0, masked=False), told(1, 2, 1, masked=False)]).rows == 2
    with pytest.raises(ValueError, match=r"one number of samples, got \[1, 2\]"):
        Conditioning(text=torch.zeros(1, 2), pooled=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"one number of samples, got \[\]"):
        Conditioning()


def test_the_registry_names_what_there_is():
    import diffusers

    assert len(set(PIPELINES)) == len(PIPELINES)
    for family in REGISTRY:
        assert all(hasattr(diffusers, name) for name in (*family.pipelines, *family.transformers)), family.name
        model = family.load()
        assert model.arch.family == family.name and set(model.arch.transformers) <= set(family.transformers)
        assert family_of_transformer(family.transformers[0]) is not None
