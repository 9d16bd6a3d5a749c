"""Config, tokenizer, templates and stops that go with exported weights; and weights that are read back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from ctpd_nemo.convert import export
from ctpd_nemo.convert.companions import ReaderFiles, copy_companions, stated_stop_ids
from ctpd_nemo.convert.export import HFWriter, tensor_sum
from ctpd_nemo.errors import InputError

OWN, TRAINED = "{{ messages[0].content }}", "{{ messages[0].content + '<end>' }}\n"
TEMPLATES = {"default": OWN, "tool_use": "{{ tools }}", "rag": "{{ documents }}"}


def tokenizer_in(folder: Path, templates: str | dict[str, str] | None, as_files: bool) -> Path:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<end>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder, save_jinja_files=as_files)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 3, "bos_token_id": 0}))
    return folder


def reader(tokenizer: Path, **changes: Any) -> ReaderFiles:
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": None, "stop_ids": [3], "token_ids": {}}
    return ReaderFiles(tokenizer=tokenizer, **{**fields, **changes})  # type: ignore[arg-type]


def copied(reference: Path, out: Path, files: ReaderFiles | None) -> Path:
    out.mkdir()
    copy_companions(reference, out, None, files)
    return out


@pytest.mark.parametrize("as_files", [True, False], ids=["files", "config"])
def test_all_named_templates_are_exported(as_files: bool, tmp_path: Path) -> None:
    base = tokenizer_in(tmp_path / "base", TEMPLATES, as_files)
    for name, files in (("plain", None), ("with a reader", reader(base))):
        assert AutoTokenizer.from_pretrained(copied(base, tmp_path / name, files)).chat_template == TEMPLATES


@pytest.mark.parametrize("as_files", [True, False], ids=["files", "config"])
@pytest.mark.parametrize("own", [None, OWN, TEMPLATES], ids=["none", "one", "named"])
def test_a_template_that_was_given_is_the_default_one_and_named_ones_stay(
    own: str | dict[str, str] | None, as_files: bool, tmp_path: Path
) -> None:
    base = tokenizer_in(tmp_path / "base", own, as_files)
    out = copied(base, tmp_path / "out", reader(base, chat_template=TRAINED))
    named = {name: text for name, text in (own if isinstance(own, dict) else {}).items() if name != "default"}
    assert AutoTokenizer.from_pretrained(out).chat_template == ({"default": TRAINED, **named} if named else TRAINED)
    assert (out / "chat_template.jinja").read_bytes() == TRAINED.encode()
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())


def test_named_templates_never_become_paths(tmp_path: Path) -> None:
    base = tokenizer_in(tmp_path / "base", OWN, False)
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for name in ("../evil", "/tmp/evil", "a/b", ""):
        path.write_text(json.dumps({**config, "chat_template": [{"name": name, "template": "x"}]}))
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        with pytest.raises(InputError, match="expected templates, each with a name and its text"):
            copied(base, out, reader(base, chat_template=TRAINED))
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    ("defaults", "stops", "expected"),
    [
        ({"eos_token_id": 3, "temperature": 0.5, "do_sample": True}, [4, 3], [4, 3]),
        ({"eos_token_id": [3, 4]}, [4, 3], [3, 4]),
        ({"eos_token_id": 4}, [4], 4),
        ({"temperature": 0.5, "do_sample": True}, [4], 4),
        (None, [4, 3], [4, 3]),
        (None, [3], None),
    ],
)
def test_stops_of_the_trained_side_join_the_base_s_defaults(
    defaults: dict[str, Any] | None, stops: list[int], expected: Any, tmp_path: Path
) -> None:
    base = tokenizer_in(tmp_path / "base", OWN, True)
    if defaults is not None:
        GenerationConfig(**defaults).save_pretrained(base)
    out = copied(base, tmp_path / "out", reader(base, stop_ids=stops))
    path = out / "generation_config.json"
    if expected is None:
        # As config.json says it.
        assert not path.exists()
        return
    found = GenerationConfig.from_pretrained(out)
    assert found.eos_token_id == expected
    assert (found.temperature, found.do_sample) == (
        (defaults or {}).get("temperature"),
        (defaults or {}).get("do_sample"),
    )
    if defaults and defaults.get("eos_token_id") == expected:
        assert path.read_bytes() == (base / "generation_config.json").read_bytes()


@pytest.mark.parametrize("eos", ["3", [3, "4"], {"a": 1}, True, 1.5])
def test_stops_that_are_no_ids_are_named(eos: Any, tmp_path: Path) -> None:
    base = tokenizer_in(tmp_path / "base", OWN, True)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(InputError, match=r"generation_config\.json, eos_token_id: found .*expected an id of a token"):
        stated_stop_ids(base)


def test_a_tensor_that_is_not_on_disk_as_it_was_written_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = export.save_file

    def flipped(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        changed["b"].view(torch.uint8)[0, 3] ^= 1
        save(changed, path, metadata=metadata)

    monkeypatch.setattr(export, "save_file", flipped)
    writer = HFWriter(tmp_path / "out", 10**6)
    writer.__enter__()
    writer.add("a", torch.ones(3))
    writer.add("b", torch.ones(2, 2, dtype=torch.bfloat16))
    with pytest.raises(InputError, match=r"model\.safetensors: found b with other bits"):
        writer.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_what_a_check_of_the_whole_folder_raises_leaves_no_folder(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def check(folder: Path) -> None:
        seen.append(sorted(path.name for path in folder.iterdir()))
        raise InputError("here", "this", "that")

    with pytest.raises(InputError, match="here"), HFWriter(tmp_path / "out", 10**6, check) as writer:
        writer.add("a", torch.ones(3))
    assert seen == [["model.safetensors"]]
    assert list(tmp_path.iterdir()) == []


def test_the_sum_of_a_tensor_is_of_its_bits_its_shape_and_its_dtype() -> None:
    make: list[Callable[[], Tensor]] = [
        lambda: torch.zeros(4),
        lambda: torch.zeros(2, 2),
        lambda: torch.zeros(8, dtype=torch.bfloat16),
        lambda: torch.zeros(8, dtype=torch.float16),
        lambda: -torch.zeros(4),
        lambda: torch.full((4,), torch.nan),
        lambda: torch.zeros(0),
        lambda: torch.zeros(0, 3),
    ]
    assert len({tensor_sum(one()) for one in make}) == len(make)
    assert [tensor_sum(one()) for one in make] == [tensor_sum(one()) for one in make]
