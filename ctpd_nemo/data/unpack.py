"""A file that is packed with gzip, as a file that can be read anywhere, within limits."""

import gzip
import os
import tempfile
import zlib
from pathlib import Path
from typing import BinaryIO

from ctpd_nemo.errors import InputError

# Text packs four- to tenfold, and what repeats itself fiftyfold; a file made to fill disks, a thousandfold.
_MOST_TIMES = 200
_ALWAYS_ALLOWED = 64 * 2**20
_BLOCK = 2**20


def unpacked(path: Path) -> BinaryIO:
    """What a gzip file holds, in a temporary file that has no name and is gone when it is closed.

    Raises:
        InputError: It is no whole gzip file, or holds more than 64 MiB and more than 200 times its size.
    """
    most = max(_ALWAYS_ALLOWED, _MOST_TIMES * os.path.getsize(path))
    # It is handed on open.
    whole = tempfile.TemporaryFile(prefix="ctpd-rows-")  # noqa: SIM115
    try:
        with gzip.open(path, "rb") as packed:
            while block := packed.read(_BLOCK):
                whole.write(block)
                if whole.tell() > most:
                    found = f"more than {most:,} bytes in a file of {os.path.getsize(path):,}"
                    raise InputError(str(path), found, f"text that packs to no less than 1/{_MOST_TIMES} of its size")
        whole.flush()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        whole.close()
        raise InputError(str(path), f"a gzip file that cannot be read ({error})", "a whole one") from None
    except BaseException:
        whole.close()
        raise
    return whole  # type: ignore[return-value]
