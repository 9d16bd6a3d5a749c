"""The job behind ``tools/inspect_spans.py``: both tokenizations of a text or of a dataset's responses, on one page."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ctpd_nemo.data.preferences import PreferenceDataset, open_preferences
from ctpd_nemo.data.templates import tokenizer_fingerprint
from ctpd_nemo.data.tokenizer_folder import load_tokenizer
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.output_paths import output_file
from ctpd_nemo.report.bands import TextView, kinds_of, text_view
from ctpd_nemo.report.letters import readable, without_surrogates
from ctpd_nemo.report.mismatch import Mismatch, mismatch_table
from ctpd_nemo.report.page import write_page
from ctpd_nemo.report.scores import CachedScores
from ctpd_nemo.spans import align

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_BATCH = 256
# Characters of a prompt that are shown.
_ASKED = 400


@dataclass
class PairsConfig:
    """Preference files, as in training.

    Attributes:
        train: Files or ``datasets`` folders.
        split: Which split of a folder that holds several.
        on_bad: "stop" at a row that cannot be used, or "skip" it.
    """

    train: list[str] = field(default_factory=list)
    split: str | None = None
    on_bad: str = "stop"


@dataclass
class WeightsConfig:
    """How weights are made of scores: ``k``, ``L`` and ``U`` of ``models.ctpd.CTPDConfig``."""

    scale: float = 1.0
    lower: float = -0.5
    upper: float = 1.5


@dataclass
class SpansPageConfig:
    """What to show.

    Attributes:
        tokenizers: Folders of two or more tokenizers: the first is the teacher's and the second the student's in the
            pictures, and the table has every ordered pair.
        text: A text to show.
        file: Or a UTF-8 text file.
        data: Or preference pairs, of which both responses are shown.
        scores: A score cache of these pairs.
        weights: How weights are made of its scores.
        limit: Pairs that are shown; the table counts all.
        spans: Spans of a text that are shown.
        output: The page.
    """

    tokenizers: list[str] = field(default_factory=list)
    text: str | None = None
    file: str | None = None
    data: PairsConfig = field(default_factory=PairsConfig)
    scores: str | None = None
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    limit: int = 10
    spans: int = 400
    output: str = "spans.html"


def write_spans_page(config: SpansPageConfig) -> list[Mismatch]:
    """Write the page, and return its table.

    Raises:
        InputError: A value, file, tokenizer or cache cannot be used.
    """
    _check(config)
    tokenizers = _named([load_tokenizer(folder) for folder in config.tokenizers], config.tokenizers)
    teacher, student = list(tokenizers)[:2]
    both = tokenizers[teacher], tokenizers[student]
    if config.data.train:
        pairs = open_preferences(config.data.train, split=config.data.split, on_bad=config.data.on_bad)
        views, source = _pair_views(config, pairs, *both), ", ".join(config.data.train)
        batches, counted = _responses(pairs), f"{2 * len(pairs):,} responses of {len(pairs):,} pairs"
    else:
        text, source, notes = _text(config)
        view = text_view(source, text, *both, config.spans)
        views, batches, counted = [view], iter([[text]]), "the text"
        view.notes.extend(notes)
    table = mismatch_table(batches, tokenizers)
    path = write_page(
        config.output,
        "spans",
        source=source,
        counted=counted,
        teacher=teacher,
        student=student,
        views=views,
        kinds=kinds_of(views),
        heats=sorted({name for view in views for band in view.bands for name in band.heat}),
        table=table,
    )
    logger.info("spans of %s: %s", source, path)
    return table


def table_text(table: Sequence[Mismatch]) -> str:
    """The table for a terminal."""
    names = max(len(f"{row.teacher} > {row.student}") for row in table)
    lines = [f"{'teacher > student':<{names}}" + "".join(f"{title:>10}" for title in _TITLES)]
    for row in table:
        numbers = [
            f"{row.n_spans:>10,}",
            *(_share(row.share(kind)) for kind in ("1:1", "1:n", "n:1", "n:m")),
            *(_plain(value) for value in (row.teacher_tokens_per_span, row.student_tokens_per_span)),
            _share(row.vocabulary_overlap),
        ]
        lines.append(f"{f'{row.teacher} > {row.student}':<{names}}" + "".join(numbers))
    return "\n".join(lines)


_TITLES = ("spans", "1:1", "1:n", "n:1", "n:m", "teacher", "student", "overlap")


def _share(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:>10.2%}"


def _plain(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:>10.3f}"


def _check(config: SpansPageConfig) -> None:
    output_file("output", config.output)
    if len(config.tokenizers) < 2:
        raise InputError("tokenizers", f"{len(config.tokenizers)} folders", "two or more tokenizer folders")
    given = [name for name in ("text", "file") if getattr(config, name) is not None]
    given += ["data.train"] if config.data.train else []
    if len(given) != 1:
        raise InputError("text, file, data.train", " and ".join(given) or "nothing", "one of the three")
    if config.scores and not config.data.train:
        raise InputError("scores", "a score cache without data.train", "the pairs that the scores are of")
    for name in ("limit", "spans"):
        if getattr(config, name) < 1:
            raise InputError(name, str(getattr(config, name)), "1 or more")


def _named(
    tokenizers: Sequence["PreTrainedTokenizerBase"], folders: Sequence[str]
) -> dict[str, "PreTrainedTokenizerBase"]:
    """Tokenizers by the shortest ends of their paths that tell them apart."""
    parts = [Path(folder).absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, tokenizers, strict=True))
    raise InputError("tokenizers", f"a folder twice in {list(folders)}", "each folder once")


def _text(config: SpansPageConfig) -> tuple[str, str, list[str]]:
    """The text, what it is, and what was changed to make it one."""
    if config.file is None:
        assert config.text is not None
        text, source = config.text, "text"
    else:
        # Bytes that are no UTF-8 become lone surrogates, which are counted below.
        text, source = Path(config.file).read_bytes().decode("utf-8", "surrogateescape"), config.file
    text, lone = without_surrogates(text)
    return text, source, [f"{lone:,} bytes or surrogates that are no UTF-8, read as U+FFFD"] if lone else []


def _responses(pairs: PreferenceDataset) -> Iterator[list[str]]:
    for start in range(0, len(pairs), _BATCH):
        yield [text for pair in pairs[start : start + _BATCH] for text in (pair.chosen, pair.rejected)]


def _pair_views(
    config: SpansPageConfig,
    pairs: PreferenceDataset,
    teacher: "PreTrainedTokenizerBase",
    student: "PreTrainedTokenizerBase",
) -> list[TextView]:
    """Both responses of the first pairs."""
    scores = None
    if config.scores:
        weights = config.weights
        method = CTPDConfig(
            weight_scale=weights.scale,
            weight_lower=weights.lower,
            weight_upper=weights.upper,
            scores=config.scores,
        )
        method.check()
        fingerprints = (pairs.fingerprint, tokenizer_fingerprint(teacher), tokenizer_fingerprint(student))
        scores = CachedScores(config.scores, *fingerprints, method)
    views = []
    for row, pair in enumerate(pairs[: config.limit]):
        responses = {"chosen": pair.chosen, "rejected": pair.rejected}
        n_spans = [align(text, teacher, student).n_spans for text in responses.values()]
        known = scores.of_pair(pair.id, row, (n_spans[0], n_spans[1])) if scores else None
        for index, (name, text) in enumerate(responses.items()):
            own = known[index] if known else None
            view = text_view(
                f"{pair.id} ({Path(pair.place).name}) \u00b7 {name}", text, teacher, student, config.spans, own
            )
            if index == 0:
                view.asked.extend(readable(pair.prompt[-1].content[:_ASKED].encode()))
            if scores and known is None:
                view.notes.append("left out when the pairs were scored")
            views.append(view)
    return views
