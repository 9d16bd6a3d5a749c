"""The model card: README.md of an exported folder in Hugging Face's form.

The metadata is written by ``huggingface_hub``'s ``ModelCardData``, so that no value can break out of its YAML; in the
body every value stands between backquotes. What is ours stands between two markers: text outside them is the user's
and is kept, and a README.md without them is left alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.base_models import (
    RECORD,
    BaseModel,
    base_of,
    of_record,
    plain,
    read_json,
    terms_of,
    without_places,
)
from ctpd_nemo.evaluation.front_matter import read_card, split_card
from ctpd_nemo.text_files import replace_text

logger = logging.getLogger(__name__)

BEGIN, END = "<!-- ctpd_nemo: begin -->", "<!-- ctpd_nemo: end -->"
EVALUATION = "evaluation.json"
# Of a run's config, those that the card shows.
_SECTIONS = ("method", "optim", "trainer", "data", "precision", "parallel")
# Fingerprints of a run that say in other words what the config says.
_NOT_DATA = ("method", "optim", "steps", "precision")
_VERSIONS = ("ctpd-nemo", "torch", "megatron-core", "nemo-toolkit", "transformers")


def write_card(folder: str | Path, record: Mapping[str, Any] | None = None, name: str | None = None) -> bool:
    """Write or renew ``README.md`` of an exported folder.

    Args:
        folder: The export.
        record: What it was made of: ``config`` (of the run), ``fingerprints``, ``policy`` (``student`` or
            ``teacher``), and ``bases``, the models by what they are, or their folders ``student`` and ``teacher``.
            Kept as ``ctpd_nemo.json`` in the folder; ``None`` reads it from there.
        name: Of the model; by default ``model_name`` of the folder.

    Returns:
        Whether the card was written; ``False`` where README.md is a user's own.

    Raises:
        InputError: The record or ``evaluation.json`` of the folder is not what an export and an evaluation write.
    """
    folder = Path(folder)
    name = plain(name or model_name(folder))
    if record is None:
        record = read_record(folder / RECORD)
    else:
        bases = {side: asdict(base) for side, base in _bases(record).items()}
        record = {**record, "bases": bases, "versions": {name: _version(name) for name in _VERSIONS}}
        replace_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=True) + "\n")
    path = folder / "README.md"
    before, after = "", "\n"
    own: dict[str, Any] = {}
    if path.exists():
        # With bytes of another encoding it is a user's own.
        text = read_card(path)
        parts = None if text is None else _own_text(text)
        if parts is None:
            logger.warning("%s has no marks of ours: left as it is", path)
            return False
        own, before, after = parts
    evaluation = read_evaluation(folder)
    ours = _metadata(name, record, evaluation)
    # What a user has set since, such as the licence, stays. Results are new, and have the name where there are some.
    results = {key: value for key, value in ours.items() if key == "model-index"}
    if results:
        own.pop("model_name", None)
    front = yaml.safe_dump({**ours, **own, **results}, sort_keys=False, allow_unicode=False)
    replace_text(path, f"---\n{front}---\n{before}{BEGIN}\n{_body(name, record, evaluation)}{END}{after}")
    return True


def model_name(folder: str | Path) -> str:
    """What an export is called by its folder; that of a pipeline's stage, ``export``, by its stage."""
    path = Path(folder).resolve()
    return path.parent.name if path.name == "export" and path.parent.name else path.name


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        # A checkout on the path is no installed package.
        return "not installed"


def _own_text(text: str) -> tuple[dict[str, Any], str, str] | None:
    """The user's metadata, and text before and after our part; ``None`` where the card is not ours."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        return None
    parts = split_card(text)
    if parts is None:
        return None
    metadata, rest = parts
    return metadata, rest[: rest.index(BEGIN)], rest[rest.index(END) + len(END) :]


def _metadata(name: str, record: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["dataset"],
            dataset_name=row["dataset"],
            metric_type=row["metric"],
            metric_name=row["metric"],
            metric_value=row["value"],
        )
        for row in evaluation_rows(evaluation)
    ]
    bases, method = _bases(record), _method(record)
    terms = terms_of(bases)
    data = ModelCardData(
        base_model=[base.name for base in bases.values()] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=terms["license"],
        license_name=terms.get("license_name"),
        license_link=terms.get("license_link"),
        tags=["ctpd", "preference-distillation", *([plain(method)] if method != "ctpd" else [])],
        datasets=None,
        model_name=name,
        eval_results=results or None,
    )
    return data.to_dict()


def _bases(record: Mapping[str, Any]) -> dict[str, BaseModel]:
    """The models that it was made of, by what they were to it; of an older record from their folders."""
    known = of_record(record)
    folders = {side: record[side] for side in ("student", "teacher") if record.get(side)}
    return known or {side: base_of(str(folder)) for side, folder in folders.items()}


def _method(record: Mapping[str, Any]) -> str:
    method = (record.get("config") or {}).get("method") or {}
    return str(method.get("name", "unknown"))


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of an ``evaluation.json``: ``dataset``, ``metric``, ``value``, ``standard_error`` and ``n`` a row."""
    rows = []
    for name, task in (evaluation.get("tasks") or {}).items():
        rows.append({"dataset": name, **{key: task[key] for key in ("metric", "value", "standard_error", "n")}})
    pairs = evaluation.get("preferences")
    if pairs:
        # Answers are of the prompts that were answered and have one, which may be few of the pairs.
        counts = pairs.get("counts") or {}
        # Of pairs that all ask the same, no error is known.
        facts = counts | (pairs.get("facts") or {})
        for name, error in pairs["standard_errors"].items():
            if name == "reward_margin" and not pairs.get("calibration"):
                # There is nothing that it is measured against.
                continue
            n = counts.get(name, pairs["n"])
            error = error if facts.get(name, n) > 1 else None
            row = {"metric": name, "value": pairs[name], "standard_error": error, "n": n}
            rows.append({"dataset": "held-out pairs", **row})
        if pairs.get("calibration"):
            found = pairs["calibration"]
            values = {
                "expected_calibration_error": (found["expected_calibration_error"], None),
                "brier_score": (
                    found["brier_score"],
                    found["brier_score_standard_error"] if facts.get("reward_margin", pairs["n"]) > 1 else None,
                ),
            }
            for name, (value, error) in values.items():
                row = {"metric": name, "value": value, "standard_error": error, "n": pairs["n"]}
                rows.append({"dataset": "held-out pairs", **row})
        for name, lengths in pairs["lengths"].items():
            row = {"metric": f"mean_tokens_{name}", "value": lengths["mean"], "n": lengths["n"]}
            rows.append({"dataset": "held-out pairs", "standard_error": lengths["mean_standard_error"], **row})
    return rows


