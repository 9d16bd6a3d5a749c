"""Rows of benchmarks from JSON Lines, in the fields that the harness's own tasks read.

One file a benchmark: ``<name>.jsonl`` with the rows that are asked, and ``<name>_fewshot.jsonl`` with rows in the same
form for the examples before each question; without it the examples are other rows of the first file. A row may have
the fields of the public dataset, or these:

- ``hellaswag``: ``ctx`` ("activity: text"), ``endings``, ``label``
- ``arc_challenge``: ``question``, ``choices`` (strings), ``label``
- ``mmlu``: ``subject``, ``question``, ``choices`` (four strings), ``label``
- ``truthfulqa_mc``: ``question``, ``mc2_choices``, ``mc2_labels`` (1 for true)
- ``winogrande``: ``sentence`` with one ``_``, ``option1``, ``option2``, ``answer`` ("1" or "2")
- ``gsm8k``: ``question``, ``answer`` that ends in ``#### number``

A ``label`` is the number of the right choice, from 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctpd_nemo.errors import InputError

Fields = dict[str, Any]


def read_local_rows(folder: Path, name: str) -> tuple[list[Fields], list[Fields] | None]:
    """The rows of a benchmark, and those for examples, or ``None`` where there is no file of them.

    Raises:
        InputError: No such file, or a row of another form.
    """
    asked = _read(folder / f"{name}.jsonl", name)
    examples = folder / f"{name}_fewshot.jsonl"
    return asked, _read(examples, name) if examples.exists() else None


def _read(path: Path, name: str) -> list[Fields]:
    if not path.is_file():
        raise InputError(str(path), "no such file", f"rows of {name} as JSON Lines")
    rows = []
    # Bytes, so that a line that is no UTF-8 is an error of that line.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                rows.append(_FORMS[name](json.loads(line.decode())))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
                raise InputError(f"{path}:{number}", repr(error), f"a row of {name}") from error
    if not rows:
        raise InputError(str(path), "no rows", f"rows of {name}")
    return rows


def _choice(label: Any, choices: list[str]) -> int:
    number = int(label)
    if not 0 <= number < len(choices):
        raise ValueError(f"label {number} of {len(choices)} choices")
    return number


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{value!r} is no list of strings")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no string")
    return value


def _hellaswag(row: Fields) -> Fields:
    endings = _texts(row["endings"])
    if "ctx_a" in row:
        activity, first, second = (_text(row[key]) for key in ("activity_label", "ctx_a", "ctx_b"))
    else:
        activity, found, first = _text(row["ctx"]).partition(": ")
        if not found:
            raise ValueError("ctx without 'activity: '")
        second = ""
    label = _choice(row["label"], endings)
    return {"activity_label": activity, "ctx_a": first, "ctx_b": second, "endings": endings, "label": str(label)}


def _arc(row: Fields) -> Fields:
    choices = row["choices"]
    if isinstance(choices, dict):
        texts, labels, key = _texts(choices["text"]), _texts(choices["label"]), str(row["answerKey"])
        labels.index(key)
    else:
        texts = _texts(choices)
        labels = [chr(ord("A") + index) for index in range(len(texts))]
        key = labels[_choice(row["label"], texts)]
    return {"question": _text(row["question"]), "choices": {"text": texts, "label": labels}, "answerKey": key}


def _mmlu(row: Fields) -> Fields:
    choices = _texts(row["choices"])
    if len(choices) != 4:
        raise ValueError(f"{len(choices)} choices, not 4")
    answer = _choice(row["answer"] if "answer" in row else row["label"], choices)
    subject = _text(row["subject"])
    return {"subject": subject, "question": _text(row["question"]), "choices": choices, "answer": answer}


def _truthfulqa(row: Fields) -> Fields:
    targets = row.get("mc2_targets") or {"choices": row["mc2_choices"], "labels": row["mc2_labels"]}
    choices, labels = _texts(targets["choices"]), [int(label) for label in targets["labels"]]
    if len(labels) != len(choices) or 1 not in labels or not set(labels) <= {0, 1}:
        raise ValueError(f"labels {labels} of {len(choices)} choices")
    return {"question": _text(row["question"]), "mc2_targets": {"choices": choices, "labels": labels}}


def _winogrande(row: Fields) -> Fields:
    sentence, answer = _text(row["sentence"]), str(row["answer"])
    if sentence.count("_") != 1 or answer not in ("1", "2"):
        raise ValueError(f"sentence with {sentence.count('_')} gaps, answer {answer!r}")
    return {"sentence": sentence, **{key: _text(row[key]) for key in ("option1", "option2")}, "answer": answer}


def _gsm8k(row: Fields) -> Fields:
    answer = _text(row["answer"])
    if "#### " not in answer:
        raise ValueError("an answer without '#### '")
    return {"question": _text(row["question"]), "answer": answer}


_FORMS: dict[str, Callable[[Fields], Fields]] = {
    "hellaswag": _hellaswag,
    "arc_challenge": _arc,
    "mmlu": _mmlu,
    "truthfulqa_mc": _truthfulqa,
    "winogrande": _winogrande,
    "gsm8k": _gsm8k,
}
