"""The pages in a real browser: nothing complains, nothing is fetched, nothing overflows, pointing shows numbers."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.report.run_page import RunPageConfig, write_run_page
from ctpd_nemo.report.spans_page import PairsConfig, SpansPageConfig, write_spans_page
from tests.report.browser import CHROMIUM, Browser, browser
from tests.report.conftest import HOSTILE

WIDTHS = (400, 1400)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, hostile texts, very long lines and an empty text among them."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizers = [str(world.teacher), str(world.student)]
    texts = {"hostile": HOSTILE * 3, "long": "x" * 3000 + "\U0001f999" * 300, "empty": ""}
    for name, text in texts.items():
        write_spans_page(SpansPageConfig(tokenizers=tokenizers, text=text, output=str(folder / f"{name}.html")))
    pairs = PairsConfig(train=[str(world.train)])
    write_spans_page(SpansPageConfig(tokenizers=tokenizers, data=pairs, output=str(folder / "pairs.html")))
    write_run_page(RunPageConfig(str(_run(folder / "run")), str(folder / "run.html")))
    return {path.stem: path for path in folder.glob("*.html")}


def _run(folder: Path) -> Path:
    """A pipeline's folder with names and values that are longer than any screen."""
    job = folder / "ctpd"
    (job / "export").mkdir(parents=True)
    weights = {"chosen": {"0.5": 1, "1": 3}, "rejected": {"0.25": 2, "-inf": 1}}
    rows = [
        {"step": step, "loss": 1 / step, "val_loss": 2 / step, "m" * 200: 1.0, "weights": weights}
        for step in range(1, 300)
    ]
    (job / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (job / "config.json").write_text(json.dumps({"policy": HOSTILE, "k" * 300: "v" * 3000}))
    scores = {"metric": "a" * 100, "value": 0.5, "standard_error": 0.1, "n": 10}
    (job / "export" / "evaluation.json").write_text(json.dumps({"tasks": {"t" * 100: scores}}))
    return folder


def luminance(chromium: Browser, selector: str, what: str) -> float:
    """Relative luminance of a colour of an element (WCAG 2.1, 1.4.3)."""
    colour = chromium.value(f"getComputedStyle(document.querySelector({selector!r})).{what}")
    channels = [int(channel) / 255 for channel in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("name", ["hostile", "long", "empty", "pairs", "run"])
def test_pages_are_silent_complete_and_fit_the_screen(
    name: str, pages: dict[str, Path], chromium: Browser, tmp_path: Path
) -> None:
    pictures = set()
    for width in WIDTHS:
        for dark in (False, True):
            chromium.open(pages[name], width, dark)
            picture = chromium.screenshot(tmp_path / "picture.png")
            assert chromium.complaints == []
            assert chromium.requests == [pages[name].as_uri()]
            assert chromium.value("document.documentElement.scrollWidth") <= width
            assert struct.unpack(">I", picture[16:20])[0] <= width
            pictures.add(picture)
    assert len(pictures) == 4


@pytest.mark.parametrize("name", ["pairs", "run"])
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_the_page(name: str, dark: bool, pages: dict[str, Path], chromium: Browser) -> None:
    chromium.open(pages[name], dark=dark)
    page = luminance(chromium, "body", "backgroundColor")
    assert page < 0.05 if dark else page > 0.8
    for selector in ("body", ".note"):
        low, high = sorted((page, luminance(chromium, selector, "color")))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_nothing_of_a_hostile_text_became_an_element(pages: dict[str, Path], chromium: Browser) -> None:
    chromium.open(pages["hostile"])
    assert chromium.value("document.querySelectorAll('script').length") == 1
    assert chromium.value("document.querySelectorAll('img, svg, iframe').length") == 0
    said = chromium.value("[...document.querySelectorAll('.said')].map((element) => element.textContent).join('')")
    assert "onerror=alert(2)" in said


def test_the_policy_of_the_page_stops_a_script_that_got_in(pages: dict[str, Path], chromium: Browser) -> None:
    broken = pages["empty"].with_name("broken.htm")
    text = pages["empty"].read_text()
    broken.write_text(text.replace("<h1>", "<script>document.title = 'run'</script><img src=x onerror=alert(1)><h1>"))
    chromium.open(broken)
    assert chromium.value("document.title") != "run"
    assert not any("dialog" in complaint for complaint in chromium.complaints)
    assert any("Content Security Policy" in complaint for complaint in chromium.complaints)


def test_pointing_at_a_span_shows_its_numbers(pages: dict[str, Path], chromium: Browser) -> None:
    chromium.open(pages["pairs"])
    assert chromium.value("document.getElementById('tip').hidden")
    chromium.point_at(".band")
    assert not chromium.value("document.getElementById('tip').hidden")
    shown = chromium.value("document.getElementById('tip').innerText")
    assert shown.startswith("span 1 \u00b7 bytes 0-")
    for token in json.loads(
        chromium.value(
            "JSON.stringify([...document.querySelector('.band').querySelectorAll('.token')]"
            ".map((token) => token.dataset.id))"
        )
    ):
        assert f" {token}\n" in shown
    assert chromium.value("document.querySelector('.band').classList.contains('on')")
    chromium.press("Escape")
    assert chromium.value("document.getElementById('tip').hidden")


def test_arrow_keys_walk_over_the_spans(pages: dict[str, Path], chromium: Browser) -> None:
    chromium.open(pages["pairs"])
    chromium.value("document.querySelector('.flow').focus()")
    for number in (1, 2):
        chromium.press("ArrowRight")
        assert chromium.value("document.querySelector('.band.on').dataset.number") == str(number)
    chromium.press("ArrowLeft")
    assert chromium.value("document.querySelector('.band.on').dataset.number") == "1"


def test_pointing_at_a_curve_shows_the_step_and_every_value(pages: dict[str, Path], chromium: Browser) -> None:
    chromium.open(pages["run"])
    chromium.point_at("svg[aria-label='loss by step']")
    head, *rows = chromium.value("document.getElementById('tip').innerText").splitlines()
    step = int(head.removeprefix("steps ").split(" to ")[0])
    assert 100 < step < 200
    values = dict(zip(rows[::2], rows[1::2], strict=True))
    assert set(values) == {"loss", "val_loss"}
    assert float(values["loss"]) == pytest.approx(1 / (step + 0.5), rel=1e-2)
    chromium.point_at("svg[aria-label='span weights, chosen by step']")
    assert chromium.value("document.getElementById('tip').innerText").splitlines()[1:] == [
        "from 1",
        "75.0%",
        "from 0.5",
        "25.0%",
    ]


def test_a_page_is_readable_without_scripts_and_prints(
    pages: dict[str, Path], chromium: Browser, tmp_path: Path
) -> None:
    chromium.open(pages["pairs"], scripts=False)
    assert chromium.complaints == []
    # Pictures of the two differ by a few pixels now and then.
    shown = "[document.querySelector('h1').innerText, document.querySelectorAll('body *').length]"
    without = chromium.value(shown)
    chromium.open(pages["pairs"])
    assert without == chromium.value(shown)
    assert chromium.pdf(tmp_path / "page.pdf").startswith(b"%PDF")
