"""Manifests of cache entries: what an entry is of, which files it has, and what was written to them.

It is JSON in one canonical form with a checksum over itself, so that no bit of it can change unseen, and it takes its
place by a rename: the entry is what its manifest says.
"""

import json
import re
from math import prod
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvlock_fast.errors import InputError, os_errors
from kvlock_fast.files import refuse_special

NAME = "manifest.json"
SCHEMA = 1
MOST_BYTES = 64 * 2**20
"""The most bytes of a manifest: about a hundred times what 50 steps of a large model take."""

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Safetensors' name of a dtype: torch's name, and bytes an element."""

SHARD_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}")


class MissingCache(InputError):
    """A folder without a cache entry."""

    def __init__(self, folder: Path):
        super().__init__(f"no cache in '{folder}': it has no {NAME}")


class DamagedCache(InputError):
    """A cache entry that is not what was written. manifest: the digest of the manifest it was opened by, if any."""

    def __init__(self, path: Path, what: str, manifest: str | None = None):
        super().__init__(f"cache file '{path}' is damaged: {what}")
        self.manifest = manifest


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TensorRecord(_Record):
    """A tensor as it was written."""

    dtype: Annotated[str, Field(pattern=rf"\A({'|'.join(DTYPES)})\z")]
    shape: list[Annotated[int, Field(ge=0)]]
    xxh3_128: Annotated[str, Field(pattern=r"\A[0-9a-f]{32}\z")]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype][1]


ShardRecord = dict[str, TensorRecord]
"""The tensors of a shard by name."""


class Manifest(_Record):
    """An entry's description. meta: whatever the writer says of it; data: the folder with the shards' files."""

    meta: dict[str, Any]
    data: Annotated[str, Field(pattern=r"\Adata-[0-9a-f.]+-[0-9a-f]+\z")]
    shards: dict[Annotated[str, Field(pattern=rf"\A{SHARD_NAME.pattern}\z")], ShardRecord]

    def serialise(self) -> bytes:
        """Return the file's bytes. Raises ValueError if meta is not JSON or the whole is too long."""
        content = {"schema": SCHEMA, **self.model_dump()}
        data = _canonical({**content, "checksum": digest_of(_canonical(content))})
        if len(data) > MOST_BYTES:
            raise ValueError(f"the manifest would take {len(data)} bytes, more than {MOST_BYTES}")
        return data


def read_bytes(folder: Path) -> bytes:
    """The manifest's bytes, not one more than `MOST_BYTES` + 1. Raises FileNotFoundError and other OSErrors."""
    refuse_special(folder / NAME)
    with (folder / NAME).open("rb") as file:
        return file.read(MOST_BYTES + 1)


def read(folder: Path) -> tuple[Manifest, str]:
    """The manifest and its digest. Raises MissingCache, DamagedCache, or InputError if it cannot be read."""
    path = folder / NAME
    with os_errors(f"cannot read '{path}'", InputError):
        try:
            data = read_bytes(folder)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingCache(folder) from None
    digest = digest_of(data)
    try:
        return _parse(data), digest
    except _Fault as fault:
        raise DamagedCache(path, str(fault), digest) from None


def digest_of(data: bytes) -> str:
    """xxh3-128 of a manifest's bytes, as hex: no two have the same, as each names a data folder of its own."""
    return xxhash.xxh3_128_hexdigest(data)


class _Fault(Exception):
    """A fault of a manifest, in words."""


def _parse(data: bytes) -> Manifest:
    if len(data) > MOST_BYTES:
        raise _Fault(f"it is longer than {MOST_BYTES} bytes")
    try:
        content = json.loads(data)
        checksum = content.pop("checksum")
        intact = _canonical({**content, "checksum": checksum}) == data and checksum == digest_of(_canonical(content))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise _Fault("its checksum does not fit")
    if content.pop("schema", None) != SCHEMA:
        raise _Fault(f"it is not of schema {SCHEMA}, the one this version reads")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise _Fault(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