def _body(name: str, record: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    config = record.get("config") or {}
    lines = [f"# {name}", ""]
    lines += [
        "A causal language model trained by preference distillation across tokenizers"
        f" ([CTPD](https://arxiv.org/abs/2601.11865)); method: {_code(_method(record))}.",
        "",
        "## Method and hyperparameters",
        "",
        *_config_table(config),
        "",
        "## Data",
        "",
    ]
    prints = {name: value for name, value in (record.get("fingerprints") or {}).items() if name not in _NOT_DATA}
    lines += [f"- {_code(name)}: {_code(value)}" for name, value in prints.items()]
    lines += [] if prints else ["No fingerprints are known."]
    lines += ["", "## Evaluation", "", *evaluation_table(evaluation), "", "## Licence", ""]
    for side, base in _bases(record).items():
        said = (
            f"its folder states {_code(base.stated)}"
            if base.stated
            else "its folder states none, which must be checked"
        )
        link = f" ({_code(base.license_link)})" if base.license_link else ""
        lines.append(f"- {side} {_code(base.name)}: {said}{link}.")
    lines += ["", "The terms of both, and of the data, may bind this model.", "", "## How to reproduce", ""]
    if config:
        lines += [
            "In a checkout of ctpd_nemo, with the path of this card's folder for `FOLDER`, and under `torchrun` where"
            " `parallel` asks for more than one process:",
            "",
            "    python tools/train.py --from-run FOLDER",
            "",
            f"It trains with `config` of `{RECORD}` in that folder, which names files and folders and not where they"
            " are: that is given behind it, as `model.student.path=...` and `data.train=[...]`.",
        ]
    lines += ["", "| package | version |", "|---|---|"]
    lines += [f"| {name} | {_code(value)} |" for name, value in (record.get("versions") or {}).items()]
    return "\n".join(lines) + "\n"


def _config_table(config: Mapping[str, Any]) -> list[str]:
    config = without_places(config)
    rows = [("seed", config["seed"])] if "seed" in config else []
    for side, values in (config.get("model") or {}).items():
        given = values if isinstance(values, Mapping) else {}
        # What decides how a conversation is written; whoever asks the model has to say the same variables.
        keys = ("tokenizer", "chat_template", "chat_template_kwargs")
        rows += [(f"model.{side}.{key}", given[key]) for key in keys if given.get(key)]
    for section in _SECTIONS:
        rows += [(f"{section}.{key}", value) for key, value in (config.get(section) or {}).items()]
    if not rows:
        return ["The config of the run is not known."]
    return ["| key | value |", "|---|---|", *(f"| {_code(key)} | {_code(value)} |" for key, value in rows)]


def evaluation_table(evaluation: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table of an ``evaluation.json``."""
    rows = evaluation_rows(evaluation)
    if not rows:
        return ["Not evaluated yet: `python tools/evaluate.py folder=...` writes this table."]
    lines = ["| data | metric | value | standard error | n |", "|---|---|---|---|---|"]
    for row in rows:
        error = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        lines.append(f"| {row['dataset']} | {row['metric']} | {row['value']:.4f} | {error} | {row['n']} |")
    return lines


def _code(value: Any) -> str:
    """A value as inline code that no character of it can end: on one line, in ASCII, without backquotes and bars."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text.encode("unicode_escape").decode("ascii")
    for character in "`|<>":
        text = text.replace(character, f"\\x{ord(character):02x}")
    return f"`{text}`" if text.strip() else "(empty)"


def read_evaluation(folder: Path) -> dict[str, Any]:
    """``evaluation.json`` of a folder, or an empty object where there is none.

    Raises:
        InputError: It is not what ``evaluate`` writes.
    """
    path = folder / EVALUATION
    evaluation = read_json(path)
    try:
        for row in evaluation_rows(evaluation):
            for name in ("value", "n"):
                float(row[name])
            float(row["standard_error"] or 0.0)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"what no evaluation wrote ({error!r})"
        raise InputError(str(path), found, "an evaluation of tools/evaluate.py, or no such file") from error
    return evaluation


def read_record(path: Path) -> dict[str, Any]:
    """``ctpd_nemo.json`` of a folder, or an empty object where there is none.

    Raises:
        InputError: It is not what an export writes.
    """
    record = read_json(path)
    parts = {name: record.get(name) for name in ("config", "fingerprints", "bases", "versions")}
    config = parts["config"] if isinstance(parts["config"], dict) else {}
    sections = {f"config.{name}": config.get(name) for name in _SECTIONS}
    for name, value in (parts | sections).items():
        if not isinstance(value, dict | None):
            raise InputError(f"{path}, {name}", repr(value), "keys and their values, as an export writes them")
    return record
