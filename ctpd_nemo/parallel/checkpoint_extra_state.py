"""What Transformer Engine keeps of its FP8 scales in checkpoints: a pickle, as the bytes of a tensor.

That library (2.10 and 2.11; ``TransformerEngineBaseModule.set_extra_state``) loads these bytes by plain ``pickle``. So
they are read by rules here, and what it is given is another pickle, made here of what was read.
"""

import importlib
import io
import pickle
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctpd_nemo.parallel.checkpoint_archives import TENSOR_NAMES, Storage, StorageKind, StoredTensor
from ctpd_nemo.parallel.checkpoint_pickles import Call, Names, Record, read_pickle, records, refusal, whole_numbers
from ctpd_nemo.parallel.layers import transformer_engine_available

_RECIPES = "transformer_engine.common.recipe"
_OF_MEGATRON = "megatron.core.extensions.transformer_engine"
_KINDS = {
    **dict.fromkeys(("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"), _RECIPES),
    **dict.fromkeys(("NVFP4BlockScaling", "Format", "MMParams", "QParams", "_FormatHelper"), _RECIPES),
    "TEDelayedScaling": _OF_MEGATRON,
}
_TENSOR = re.compile(r"(scale|scale_inv|amax_history)_(fwd|bwd)")
_NUMBERS_AND_TEXT = (bool, int, float, str, type(None))
_MOST_ELEMENTS = 2**32
_LONGEST = 256
# Of the format that ``torch.save`` had before archives; storages within other pickles have it to this day.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


def is_extra_state(key: str) -> bool:
    """Whether an object of a checkpoint is such a state, by its key."""
    return key.rpartition("/")[0].endswith("_extra_state")


@dataclass(frozen=True)
class ExtraState:
    """Such a state that holds what it may.

    Attributes:
        values: A recipe, numbers and tensors, by name.
        place: For errors.
    """

    values: dict[str, Any]
    place: str

    def encode(self) -> Tensor:
        """The bytes that Transformer Engine takes: empty where it is not there, as other layers ignore them.

        Raises:
            InputError: The recipe is none of the Transformer Engine that is installed.
        """
        if not transformer_engine_available():
            return torch.empty(0, dtype=torch.uint8)
        try:
            values = {name: _made(value) for name, value in self.values.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise refusal(self.place, f"an FP8 recipe of another Transformer Engine ({error})") from error
        return torch.frombuffer(bytearray(pickle.dumps(values)), dtype=torch.uint8)


def read_extra_state(value: Any, place: str) -> Any:
    """A state as it is in a checkpoint, by rules: ``None``, an empty tensor, or ``ExtraState``.

    Raises:
        InputError: It is anything else.
    """
    if value is None:
        return None
    if type(value) is not Tensor or value.dtype != torch.uint8 or value.dim() != 1:
        raise refusal(place, "an _extra_state that is not of bytes")
    if not len(value):
        return value
    state = read_pickle(value.numpy().tobytes(), place, _names(place))
    if type(state) is not dict or not all(type(name) is str for name in state):
        raise refusal(place, "an _extra_state that is no dict")
    return ExtraState({name: _checked(name, held, place) for name, held in state.items()}, place)


def _names(place: str) -> Names:
    def storage(arguments: tuple[Any, ...]) -> Storage:
        (content,) = arguments
        return _storage(content, place)

    load = Call(storage)
    return {
        **TENSOR_NAMES,
        **{key: call for kind, module in _KINDS.items() for key, call in records(module, kind).items()},
        ("torch.storage", "_load_from_bytes"): load,
        # What Megatron-Core puts in its place, from 0.17 on.
        ("megatron.core.safe_globals", "safe_load_from_bytes"): load,
    }


def _storage(content: bytes, place: str) -> Storage:
    """A storage in the format before archives: five pickles, and its bytes."""
    stream, found = io.BytesIO(content), []

    def described(identity: tuple[Any, ...]) -> Storage:
        kind, storage_kind, key, _, elements, view = identity
        if kind != "storage" or type(storage_kind) is not StorageKind or type(key) is not str or view is not None:
            raise ValueError("what is no storage")
        (count,) = whole_numbers((elements,), _MOST_ELEMENTS)
        found.extend([key, count])
        size = count * storage_kind.dtype.itemsize
        return Storage(storage_kind.dtype, size, lambda first, length: bytearray(data[first : first + length]))

    def next_pickle() -> Any:
        return read_pickle(stream, place, TENSOR_NAMES, Call(described))

    magic, version, system, storage, keys = (next_pickle() for _ in range(5))
    if (magic, version, keys) != (_MAGIC, _VERSION, found[:1]) or type(storage) is not Storage or len(found) != 2:
        raise ValueError("a storage in another format")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("a storage of another byte order")
    count, data = int.from_bytes(stream.read(8), "little"), stream.read()
    if count != found[1] or len(data) != storage.bytes:
        raise ValueError(f"{len(data):,} bytes of {storage.bytes:,}")
    return storage


# What it may hold


def _checked(name: str, value: Any, place: str) -> Any:
    """A value of the state of this name, tensors read."""
    if name == "recipe" and type(value) is Record and _is_record(value, of_recipe=True):
        return value
    if name == "extra_fp8_variables" and type(value) is dict and _is_plain(value, depth=3):
        return value
    if _TENSOR.fullmatch(name) and type(value) is StoredTensor and value.dtype == torch.float32:
        return value.read()
    raise refusal(place, f"an _extra_state with a {type(value).__name__} for {name}")


def _is_record(record: Record, of_recipe: bool) -> bool:
    """Whether a record of the library holds numbers, text, and the records that a recipe has."""
    if record.kind == "Format":
        (helper,) = record.arguments if len(record.arguments) == 1 else (None,)
        if type(helper) is not Record or helper.kind != "_FormatHelper" or record.state is not None:
            return False
        return len(helper.arguments) == 2 and all(type(limit) in (int, float) for limit in helper.arguments)
    if record.arguments or type(record.state) is not dict or of_recipe != record.kind.endswith("Scaling"):
        return False
    parts = [value for value in record.state.values() if not _is_plain(value, 1)]
    named = all(type(name) is str for name in record.state)
    return named and all(type(part) is Record and of_recipe and _is_record(part, of_recipe=False) for part in parts)


def _is_plain(value: Any, depth: int) -> bool:
    """Numbers, text, and short lists, tuples and dicts of them, so many within each other."""
    if type(value) not in (tuple, list, dict):
        return type(value) in _NUMBERS_AND_TEXT
    items = value.values() if type(value) is dict else value
    named = type(value) is not dict or all(type(name) is str for name in value)
    return depth > 0 and named and len(value) <= _LONGEST and all(_is_plain(item, depth - 1) for item in items)


# What is made of it


def _made(value: Any) -> Any:
    """The object of the library that a record stands for; other values as they are."""
    if type(value) is not Record:
        return value
    kind: Any = getattr(importlib.import_module(_KINDS[value.kind]), value.kind)
    if value.arguments:
        return kind(*map(_made, value.arguments))
    # As ``pickle`` would make it, but with no attribute in the place of a method.
    for name in value.state:
        if name.startswith("__") or callable(getattr(kind, name, None)):
            raise ValueError(f"{value.kind} with {name} = {value.state[name]!r}")
    made = object.__new__(kind)
    made.__dict__.update({name: _made(item) for name, item in value.state.items()})
    return made
