"""The small files of a model folder: how large each may be, so that reading them takes little, whatever they hold."""

from pathlib import Path
from typing import Any

from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object

_MIB = 2**20
# At most. Real ones: a tokenizer of 256,000 pieces has 35 MB, its config with thousands of added tokens one, a template
# 30 kB.
LARGEST = {
    "config.json": _MIB,
    "generation_config.json": _MIB,
    "processor_config.json": _MIB,
    "preprocessor_config.json": _MIB,
    "adapter_config.json": _MIB,
    "params.json": _MIB,
    "tokenizer.json": 96 * _MIB,
    "tokenizer_config.json": 16 * _MIB,
    "special_tokens_map.json": 4 * _MIB,
    "added_tokens.json": 16 * _MIB,
    "vocab.json": 32 * _MIB,
    "vocab.txt": 32 * _MIB,
    "merges.txt": 32 * _MIB,
    "tekken.json": 64 * _MIB,
    "tokenizer.model": 32 * _MIB,
    "spiece.model": 32 * _MIB,
    "sentencepiece.bpe.model": 32 * _MIB,
    "chat_template.jinja": _MIB,
    "chat_template.json": _MIB,
}
# In a folder ``additional_chat_templates``.
_MOST_TEMPLATES = 100
# Each makes an entry of a table, or a module of a model.
_MOST_LABELS, _MOST_LAYERS = 100_000, 20_000


def check_files(folder: str | Path) -> list[Path]:
    """Look at the kind and size of the small files that ``transformers`` may read of a folder.

    Returns:
        Those that are there.

    Raises:
        InputError: One is no regular file, or larger than any.
    """
    folder = Path(folder)
    templates = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if len(templates) > _MOST_TEMPLATES:
        raise InputError(str(templates[0].parent), f"{len(templates):,} templates", f"{_MOST_TEMPLATES} at most")
    limits = {folder / name: largest for name, largest in LARGEST.items()}
    limits |= dict.fromkeys(templates, LARGEST["chat_template.jinja"])
    there = [path for path in limits if path.exists()]
    for path in there:
        if not path.is_file():
            raise InputError(str(path), "no regular file", "a file")
        if path.stat().st_size > limits[path]:
            raise InputError(str(path), f"{path.stat().st_size:,} bytes", f"{limits[path]:,} bytes at most")
    return there


def read_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        InputError: It cannot be read, or asks ``transformers`` for tables or modules without end.
    """
    path = Path(folder) / "config.json"
    config = read_object(path, "the config of a model", LARGEST["config.json"])
    check_counts(config, str(path))
    return config


def check_counts(config: dict[str, Any], place: str) -> None:
    """Stop where a model's config has a number of which ``transformers`` would make as many objects.

    Raises:
        InputError: It names the key.
    """
    left = [config]
    while left:
        for key, value in left.pop().items():
            if isinstance(value, dict):
                left.append(value)
            elif isinstance(value, int):
                most = _MOST_LABELS if key.startswith(("num_", "n_")) else None
                most = _MOST_LAYERS if "layer" in key else most
                if most is not None and value > most:
                    raise InputError(f"{place}, {key}", f"{value:,}"[:100], f"{most:,} at most")
