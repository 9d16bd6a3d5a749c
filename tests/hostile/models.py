"""Model folders that cannot be used: what their config says, and what their weight files hold."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hostile.case import Case, Scene, Values

Edit = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"
WHOLE, READABLE, SIBLING = "a positive whole number", "a safetensors file", "the name of a file in the same folder"


def copied(scene: Scene) -> Path:
    """The student's folder, to be broken."""
    return Path(shutil.copytree(scene.world.student, scene.folder / "model"))


# config.json

DEEP = json.loads("[" * 900 + "]" * 900)


def _config(**changed: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changed}
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))

    return edit


def _text(content: str | bytes, name: str = "config.json") -> Edit:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def _rope(**values: Any) -> Edit:
    """Rotary parameters as both majors of transformers write them."""
    whole = {"rope_type": "default", "rope_theta": 10000.0, **values}
    return _config(rope_parameters=whole, rope_scaling=None, rope_theta=whole["rope_theta"])


CONFIGS: dict[str, tuple[Edit, str, str]] = {
    "no JSON": (_text("{"), "no JSON", "a JSON object"),
    "an empty file": (_text(""), "no JSON", "a JSON object"),
    "a list": (_text("[]"), "a JSON list", "a JSON object"),
    "null": (_text("null"), "a JSON NoneType", "a JSON object"),
    "a pickle": (_text(pickle.dumps({})), "no JSON", "a JSON object"),
    "Latin-1": (_text(b'{"model_type": "\xe9"}'), "no JSON", "a JSON object"),
    "objects without end": (_text('{"a":' * 100_000), "no JSON", "a JSON object"),
    "a number of 5000 digits": (_text('{"hidden_size": ' + "1" * 5000 + "}"), "no JSON", "a JSON object"),
    "no family": (_config(model_type=...), "model_type = None", "one of the known families"),
    "a family that is a list": (_config(model_type=["llama"]), "model_type = ['llama']", "one of the known families"),
    "another family": (_config(model_type="gpt_oss"), "model_type = 'gpt_oss'", "one of the known families"),
    "a family that is a path": (_config(model_type="../llama"), "model_type = '../llama'", "one of the known"),
    "no layers": (_config(num_hidden_layers=0), "num_hidden_layers = 0", WHOLE),
    "no number of layers": (_config(num_hidden_layers=...), "num_hidden_layers = None", WHOLE),
    "a billion layers": (_config(num_hidden_layers=10**9), "num_hidden_layers = 1000000000", "at most"),
    "a true number of layers": (_config(num_hidden_layers=True), "num_hidden_layers = True", WHOLE),
    "layers that are text": (_config(num_hidden_layers="2"), "num_hidden_layers = '2'", WHOLE),
    "more layers than there are": (_config(num_hidden_layers=3), "no tensor model.layers.2", "all tensors of a"),
    "fewer layers than there are": (_config(num_hidden_layers=1, layer_types=...), "tensor model.layers.1", "only ten"),
    "a negative width": (_config(hidden_size=-24), "hidden_size = -24", WHOLE),
    "half a width": (_config(hidden_size=24.5), "hidden_size = 24.5", WHOLE),
    "another width": (_config(hidden_size=32), "of shape", "by config.json"),
    "a width of 2^60": (_config(hidden_size=2**60), "hidden_size = 1152921504606846976", "at most"),
    "an endless vocabulary": (_config(vocab_size=2**40), "vocab_size = 1099511627776", "at most"),
    "a vocabulary of one": (_config(vocab_size=1, pad_token_id=...), "of shape", "by config.json"),
    "no heads": (_config(num_attention_heads=0), "num_attention_heads = 0", WHOLE),
    "groups that do not divide": (_config(num_key_value_heads=3), "num_key_value_heads = 3", "a divisor of"),
    "no groups": (_config(num_key_value_heads=0), "num_key_value_heads = 0", "a divisor of"),
    "groups that are text": (_config(num_key_value_heads="two"), "num_key_value_heads", "accepts"),
    "a head of odd width": (_config(head_dim=7), "head_dim", "accepts"),
    "a head of no width": (_config(head_dim=-2), "head_dim = -2", "a positive even number"),
    "more heads than width": (
        _config(num_attention_heads=10_000, head_dim=None, num_key_value_heads=1),
        "the number of attention heads",
        "accepts",
    ),
    "no positions": (_config(max_position_embeddings=0), "max_position_embeddings = 0", WHOLE),
    "positions that are text": (_config(max_position_embeddings="many"), "max_position_embeddings", "accepts"),
    "an epsilon that is text": (_config(rms_norm_eps="small"), "rms_norm_eps", "accepts"),
    "an epsilon that is no number": (_config(rms_norm_eps=float("nan")), "rms_norm_eps = nan", "a number between"),
    "a negative epsilon": (_config(rms_norm_eps=-1e-6), "rms_norm_eps = -1e-06", "a number between 0 and 1"),
    "another activation": (_config(hidden_act="gelu"), "hidden_act = 'gelu'", "silu"),
    "biases nobody has": (_config(mlp_bias=True), "mlp_bias = true", "false"),
    "a rotary base that is no number": (_rope(rope_theta=float("nan")), "rope_theta = nan", "a positive number"),
    "an infinite rotary base": (_rope(rope_theta=float("inf")), "rope_theta = inf", "a positive number"),
    "a negative rotary base": (_rope(rope_theta=-1), "rope_theta = -1", "a positive number"),
    "an unknown rotary type": (_rope(rope_type="evil"), "evil", ""),
    "a rotary type of others": (_rope(rope_type="proportional"), "rotary type 'proportional'", "one of default"),
    "a rotary parameter nobody has": (_rope(rope_type="linear", factor=2.0, evil=1), "parameter evil = 1", "one of"),
    "part of a head rotated": (_rope(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5", "all of a head"),
    "attention to what comes": (_config(is_causal=False), "False, a key that is not read", "no such key"),
    "attention to what comes, by null": (_config(is_causal=None), "None, a key that is not read", "no such key"),
    "a key nobody knows": (_config(logit_scale=2.0), "2.0, a key that is not read", "no such key"),
    "lists in lists for a size": (_config(hidden_size=DEEP), "hidden_size = [[[", WHOLE),
    "lists in lists for a note": (_config(note=DEEP), "a key that is not read", "no such key"),
    "a key that is a method": (_config(to_dict="x"), "'x', a key that is not read", "no such key"),
    "quantized weights": (_config(quantization_config={"quant_method": "fp8"}), "a key that is not read", "no such"),
    "another class": (_config(architectures=["GPT2LMHeadModel"]), "['GPT2LMHeadModel']", "LlamaForCausalLM"),
    "classes that are text": (_config(architectures="LlamaForCausalLM"), "'LlamaForCausalLM'", "LlamaForCausalLM"),
    "padding outside the vocabulary": (_config(pad_token_id=10**6), "1000000", "an id below vocab_size"),
    "a rotary factor that is text": (_rope(rope_type="linear", factor="two"), "linear", ""),
    "a rotary factor of zero": (_rope(rope_type="linear", factor=0.0), "linear rotary parameters", ""),
    "a dtype that is a list": (_config(dtype=[]), "list index out of range", "accepts"),
    "a dtype that is a class": (_config(dtype="Tensor"), "dtype = <class 'torch.Tensor'>", "the name of a dtype"),
    "a dtype of a letter to come": (_config(dtype="\ud7fc"), r"has no attribute '\ud7fc'", "accepts"),
    "a dtype nobody knows": (_config(dtype="float99", torch_dtype="float99"), "float99", ""),
}


# Weight files


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _with_header(edit: Callable[[dict[str, Any]], object]) -> Edit:
    def change(folder: Path) -> None:
        header, data = _read(folder / WEIGHTS)
        edit(header)
        written = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(written)) + written + data)

    return change


