"""The model card: README.md of an exported folder in Hugging Face's form.

The metadata is written by ``huggingface_hub``'s ``ModelCardData``, so that no value can break out of its YAML; in the
body every value stands between backquotes. What is ours stands between two markers: text outside them is the user's
and is kept, and a README.md without them is left alone.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object
from ctpd_nemo.text_files import replace_text

logger = logging.getLogger(__name__)

BEGIN, END = "<!-- ctpd_nemo: begin -->", "<!-- ctpd_nemo: end -->"
RECORD = "ctpd_nemo.json"
EVALUATION = "evaluation.json"
# Of a run's config, those that the card shows.
_SECTIONS = ("method", "optim", "trainer", "data", "precision", "parallel")
# Fingerprints of a run that say in other words what the config says.
_NOT_DATA = ("method", "optim", "steps", "precision")
_VERSIONS = ("ctpd-nemo", "torch", "megatron-core", "nemo-toolkit", "transformers")
# Of ``huggingface_hub``: models--OWNER--NAME/snapshots/COMMIT.
_CACHED = re.compile(r"(?:^|/)models--([^/]+)/snapshots/[^/]+/?\Z")
_FRONT = re.compile(r"\A---\s*\n(.*?\n)---\s*\n", re.DOTALL)


def write_card(folder: str | Path, record: Mapping[str, Any] | None = None, name: str | None = None) -> bool:
    """Write or renew ``README.md`` of an exported folder.

    Args:
        folder: The export.
        record: What it was made of: ``config`` (of the run), ``fingerprints``, ``policy`` (``student`` or
            ``teacher``), and the folders ``student`` and ``teacher``. Kept as ``ctpd_nemo.json`` in the folder;
            ``None`` reads it from there.
        name: Of the model; by default ``model_name`` of the folder.

    Returns:
        Whether the card was written; ``False`` where README.md is a user's own.

    Raises:
        InputError: The record or ``evaluation.json`` of the folder is not what an export and an evaluation write.
    """
    folder = Path(folder)
    name = _plain(name or model_name(folder))
    if record is None:
        record = read_record(folder / RECORD)
    else:
        record = {**_licences(record), **record, "versions": {name: _version(name) for name in _VERSIONS}}
        replace_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=True) + "\n")
    path = folder / "README.md"
    before, after = "", "\n"
    own: dict[str, Any] = {}
    if path.exists():
        # With bytes of another encoding it is a user's own.
        parts = _own_text(path.read_bytes().decode("utf-8", "replace"))
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
    front = _FRONT.match(text)
    try:
        metadata = yaml.safe_load(front.group(1)) if front else {}
    except yaml.YAMLError:
        return None
    if not isinstance(metadata, dict):
        return None
    rest = text[front.end() :] if front else text
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
    bases = [repository(str(record[side])) for side in ("student", "teacher") if record.get(side)]
    method = _method(record)
    data = ModelCardData(
        base_model=bases or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license="other",
        license_name="see-license-of-the-base-models",
        tags=["ctpd", "preference-distillation", *([_plain(method)] if method != "ctpd" else [])],
        datasets=None,
        model_name=name,
        eval_results=results or None,
    )
    return data.to_dict()


def _method(record: Mapping[str, Any]) -> str:
    method = (record.get("config") or {}).get("method") or {}
    return str(method.get("name", "unknown"))


def repository(folder: str) -> str:
    """What a model is called on the Hub: ``owner/name`` where its folder is in a cache of the Hub, else its own name.

    It can stand in ``base_model``: letters, digits, ``_``, ``-`` and ``.``, neither of these two twice in a row,
    and one slash.
    """
    cached = _CACHED.search(folder)
    parts = cached.group(1).split("--", 1) if cached else [Path(folder).name]
    singles = (re.sub(r"--+|\.\.+", lambda marks: marks[0][0], _plain(part)) for part in parts)
    return "/".join(single.removesuffix(".git").strip("-.") or "unnamed" for single in singles)


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:96] or "unnamed"


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of an ``evaluation.json``: ``dataset``, ``metric``, ``value``, ``standard_error`` and ``n`` a row."""
    rows = []
    for name, task in (evaluation.get("tasks") or {}).items():
        rows.append({"dataset": name, **{key: task[key] for key in ("metric", "value", "standard_error", "n")}})
    pairs = evaluation.get("preferences")
    if pairs:
        # Answers are of the prompts that were answered and have one, which may be few of the pairs.
        counts = pairs.get("counts") or {}
        for name, error in pairs["standard_errors"].items():
            if name == "reward_margin" and not pairs.get("calibration"):
                # There is nothing that it is measured against.
                continue
            n = counts.get(name, pairs["n"])
            row = {"metric": name, "value": pairs[name], "standard_error": error if n > 1 else None, "n": n}
            rows.append({"dataset": "held-out pairs", **row})
        if pairs.get("calibration"):
            found = pairs["calibration"]
            values = {
                "expected_calibration_error": (found["expected_calibration_error"], None),
                "brier_score": (found["brier_score"], found["brier_score_standard_error"]),
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
    for side in ("student", "teacher"):
        if record.get(side):
            stated = (record.get("licences") or {}).get(side)
            said = f"its folder states {_code(stated)}" if stated else "its folder states none, which must be checked"
            lines.append(f"- {side} {_code(repository(str(record[side])))}: {said}.")
    lines += ["", "The terms of both, and of the data, may bind this model.", "", "## How to reproduce", ""]
    if config:
        lines += [
            "In a checkout of ctpd_nemo, with the path of this card's folder for `FOLDER`, and under `torchrun` where"
            " `parallel` asks for more than one process:",
            "",
            "    python tools/train.py --from-run FOLDER",
            "",
            f"It trains with `config` of `{RECORD}` in that folder. What lies elsewhere now is given behind it, as"
            " `model.student.path=...` or `data.train=[...]`.",
        ]
    lines += ["", "| package | version |", "|---|---|"]
    lines += [f"| {name} | {_code(value)} |" for name, value in (record.get("versions") or {}).items()]
    return "\n".join(lines) + "\n"


def _config_table(config: Mapping[str, Any]) -> list[str]:
    rows = [("seed", config["seed"])] if "seed" in config else []
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


def _licences(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"licences": {side: stated_licence(record[side]) for side in ("student", "teacher") if record.get(side)}}


def base_model(folder: str | Path) -> Path:
    """The folder that a chain of exports began with: what a stage trains is often the export of an earlier one."""
    folder = Path(folder)
    seen = {folder.resolve()}
    while policy := (record := read_json(folder / RECORD)).get("policy"):
        base = record.get(policy) if isinstance(policy, str) else None
        if not isinstance(base, str) or not base or Path(base).resolve() in seen:
            break
        folder = Path(base)
        seen.add(folder.resolve())
    return folder


def stated_licence(folder: str | Path) -> str | None:
    """What a model folder says of its licence: in its card's metadata, else the first line of a licence file."""
    folder = Path(folder)
    readme = folder / "README.md"
    if readme.is_file():
        front = _FRONT.match(readme.read_text(encoding="utf-8", errors="replace"))
        try:
            metadata = yaml.safe_load(front.group(1)) if front else None
        except yaml.YAMLError:
            metadata = None
        if isinstance(metadata, dict) and metadata.get("license"):
            return str(metadata.get("license_name") or metadata["license"])
    for path in sorted(folder.glob("LICENSE*")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if first := next((line.strip() for line in lines if line.strip()), None):
            return f"{path.name}: {first[:200]}"
    return None


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
    parts = {name: record.get(name) for name in ("config", "fingerprints", "licences", "versions")}
    config = parts["config"] if isinstance(parts["config"], dict) else {}
    sections = {f"config.{name}": config.get(name) for name in _SECTIONS}
    for name, value in (parts | sections).items():
        if not isinstance(value, dict | None):
            raise InputError(f"{path}, {name}", repr(value), "keys and their values, as an export writes them")
    return record


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, or an empty one where there is no file.

    Raises:
        InputError: The file holds something else.
    """
    if not path.exists():
        return {}
    return read_object(path)
