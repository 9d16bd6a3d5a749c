"""Encoded datasets, written whole."""

from pathlib import Path

from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded import EncodedDataset, Manifest
from ctpd_nemo.data.encoded_writer import write_encoded
from ctpd_nemo.data.preferences import PreferenceDataset
from ctpd_nemo.data.source import TextSource

N_PAIRS = 23
PAIRS_PER_SHARD = 5


def write(folder: Path, dataset: PreferenceDataset, encoder: PairEncoder, num_workers: int = 0) -> EncodedDataset:
    manifest = Manifest.of(dataset, encoder, PAIRS_PER_SHARD)
    for _ in write_encoded(folder, manifest, TextSource(dataset, encoder), num_workers):
        pass
    return EncodedDataset(folder, manifest)


def opened(folder: Path, dataset: PreferenceDataset, encoder: PairEncoder) -> EncodedDataset:
    return EncodedDataset(folder, Manifest.of(dataset, encoder, PAIRS_PER_SHARD))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
