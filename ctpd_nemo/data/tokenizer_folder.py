"""Tokenizers from folders of others."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ctpd_nemo.errors import InputError


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a local folder; no code of the folder is run.

    Raises:
        InputError: There is none.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        found = "no tokenizer.json" if Path(folder).is_dir() else "no such folder"
        raise InputError(folder, found, "a folder with a Hugging Face fast tokenizer (tokenizer.json)")
    with _reading(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def _reading(folder: str) -> Iterator[None]:
    try:
        yield
    # Parsers of several libraries, each with errors of its own; a panic of one in Rust is no ``Exception``.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(folder, f"a tokenizer that cannot be read ({reason})", "a Hugging Face tokenizer") from error
