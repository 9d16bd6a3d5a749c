"""What travels with the weights of an exported folder: config, tokenizer, chat templates, stop tokens, licence."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object
from ctpd_nemo.text_files import naming

# The tokenizer in its many forms, and its templates; transformers keeps named ones in a folder.
_TOKENIZER = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
_TERMS = ("LICENSE*", "NOTICE*")
_TOKENIZER_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class ReaderFiles:
    """How an exported model reads and stops.

    Attributes:
        tokenizer: Folder of its tokenizer.
        tokenizer_class: Of transformers, with which that folder was loaded.
        chat_template: In place of that folder's default template; ``None`` keeps it.
        stop_ids: Tokens that end generation, the one that training ended turns with first.
        token_ids: Other ids of ``generation_config.json`` that are this tokenizer's, by name.
    """

    tokenizer: Path
    tokenizer_class: str
    chat_template: str | None
    stop_ids: Sequence[int]
    token_ids: dict[str, int]


def copy_companions(
    reference: Path, folder: Path, dtype: torch.dtype | None, reader: ReaderFiles | None = None
) -> None:
    """Copy what is not weights: ``config.json`` (its dtype replaced where one is given), tokenizer, licence.

    Raises:
        InputError: A file of the reference or of the tokenizer is not what it should be.
    """
    if dtype is None:
        _copy(reference / "config.json", folder)
    else:
        config = json.loads((reference / "config.json").read_text(encoding="utf-8"))
        # transformers wrote torch_dtype until 4.55 and dtype since; both read both.
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        _write_json(folder / "config.json", config)
    tokenizer = reference if reader is None else reader.tokenizer
    _copy_all(reference, folder, _TERMS)
    _copy_all(tokenizer, folder, _TOKENIZER)
    if reader is None:
        _copy_all(reference, folder, (_GENERATION,))
        return
    if reader.chat_template is not None:
        _replace_template(folder, reader.chat_template)
    if tokenizer.resolve() != reference.resolve():
        _name_class(folder, reader.tokenizer_class)
    _write_generation_config(reference, folder, reader)


def stated_stop_ids(folder: Path) -> list[int]:
    """The tokens that end generation by a model folder's own defaults.

    Raises:
        InputError: They are something else than ids.
    """
    return _ids(_generation_defaults(folder), folder)


def _generation_defaults(folder: Path) -> dict[str, Any]:
    """``generation_config.json``; without one, what transformers takes from ``config.json``."""
    if (folder / _GENERATION).is_file():
        return read_object(folder / _GENERATION)
    config = read_object(folder / "config.json")
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}


def _ids(defaults: dict[str, Any], folder: Path) -> list[int]:
    found = defaults.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
        raise InputError(f"{folder / _GENERATION}, eos_token_id", repr(found), "an id of a token, or some")
    return ids


def _write_generation_config(reference: Path, folder: Path, reader: ReaderFiles) -> None:
    """The reference's defaults with the stops of this reader; the very same file where they are the same."""
    defaults = _generation_defaults(reference)
    is_there = (reference / _GENERATION).is_file()
    same_ids = all(defaults.get(name) == index for name, index in reader.token_ids.items())
    if set(_ids(defaults, reference)) == set(reader.stop_ids) and same_ids:
        if is_there:
            _copy(reference / _GENERATION, folder)
        return
    stops = list(reader.stop_ids)
    defaults |= {**reader.token_ids, "eos_token_id": stops if len(stops) > 1 else stops[0]}
    _write_json(folder / _GENERATION, defaults)


def _replace_template(folder: Path, template: str) -> None:
    """Make a template the default one; those with other names stay."""
    for path in folder.glob("chat_template*"):
        path.unlink()
    with naming(folder / _TEMPLATE):
        (folder / _TEMPLATE).write_text(template, encoding="utf-8", newline="")
    path = folder / _TOKENIZER_CONFIG
    config = read_object(path) if path.is_file() else {}
    if "chat_template" not in config:
        return
    named = config.pop("chat_template")
    for one in named if isinstance(named, list) else ():
        name, text = (one.get(key) if isinstance(one, dict) else None for key in ("name", "template"))
        if not isinstance(name, str) or not isinstance(text, str) or not name or Path(name).name != name:
            raise InputError(f"{path}, chat_template", repr(one), "templates, each with a name and its text")
        if name != "default":
            (folder / "additional_chat_templates").mkdir(exist_ok=True)
            own = folder / "additional_chat_templates" / f"{name}.jinja"
            with naming(own):
                own.write_text(text, encoding="utf-8", newline="")
    _write_json(path, config)


def _name_class(folder: Path, tokenizer_class: str) -> None:
    """Have transformers load a tokenizer as where it came from: else it goes by the model that it lies beside."""
    path = folder / _TOKENIZER_CONFIG
    config = read_object(path) if path.is_file() else {}
    if config.get("tokenizer_class") is None:
        _write_json(path, {**config, "tokenizer_class": tokenizer_class})


def _copy_all(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    for path in sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
        _copy(path, folder / path.parent.relative_to(source))


def _copy(path: Path, folder: Path) -> None:
    with naming(folder / path.name):
        folder.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with naming(path):
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
