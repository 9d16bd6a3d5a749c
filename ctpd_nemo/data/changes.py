"""Whether a file is still what it was when it was opened."""

import hashlib
import logging
import os
from pathlib import Path

from ctpd_nemo.errors import InputError

logger = logging.getLogger(__name__)

_BLOCK = 2**20


class WatchedFile:
    """A file as it was: what the file system says of it, and a sum of what it holds."""

    def __init__(self, path: Path) -> None:
        """Look at the file, before it is opened."""
        self.path = path
        self._stat = _stat(path)
        self._sum = b""
        self._missed = False

    def opened(self) -> "WatchedFile":
        """Read the file once, now that it is known to be one of rows.

        Raises:
            InputError: It has changed since it was looked at.
        """
        self._sum = _content(self.path)
        if _stat(self.path) != self._stat:
            raise InputError(str(self.path), "a file that changes while it is read", "one that nobody writes")
        return self

    def change(self) -> str | None:
        """What has become of the file; ``None`` where it holds what it did.

        It is read again only where the file system says that it may not. One that is gone is open still, and a warning.
        """
        try:
            now = _stat(self.path)
            if now != self._stat and _content(self.path) != self._sum:
                return "other content than when the job began"
        except OSError as error:
            if not self._missed:
                logger.warning("%s cannot be looked at any more: %s", self.path, error.strerror or error)
            self._missed = True
            return None
        self._stat = now
        return None


def _stat(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _content(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.digest()
