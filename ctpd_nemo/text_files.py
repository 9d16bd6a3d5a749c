"""Small files that others may read, or write, at any time."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def replace_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file under another name and give it its own when it is whole; of two writers the later one's stays.

    What has to outlive a machine that goes down is ``parallel.checkpoint_files.write_whole``'s.

    Args:
        path: The file.
        text: Its content.
        errors: What becomes of characters that UTF-8 cannot hold, as ``str.encode`` takes it.

    Raises:
        OSError: It cannot be written; what was there stays.
    """
    # Not the number of the process: in containers and on other nodes another may have the same.
    writing = path.with_name(f".{path.name}.writing-{uuid.uuid4().hex[:12]}")
    try:
        with naming(path):
            writing.write_text(text, encoding="utf-8", errors=errors)
            writing.replace(path)
    finally:
        writing.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an ``OSError`` name the file that could not be written.

    That of an open file that cannot grow names none, that of a copy the source, others a temporary name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
