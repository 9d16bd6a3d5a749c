"""Folders whose small files ask for time or memory without end. What they are made of is small."""

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Edit = Callable[[Path], object]
MILLION, BILLION = 10**6, 10**9


def _spec(name: str = "tokenizer.json", **changed: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / name
        spec = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(
            json.dumps(spec | {key: value(spec) if callable(value) else value for key, value in changed.items()})
        )

    return edit


def _config(**changed: Any) -> Edit:
    return _spec("tokenizer_config.json", **changed)


def _model_config(**changed: Any) -> Edit:
    return _spec("config.json", **changed)


def _replacing(*pairs: tuple[str, str], regex: bool = False) -> Edit:
    how = "Regex" if regex else "String"
    parts = [{"type": "Replace", "pattern": {how: old}, "content": new} for old, new in pairs]
    return _spec(normalizer={"type": "Sequence", "normalizers": parts})


def _splitting(pattern: str) -> Edit:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _spec(pre_tokenizer=part)


def _added(count: int) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": 10_000 + at, "content": f"<|{at}|>", "special": True, **flags} for at in range(count)]


def _charsmap(longest: int) -> str:
    return base64.b64encode((1024).to_bytes(4, "little") + bytes(1024) + b"x" * longest + b"\0").decode()


def _of_model(**changed: Any) -> Edit:
    return _spec(model=lambda spec: spec["model"] | changed)


def _pipe(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return edit


def _both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def _words(kind: str, **values: Any) -> Edit:
    vocab = {character: at for at, character in enumerate("[]abcdefg")} | {"[UNK]": 9}
    return _spec(model={"type": kind, "vocab": vocab, "unk_token": "[UNK]", **values}, pre_tokenizer=None)


COSTS: dict[str, tuple[Edit, str]] = {
    "three normalizers that expand": (
        _replacing(("a", "b" * 1000), ("b", "c" * 1000), ("c", "d" * 1000)),
        "normalizer",
    ),
    "forty that double": (_replacing(*[("a", "aa")] * 40), "normalizer"),
    "one that expands a rare word": (_replacing(("zqx", "y" * MILLION)), "normalizer"),
    "one that expands each character": (_replacing((".", "y" * 100_000), regex=True), "normalizer"),
    "one that expands nothing": (_replacing(("", "y" * 100_000), regex=True), "normalizer"),
    "a long beginning": (_spec(normalizer={"type": "Prepend", "prepend": "x" * MILLION}), "before a text"),
    "a charsmap that expands": (
        _spec(normalizer={"type": "Precompiled", "precompiled_charsmap": _charsmap(10**5)}),
        "normalizer",
    ),
    "a decoder that expands": (
        _spec(decoder={"type": "Replace", "pattern": {"String": "a"}, "content": "b" * MILLION}),
        "decoder",
    ),
    "a post-processor that copies": (
        _spec(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10_000,
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {},
            }
        ),
        "post-processor",
    ),
    "an expression that backtracks": (_splitting(r"(a+)+$"), "panic"),
    "another": (_splitting(r"(\s|\s\s)+x"), "panic"),
    "one that takes the third power": (_splitting(r"a*a*a*b|\s*\s*\s*x"), ""),
    "one that draws": (_words("BPE", merges=[], dropout=0.5), "dropout"),
    "words of any length": (
        _words("WordPiece", max_input_chars_per_word=BILLION, continuing_subword_prefix="##"),
        "words of 1,000,000,000 characters",
    ),
    "a long end of words": (_words("BPE", merges=[], end_of_word_suffix="x" * 5 * MILLION), "to each word"),
    "many added tokens": (_spec(added_tokens=_added(110_000)), "110,000 added tokens"),
    "a token of a megabyte": (_words("BPE", merges=[], vocab={"x" * MILLION: 0}), "a token of"),
    "a trie that is deep": (
        _spec(model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["ab" * 100_000, -1.0]]}),
        "",
    ),
    "a billion labels": (_model_config(model_type="llama", num_labels=BILLION), "num_labels"),
    "a billion layers": (_model_config(model_type="qwen2", num_hidden_layers=BILLION), "num_hidden_layers"),
    "a billion labels of another family": (_model_config(model_type="bert", num_labels=BILLION), "num_labels"),
    "a billion layers of a part": (_model_config(model_type="x", vision_config={"n_layers": BILLION}), "n_layers"),
    "a config that is a pipe": (_pipe("tokenizer_config.json"), "no regular file"),
    "a model's config that is a pipe": (_pipe("config.json"), "no regular file"),
    "a template that is a pipe": (_pipe("chat_template.jinja"), "no regular file"),
    "a config of 20 MB": (_config(note="x" * 20 * MILLION), "bytes"),
    "a tokenizer of 200 MB": (lambda folder: os.truncate(folder / "tokenizer.json", 200 * MILLION), "bytes"),
    "lists in lists": (lambda folder: (folder / "tokenizer_config.json").write_text("[" * 10**5), "no JSON"),
}

# What the classes of transformers would make of a tokenizer's config.
SLOW: dict[str, tuple[Edit, str]] = {
    "a billion extra ids": (_config(tokenizer_class="T5Tokenizer", extra_ids=BILLION), "does not survive"),
    "special tokens that are compared with each other": (
        _config(extra_special_tokens=[f"<{at}>" for at in range(300_000)]),
        "does not survive",
    ),
    "arguments by place": (_config(tokenizer_class="T5Tokenizer", init_inputs=[None, "a", "b", "c", BILLION]), ""),
}
