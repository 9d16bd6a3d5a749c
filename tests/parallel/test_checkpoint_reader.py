"""What is read of a checkpoint is what was written, bit for bit; it is read once, and by nothing else."""

import io
import itertools
import json
import pickle
import random
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from transformers import LlamaConfig

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel import checkpoint, checkpoint_extra_state, checkpoint_index
from ctpd_nemo.parallel.checkpoint_archives import Part, read_object
from ctpd_nemo.parallel.checkpoint_extra_state import ExtraState, read_extra_state
from ctpd_nemo.parallel.checkpoint_files import write_manifest
from ctpd_nemo.parallel.checkpoint_index import _are_all_of, read_index
from ctpd_nemo.parallel.checkpoint_reader import CheckpointReader
from ctpd_nemo.parallel.checkpoint_tensors import CheckpointTensors
from tests.parallel.test_checkpoint import STATE, Run, assert_equal, make_run, step, weights

NORM = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2).save_pretrained(folder)
    made = make_run(read_architecture(folder), 1)
    step(made, 0)
    return made


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "step-00000001", *run, STATE)
    return tmp_path / "step-00000001"


def again(folder: Path) -> None:
    """Give a folder that was changed a manifest that fits."""
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def index_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


# As torch reads it


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def read(content: bytes, tmp_path: Path) -> Any:
    path = tmp_path / "archive"
    path.write_bytes(b"before" + content + b"behind")
    with io.FileIO(path) as file:
        return read_object(Part(file, 6, len(content), "here"))


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_and_form_are_read_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base = torch.arange(24).reshape(4, 6).to(torch.float32).to(dtype)
    forms = [base, base[1:, 2:4], base.t(), base[0, 0], base[:0], base[:, None, ::2]]
    for form in (*forms, [forms], {"a": (forms[0],)}):
        found, expected = (read(saved(form), tmp_path), torch.load(io.BytesIO(saved(form)), weights_only=True))
        for one, other in zip(leaves(found), leaves(expected), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert raw(one) == raw(other)


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_numbers_text_and_what_holds_them_are_read(tmp_path: Path) -> None:
    content = {"a": [1, -2, 2**40, 2.5, True, None, "text", "é🦙"], "b": (1, ()), 3: {}, "size": torch.Size([2])}
    content |= {"dtype": torch.bfloat16, "again": content["a"]}
    found = read(saved(content), tmp_path)
    assert found == content
    assert type(found["size"]) is torch.Size
    assert found["again"] is not found["a"], "each its own"


def test_an_index_is_what_its_pickle_says(folder: Path) -> None:
    found, expected = CheckpointReader(folder), index_of(folder)
    assert found.metadata.state_dict_metadata == expected.state_dict_metadata
    places = {key: (at.file, at.offset, at.length) for key, at in found._index.entries.items()}
    stored = {key: (at.relative_path, at.offset, at.length) for key, at in expected.storage_data.items()}
    assert places == stored


@pytest.mark.parametrize("protocol", range(6))
def test_an_index_is_read_in_the_protocols_that_its_writers_have(folder: Path, protocol: int) -> None:
    index = index_of(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(index, protocol))
    again(folder)
    if protocol < 2:
        with pytest.raises(InputError, match="another protocol than 2 to 5"):
            CheckpointReader(folder)
    else:
        assert CheckpointReader(folder).metadata.state_dict_metadata == index.state_dict_metadata


# Once, and by nothing else


@pytest.fixture
def no_other_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that loads pickles of a file by other means fails."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("another reader")

    for module, names in {
        torch: ["load"],
        torch.serialization: ["load", "_load", "_legacy_load"],
        torch.distributed.checkpoint: ["load", "load_state_dict"],
        torch.distributed.checkpoint.FileSystemReader: ["read_metadata", "read_data"],
        pickle: ["load", "loads"],
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, fail)


@pytest.mark.usefixtures("no_other_reader")
def test_nothing_but_the_reader_loads_what_a_checkpoint_holds(folder: Path, run: Run) -> None:
    expected = weights(run)
    with torch.no_grad():
        for parameter in run[0][0].parameters():
            parameter.zero_()
    assert checkpoint.load(folder, *run) == STATE
    assert_equal(weights(run), expected)
    tensors = CheckpointTensors(folder)
    assert torch.equal(tensors(NORM, (16,)), expected[NORM])


_opened: list[str] | None = None


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str):
        _opened.append(arguments[0])


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Names of files that this process opens."""
    global _opened
    sys.addaudithook(_see)
    _opened = []
    yield _opened
    _opened = None


def test_the_index_and_the_common_state_are_read_once(folder: Path, run: Run, opened: list[str]) -> None:
    """Sizes are looked at first, which opens files and reads none."""
    reader = CheckpointReader(folder)
    reader.train_state()
    before = list(opened)
    checkpoint.load(reader, *run)
    later = {Path(path).suffix for path in opened[len(before) :] if Path(path).parent == folder}
    assert later == {".distcp"}
    counts = [before.count(str(folder / name)) for name in (".metadata", "common.pt") if (folder / name).exists()]
    assert set(counts) == {2}


def test_what_was_read_is_what_is_used(folder: Path, run: Run) -> None:
    """Whoever changes index, common state and objects after they were read changes nothing."""
    expected = weights(run)
    reader = CheckpointReader(folder)
    state = torch.get_rng_state()
    for path in folder.iterdir():
        if path.suffix != ".distcp":
            path.write_bytes(b"evil")
    objects = [at for index, at in reader._index.entries.items() if index.offset is None]
    for at in objects:
        with (folder / at.file).open("r+b") as file:
            file.seek(at.offset)
            file.write(bytes(at.length))
    torch.manual_seed(5)
    with torch.no_grad():
        run[0][0].module.decoder.final_layernorm.weight.zero_()
    assert checkpoint.load(reader, *run) == STATE
    assert_equal(weights(run), expected)
    assert not torch.equal(torch.get_rng_state(), state), "another layout is none of a run's own: its states stay"


def test_a_shard_that_changes_after_it_was_looked_at_is_refused(folder: Path, run: Run) -> None:
    reader = CheckpointReader(folder)
    for shard in folder.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(InputError, match="as were written"):
        checkpoint.load(reader, *run)


def test_what_is_handed_out_is_a_copy(folder: Path) -> None:
    reader = CheckpointReader(folder)
    reader.common()["optimizer"].clear()
    reader.object("rng_state/shard_0.0_1.1")[0].clear()
    assert reader.common()["optimizer"]
    assert reader.object("rng_state/shard_0.0_1.1")[0]


# Pieces


def test_pieces_are_a_whole_tensor_exactly_where_counting_says_so() -> None:
    """Against counting how many pieces each element is in."""
    draw = random.Random(0)
    outcomes = set()
    for _ in range(3_000):
        dims = draw.randint(0, 3)
        size = [draw.randint(0, 3) for _ in range(dims)]
        cuts = [sorted(draw.sample(range(n + 1), draw.randint(0, n))) for n in size]
        grid = [
            list(itertools.pairwise([0, *(c for c in cut if 0 < c < n), n])) for cut, n in zip(cuts, size, strict=True)
        ]
        boxes = [([a for a, _ in box], [b - a for a, b in box]) for box in itertools.product(*grid)]
        if draw.random() < 0.6:
            boxes = [broken(draw, box) for box in boxes if draw.random() < 0.9]
        counts = {
            at: sum(all(o <= x < o + s for x, o, s in zip(at, *box, strict=True)) for box in boxes)
            for at in itertools.product(*(range(-1, n + 2) for n in size))
        }
        inside = {at: all(0 <= x < n for x, n in zip(at, size, strict=True)) for at in counts}
        expected = all(count == inside[at] for at, count in counts.items())
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
        assert _are_all_of(torch.Size(size), chunks) == expected
        outcomes.add((dims, expected))
    assert len(outcomes) >= 7


def broken(draw: random.Random, box: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """A box that may be moved, or grown, by one."""
    offsets, sizes = list(box[0]), list(box[1])
    if offsets and draw.random() < 0.3:
        which = draw.randrange(len(offsets))
        (offsets if draw.random() < 0.5 else sizes)[which] += 1
    return offsets, sizes


def test_a_pickle_has_so_many_operations_at_most(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few bytes each has: what reading one costs is bounded."""
    content, sizes = (folder / ".metadata").read_bytes(), {path.name: path.stat().st_size for path in folder.iterdir()}
    assert len(read_index(content, "here", sizes).entries) > 40
    monkeypatch.setattr(checkpoint_index, "_MOST_OPERATIONS", 1_000)
    with pytest.raises(InputError, match="a pickle of more than 1,000 operations"):
        read_index(content, "here", sizes)


