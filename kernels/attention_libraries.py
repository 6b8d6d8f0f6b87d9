"""Attention by other libraries, behind the same layout as ours: cuDNN and flash-attn, for those who have them.

Each takes q [B, Sq, H, D] and k, v [B, S, H, D] and returns [B, Sq, H, D] in q's dtype. torch's own choice of an SDPA
backend is not cuDNN on Hopper, so that one is asked for by name.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvlock_fast.kernels.language import require_package_name

require_package_name(__name__)

HALVES = (torch.float16, torch.bfloat16)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """torch's scaled_dot_product_attention, with the backend torch picks."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v, scale)


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The newest flash-attn that is installed: 4 (CuTe), 3 (Hopper) or 2."""
    newest = next(filter(_has, ("flash_attn.cute", "flash_attn_interface")), "flash_attn")
    out = import_module(newest).flash_attn_func(q, k, v, softmax_scale=scale)
    return out[0] if isinstance(out, tuple) else out


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def available(name: str, q: Tensor) -> str | None:
    """None where backend `name` can serve q, else the reason why not."""
    if name == "sdpa":
        return None
    if not q.is_cuda:
        return f"it needs CUDA tensors, got one on {q.device}"
    if q.dtype not in HALVES:
        return f"it takes float16 and bfloat16, got {q.dtype}"
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "torch was built without cuDNN"
    if name == "flash" and not any(map(_has, ("flash_attn", "flash_attn_interface"))):
        return "flash-attn is not installed"
    if name == "cudnn" and (q.shape[3] % 8 or q.shape[3] > 128):
        return f"it takes head dims up to 128 that are multiples of 8, got {q.shape[3]}"
    return None


BACKENDS = {"sdpa": sdpa, "cudnn": cudnn, "flash": flash}
