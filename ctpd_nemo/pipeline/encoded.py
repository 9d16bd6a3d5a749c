"""Encoded datasets of a run: built once by one process, found again by every job that reads the same pairs alike."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ctpd_nemo.data.encoded import EncodedDataset, Manifest
from ctpd_nemo.data.encoded_pair import FAULTS
from ctpd_nemo.data.encoded_writer import write_encoded
from ctpd_nemo.data.source import TextSource
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData, no_usable_pair
from ctpd_nemo.pipeline.rank_zero import on_rank_0_in_parts

logger = logging.getLogger(__name__)


def encoded_root(run: RunConfig) -> Path | None:
    """The folder that holds a run's encoded datasets, one below the other; ``None`` where it encodes as it goes.

    "auto" is ``encoded`` beside the run folder: the stages of a pipeline share it, and so do runs of one folder.
    """
    if run.data.encoded is None:
        return None
    return Path(run.run_dir).parent / "encoded" if run.data.encoded == "auto" else Path(run.data.encoded)


def use_encoded(data: RunData) -> None:
    """Let a run read encoded datasets, where its config says so; rank 0 builds what is missing, the others wait.

    All ranks call it together.

    Raises:
        InputError: A folder holds something else, is damaged or cannot be written; a row or template is bad.
    """
    root = encoded_root(data.run)
    if root is None:
        return
    for name, dataset in data.datasets().items():
        manifest = Manifest.of(dataset, data.encoder)
        folder = root / manifest.name
        # The processes of this node that wait lend their workers.
        workers = data.run.data.num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        source = TextSource(dataset, data.encoder)
        on_rank_0_in_parts(_told(folder, write_encoded(folder, manifest, source, workers)))
        data.encoded[name] = EncodedDataset(folder, manifest)
        _check_skipped(data, name)


def _check_skipped(data: RunData, name: str) -> None:
    """Say at once what an encoded dataset leaves out.

    Raises:
        InputError: That is a row which is to stop the run, or all of them.
    """
    dataset, encoded, config = data.datasets()[name], data.encoded[name], data.run.data
    skipped = encoded.skipped
    faults = [reason for reason in FAULTS if skipped[reason]]
    if faults and config.on_bad == "stop":
        place = dataset.place(encoded.first_skipped(faults[0]))
        raise InputError(place, f"a pair that cannot be encoded ({faults[0]})", "pairs that can, or data.on_bad=skip")
    if skipped.total() == len(encoded):
        raise no_usable_pair(", ".join(getattr(config, name)), skipped)
    if skipped.total() > config.warn_skipped * len(encoded):
        reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common())
        logger.warning("%s: %d of %d pairs are skipped: %s", name, skipped.total(), len(encoded), reasons)


def _told(folder: Path, shards: Iterator[tuple[int, int]], every: float = 10.0) -> Iterator[None]:
    """Log how far it is, now and then, and where it took more than a moment how long it was."""
    begun = told = time.monotonic()
    for done, total in shards:
        now = time.monotonic()
        if now - told >= every or (done == total and now - begun >= 1.0):
            logger.info("%s: %d of %d shards encoded in %.0f s", folder, done, total, now - begun)
            told = now
        yield