def test_an_index_of_more_bytes_than_the_files_is_not_read() -> None:
    with pytest.raises(InputError, match="an index of 2,000,000 bytes for files of fewer"):
        read_index(bytes(2_000_000), "here", {".metadata": 2_000_000, "__0_0.distcp": 100_000})


# Transformer Engine's states

RECIPES = """
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float

class Format(Enum):
    E4M3 = _FormatHelper(448, 448)
    HYBRID = _FormatHelper(448, 57344)

@dataclass(frozen=True)
class MMParams:
    use_split_accumulator: bool = True

@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_compute_algo: Any = "max"
    scaling_factor_compute_algo: Any = None

    def delayed(self):
        return True

@dataclass
class Float8CurrentScaling:
    fp8_format: Format = Format.E4M3
    fp8_gemm_fprop: MMParams = MMParams(False)

    def delayed(self):
        return False
"""


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for Transformer Engine's module of recipes, whose classes these are in part; it needs a GPU."""
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("transformer_engine.common.recipe")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(RECIPES, vars(module))
    monkeypatch.setattr(checkpoint_extra_state, "transformer_engine_available", lambda: True)
    return module


def in_bytes(state: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def state_of(recipe: Any) -> dict[str, Any]:
    """As ``TransformerEngineBaseModule.get_extra_state`` makes it."""
    scales = {"scale_fwd": torch.rand(3), "amax_history_fwd": torch.rand(4, 3), "scale_bwd": torch.rand(2)}
    extra = {"fp8_checkpoint": True, "num_gemms": 1, "fp8_max_fwd": 448, "fp8_max_bwd": 57344.0, "shapes": [(1, 2)]}
    return {"recipe": recipe, **scales, "extra_fp8_variables": extra}


@pytest.mark.parametrize("kind", ["DelayedScaling", "Float8CurrentScaling"])
def test_transformer_engine_is_given_what_it_wrote(recipes: Any, kind: str) -> None:
    state = state_of(getattr(recipes, kind)(fp8_format=recipes.Format.HYBRID))
    found = read_extra_state(in_bytes(state), "here")
    given = pickle.loads(found.encode().numpy().tobytes())
    assert given.keys() == state.keys()
    assert type(given["recipe"]) is getattr(recipes, kind)
    assert (given["recipe"], given["extra_fp8_variables"]) == (state["recipe"], state["extra_fp8_variables"])
    assert all(torch.equal(given[name], state[name]) for name in ("scale_fwd", "amax_history_fwd", "scale_bwd"))


def test_other_layers_are_given_nothing_of_transformer_engine() -> None:
    assert read_extra_state(None, "here") is None
    assert len(read_extra_state(torch.empty(0, dtype=torch.uint8), "here")) == 0
    found = read_extra_state(in_bytes({"extra_fp8_variables": {}}), "here")
    assert type(found) is ExtraState
    assert found.encode().numel() == 0


ATTRIBUTES: dict[str, Callable[[Any], Any]] = {
    "a method": lambda recipe: vars(recipe).update(delayed=True),
    "a function": lambda recipe: vars(recipe).update(amax_compute_algo=print),
    "a class": lambda recipe: vars(recipe).update(scaling_factor_compute_algo=dict),
    "a dunder": lambda recipe: vars(recipe).update(__class__="dict"),
    "a recipe": lambda recipe: vars(recipe).update(margin=type(recipe)()),
    "a tensor": lambda recipe: vars(recipe).update(margin=torch.zeros(1)),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_recipe_with_an_attribute_that_no_recipe_has_is_refused(recipes: Any, name: str) -> None:
    recipe = recipes.DelayedScaling()
    ATTRIBUTES[name](recipe)
    with pytest.raises(InputError, match="nothing but its own records"):
        read_extra_state(in_bytes({"recipe": recipe}), "here").encode()


def test_a_format_that_is_none_of_the_library_is_refused(recipes: Any) -> None:
    state = pickle.dumps({"recipe": recipes.DelayedScaling()}).replace(b"M\xc0\x01", b"M\xc1\x01")
    found = read_extra_state(torch.frombuffer(bytearray(state), dtype=torch.uint8), "here")
    with pytest.raises(InputError, match="an FP8 recipe of another Transformer Engine"):
        found.encode()


def test_states_in_a_checkpoint_are_made_anew(folder: Path, recipes: Any) -> None:
    """What is handed on is never the bytes that lay there."""
    key = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"
    stored = in_bytes(state_of(recipes.DelayedScaling()))
    index = index_of(folder)
    at = index.storage_data[MetadataIndex(key)]
    content = saved([stored])
    path = folder / at.relative_path
    at.offset, at.length = path.stat().st_size, len(content)
    path.write_bytes(path.read_bytes() + content)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    again(folder)
    (given,) = CheckpointReader(folder).object(key)
    assert not torch.equal(given, stored)
    assert pickle.loads(given.numpy().tobytes())["recipe"] == recipes.DelayedScaling()


# Training state


@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2-pp1"])
def test_a_common_state_fills_nothing_that_is_in_shards(folder: Path, run: Run, layout: str) -> None:
    content = {**torch.load(io.BytesIO(saved(CheckpointReader(folder).common()))), "model": {"evil": 1}}
    state = json.loads(content["state"])
    state["fingerprints"]["layout"] = layout
    torch.save({**content, "state": json.dumps(state)}, folder / "common.pt")
    again(folder)
    with pytest.raises(InputError, match="a common state with 'model'"):
        checkpoint.load(folder, *run)
