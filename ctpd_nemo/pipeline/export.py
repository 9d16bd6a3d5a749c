"""From a checkpoint to a Hugging Face folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ctpd_nemo.convert.export import export_hf
from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.card import base_model, model_name, write_card
from ctpd_nemo.json_files import read_object
from ctpd_nemo.models.methods import METHODS
from ctpd_nemo.output_paths import output_folder
from ctpd_nemo.parallel.checkpoint import read_state
from ctpd_nemo.parallel.checkpoint_files import check_is_checkpoint, resolve
from ctpd_nemo.parallel.checkpoint_tensors import CheckpointTensors
from ctpd_nemo.pipeline.checkpointing import find_damage_together
from ctpd_nemo.pipeline.rank_zero import on_rank_0, on_rank_0_however_long


@dataclass
class ExportConfig:
    """What to export.

    Attributes:
        checkpoint: A checkpoint folder, of any layout, or ``latest`` beside it.
        reference: The Hugging Face folder that training started from: its config, tokenizer and names are kept.
        folder: To write; must not be in use.
    """

    checkpoint: str | None = None
    reference: str | None = None
    folder: str | None = None


def export(config: ExportConfig) -> Path:
    """Write a checkpoint as a folder that ``transformers`` loads, with a model card; rank 0 does it, the others wait.

    Where process groups are there, all ranks share the reading that finds damage first.

    One process holds one tensor and one shard of the export at a time; the layout of the checkpoint does not matter.

    Raises:
        InputError: One of the folders is missing or cannot be used, or a file of the checkpoint is damaged.
    """
    checkpoint, reference, folder = (_given(config, key) for key in ("checkpoint", "reference", "folder"))
    # All of the checkpoint is read before the first byte is written.
    new = output_folder("folder", folder)
    if new.is_dir() and any(new.iterdir()):
        raise InputError(folder, "something already there", "a folder that does not exist yet")

    def write() -> None:
        whole = resolve(checkpoint)
        # Else the ranks have shared the reading.
        check_is_checkpoint(whole, sums=not dist.is_initialized())
        record = _record(whole, reference)
        name = model_name(folder)

        def card(partial: Path) -> None:
            write_card(partial, record, name)

        export_hf(folder, reference, CheckpointTensors(whole), finish=card)

    if dist.is_initialized():
        damage = find_damage_together(on_rank_0(lambda: resolve(checkpoint)))
        if damage is not None:
            raise damage
        on_rank_0_however_long(write)
    # By itself this job needs no process groups: under torchrun its other processes have nothing to do.
    elif os.environ.get("RANK", "0") == "0":
        write()
    return Path(folder)


def _record(checkpoint: Path, reference: str) -> dict[str, Any]:
    """What the card says of a run: the config beside its checkpoints, where it is, and the fingerprints in this one."""
    path = checkpoint.resolve().parent.parent / "config.json"
    config = read_object(path, "the config of a run") if path.is_file() else {}
    policy = _text_at(config, path, "policy") or "student"
    bases = {policy: str(base_model(reference))}
    method = METHODS.get(_text_at(config, path, "method", "name") or "")
    teacher = _text_at(config, path, "model", "teacher", "path")
    if method is not None and method.two_sided and teacher:
        bases["teacher"] = str(base_model(teacher))
    return {"config": config, "fingerprints": read_state(checkpoint).fingerprints, "policy": policy, **bases}


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


def _given(config: ExportConfig, key: str) -> str:
    value = getattr(config, key)
    if not value:
        raise InputError(key, "nothing", "a folder")
    return value
