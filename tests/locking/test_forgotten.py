"""A lock that is forgotten is freed with what it keeps; copies and pickles of a locked model are the plain model."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import kvlock_fast as kvf
from kvlock_fast.errors import InputError
from kvlock_fast.locking.lock import Mode, TransformerLock
from kvlock_fast.locking.registry import LOCKED
from kvlock_fast.models import wrap_pipeline
from tests.support.tiny import tiny_wan

pytestmark = pytest.mark.numeric


@pytest.fixture
def scene():
    """A tiny transformer, its forward as a function, and a foreground of its 24 tokens."""
    pipe = tiny_wan()
    transformer = pipe.transformer
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, transformer.config.in_channels, 1, 8, 12, generator=generator)
    text = torch.randn(1, 4, transformer.config.text_dim, generator=generator)

    def forward(model=transformer, x=latents):
        with torch.no_grad():
            return model(x, torch.tensor([500.0]), text, return_dict=False)[0]

    foreground = torch.zeros(1, 24, dtype=torch.bool)
    foreground[:, :6] = True
    return transformer, forward, foreground


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_a_forgotten_lock_is_freed_with_its_keys_and_values(scene):
    transformer, forward, foreground = scene
    plain, before, others = kinds(transformer), forward(), len(LOCKED)
    lock = kvf.attach(transformer, foreground, lock=kvf.LockConfig(alpha=0.5), num_steps=4)
    lock.__enter__()
    with lock.source():
        forward()
    kept = [weakref.ref(x) for layers in lock._kept[None] for x in layers.values()]
    assert kept and all(ref() is not None for ref in kept) and len(LOCKED) > others
    del lock
    gc.collect()
    assert all(ref() is None for ref in kept)
    assert kinds(transformer) == plain and len(LOCKED) == others
    assert torch.equal(forward(), before)
    with kvf.attach(transformer, foreground, lock=kvf.LockConfig(alpha=0.5), num_steps=4):
        pass


def test_a_forgotten_lock_is_no_lock_for_the_next(scene):
    """Also where it waits in a circle for the collector."""
    transformer, _, foreground = scene
    gc.disable()
    try:
        lock = kvf.attach(transformer, foreground, lock=kvf.LockConfig(alpha=0.5), num_steps=4).__enter__()
        lock.itself = lock
        del lock
        with kvf.attach(transformer, foreground, lock=kvf.LockConfig(alpha=0.5), num_steps=4):
            pass
    finally:
        gc.enable()


def test_a_lock_that_is_held_still_refuses_another(scene):
    transformer, _, foreground = scene
    with (
        kvf.attach(transformer, foreground, lock=kvf.LockConfig(alpha=0.5), num_steps=4),
        pytest.raises(InputError, match="locked already"),
        kvf.attach(transformer, foreground, lock=kvf.LockConfig(alpha=0.5), num_steps=4),
    ):
        pass


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_locked_model_is_the_plain_model(scene, duplicate):
    transformer, forward, foreground = scene
    plain, before, names = kinds(transformer), forward(), set(transformer.state_dict())
    with kvf.attach(transformer, foreground, lock=kvf.LockConfig(alpha=0.5), num_steps=4) as lock:
        with lock.source():
            forward()
        twin = duplicate(transformer)
        assert kinds(twin) == plain and set(twin.state_dict()) == names
        assert not any(hasattr(module, "kvlock_number") for module in twin.modules())
        with lock.edit():  # a forward of the copy is no forward of the locked one
            assert torch.equal(forward(twin), before)
            forward()
    assert torch.equal(forward(twin), before) and torch.equal(forward(), before)


def test_a_copy_in_the_middle_of_a_forward_is_refused(scene):
    transformer, forward, foreground = scene
    with kvf.attach(transformer, foreground, lock=kvf.LockConfig(alpha=0.5), num_steps=4) as lock, lock.source():
        with pytest.raises(RuntimeError, match="cannot be copied in the middle of a forward"):
            copy.deepcopy(transformer)
        forward()


def test_a_copy_can_be_locked_itself(scene):
    transformer, forward, foreground = scene
    lock = kvf.LockConfig(alpha=0.5)
    with kvf.attach(transformer, foreground, lock=lock, num_steps=4) as first:
        twin = copy.deepcopy(transformer)
        with kvf.attach(twin, foreground, lock=lock, num_steps=4) as second:
            for one, model in ((first, transformer), (second, twin)):
                with one.source():
                    forward(model)
    assert kinds(twin) == kinds(transformer)


def test_detaching_twice_is_nothing(scene):
    transformer, forward, _ = scene
    before = forward()
    model = wrap_pipeline(tiny_wan())
    lock = TransformerLock(transformer, model.arch)
    with lock.forward(Mode.CAPTURE, tokens=24):
        forward()
    lock.detach()
    lock.detach()
    assert torch.equal(forward(), before)
