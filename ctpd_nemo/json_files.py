"""JSON that others wrote: manifests, indexes, configs of models and runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctpd_nemo.errors import InputError

# A manifest of a checkpoint of thousands of ranks has some ten million bytes.
_LARGEST = 256 * 1024 * 1024
# A million steps with histograms of weights have some three billion bytes, and a row of them some thousand.
_LARGEST_LOG, _LONGEST_ROW = 16 * 1024**3, 16 * 1024**2


def read_object(path: str | Path, expected: str = "a JSON object", largest: int = _LARGEST) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        path: The file.
        expected: What it should hold, for errors.
        largest: Bytes that it may have.

    Raises:
        InputError: It cannot be read, holds no JSON or JSON of another type, or is larger than any such file.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(str(path), "no such file" if not path.exists() else "no regular file", expected)
        if path.stat().st_size > largest:
            raise InputError(str(path), f"{path.stat().st_size:,} bytes", f"{expected}, of {largest:,} bytes at most")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(str(path), f"a file that cannot be read ({error.strerror})", expected) from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        # Beyond the grammar: a number of thousands of digits, lists nested without end.
        raise InputError(str(path), f"no JSON ({error})", expected) from error
    if not isinstance(found, dict):
        raise InputError(str(path), f"a JSON {type(found).__name__}", expected)
    return found


def read_rows(path: Path) -> Iterator[str]:
    """Lines of a log of JSON rows, with their ends; what is too long for a row is cut, and so is none.

    Raises:
        InputError: It is no regular file, or larger than any such log.
        OSError: It cannot be read.
    """
    if not path.is_file():
        raise InputError(str(path), "a folder" if path.is_dir() else "no regular file", "a log of JSON rows")
    if path.stat().st_size > _LARGEST_LOG:
        expected = f"a log of JSON rows, of {_LARGEST_LOG:,} bytes at most"
        raise InputError(str(path), f"{path.stat().st_size:,} bytes", expected)
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        while line := file.readline(_LONGEST_ROW):
            rest = line
            while rest and not rest.endswith("\n"):
                rest = file.readline(_LONGEST_ROW)
            yield line
