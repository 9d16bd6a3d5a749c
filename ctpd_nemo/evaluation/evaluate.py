"""The evaluation job: benchmarks and held-out pairs, ``evaluation.json`` beside the export, and its model card."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.card import EVALUATION, RECORD, read_evaluation, read_record, write_card
from ctpd_nemo.evaluation.harness import known_tasks, prepare_tasks, run_harness
from ctpd_nemo.evaluation.model import check_place, check_runs_no_code, chosen_device
from ctpd_nemo.evaluation.preferences import evaluate_folder
from ctpd_nemo.output_paths import written_folder
from ctpd_nemo.text_files import replace_text


@dataclass
class TasksConfig:
    """Benchmarks, see :func:`ctpd_nemo.evaluation.harness.run_harness`.

    Attributes:
        names: Which; null is all six, an empty list none.
        data: Folder of local rows; null is the harness's own datasets.
        num_fewshot: Examples before each question; null is the leaderboard's number of each task.
        limit: Only the first so many questions.
        max_length: Longest sequence in tokens; null is the model's own.
    """

    names: list[str] | None = None
    data: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    max_length: int | None = None


@dataclass
class PairsConfig:
    """Held-out pairs, see :func:`ctpd_nemo.evaluation.preferences.evaluate_folder`.

    Attributes:
        file: Preference pairs; null leaves them out.
        reference: Folder of the model that margins are measured against.
        beta: Of the implicit reward whose calibration is measured.
        limit: Only the first so many pairs.
        generations: Prompts that are answered; null is all where a row has an answer, else a few.
        max_new_tokens: Longest generated response.
        max_length: Longest sequence, prompt and response.
        include_eos: Whether the end of the turn is scored.
        chat_template: A Jinja template or its path; null is each tokenizer's own.
        chat_template_kwargs: Variables for it; null is what each folder was trained with.
        on_bad: "stop" at a row that cannot be used, or "skip" it and count it.
        split: Which split of a folder that has several.
    """

    file: str | None = None
    reference: str | None = None
    beta: float = 0.1
    limit: int | None = None
    generations: int | None = None
    max_new_tokens: int = 256
    max_length: int = 2048
    include_eos: bool = True
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    on_bad: str = "stop"
    split: str | None = None


@dataclass
class EvaluateConfig:
    """What to evaluate.

    Attributes:
        folder: The exported Hugging Face folder; ``evaluation.json`` and the card are written there.
        tasks: Benchmarks.
        pairs: Held-out pairs.
        batch_size: Sequences a forward pass.
        device: As torch names it; ``auto``, or null, is a GPU where there is one.
        dtype: As torch names it; ``auto`` keeps that of the stored weights.
        seed: Of sampled responses, and of the choice of examples.
    """

    folder: str | None = None
    tasks: TasksConfig = field(default_factory=TasksConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    batch_size: int = 8
    device: str | None = "auto"
    dtype: str = "auto"
    seed: int = 1234

    def check(self) -> None:
        """Stop with an ``InputError`` that names the key of a value that cannot be used."""
        counts = {
            "batch_size": self.batch_size,
            "tasks.limit": self.tasks.limit,
            "pairs.limit": self.pairs.limit,
            "pairs.generations": self.pairs.generations,
            "pairs.max_new_tokens": self.pairs.max_new_tokens,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise InputError(name, str(count), "1 or more")
        if self.tasks.max_length is not None and self.tasks.max_length < 2:
            raise InputError("tasks.max_length", str(self.tasks.max_length), "2 or more: a token and one before it")
        if not 0 < self.pairs.beta < math.inf:
            raise InputError("pairs.beta", str(self.pairs.beta), "a positive number")
        if not 0 <= self.seed < 2**32:
            raise InputError("seed", str(self.seed), "0 to 4294967295, what every library takes")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, and keep what an earlier evaluation of the folder found on other tasks.

    Raises:
        InputError: A value, folder or file cannot be used, or nothing is asked for.
    """
    if not config.folder or not Path(config.folder).is_dir():
        raise InputError("folder", repr(config.folder), "an exported Hugging Face folder")
    config.check()
    folder = Path(config.folder)
    names = known_tasks() if config.tasks.names is None else config.tasks.names
    if not names and not config.pairs.file:
        expected = "one of them: pairs.file=PAIRS, or tasks.names=[...] of " + ", ".join(known_tasks())
        raise InputError("pairs.file, tasks.names", "neither held-out pairs nor benchmarks", expected)
    common: dict[str, Any] = {"device": chosen_device(config.device), "dtype": config.dtype}
    found = _look(config, folder, common)
    prepared = prepare_tasks(names, data=config.tasks.data, num_fewshot=config.tasks.num_fewshot) if names else {}
    if config.pairs.file:
        pairs = vars(config.pairs).copy()
        file = pairs.pop("file")
        scores = evaluate_folder(folder, file, **pairs, **common, batch_size=config.batch_size, sample_seed=config.seed)
        found = _keep(folder, {"preferences": scores.as_dict()})
    if names:
        tasks = {key: value for key, value in vars(config.tasks).items() if key != "names"}
        more: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "prepared": prepared}
        results = run_harness(folder, names, **tasks, **common, **more)
        found = _keep(folder, {"tasks": results})
    write_card(folder)
    return found


def _look(config: EvaluateConfig, folder: Path, place: Mapping[str, Any]) -> dict[str, Any]:
    """Look at the folders before the work begins, and whether results can be kept; those that are there."""
    written_folder("folder", folder)
    kept = read_evaluation(folder)
    read_record(folder / RECORD)
    check_place(**place)
    reference = config.pairs.reference if config.pairs.file else None
    for path in (folder, *([Path(reference)] if reference else [])):
        check_runs_no_code(path)
        if not any(path.glob("*.safetensors")):
            found = "no model (no weights as safetensors)"
            raise InputError(str(path), found, "a Hugging Face folder of a causal model")
    return kept


def _keep(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Put results beside those that are there now: benchmarks and pairs may be evaluated by jobs side by side."""
    found = read_evaluation(folder)
    if "tasks" in results:
        results = {"tasks": {**(found.get("tasks") or {}), **results["tasks"]}}
    found |= results
    replace_text(folder / EVALUATION, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return found
