"""Two small tokenizers that disagree, and texts that would like to be more than texts."""

from pathlib import Path

import pytest

from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.pipeline.recipe import small_world

HOSTILE = (
    "</script><script>alert(1)</script> <img src=x onerror=alert(2)> '\"><svg/onload=alert(3)> {{ 7 * 7 }} {% raw %} "
    "<!-- --> ]]> &lt; &#x3c; javascript:alert(4) \u202etfel\u202c \u2066x\u2069 \x00\x07\x1b[31m <|im_end|> "
    "<|eot_id|> \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f999 e\u0301 \ufeff\u200b\u2028\u2029 "
    "\r\n\ttab \u0627\u0644 \ufffd"
)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("report") / "world")


@pytest.fixture
def tokenizers(world: TinyWorld) -> list[str]:
    """The folders of teacher and student."""
    return [str(world.teacher), str(world.student)]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.html"
