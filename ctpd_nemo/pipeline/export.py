"""From a checkpoint to a Hugging Face folder."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ctpd_nemo.convert.export import export_hf
from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.base_models import base_of, without_places
from ctpd_nemo.evaluation.card import model_name, write_card
from ctpd_nemo.json_files import read_object
from ctpd_nemo.models.config import SideConfig
from ctpd_nemo.models.methods import METHODS
from ctpd_nemo.models.probe import Probe
from ctpd_nemo.output_paths import output_folder
from ctpd_nemo.parallel.checkpoint_files import check_is_checkpoint, resolve
from ctpd_nemo.parallel.checkpoint_reader import CheckpointReader
from ctpd_nemo.parallel.checkpoint_tensors import CheckpointTensors
from ctpd_nemo.pipeline.checkpointing import find_damage_together
from ctpd_nemo.pipeline.origin import read_starts
from ctpd_nemo.pipeline.rank_zero import on_rank_0, on_rank_0_however_long
from ctpd_nemo.pipeline.read_back import read_back
from ctpd_nemo.pipeline.trained_side import find_side, side_config


@dataclass
class ExportConfig:
    """What to export.

    Attributes:
        checkpoint: A checkpoint folder, of any layout, or ``latest`` beside it.
        reference: The Hugging Face folder that training started from: its config, defaults and names are kept.
        folder: To write; must not be in use.
        tokenizer: Folder of the tokenizer that the run was trained with; ``None`` for where the run's config says.
        chat_template: The chat template, or its path, likewise.
        dtype: What all tensors are rounded to, e.g. ``bfloat16``. By default nothing is rounded: a run in fp32 is
            exported in fp32, whatever ``reference`` has.
    """

    checkpoint: str | None = None
    reference: str | None = None
    folder: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: str | None = None


def export(config: ExportConfig) -> Path:
    """Write a checkpoint as a folder that ``transformers`` loads, with a model card; rank 0 does it, the others wait.

    Tokenizer, chat template and stop tokens are those that the run was trained with. The folder is read back and
    compared with the run before it has its name; see ``read_back``.

    Where process groups are there, all ranks share the reading that finds damage first.

    One process holds one tensor and one shard of the export at a time; the layout of the checkpoint does not matter.

    Raises:
        InputError: One of the folders is missing or cannot be used, or a file of the checkpoint is damaged; what the
            run was trained with is not there any more, or the export reads, stops or computes otherwise.
    """
    dtype = _dtype(config.dtype)
    checkpoint, reference, folder = (_given(config, key) for key in ("checkpoint", "reference", "folder"))
    # All of the checkpoint is read before the first byte is written.
    new = output_folder("folder", folder)
    if new.is_dir() and any(new.iterdir()):
        raise InputError(folder, "something already there", "a folder that does not exist yet")

    def write() -> None:
        whole = resolve(checkpoint)
        # Else the ranks have shared the reading.
        check_is_checkpoint(whole, sums=not dist.is_initialized())
        reader = CheckpointReader(whole)
        reader.check_tensors()
        run_folder, state = whole.resolve().parent.parent, reader.train_state()
        run = _run_of(run_folder)
        trained = find_side(
            _side_config(config, run, run_folder), Path(reference), state.fingerprints, _started_in(run_folder)
        )
        record = _record(run, run_folder, state.fingerprints, reference)
        probe = Probe.read(run_folder, whole.resolve().name)
        name = model_name(folder)

        def finish(partial: Path) -> None:
            write_card(partial, record, name)

        export_hf(
            folder,
            reference,
            CheckpointTensors(reader),
            dtype,
            finish=finish,
            reader=trained.files(Path(reference)),
            check=lambda partial: read_back(partial, folder, trained, probe, rounded=dtype is not None),
        )

    if dist.is_initialized():
        damage = find_damage_together(on_rank_0(lambda: resolve(checkpoint)))
        if damage is not None:
            raise damage
        on_rank_0_however_long(write)
    # By itself this job needs no process groups: under torchrun its other processes have nothing to do.
    elif os.environ.get("RANK", "0") == "0":
        write()
    return Path(folder)


def _run_of(folder: Path) -> dict[str, Any]:
    """The config of the run in a folder; empty where a checkpoint lies elsewhere."""
    path = folder / "config.json"
    return read_object(path, "the config of a run") if path.is_file() else {}


def _side_config(config: ExportConfig, run: dict[str, Any], folder: Path) -> SideConfig:
    """The side that was trained, with what the user says of where it is now."""
    side = side_config(run, str(folder / "config.json"))
    side.tokenizer = config.tokenizer or side.tokenizer
    side.chat_template = config.chat_template or side.chat_template
    return side


def _started_in(folder: Path) -> str | None:
    """The working folder of a run's last start."""
    starts = read_starts(folder)
    before = starts[-1].get("folder") if starts else None
    return before if isinstance(before, str) else None


def _record(config: dict[str, Any], folder: Path, fingerprints: dict[str, str], reference: str) -> dict[str, Any]:
    """What the card says of a run: its config, what it was made of, and the fingerprints in the checkpoint."""
    path = folder / "config.json"
    policy = _text_at(config, path, "policy") or "student"
    bases = {policy: base_of(reference)}
    method = METHODS.get(_text_at(config, path, "method", "name") or "")
    teacher = _text_at(config, path, "model", "teacher", "path")
    if method is not None and method.two_sided and teacher:
        bases["teacher"] = base_of(teacher)
    return {
        "config": without_places(config),
        "fingerprints": fingerprints,
        "policy": policy,
        "bases": {side: asdict(base) for side, base in bases.items()},
    }


def _text_at(config: dict[str, Any], path: Path, *keys: str) -> str | None:
    """The string that a config holds under keys, one below the other; ``None`` where there is nothing."""
    place = f"{path}, {'.'.join(keys)}"
    value: Any = config
    for key in keys:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise InputError(place, repr(value), "keys and their values, as a job writes them")
        value = value.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(place, repr(value), "a string, as a job writes it")
    return value


def _dtype(name: str | None) -> torch.dtype | None:
    """The type of a name as ``torch_dtype`` of a ``config.json`` has it."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in dtypes:
        raise InputError("dtype", repr(name), f"null, or one of {', '.join(dtypes)}")
    return None if name is None else dtypes[name]


def _given(config: ExportConfig, key: str) -> str:
    value = getattr(config, key)
    if not value:
        raise InputError(key, "nothing", "a folder")
    return value
