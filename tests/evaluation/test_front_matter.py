"""Metadata of a README.md: what real cards have is read, and nothing that a stranger writes there takes long."""

import os
import tracemalloc
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ctpd_nemo.evaluation.base_models import stated_licence
from ctpd_nemo.evaluation.front_matter import split_card

LAUGHS = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: v}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 30)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "newlines": "---\n" + "\n" * 2_000_000,
    "newlines and spaces": "---\n" + " \n" * 1_000_000,
    "dashes": "---\n" + "---a\n" * 500_000,
    "an aliased licence": f"---\n{LAUGHS}license: *i\n---\n",
    "a licence with an anchor": "---\nlicense: &x [*x]\n---\n",
    "merged mappings": f"---\n{MERGES}license: mit\n---\n",
    "lists in lists": "---\nlicense: " + "[" * 60_000 + "\n---\n",
    "mappings in mappings": "---\nlicense: " + "{a: " * 15_000 + "\n---\n",
    "a list": "---\nlicense: [" + "mit, " * 2_000 + "]\n---\n",
    "a mapping": "---\nlicense: {mit: 1}\n---\n",
    "a long number": "---\nlicense: " + "9" * 60_000 + "\n---\n",
    "a number": "---\nlicense: 7\n---\n",
    "a day that is none": "---\nlicense: 2001-99-99\n---\n",
    "a class of Python": "---\nlicense: !!python/object/apply:os.system ['touch evil']\n---\n",
    "64 kB of metadata": "---\n" + "a: b\n" * 20_000 + "license: mit\n---\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_front_matter_takes_time_or_memory_and_no_licence_is_other_than_text(tmp_path: Path, name: str) -> None:
    (tmp_path / "README.md").write_text(HOSTILE[name])
    tracemalloc.start()
    assert stated_licence(tmp_path) is None
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6


def test_a_card_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE"):
        os.mkfifo(tmp_path / name)
    assert stated_licence(tmp_path) is None


@pytest.mark.parametrize(
    ("front", "stated"),
    [
        ("license: mit", "mit"),
        ("license: other\nlicense_name: llama3.2\nlicense_link: LICENSE", "llama3.2"),
        ("language:\n- en\nlicense: 'apache-2.0'  # a comment\ntags: [a, b]", "apache-2.0"),
        ("license: |\n  mit\n", "mit\n"),
        ("license: " + "x" * 1000, "x" * 200),
        ("license_name: alone", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_licence_is_read_as_the_hub_reads_it(tmp_path: Path, newline: str, front: str, stated: str | None) -> None:
    text = f"---\n{front}\n---\n\n# A model\n\n---\nlicense: not this one\n---\n".replace("\n", newline)
    (tmp_path / "README.md").write_bytes(text.encode())
    assert stated_licence(tmp_path) == stated
    theirs = ModelCard(text.replace("\r\n", "\n")).data.to_dict() if front else {}
    parts = split_card(text)
    assert parts is not None
    assert parts[0] == theirs
    assert parts[1].replace("\r", "").startswith("\n# A model")
