"""Megatron-Core weights back to Hugging Face folders, bit for bit."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.convert.export import HFWriter, export_hf, hf_tensors, model_tensors
from ctpd_nemo.convert.layout import EMBEDDING, OUTPUT
from ctpd_nemo.convert.load import load_hf_weights
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.gpt import build_gpt
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.precision import PrecisionConfig


def imported(folder: Path) -> list[GPTModel]:
    architecture = read_architecture(folder)
    initialize(ParallelConfig())
    chunks = build_gpt(architecture, ParallelConfig(), PrecisionConfig("fp32"))
    load_hf_weights(chunks, folder, architecture)
    return chunks


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_bit_for_bit(folder: Path, reference: Path) -> None:
    exported, original = all_tensors(folder), all_tensors(reference)
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert exported[name].dtype == tensor.dtype, name
        assert torch.equal(exported[name], tensor), name


def test_export_after_import_is_bit_for_bit(family_case: str, tiny_model: Callable, tmp_path: Path) -> None:
    tiny = tiny_model(family_case)
    export_hf(tmp_path / "out", tiny.folder, model_tensors(imported(tiny.folder)))
    assert_bit_for_bit(tmp_path / "out", tiny.folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny.model(ids).logits)


def test_each_tensor_keeps_its_own_dtype(tiny_model: Callable, tmp_path: Path) -> None:
    reference = tmp_path / "mixed"
    tiny_model("qwen3").model.save_pretrained(reference)
    path = reference / "model.safetensors"
    state = {name: t if "norm" in name else t.bfloat16() for name, t in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    trained = model_tensors(imported(reference))
    export_hf(tmp_path / "out", reference, lambda name, shape: trained(name, shape).bfloat16())
    assert {name: t.dtype for name, t in all_tensors(tmp_path / "out").items()} == {
        n: t.dtype for n, t in state.items()
    }
    assert (tmp_path / "out" / "config.json").read_bytes() == (reference / "config.json").read_bytes()


def test_what_was_trained_in_fp32_is_not_rounded_to_the_dtype_that_it_began_in(
    tiny_model: Callable, tmp_path: Path
) -> None:
    reference = tmp_path / "bf16"
    copy.deepcopy(tiny_model("qwen2").model).bfloat16().save_pretrained(reference)
    chunks = imported(reference)
    for parameter in chunks[0].parameters():
        # A step of training that bf16 has no bits for.
        parameter.data.mul_(1 + 2**-12)
    export_hf(tmp_path / "out", reference, model_tensors(chunks))
    before = all_tensors(reference)
    for name, tensor in all_tensors(tmp_path / "out").items():
        assert torch.equal(tensor, before[name].float() * (1 + 2**-12)), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float32


def test_a_dtype_that_is_asked_for_is_named_in_the_config(tiny_model: Callable, tmp_path: Path) -> None:
    tiny = tiny_model("llama")
    export_hf(tmp_path / "out", tiny.folder, model_tensors(imported(tiny.folder)), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert read_architecture(tmp_path / "out").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_dtype_that_is_asked_for_is_named_where_the_tensors_had_it_already(
    tiny_model: Callable, tmp_path: Path
) -> None:
    reference = tmp_path / "bf16"
    copy.deepcopy(tiny_model("llama").model).bfloat16().save_pretrained(reference)
    config = json.loads((reference / "config.json").read_text())
    (reference / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    export_hf(tmp_path / "out", reference, model_tensors(imported(reference)), dtype=torch.bfloat16)
    assert read_architecture(tmp_path / "out").dtype == torch.bfloat16


def test_shards_stay_below_their_limit_and_the_index_is_complete(tiny_model: Callable, tmp_path: Path) -> None:
    tiny = tiny_model("qwen2")
    export_hf(tmp_path / "out", tiny.folder, model_tensors(imported(tiny.folder)), max_shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(shards)
    assert count > 3
    assert shards == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    sizes = {shard: load_file(tmp_path / "out" / shard) for shard in shards}
    assert index["weight_map"] == {name: shard for shard, tensors in sizes.items() for name in tensors}
    per_shard = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in sizes.values()]
    assert max(per_shard) <= 60_000
    assert sum(per_shard) == index["metadata"]["total_size"]
    assert_bit_for_bit(tmp_path / "out", tiny.folder)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    with HFWriter(tmp_path / "out", max_shard_bytes=10) as writer:
        writer.add("large", torch.ones(100))
        writer.add("small", torch.ones(1))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert sorted(all_tensors(tmp_path / "out")) == ["large", "small"]


def test_vocabulary_padding_is_cut(tiny_model: Callable, tmp_path: Path) -> None:
    tiny = tiny_model("llama")
    source = model_tensors(imported(tiny.folder))

    def padded(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = source(name, shape)
        return torch.cat([tensor, torch.full((5, 48), torch.nan)]) if name in (EMBEDDING, OUTPUT) else tensor

    export_hf(tmp_path / "out", tiny.folder, padded)
    assert_bit_for_bit(tmp_path / "out", tiny.folder)


def test_a_source_is_asked_for_the_shapes_of_the_model(family_case: str, tiny_model: Callable) -> None:
    folder = tiny_model(family_case).folder
    source = model_tensors(imported(folder))

    def checked(name: str, shape: tuple[int, ...]) -> Tensor:
        assert tuple(source(name, shape).shape) == shape, name
        return source(name, shape)

    assert sum(1 for _ in hf_tensors(read_architecture(folder), checked)) == len(all_tensors(folder))


def test_tokenizer_generation_config_and_licence_travel_along(
    tiny_model: Callable, tmp_path: Path, shared_dir: Path
) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(tiny_model("llama").folder, reference)
    shutil.copytree(shared_dir / "tokenizers" / "llama3", reference, dirs_exist_ok=True)
    GenerationConfig(max_new_tokens=7, temperature=0.25, do_sample=True).save_pretrained(reference)
    (reference / "LICENSE.txt").write_text("terms")
    (reference / "optimizer.pt").write_text("not part of a model")
    export_hf(tmp_path / "out", reference, model_tensors(imported(reference)))
    text = "Ünïcode 🦙 and 12345"
    original, exported = AutoTokenizer.from_pretrained(reference), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported(text).input_ids == original(text).input_ids
    assert exported.chat_template == original.chat_template
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.max_new_tokens == 7
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "terms"
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_an_export_never_overwrites(tiny_model: Callable, tmp_path: Path) -> None:
    folder = tiny_model("llama").folder
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something already there"):
        export_hf(tmp_path, folder, model_tensors(imported(folder)))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture
def failing_source() -> Iterator[Callable[[str, tuple[int, ...]], Tensor]]:
    """A source whose fifth tensor has a row too many."""
    calls: list[str] = []

    def source(name: str, shape: tuple[int, ...]) -> Tensor:
        calls.append(name)
        return torch.zeros(shape[0] + (len(calls) == 5), *shape[1:])

    yield source
    assert len(calls) == 5


def test_a_failed_export_leaves_nothing(tiny_model: Callable, tmp_path: Path, failing_source: Callable) -> None:
    with pytest.raises(ValueError, match="has shape"):
        export_hf(tmp_path / "out", tiny_model("llama").folder, failing_source, max_shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_replaced(tiny_model: Callable, tmp_path: Path) -> None:
    tiny = tiny_model("llama")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "shard-0").write_text("half")
    export_hf(tmp_path / "out", tiny.folder, model_tensors(imported(tiny.folder)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_bit_for_bit(tmp_path / "out", tiny.folder)
