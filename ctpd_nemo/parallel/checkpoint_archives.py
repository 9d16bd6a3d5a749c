"""What ``torch.save`` wrote, read by rules.

An archive is a zip of files that are not compressed: ``data.pkl``, a pickle, and the bytes of each storage that its
tensors are views of. The pickle is read by ``checkpoint_pickles``; a tensor is a plain one on the CPU, of no more bytes
than the archive has for it. ``torch.load`` with ``weights_only`` would do for well-meant files: it also makes tensors
of other classes, of sizes that the file does not hold, and whatever libraries have registered with it in this process,
as Megatron-Core does with ``argparse.Namespace``.
"""

import io
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.checkpoint_pickles import Call, Names, read_pickle, refusal, whole_numbers

_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_MOST = 2**48
_MOST_DIMS = 32
_DEEPEST = 64
# The directory of an archive has some 80 bytes for each storage.
_LARGEST_DIRECTORY = 2**20
_LARGEST_PICKLE = 2**26
_LOCAL_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True)
class Part:
    """A part of an open file.

    Attributes:
        file: Without a buffer.
        start: Where the part begins, in bytes.
        length: In bytes.
        place: For errors.
    """

    file: io.FileIO
    start: int
    length: int
    place: str

    def read(self, at: int, length: int) -> bytearray:
        """So many bytes from ``at`` on.

        Raises:
            InputError: The part, or the file by now, has fewer.
        """
        if not 0 <= at <= at + length <= self.length:
            raise refusal(self.place, f"{length:,} bytes at {at:,} of {self.length:,}")
        content = bytearray(length)
        unread = memoryview(content)
        self.file.seek(self.start + at)
        # The system reads 2 GB at once, at most.
        while unread and (count := self.file.readinto(unread)):
            unread = unread[count:]
        if unread:
            raise InputError(self.place, f"{len(unread):,} bytes too few", "a checkpoint that nobody changes meanwhile")
        return content


class _Directory(io.RawIOBase):
    """A part of a file as ``zipfile`` reads directories; it is given no more than any of them has."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._part.length}[whence]
        if at < 0:
            raise OSError("before the beginning")
        self._at = at
        return at

    def read(self, size: int = -1) -> bytes:
        left = max(self._part.length - self._at, 0)
        size = left if size < 0 else min(size, left)
        if size > _LARGEST_DIRECTORY:
            raise refusal(self._part.place, f"an archive with a directory of {size:,} bytes")
        content = bytes(self._part.read(self._at, size))
        self._at += size
        return content


@dataclass(frozen=True)
class Storage:
    """The bytes that tensors are views of.

    Attributes:
        dtype: Of its elements; uint8 where it has none of its own.
        bytes: How many there are.
        read: Reads so many from a byte on.
    """

    dtype: torch.dtype
    bytes: int
    read: Callable[[int, int], bytearray]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor whose bytes are not read yet; they are there.

    Attributes:
        dtype: Of its elements.
        shape: Its shape.
        stride: In elements, as torch has it.
        offset: The first element of the storage that it holds.
        storage: Holds it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: Storage

    @property
    def reach(self) -> int:
        """Elements of the storage from its first to its last, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    def read(self) -> Tensor:
        """A tensor of its own, on the CPU."""
        if not self.reach:
            return torch.empty(self.shape, dtype=self.dtype)
        size = self.dtype.itemsize
        content = self.storage.read(self.offset * size, self.reach * size)
        elements = torch.frombuffer(content, dtype=self.dtype)
        return elements.as_strided(self.shape, self.stride).contiguous()


def _rebuild(arguments: tuple[Any, ...], dtype: torch.dtype | None = None) -> StoredTensor:
    """``torch._utils._rebuild_tensor_v2``, as a description of the tensor."""
    storage, offset, shape, stride, requires_grad, hooks = arguments
    if type(storage) is not Storage or type(requires_grad) is not bool or hooks != {}:
        raise ValueError("a tensor made of something else")
    dtype = dtype or storage.dtype
    whole_numbers((offset,), _MOST)
    tensor = StoredTensor(dtype, whole_numbers(shape, _MOST), whole_numbers(stride, _MOST), offset, storage)
    if len(shape) > _MOST_DIMS or len(shape) != len(stride):
        raise ValueError("a tensor of so many dimensions")
    # A stride of 0 would make many elements of one.
    if math.prod(shape) > tensor.reach or (offset + tensor.reach) * dtype.itemsize > storage.bytes:
        raise ValueError(f"a tensor of shape {shape[:8]}, of which there are {storage.bytes:,} bytes")
    return tensor


