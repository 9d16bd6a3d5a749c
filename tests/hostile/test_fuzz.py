"""Readers of files that anything may be written into: what cannot be read is an ``InputError``, and nothing else."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.strategies import common

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.convert.safetensors_folder import SafetensorsFolder
from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import SKIP_REASONS, EncodedPair, Skipped
from ctpd_nemo.data.forms import PreferencePair, RowError, parse_pair
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.templates import Side
from ctpd_nemo.data.tokenizer_folder import load_tokenizer
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.parallel.checkpoint_files import write_manifest
from ctpd_nemo.parallel.checkpoint_reader import CheckpointReader
from ctpd_nemo.pipeline.score_cache import ScoreReader, read_manifest
from ctpd_nemo.spans import align
from tests.data.conversations import TEMPLATES
from tests.fuzz import fuzz
from tests.hostile.case import Scene
from tests.hostile.rows import GOOD

# A change of a file: where (a share of its length), what goes there, and how many bytes go.
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.binary(max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b'"', b"]", b"-1"]),
        st.integers(0, 16) | st.just(2**20),
    ),
    min_size=1,
    max_size=4,
)
# Files of a checkpoint; newer releases of Megatron-Core keep their common state among the shards.
COMMON = ["common.pt"] if hasattr(common, "TorchCommonSaveStrategy") else []
CHECKPOINT = [".metadata", *COMMON, "metadata.json", "__0_0.distcp"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
# Values that are nearly right.
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "from"]),
    st.sampled_from(["user", "assistant", "system", "tool", "", " ", "\ud800", None, 7]),
)
FIELD = JSON | st.text(st.characters(), max_size=8) | st.lists(MESSAGE | JSON, max_size=4)
ROWS = st.dictionaries(st.sampled_from(["id", "system", "prompt", "chosen", "rejected", "more"]), FIELD)


def edited(content: bytes, edits: list[tuple[float, bytes, int]]) -> bytes:
    for share, new, gone in edits:
        at = int(share * len(content))
        content = content[:at] + new + content[at + gone :]
    return content


def read(reader: Callable[[], Any]) -> None:
    """Read; the one error there may be is one line that a terminal shows as it is."""
    said = ""
    try:
        reader()
    except InputError as error:
        said = str(error)
    assert said.isprintable()


def _pair_or_reason(row: dict[str, Any]) -> PreferencePair | RowError:
    try:
        return parse_pair(row, "row-1", "rows:1")
    except RowError as error:
        return error


@fuzz(30)
@given(row=ROWS)
def test_any_row_is_a_pair_or_says_why_not(row: dict[str, Any]) -> None:
    pair = _pair_or_reason(row)
    if isinstance(pair, RowError):
        assert pair.reason
        assert pair.found
        assert pair.expected
        return
    roles = [message.role for message in pair.prompt if message.role != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert pair.chosen != pair.rejected
    for text in (pair.id, pair.chosen, pair.rejected, *(message.content for message in pair.prompt)):
        text.encode()


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
@fuzz(60)
@given(edits=EDITS)
def test_any_bytes_of_json_lines(tmp_path: Path, on_bad: str, edits: list[Any]) -> None:
    whole = b"".join(json.dumps({**GOOD, "id": f"é{row}"}, ensure_ascii=False).encode() + b"\n" for row in range(4))
    (tmp_path / "pairs.jsonl").write_bytes(edited(whole, edits))
    read(lambda: list(open_preferences(tmp_path / "pairs.jsonl", on_bad=on_bad)))


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl.gz"])
@fuzz(60)
@given(edits=EDITS)
def test_any_bytes_of_a_list_or_of_gzip(tmp_path: Path, name: str, edits: list[Any]) -> None:
    rows = [{**GOOD, "id": f"é{row}"} for row in range(4)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    whole = json.dumps({"data": rows}, indent=1).encode() if name.endswith("json") else gzip.compress(lines)
    (tmp_path / name).write_bytes(edited(whole, edits))
    read(lambda: list(open_preferences(tmp_path / name, on_bad="skip")))


@pytest.fixture(scope="module")
def encoders(whole: Scene) -> list[PairEncoder]:
    """Templates that read tools and calls, and all there is."""
    tokenizer = load_tokenizer(str(whole.world.student))
    return [
        PairEncoder(Side(tokenizer, TEMPLATES[name]), None, True, 512, on_bad="skip")
        for name in ("tools", "reasoning", "everything")
    ]


@fuzz(60)
@given(
    columns=st.dictionaries(st.sampled_from(["tools", "documents", "images", "mood", "id"]), JSON),
    asked=st.dictionaries(st.sampled_from(["name", "tool_calls", "content", "x"]), JSON),
    answered=st.dictionaries(st.sampled_from(["reasoning_content", "thinking", "tool_calls", "content", "x"]), JSON),
)
def test_any_fields_beside_the_text_are_rendered_or_refused(
    encoders: list[PairEncoder], tmp_path: Path, columns: Any, asked: Any, answered: Any
) -> None:
    chosen = {"role": "assistant", "content": "The Baltic.", **answered}
    row = {**columns, "prompt": [{"role": "user", "content": "?", **asked}], "chosen": [chosen], "rejected": "Paris."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(GOOD) + "\n")
    for encoder in encoders:
        dataset = open_preferences(tmp_path / "pairs.jsonl", on_bad="skip", kept=encoder.kept)
        found = encoder.encode(range(len(dataset)), dataset[:])
        assert isinstance(found[-1], EncodedPair)
        for pair in found:
            assert not isinstance(pair, Skipped) or (pair.reason in SKIP_REASONS and "\n" not in pair.why)


def test_fields_in_each_other_without_end_are_refused(encoders: list[PairEncoder], tmp_path: Path) -> None:
    for depth in (30, 60, 70, 300, 900):
        tools = '[{"a": ' + "[" * depth + "]" * depth + "}]"
        for given_as in (tools, json.dumps(tools)):
            row = '{"prompt": "?", "chosen": "a", "rejected": "b", "tools": ' + given_as + "}"
            (tmp_path / "pairs.jsonl").write_text(row + "\n" + json.dumps(GOOD) + "\n")
            dataset = open_preferences(tmp_path / "pairs.jsonl", on_bad="skip", kept=encoders[0].kept)
            found = encoders[0].encode(range(len(dataset)), dataset[:])
            assert [type(pair) for pair in found] == [EncodedPair] * (2 if depth <= 60 else 1)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "pairs.parquet"
    turns = [[{"role": "assistant", "content": f"answer {row}"}] for row in range(20)]
    pq.write_table(pa.table({"prompt": ["a"] * 20, "chosen": turns, "rejected": ["b"] * 20}), path, row_group_size=7)
    return path.read_bytes()


@fuzz(60)
@given(edits=EDITS)
def test_any_bytes_of_parquet(tmp_path: Path, parquet: bytes, edits: list[Any]) -> None:
    (tmp_path / "pairs.parquet").write_bytes(edited(parquet, edits))
    read(lambda: list(open_preferences(tmp_path / "pairs.parquet", on_bad="skip")))


@fuzz(40)
@given(name=st.sampled_from(["config.json", "model.safetensors"]), edits=EDITS)
def test_any_bytes_of_a_model_folder(whole: Scene, tmp_path: Path, name: str, edits: list[Any]) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(whole.world.student / file, tmp_path)
    (tmp_path / name).write_bytes(edited((tmp_path / name).read_bytes(), edits))
    read(lambda: SafetensorsFolder(tmp_path, read_architecture(tmp_path)))


@fuzz(40)
@given(
    key=st.sampled_from(
        [
            "num_hidden_layers",
            "hidden_size",
            "head_dim",
            "num_key_value_heads",
            "rope_parameters",
            "rope_scaling",
            "rope_theta",
            "rms_norm_eps",
            "max_position_embeddings",
            "dtype",
            "tie_word_embeddings",
            "layer_types",
            "sliding_window",
            "model_type",
            "quantization_config",
            "vocab_size",
            "hidden_act",
            "auto_map",
        ]
    ),
    value=JSON,
)
def test_any_value_in_a_model_config(whole: Scene, tmp_path: Path, key: str, value: Any) -> None:
    config = json.loads((whole.world.student / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    read(lambda: read_architecture(tmp_path))


@fuzz(40)
@given(
    side=st.sampled_from(["student", "teacher"]),
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]),
    edits=EDITS,
)
def test_any_bytes_of_a_tokenizer_folder(whole: Scene, tmp_path: Path, side: str, name: str, edits: list[Any]) -> None:
    folder = getattr(whole.world, side)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / file).exists():
            shutil.copy(folder / file, tmp_path)
    (tmp_path / name).write_bytes(edited((tmp_path / name).read_bytes(), edits))

    def use() -> None:
        tokenizer = load_tokenizer(str(tmp_path))
        Side(tokenizer)
        align("Some text, 🦙.", tokenizer, tokenizer)

    read(use)


@fuzz(40)
@given(name=st.sampled_from(["manifest.json", "positive-00001.parquet"]), edits=EDITS)
def test_any_bytes_of_a_score_cache(whole: Scene, tmp_path: Path, name: str, edits: list[Any]) -> None:
    cache = Path(shutil.copytree(whole.cache, tmp_path / "cache", dirs_exist_ok=True))
    manifest = read_manifest(whole.cache)
    (cache / name).write_bytes(edited((cache / name).read_bytes(), edits))
    method = CTPDConfig(scores=str(cache))
    read(lambda: ScoreReader(cache, manifest["fingerprints"], manifest["teacher_weights"], method))


@fuzz(40)
@given(name=st.sampled_from(CHECKPOINT), edits=EDITS)
def test_any_bytes_of_a_checkpoint(whole: Scene, tmp_path: Path, name: str, edits: list[Any]) -> None:
    folder = Path(shutil.copytree(whole.checkpoint, tmp_path / "checkpoint", dirs_exist_ok=True))
    (folder / name).write_bytes(edited((folder / name).read_bytes(), edits))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    read(lambda: CheckpointReader(folder).check_tensors())
