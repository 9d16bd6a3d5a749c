"""The page of spans: what is in it, and that no text gets out of its place."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.report.letters import plain, readable
from ctpd_nemo.report.spans_page import PairsConfig, SpansPageConfig, write_spans_page
from ctpd_nemo.spans import align
from tests.pipeline.tool import run_tool
from tests.report.conftest import HOSTILE
from tests.report.reading import Element, read_page


def said(view: Element) -> str:
    """The text of a view, as it is shown."""
    return "".join(part.text for band in view.find(class_="band") for part in band.find(class_="said"))


def as_shown(text: str) -> str:
    """What the page should show, but that a cut character stands as its bytes."""
    return "".join(part.text for part in readable(text.encode()))


@pytest.mark.parametrize("text", ["Add 6 and 9.", "", " ", "\n\n", "x" * 5000, "\U0001f999" * 9, HOSTILE])
def test_a_text_is_shown_span_by_span(text: str, tokenizers: list[str], page: Path) -> None:
    write_spans_page(SpansPageConfig(tokenizers=tokenizers, text=text, output=str(page), spans=10_000))
    (view,) = read_page(page).find(class_="view")
    bands = view.find(class_="band")
    teacher, student = (AutoTokenizer.from_pretrained(folder) for folder in tokenizers)
    spans = align(text, teacher, student)
    bounds = spans.bounds.tolist()
    expected = [readable(text.encode()[begin:end]) for begin, end in pairwise(bounds)]
    assert [band.find(class_="said")[0].text for band in bands] == [
        "".join(p.text for p in parts) for parts in expected
    ]
    for number, band in enumerate(bands):
        shown = [
            [token.attributes["data-id"] for token in side.find(class_="token")] for side in band.find(class_="side")
        ]
        ids = (spans.teacher_ids, spans.teacher_span), (spans.student_ids, spans.student_span)
        assert shown == [[str(token) for token in tokens[span == number]] for tokens, span in ids]


def test_hostile_text_stays_text(tokenizers: list[str], page: Path) -> None:
    write_spans_page(SpansPageConfig(tokenizers=tokenizers, text=HOSTILE, output=str(page)))
    content = page.read_text()
    assert "<script>alert" not in content
    for char in "\x00\x07\x1b\u202e\u202c\u2066\u2028\ufeff":
        assert char not in content
    (view,) = read_page(page).find(class_="view")
    for word in (
        "</script>",
        "alert(1)",
        "{{\u00b77\u00b7*\u00b77\u00b7}}",
        "{%\u00b7raw",
        "&lt;",
        "<|im_end|>",
        "U+0000",
    ):
        assert word in said(view), word


def test_a_file_that_is_no_utf_8_is_shown_with_replacement_characters(
    tokenizers: list[str], page: Path, tmp_path: Path
) -> None:
    file = tmp_path / "<b>text&.txt"
    file.write_bytes("na\u00efve ".encode() + b"\xff\xed\xa0\x80 end")
    write_spans_page(SpansPageConfig(tokenizers=tokenizers, file=str(file), output=str(page)))
    (view,) = read_page(page).find(class_="view")
    assert "4 bytes or surrogates that are no UTF-8" in view.text
    assert str(file) in view.find(tag="h3")[0].text


def test_a_lone_surrogate_in_a_text_is_a_replacement_character(tokenizers: list[str], page: Path) -> None:
    write_spans_page(SpansPageConfig(tokenizers=tokenizers, text="a\ud83d b", output=str(page)))
    (view,) = read_page(page).find(class_="view")
    assert "1 bytes or surrogates" in view.text


def test_a_cut_character_says_which_bytes_a_span_holds(tokenizers: list[str], page: Path) -> None:
    # Beside itself, a byte-level tokenizer without a piece for the character cuts it inside.
    copy = page.parent / "copy"
    copy.symlink_to(tokenizers[0])
    write_spans_page(SpansPageConfig(tokenizers=[tokenizers[0], str(copy)], text="\U0001f999", output=str(page)))
    bands = read_page(page).find(class_="band")
    assert "".join(band.find(class_="said")[0].text for band in bands).replace(" ", "") == "F09FA699"
    assert len(bands) > 1
    done = 0
    for band in bands:
        held = len(bytes.fromhex(band.find(class_="said")[0].text))
        assert band.attributes["data-cut"] == f"bytes {done + 1}-{done + held} of 4 of U+1F999"
        done += held


def test_long_texts_are_cut_and_say_so(tokenizers: list[str], page: Path) -> None:
    (row, _) = write_spans_page(
        SpansPageConfig(tokenizers=tokenizers, text="6 and 9. " * 40, output=str(page), spans=7)
    )
    (view,) = read_page(page).find(class_="view")
    assert len(view.find(class_="band")) == 7
    assert f"the first 7 of {row.n_spans} spans" in view.text


def test_pairs_are_shown_up_to_the_limit_and_all_counted(world: TinyWorld, tokenizers: list[str], page: Path) -> None:
    pairs = PairsConfig(train=[str(world.train)])
    (row, _) = write_spans_page(SpansPageConfig(tokenizers=tokenizers, data=pairs, limit=2, output=str(page)))
    views = read_page(page).find(class_="view")
    rows = [json.loads(line) for line in world.train.read_text().splitlines()]
    texts = [turn["content"] for pair in rows for name in ("chosen", "rejected") for turn in pair[name]]
    assert [said(view) for view in views] == [as_shown(text) for text in texts[:4]]
    assert plain(readable(rows[0]["prompt"][-1]["content"].encode())) in views[0].text
    teacher, student = (AutoTokenizer.from_pretrained(folder) for folder in tokenizers)
    assert row.n_spans == sum(align(text, teacher, student).n_spans for text in texts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizers": []}, "tokenizers: found 0 folders"),
        ({"text": None}, "text, file, data.train: found nothing"),
        ({"file": "x"}, "text, file, data.train: found text and file"),
        ({"scores": "cache"}, "scores: found a score cache without data.train"),
        ({"spans": 0}, "spans: found 0"),
        ({"limit": 0}, "limit: found 0"),
    ],
)
def test_what_cannot_be_shown_is_refused(changes: dict, message: str, tokenizers: list[str], page: Path) -> None:
    values = {"tokenizers": tokenizers, "text": "x", "output": str(page), **changes}
    with pytest.raises(InputError, match=message):
        write_spans_page(SpansPageConfig(**values))
    assert not page.exists()


def test_a_folder_twice_is_refused(tokenizers: list[str], page: Path) -> None:
    with pytest.raises(InputError, match="a folder twice"):
        write_spans_page(SpansPageConfig(tokenizers=[tokenizers[0]] * 2, text="x", output=str(page)))


def test_the_tool_writes_the_page_and_prints_the_table(tokenizers: list[str], tmp_path: Path) -> None:
    arguments = [f"tokenizers=[{','.join(tokenizers)}]", "text='Add 6 and 9.'"]
    status, stdout, stderr = run_tool("inspect_spans.py", arguments, tmp_path)
    assert status == 0, stderr
    assert [line.split()[:3] for line in stdout.splitlines()[1:]] == [
        ["teacher", ">", "student"],
        ["student", ">", "teacher"],
    ]
    assert read_page(tmp_path / "spans.html").find(class_="band")
    assert run_tool("inspect_spans.py", arguments[:1], tmp_path)[0] == 2