def _rebuild_of_bytes(arguments: tuple[Any, ...]) -> StoredTensor:
    """``torch._utils._rebuild_tensor_v3``: the dtypes that came after storages had types."""
    *others, dtype = arguments
    if type(dtype) is not torch.dtype:
        raise ValueError("a tensor without a dtype")
    return _rebuild(tuple(others), dtype)


def _size(arguments: tuple[Any, ...]) -> torch.Size:
    (sizes,) = arguments
    return torch.Size(whole_numbers(sizes, _MOST))


def _empty_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise ValueError("a dict of something else")
    return {}


@dataclass(frozen=True)
class StorageKind:
    """The class of a storage, by its dtype."""

    dtype: torch.dtype


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What dicts of torch's own modules are; a plain one holds the same, and takes no attributes.
TENSOR_NAMES: Names = {
    **{("torch", name.removeprefix("torch.")): dtype for name, dtype in _DTYPES.items()},
    **{("torch", name): StorageKind(dtype) for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): StorageKind(torch.uint8),
    ("torch", "Size"): Call(_size),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_rebuild),
    ("torch._utils", "_rebuild_tensor_v3"): Call(_rebuild_of_bytes),
    ("collections", "OrderedDict"): Call(_empty_dict),
}


def read_archive(part: Part) -> Any:
    """What an archive holds, tensors as ``StoredTensor``.

    Raises:
        InputError: It is no archive of ``torch.save``, or asks for more than tensors, numbers, text and what holds
            them.
    """
    if bytes(part.read(0, min(4, part.length))) != _LOCAL_MAGIC:
        raise refusal(part.place, "no archive of torch.save")
    try:
        members = _members(part)
        (pickled,) = (name for name in members if name.endswith("/data.pkl"))
        prefix = pickled.removesuffix("data.pkl")
        if (order := members.get(f"{prefix}byteorder")) and bytes(part.read(*order)) != b"little":
            raise refusal(part.place, "an archive of another byte order than little")
    except InputError:
        raise
    except (zipfile.BadZipFile, ValueError, LookupError, struct.error, OSError, NotImplementedError) as error:
        raise refusal(part.place, f"an archive that cannot be read ({error})") from error
    at, length = members[pickled]
    if length > _LARGEST_PICKLE:
        raise refusal(part.place, f"an archive with a pickle of {length:,} bytes")

    def storage(identity: tuple[Any, ...]) -> Storage:
        kind, storage_kind, key, _, elements = identity
        if kind != "storage" or type(storage_kind) is not StorageKind or type(key) is not str:
            raise ValueError("what is no storage")
        start, size = members[f"{prefix}data/{key}"]
        (count,) = whole_numbers((elements,), _MOST)
        if count * storage_kind.dtype.itemsize > size:
            raise ValueError(f"{count:,} elements in {size:,} bytes")
        return Storage(storage_kind.dtype, size, lambda first, bytes_: part.read(start + first, bytes_))

    return read_pickle(bytes(part.read(at, length)), part.place, TENSOR_NAMES, Call(storage))


def _members(part: Part) -> dict[str, tuple[int, int]]:
    """Where the files of an archive are in it, and their lengths, by name."""
    members: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(_Directory(part)) as archive:  # type: ignore[arg-type]
        for member in archive.infolist():
            if member.filename in members or member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise refusal(part.place, "an archive with a file that is there twice, compressed or encrypted")
            header = _LOCAL_HEADER.unpack(part.read(member.header_offset, _LOCAL_HEADER.size))
            at = member.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
            if header[0] != _LOCAL_MAGIC or at + member.file_size > part.length:
                raise refusal(part.place, "an archive that names what it does not hold")
            members[member.filename] = at, member.file_size
    return members


def read_object(part: Part) -> Any:
    """What an archive holds: tensors, numbers, text, and the lists, tuples and dicts that hold them, each its own.

    Raises:
        InputError: It is no archive of ``torch.save``, or holds anything else.
    """
    value, left = read_archive(part), [part.length]

    def copy(found: Any, depth: int) -> Any:
        left[0] -= 1
        if depth > _DEEPEST or left[0] < 0:
            raise refusal(part.place, "an object that holds more than was written")
        if type(found) in (list, tuple):
            return type(found)(copy(item, depth + 1) for item in found)
        if type(found) is dict:
            return {key: copy(item, depth + 1) for key, item in found.items()}
        if type(found) is StoredTensor:
            left[0] -= found.reach * found.dtype.itemsize
            return found.read() if left[0] >= 0 else copy(None, depth)
        if type(found) in (bool, int, float, str, bytes, type(None), torch.dtype, torch.Size):
            return found
        raise refusal(part.place, f"an object that holds a {type(found).__name__}")

    return copy(value, 0)
