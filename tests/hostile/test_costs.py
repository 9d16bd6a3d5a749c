"""What a stranger's folder asks for ends in one line, and takes this process neither time nor memory."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from ctpd_nemo.data import tokenizer_folder
from ctpd_nemo.data.tokenizer_folder import load_tokenizer
from ctpd_nemo.errors import InputError
from tests.hostile.costs import COSTS, SLOW, Edit


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small tokenizer, and limits that are soon reached."""
    monkeypatch.setattr(tokenizer_folder, "_SECONDS", 2)
    monkeypatch.setattr(tokenizer_folder, "_BYTES", 2**29)
    path = tmp_path / "stranger"
    path.mkdir()
    vocab = {chr(code): code - 32 for code in range(32, 127)}
    Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return path


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the folder may be read here by the libraries that it attacks."""
    monkeypatch.setattr(tokenizer_folder, "read_tokenizer", lambda folder: pytest.fail("read in this process"))


def _refused(folder: Path, edit: Edit, found: str) -> None:
    edit(folder)
    with pytest.raises(InputError) as refused:
        load_tokenizer(str(folder))
    assert found in str(refused.value)
    assert str(folder) in refused.value.place


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("name", COSTS)
def test_a_folder_that_asks_for_time_or_memory_without_end_is_refused_unread(folder: Path, name: str) -> None:
    _refused(folder, *COSTS[name])


@pytest.mark.slow  # imports transformers in a process of its own
@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("name", SLOW)
def test_what_transformers_would_make_of_a_folder_is_tried_in_another_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tokenizer_folder, "_SECONDS", 15)
    _refused(folder, *SLOW[name])


@pytest.mark.slow  # likewise
def test_a_tokenizer_of_any_class_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_folder, "_SECONDS", 60)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BloomTokenizerFast", "extra_ids": 3000000}')
    assert load_tokenizer(str(folder))("abc")["input_ids"] == [65, 66, 67]


def test_a_tokenizer_is_tried_once_for_each_content(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    run = tokenizer_folder.run_limited
    monkeypatch.setattr(
        tokenizer_folder, "run_limited", lambda *args, **given: (tried.append(given), run(*args, **given))[1]
    )
    load_tokenizer(str(folder))
    load_tokenizer(str(folder))
    load_tokenizer(shutil.copytree(folder, tmp_path / "copy"))
    assert len(tried) == 1
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    load_tokenizer(str(folder))
    assert len(tried) == 2
