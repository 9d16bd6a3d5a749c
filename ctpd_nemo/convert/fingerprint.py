"""A name for the content of a Hugging Face folder's weights."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from ctpd_nemo.convert.safetensors_folder import weight_files
from ctpd_nemo.errors import InputError

_CHUNK_BYTES = 64 * 1024 * 1024
_THREADS = 8


def weights_fingerprint(folder: str | Path) -> str:
    """SHA-256 (64 hex digits) over every byte of ``config.json`` and of the safetensors files, and their names.

    Files are hashed in chunks of 64 MiB by several threads, and the digests of the chunks hashed in order; the result
    does not depend on the threads, nor on times or places of the files.

    Raises:
        InputError: No ``config.json``, or no usable weight files.
    """
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(str(folder), "no config.json", "a Hugging Face model folder")
    files = [config, *weight_files(folder)]
    total = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as pool:
        for digest in pool.map(_digest, chain.from_iterable(map(_chunks, files))):
            total.update(digest)
    return total.hexdigest()


def _chunks(path: Path) -> Iterator[tuple[Path, int]]:
    """Where each chunk of a file begins; one chunk for an empty file."""
    return ((path, start) for start in range(0, max(path.stat().st_size, 1), _CHUNK_BYTES))


def _digest(chunk: tuple[Path, int]) -> bytes:
    """The digest of a chunk; the name and place go in too, so that bytes cannot move between files unseen."""
    path, start = chunk
    with path.open("rb") as file:
        file.seek(start)
        digest = hashlib.sha256(f"{path.name}\0{start}\0".encode())
        digest.update(file.read(_CHUNK_BYTES))
        return digest.digest()
