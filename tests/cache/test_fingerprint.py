"""A cache's identity follows the weights, however they were changed in place."""

import numpy as np
import pytest
import torch

from kvlock_fast.cache.fingerprint import fingerprint
from kvlock_fast.models import wrap_pipeline
from tests.support.tiny import tiny_wan


def _weight(pipe):
    return pipe.transformer.blocks[1].attn1.to_k.weight


def _fuse_lora(pipe):
    peft = pytest.importorskip("peft")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_k", "to_v"]))
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()


def _numpy(pipe):
    _weight(pipe).detach().numpy()[:] *= 1.01


def _dlpack(pipe):
    np.from_dlpack(_weight(pipe).detach()).__array__()
    torch.from_dlpack(_weight(pipe).detach()).mul_(1.01)


def _under_no_grad(pipe):
    with torch.no_grad():
        _weight(pipe).add_(1e-3)


def _loaded(pipe):
    state = {name: x * 1.001 for name, x in pipe.transformer.state_dict().items()}
    pipe.transformer.load_state_dict(state)


def _another_parameter(pipe):
    part = pipe.transformer.blocks[1].attn1.to_k
    part.weight = torch.nn.Parameter(part.weight.detach() * 1.01)


CHANGES = {
    "data, added to": lambda pipe: _weight(pipe).data.add_(1e-3),
    "data, replaced": lambda pipe: setattr(_weight(pipe), "data", _weight(pipe).data * 1.01),
    "data, a bias": lambda pipe: pipe.transformer.blocks[0].attn1.to_q.bias.data.zero_(),
    "data, a norm": lambda pipe: pipe.transformer.blocks[0].attn1.norm_k.weight.data.mul_(1.01),
    "numpy": _numpy,
    "dlpack": _dlpack,
    "under no_grad": _under_no_grad,
    "load_state_dict": _loaded,
    "another parameter": _another_parameter,
    "a lora, fused and unloaded": _fuse_lora,
    "text encoder": lambda pipe: next(iter(pipe.text_encoder.parameters())).data.mul_(1.01),
    "autoencoder": lambda pipe: next(iter(pipe.vae.parameters())).data.mul_(1.01),
    "dtype": lambda pipe: pipe.transformer.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_place_is_another_identity(change):
    pipe = tiny_wan()
    model = wrap_pipeline(pipe)
    before = fingerprint(model.modules)
    assert fingerprint(model.modules) == before
    change(pipe)
    assert fingerprint(wrap_pipeline(pipe).modules) != before


def test_the_same_weights_are_the_same_identity():
    one, two = (wrap_pipeline(tiny_wan()) for _ in range(2))
    assert fingerprint(one.modules) == fingerprint(two.modules)
    for part in two.transformers[0].parameters():
        part.data = part.data.clone()
    assert fingerprint(one.modules) == fingerprint(two.modules)


def test_weights_that_lie_otherwise_in_memory_are_not_copied():
    from kvlock_fast.cache.fingerprint import Weight, _bytes_of, _sampled

    x = torch.randn(8, 4, 6, 5).to(memory_format=torch.channels_last)
    assert _bytes_of(x).data_ptr() == x.data_ptr()
    before = _sampled([Weight("x", 0, lambda: x, x)])
    x.data.mul_(1.01)
    assert _sampled([Weight("x", 0, lambda: x, x)]) != before


def test_packed_weights_beside_plain_ones():
    """A subclass with ideas of its own about every function, as GGUF's weights have."""
    from kvlock_fast.cache.fingerprint import Weight, _sampled

    class Packed(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            raise KeyError("no quant type")

    packed = torch.zeros(300, dtype=torch.uint8).as_subclass(Packed)
    with torch._C.DisableTorchFunctionSubclass():
        weights = [Weight("a", 0, lambda: None, torch.ones(5)), Weight("b", 0, lambda: None, packed)]
    assert isinstance(_sampled(weights), str)


def test_what_was_hashed_is_not_hashed_again(monkeypatch):
    from kvlock_fast.cache import fingerprint as room

    model = wrap_pipeline(tiny_wan())
    before = fingerprint(model.modules)
    monkeypatch.setattr(room, "tensor_bytes", lambda tensor: pytest.fail("the whole weight is read again"))
    assert fingerprint(model.modules) == before


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (255,), (257,), (1000, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool], ids=str)
def test_any_weight_can_be_sampled(shape, dtype):
    from kvlock_fast.cache.fingerprint import Weight, _sampled

    x = torch.zeros(shape).to(dtype)
    before = _sampled([Weight("x", 0, lambda: x, x)])
    if x.numel():
        x.reshape(-1).view(torch.uint8).fill_(1)
        assert _sampled([Weight("x", 0, lambda: x, x)]) != before
    turned = x.T if x.ndim == 2 else x
    assert isinstance(_sampled([Weight("x", 0, lambda: turned, turned)]), str)
