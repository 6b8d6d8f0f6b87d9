"""A shard, one safetensors file: written and hashed in one pass, mapped into memory, compared with what was written.

The header follows from the tensors' names, dtypes and shapes, so the manifest's record of these says every byte of it;
the tensors' own bytes are hashed. Nothing of a file is left uncovered.
"""

import json
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from kvlock_fast.cache.manifest import DTYPES, DamagedCache, ShardRecord, TensorRecord
from kvlock_fast.files import refuse_special

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 4096
"""Bytes that the header is filled up to a multiple of, so that the data begin on a page."""

_NO_DIGEST = "0" * 32
_NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}


def shard_layout(tensors: ShardRecord) -> tuple[bytes, dict[str, int]]:
    """The header, and where in the file each tensor begins. Wide dtypes come first: so each is aligned to its own."""
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype][1], name))
    fields, end = {}, 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        fields[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + field["data_offsets"][0] for name, field in fields.items()}


def write_shard(path: Path, tensors: Mapping[str, "Tensor"], pool: ThreadPoolExecutor) -> ShardRecord:
    """Write tensors (any device, any strides) to a new file and wait until they are on the disk.

    Raises OSError, and ValueError for what the format cannot hold.
    """
    records = {name: _record(name, tensor) for name, tensor in tensors.items()}
    header, offsets = shard_layout(records)
    with path.open("xb") as file:
        file.write(header)
        for name in offsets:
            data = tensor_bytes(tensors[name])
            digest = pool.submit(xxhash.xxh3_128_hexdigest, data)
            file.write(data)
            records[name] = records[name].model_copy(update={"xxh3_128": digest.result()})
        file.flush()
        os.fsync(file.fileno())
    return records


def _record(name: str, tensor: "Tensor") -> TensorRecord:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _NAMES:
        raise ValueError(f"tensor '{name}' has the dtype {dtype}; a cache file holds {', '.join(_NAMES)}")
    if name == "__metadata__":
        raise ValueError("no tensor of a cache file can be named __metadata__")
    return TensorRecord(dtype=_NAMES[dtype], shape=list(tensor.shape), xxh3_128=_NO_DIGEST)


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """The tensor's bytes in its logical order, without a copy where it is contiguous on the CPU."""
    import torch

    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


class MappedShard:
    """A shard's file mapped into memory. It stays readable when others remove the file; writes to it change no file."""

    def __init__(self, path: Path, tensors: ShardRecord):
        """Map the file. Raises DamagedCache unless it has the length that was written; FileNotFoundError, OSError."""
        self.path, self._records = path, tensors
        self._header, self._offsets = shard_layout(tensors)
        expected = len(self._header) + sum(record.nbytes for record in tensors.values())
        refuse_special(path)
        with path.open("rb") as file:
            self.nbytes = os.fstat(file.fileno()).st_size
            if self.nbytes != expected:
                raise DamagedCache(path, f"it has {self.nbytes} bytes, {expected} were written")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def verify(self) -> None:
        """Raise DamagedCache unless every byte is as it was written."""
        data = memoryview(self._map)
        if data[: len(self._header)] != self._header:
            raise DamagedCache(self.path, "its header is not what was written")
        for name, begin in self._offsets.items():
            record = self._records[name]
            if xxhash.xxh3_128_hexdigest(data[begin : begin + record.nbytes]) != record.xxh3_128:
                raise DamagedCache(self.path, f"tensor '{name}' is not what was written")

    def tensors(self) -> dict[str, "Tensor"]:
        """Views of the mapping, which lives as long as one of them does."""
        import torch

        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        return {name: self._view(whole, name) for name in self._records}

    def _view(self, whole: "Tensor", name: str) -> "Tensor":
        import torch

        record, begin = self._records[name], self._offsets[name]
        dtype = getattr(torch, DTYPES[record.dtype][0])
        return whole[begin : begin + record.nbytes].view(dtype).view(record.shape)