def _bytes(content: bytes) -> Edit:
    return lambda folder: (folder / WEIGHTS).write_bytes(content)


def _length(value: int) -> Edit:
    """Another length of the header than it has."""
    return lambda folder: _bytes(struct.pack("<Q", value) + (folder / WEIGHTS).read_bytes()[8:])(folder)


def _tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return change


def _offsets(start: int, stop: int) -> Edit:
    return _with_header(lambda header: header[NORM].update(data_offsets=[start, stop]))


def _replaced(convert: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return _tensors(lambda tensors: tensors.update({NORM: convert(tensors[NORM])}))


def _sharded(edit: Callable[[Path, dict[str, Any]], object] = lambda folder, index: None) -> Edit:
    """Two shards and their index, with something done to them."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        edit(folder, index)
        if not (folder / INDEX).exists():
            (folder / INDEX).write_text(json.dumps(index))

    return change


def _mapped(shard: Any, name: str = NORM) -> Edit:
    return _sharded(lambda folder, index: index["weight_map"].update({name: shard}))


def _linked(target: str) -> Edit:
    return lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to(target))


def _pickled(folder: Path) -> None:
    """Weights as old folders have them."""
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _pickled_shard(folder: Path, index: dict[str, Any]) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({NORM: 1}))
    index["weight_map"][NORM] = "pytorch_model.bin"


NONE = "neither model.safetensors nor model.safetensors.index.json"
UNREADABLE = "a file that cannot be read"
FILES: dict[str, tuple[Edit, str, str, str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "model", NONE, "in the safetensors format"),
    "a folder by that name": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
        "model",
        NONE,
        "safetensors format",
    ),
    "a pickle beside it": (_pickled, "model", NONE, "in the safetensors format"),
    "a pickle by that name": (_bytes(pickle.dumps({NORM: 1})), WEIGHTS, UNREADABLE, READABLE),
    "an empty file": (_bytes(b""), WEIGHTS, UNREADABLE, READABLE),
    "seven bytes": (_bytes(b"1234567"), WEIGHTS, UNREADABLE, READABLE),
    "a header of no length": (_length(0), WEIGHTS, UNREADABLE, READABLE),
    "a header beyond the file": (_length(2**30), WEIGHTS, UNREADABLE, READABLE),
    "a header of 2^63 bytes": (_length(2**63), WEIGHTS, UNREADABLE, READABLE),
    "a header that is cut": (_length(100), WEIGHTS, UNREADABLE, READABLE),
    "a header that is no JSON": (_bytes(struct.pack("<Q", 8) + b"{{{{{{{{"), WEIGHTS, UNREADABLE, READABLE),
    "a header that is a list": (_bytes(struct.pack("<Q", 2) + b"[]"), WEIGHTS, UNREADABLE, READABLE),
    "a header without end": (_bytes(struct.pack("<Q", 50_000) + b'{"a":' * 10_000), WEIGHTS, UNREADABLE, READABLE),
    "half a file": (
        lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2),
        WEIGHTS,
        UNREADABLE,
        "",
    ),
    "bytes behind the last tensor": (
        lambda folder: (folder / WEIGHTS).open("ab").write(b"more"),
        WEIGHTS,
        UNREADABLE,
        READABLE,
    ),
    "offsets beyond the file": (_offsets(0, 2**40), WEIGHTS, UNREADABLE, READABLE),
    "negative offsets": (_offsets(-8, 88), WEIGHTS, UNREADABLE, READABLE),
    "offsets that run back": (_offsets(96, 0), WEIGHTS, UNREADABLE, READABLE),
    "a tensor over another": (_offsets(4, 100), WEIGHTS, UNREADABLE, READABLE),
    "a shape of 2^64 numbers": (
        _with_header(lambda header: header[NORM].update(shape=[2**32, 2**32])),
        WEIGHTS,
        UNREADABLE,
        READABLE,
    ),
    "a negative shape": (_with_header(lambda header: header[NORM].update(shape=[-24])), WEIGHTS, UNREADABLE, READABLE),
    "an unknown dtype": (_with_header(lambda header: header[NORM].update(dtype="EVIL")), WEIGHTS, UNREADABLE, READABLE),
    "a tensor that is missing": (_tensors(lambda tensors: tensors.pop(NORM)), "model", f"no tensor {NORM}", "all ten"),
    "a tensor too many": (
        _tensors(lambda tensors: tensors.update(evil=torch.zeros(1))),
        WEIGHTS,
        "tensor evil",
        "only tensors that",
    ),
    "a name that climbs": (
        _tensors(lambda tensors: tensors.update({"../../evil": torch.zeros(1)})),
        WEIGHTS,
        "tensor ../../evil",
        "only",
    ),
    "another shape": (
        _replaced(lambda tensor: tensor[:-1]),
        WEIGHTS,
        f"{NORM} of shape (23,)",
        "(24,), by config.json",
    ),
    "another rank": (_replaced(lambda tensor: tensor[None]), WEIGHTS, f"{NORM} of shape (1, 24)", "(24,), by config"),
    "no numbers": (_replaced(lambda tensor: tensor[:0]), WEIGHTS, f"{NORM} of shape (0,)", "(24,), by config.json"),
    "a transposed matrix": (
        _tensors(lambda t: t.update({name: t[name].T for name in t if "down_proj" in name})),
        WEIGHTS,
        "of shape",
        "by c",
    ),
    "64 bits": (_replaced(lambda tensor: tensor.double()), WEIGHTS, f"{NORM} of dtype F64", "one of F32, F16, BF16"),
    "whole numbers": (_replaced(lambda tensor: tensor.long()), WEIGHTS, f"{NORM} of dtype I64", "one of F32"),
    "truth values": (_replaced(lambda tensor: tensor > 0), WEIGHTS, f"{NORM} of dtype BOOL", "one of F32"),
    "8 bits": (_replaced(lambda tensor: tensor.to(torch.float8_e4m3fn)), WEIGHTS, "of dtype F8_E4M3", "one of F32"),
    "complex numbers": (_replaced(lambda tensor: tensor.to(torch.complex64)), WEIGHTS, "of dtype C64", "one of F32"),
    "a link to another kind of file": (_linked("config.json"), WEIGHTS, UNREADABLE, READABLE),
    "a link to a file of the system": (_linked("/etc/passwd"), WEIGHTS, UNREADABLE, READABLE),
    "a link to a device": (_linked("/dev/zero"), "model", NONE, "in the safetensors format"),
    "a link to nothing": (_linked("gone"), "model", NONE, "in the safetensors format"),
    "a link to itself": (_linked(WEIGHTS), "model", NONE, "in the safetensors format"),
    "an index that is no JSON": (
        _sharded(lambda folder, index: (folder / INDEX).write_text("{")),
        INDEX,
        "no JSON",
        "a safetensors index",
    ),
    "an index that is a list": (
        _sharded(lambda folder, index: (folder / INDEX).write_text("[]")),
        INDEX,
        "a JSON list",
        "a safetensors index",
    ),
    "an index without a map": (
        _sharded(lambda folder, i: i.pop("weight_map")),
        INDEX,
        "weight_map = None",
        "an index"[3:],
    ),
    "a map that is a list": (
        _sharded(lambda f, i: i.update(weight_map=[1])),
        INDEX,
        "weight_map = [1]",
        "a safetensors",
    ),
    "a map of nothing": (_sharded(lambda f, i: i["weight_map"].clear()), INDEX, "an empty weight_map", "a safetensors"),
    "a shard that is missing": (
        _sharded(lambda folder, index: (folder / "b.safetensors").unlink()),
        "b.safetensors",
        "no such file",
        "every sh",
    ),
    "a shard in the folder above": (_mapped("../b.safetensors"), INDEX, f"{NORM} in '../b.safetensors'", SIBLING),
    "a shard at the root": (_mapped("/etc/passwd"), INDEX, f"{NORM} in '/etc/passwd'", SIBLING),
    "a shard in a folder below": (_mapped("x/b.safetensors"), INDEX, f"{NORM} in 'x/b.safetensors'", SIBLING),
    "a shard that is the folder": (_mapped("."), INDEX, f"{NORM} in '.'", SIBLING),
    "a shard that is the folder above": (_mapped(".."), "model/..", "no such file", "every shard of the index"),
    "a shard without a name": (_mapped(""), "model", "no such file", "every shard of the index"),
    "a shard with a NUL": (_mapped("a\0b"), r"a\x00b", "no such file", "every shard of the index"),
    "a shard that is a number": (_mapped(7), INDEX, f"{NORM} in 7", SIBLING),
    "a shard that is the config": (_mapped("config.json"), "config.json", UNREADABLE, READABLE),
    "a shard that is a pickle": (_sharded(_pickled_shard), "pytorch_model.bin", UNREADABLE, READABLE),
    "a tensor in another shard": (
        _mapped("a.safetensors"),
        "a.safetensors",
        f"no tensor {NORM}",
        "the tensors model.s",
    ),
    "a tensor in two shards": (
        _sharded(lambda folder, index: shutil.copy(folder / "a.safetensors", folder / "b.safetensors")),
        "b.safetensors",
        "also in a.safetensors",
        "each tensor once",
    ),
}


def _job(edit: Edit) -> Callable[[Scene], Values]:
    def make(scene: Scene) -> Values:
        folder = copied(scene)
        edit(folder)
        return {"model": {"student": {"path": str(folder)}}}

    return make


def model_cases() -> list[Case]:
    configs = [
        Case(name, "model config", _job(edit), "model", found, expected)
        for name, (edit, found, expected) in CONFIGS.items()
    ]
    return configs + [Case(name, "weights", _job(edit), *rest) for name, (edit, *rest) in FILES.items()]
