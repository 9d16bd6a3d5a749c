"""Hugging Face folders into Megatron-Core: values against a reshaping oracle, logits against ``transformers``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctpd_nemo.convert.architecture import Architecture, read_architecture
from ctpd_nemo.convert.layout import is_vocabulary, megatron_parameters
from ctpd_nemo.convert.load import fill_parameter, load_hf_weights
from ctpd_nemo.convert.safetensors_folder import SafetensorsFolder
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.gpt import build_gpt
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.precision import PrecisionConfig

INDEX = "model.safetensors.index.json"


def whole_parameter(name: str, a: Architecture, state: dict[str, Tensor]) -> Tensor:
    """A Megatron parameter over all ranks, from Hugging Face tensors by reshaping."""
    if "layers." not in name:
        hf = {"embedding": "model.embed_tokens", "decoder": "model.norm", "output_layer": "lm_head"}[name.split(".")[0]]
        return state[f"{hf}.weight"]
    layer, parameter = name.removeprefix("decoder.layers.").split(".", 1)
    of = {key.removeprefix(f"model.layers.{layer}."): value for key, value in state.items()}
    if parameter.startswith("self_attention.linear_qkv.") and "norm" not in parameter:
        kind = parameter.rsplit(".", 1)[1]
        q, k, v = (of[f"self_attn.{p}_proj.{kind}"] for p in "qkv")
        groups = [t.reshape(a.num_query_groups, -1, *t.shape[1:]) for t in (q, k, v)]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if parameter == "mlp.linear_fc1.weight":
        return torch.cat([of["mlp.gate_proj.weight"], of["mlp.up_proj.weight"]])
    return of[
        {
            "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
            "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
            "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
            "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
            "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
            "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        }[parameter]
    ]


def rank_share(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    """Megatron's tensor-parallel split of a whole parameter."""
    if "norm" in name:
        return whole
    if is_vocabulary(name):
        whole = torch.nn.functional.pad(whole, (0, 0, 0, -len(whole) % size))
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(size, dim=1)[rank]
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
    return whole.chunk(size)[rank]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_each_rank_gets_megatrons_share_of_each_parameter(family_case: str, tp_size: int, tiny_model: Callable) -> None:
    tiny = tiny_model(family_case)
    architecture = read_architecture(tiny.folder)
    reader = SafetensorsFolder(tiny.folder, architecture)
    for name in megatron_parameters(architecture):
        whole = whole_parameter(name, architecture, tiny.model.state_dict())
        for rank in range(tp_size):
            expected = rank_share(name, whole, rank, tp_size)
            destination = torch.full(expected.shape, torch.nan)
            fill_parameter(destination, name, architecture, reader, rank, tp_size)
            assert torch.equal(destination, expected), name


def megatron_logits(folder: Path, ids: list[Tensor]) -> Tensor:
    """Logits ``[T, V]`` of packed sequences from one process's ``GPTModel`` in fp32."""
    architecture = read_architecture(folder)
    initialize(ParallelConfig())
    (chunk,) = build_gpt(architecture, ParallelConfig(), PrecisionConfig("fp32"))
    load_hf_weights([chunk], folder, architecture)
    lengths = torch.tensor([len(sequence) for sequence in ids])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest)
    positions = torch.cat([torch.arange(len(sequence)) for sequence in ids])[None]
    weight = (chunk.embedding.word_embeddings if architecture.tied_embeddings else chunk.output_layer).weight
    with torch.no_grad():
        hidden = chunk(torch.cat(ids)[None], positions, None, packed_seq_params=packed)
        return hidden.flatten(0, 1) @ weight.T


def test_logits_match_transformers(family_case: str, tiny_model: Callable, record_property: Callable) -> None:
    tiny = tiny_model(family_case)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 131, (length,), generator=generator) for length in (61, 1, 22)]
    with torch.no_grad():
        expected = torch.cat([tiny.model(sequence[None]).logits[0] for sequence in ids])
    difference = (megatron_logits(tiny.folder, ids) - expected).abs().max().item()
    record_property("max_logit_difference", difference)
    assert expected.abs().max() > 1
    assert difference < 1e-4


def test_one_file_loads_like_shards(tiny_model: Callable, tmp_path: Path) -> None:
    tiny = tiny_model("qwen2")
    tiny.model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    ids = [torch.arange(9)]
    assert torch.equal(megatron_logits(tmp_path, ids), megatron_logits(tiny.folder, ids))


def test_bf16_parameters_take_the_rounded_values(tiny_model: Callable) -> None:
    tiny = tiny_model("llama")
    architecture = read_architecture(tiny.folder)
    destination = torch.empty(131, 48, dtype=torch.bfloat16)
    fill_parameter(destination, "output_layer.weight", architecture, SafetensorsFolder(tiny.folder, architecture))
    assert torch.equal(destination, tiny.model.lm_head.weight.bfloat16())


def test_rotary_buffers_and_equal_tied_copies_are_left_unread_and_named(tiny_model: Callable, tmp_path: Path) -> None:
    tiny = tiny_model("mistral-tied")
    tiny.model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    state |= {"lm_head.weight": state["model.embed_tokens.weight"].clone(), buffer: torch.ones(4)}
    save_file(state, tmp_path / "model.safetensors")
    architecture = read_architecture(tmp_path)
    initialize(ParallelConfig())
    chunks = build_gpt(architecture, ParallelConfig(), PrecisionConfig("fp32"))
    assert set(load_hf_weights(chunks, tmp_path, architecture)) == {"lm_head.weight", buffer}
    state["lm_head.weight"][130, 47] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight that differs from model\.embed_tokens\.weight"):
        load_hf_weights(chunks, tmp_path, architecture)


def test_a_model_of_another_shape_is_refused(tiny_model: Callable) -> None:
    with_bias, without = tiny_model("qwen2").folder, tiny_model("llama").folder
    initialize(ParallelConfig())
    chunks = build_gpt(read_architecture(with_bias), ParallelConfig(), PrecisionConfig("fp32"))
    with pytest.raises(InputError, match=r"no weights for the model's decoder\.layers\.0.*linear_qkv\.bias"):
        load_hf_weights(chunks, without, read_architecture(without))
    chunks = build_gpt(read_architecture(without), ParallelConfig(), PrecisionConfig("fp32"))
    with pytest.raises(InputError, match=r"weights for decoder\.layers\.0.*linear_qkv\.bias, which the model lacks"):
        load_hf_weights(chunks, with_bias, read_architecture(with_bias))


def test_a_vocabulary_that_does_not_fit_is_refused(tiny_model: Callable) -> None:
    folder = tiny_model("llama").folder
    architecture = read_architecture(folder)
    reader = SafetensorsFolder(folder, architecture)
    with pytest.raises(InputError, match="found vocab_size = 131; expected at most the model's 130"):
        fill_parameter(torch.empty(65, 48), "output_layer.weight", architecture, reader, 0, 2)
    with pytest.raises(InputError, match=r"expected the model's \(131, 47\)"):
        fill_parameter(torch.empty(131, 47), "output_layer.weight", architecture, reader)


def _edit_index(folder: Path, tensor: str, shard: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][tensor] = shard
    (folder / INDEX).write_text(json.dumps(index))


def _edit_tensor(folder: Path, tensor: str, change: Callable[[Tensor], Tensor | None]) -> str:
    """Change, or drop, a tensor in its shard; returns the shard's name."""
    shard = json.loads((folder / INDEX).read_text())["weight_map"][tensor]
    state = load_file(folder / shard)
    changed = change(state.pop(tensor))
    save_file(state if changed is None else state | {tensor: changed}, folder / shard)
    return shard


KEY = "model.layers.1.self_attn.k_proj.weight"


def _drop_shard(folder: Path) -> str:
    shard = json.loads((folder / INDEX).read_text())["weight_map"][KEY]
    (folder / shard).unlink()
    return f"{shard}: found no such file, where model"


def _drop_tensor(folder: Path) -> str:
    return f"{_edit_tensor(folder, KEY, lambda t: None)}: found no tensor {KEY}"


def _drop_tensor_and_entry(folder: Path) -> str:
    _edit_tensor(folder, KEY, lambda t: None)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][KEY]
    (folder / INDEX).write_text(json.dumps(index))
    return f"found no tensor {KEY}; expected all tensors of a llama model"


def _transpose(folder: Path) -> str:
    return f"{_edit_tensor(folder, KEY, lambda t: t.T.contiguous())}: found {KEY} of shape (48, 16); expected (16, 48)"


def _quantise(folder: Path) -> str:
    return f"{_edit_tensor(folder, KEY, lambda t: t.to(torch.int8))}: found {KEY} of dtype I8"


def _add_tensor(folder: Path) -> str:
    save_file({"model.layers.1.self_attn.q_proj.bias": torch.ones(48)}, folder / "extra.safetensors")
    _edit_index(folder, "model.layers.1.self_attn.q_proj.bias", "extra.safetensors")
    return "extra.safetensors: found tensor model.layers.1.self_attn.q_proj.bias; expected only tensors"


def _store_twice(folder: Path) -> str:
    save_file({KEY: torch.ones(16, 48), "spare": torch.ones(1)}, folder / "z.safetensors")
    _edit_index(folder, "spare", "z.safetensors")
    return f"z.safetensors: found {KEY}, also in model-0"


def _escape(folder: Path) -> str:
    _edit_index(folder, KEY, "../other/model.safetensors")
    return f"{KEY} in '../other/model.safetensors'; expected the name of a file in the same folder"


def _truncate(folder: Path) -> str:
    shard = json.loads((folder / INDEX).read_text())["weight_map"][KEY]
    (folder / shard).write_bytes((folder / shard).read_bytes()[:-7])
    return f"{shard}: found a file that cannot be read"


def _break_index(folder: Path) -> str:
    (folder / INDEX).write_text('{"weight_map": []}')
    return f"{INDEX}: found weight_map = []"


def _no_weights(folder: Path) -> str:
    (folder / INDEX).unlink()
    return "found neither model.safetensors nor model.safetensors.index.json"


@pytest.mark.parametrize(
    "damage",
    [
        _drop_shard,
        _drop_tensor,
        _drop_tensor_and_entry,
        _transpose,
        _quantise,
        _add_tensor,
        _store_twice,
        _escape,
        _truncate,
        _break_index,
        _no_weights,
    ],
    ids=lambda damage: damage.__name__.strip("_"),
)
def test_a_damaged_folder_is_refused_by_file_and_tensor(
    damage: Callable[[Path], str], tiny_model: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama").folder, folder)
    message = damage(folder)
    with pytest.raises(InputError) as error:
        SafetensorsFolder(folder, read_architecture(folder))
    assert message in str(error.value)
