"""A row that no template or tokenizer can take is its own fault: skipped and counted, or named by file and row."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ctpd_nemo.data.config import DataConfig, longest_row
from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded import EncodedDataset, Manifest
from ctpd_nemo.data.encoded_pair import EncodedPair, Skipped
from ctpd_nemo.data.encoded_writer import write_encoded
from ctpd_nemo.data.loader import Batching, StepStats, build_step_loader
from ctpd_nemo.data.preferences import PreferenceDataset, open_preferences
from ctpd_nemo.data.source import TextSource
from ctpd_nemo.data.steps import StepPlan
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from tests.data.conversations import TEMPLATES

# The regular expression of the tokenizer below takes more steps on it than the library allows, and panics.
PANIC = "a" * 40 + "b"
NO_SYSTEM = TEMPLATES["no system"]


@pytest.fixture(scope="module")
def fragile(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that panics where the real ones do on eleven million spaces: for want of a limit on its steps."""
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("(a+)+!"), "isolated"), words])
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = NO_SYSTEM
    return tokenizer


GOOD = [{"prompt": f"Name sea {number}.", "chosen": "The Baltic.", "rejected": "Paris."} for number in range(9)]
BAD: dict[str, dict[str, Any]] = {
    "a prompt on which the tokenizer panics": {**GOOD[0], "prompt": PANIC},
    "a chosen response on which it panics": {**GOOD[0], "chosen": PANIC},
    "a rejected response on which it panics": {**GOOD[0], "rejected": PANIC},
    "a system message": {**GOOD[0], "system": "Be brief."},
    "tools": {**GOOD[0], "tools": [{"type": "function"}]},
    "a developer": {**GOOD[0], "prompt": [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]},
}
REASONS = Counter(refused_by_tokenizer=3, refused_by_template=1, unread_field=1, unknown_role=1)


def mixed() -> list[dict[str, Any]]:
    """Good rows and bad ones, in turns."""
    turns = [row for pair in zip(GOOD, BAD.values(), strict=False) for row in pair]
    return [*turns, *GOOD[len(BAD) :]]


@pytest.fixture
def dataset(write_jsonl: Callable[..., Path]) -> PreferenceDataset:
    return open_preferences(write_jsonl(mixed()))


def encoder_of(tokenizer: PreTrainedTokenizerFast, on_bad: str) -> PairEncoder:
    return PairEncoder(Side(tokenizer), None, True, 128, on_bad=on_bad)


def ids_of(pair: EncodedPair | Skipped) -> Any:
    if isinstance(pair, Skipped):
        return pair
    sides = [response.policy for response in (pair.chosen, pair.rejected)]
    return [part.tolist() for side in sides for part in (side.prompt_ids, side.response_ids, side.response_span)]


@pytest.mark.usefixtures("capfd")
def test_a_row_the_tokenizer_panics_on_is_skipped_and_counted_and_harms_no_other(
    fragile: PreTrainedTokenizerFast, dataset: PreferenceDataset
) -> None:
    encoder = encoder_of(fragile, "skip")
    alone = [ids_of(encoder.encode([row], [dataset[row]])[0]) for row in range(len(dataset))]
    together = [ids_of(pair) for pair in encoder.encode(range(len(dataset)), dataset[:])]
    assert together == alone
    skipped = [pair for pair in together if isinstance(pair, Skipped)]
    assert Counter(pair.reason for pair in skipped) == REASONS
    assert len(skipped) + sum(isinstance(pair, list) for pair in together) == len(dataset)
    # What is said of each names its row, on one line.
    for pair in skipped:
        assert dataset.place(pair.index) in pair.why
        assert "\n" not in pair.why
    # The tokenizer is what it was: rows without a bad one among them are encoded as before.
    good = [row for row in range(len(dataset)) if isinstance(together[row], list)]
    assert [ids_of(pair) for pair in encoder.encode(good, [dataset[row] for row in good])] == [alone[n] for n in good]


@pytest.mark.usefixtures("capfd")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_steps_count_bad_rows_and_all_ranks_together_see_every_pair_once(
    fragile: PreTrainedTokenizerFast, dataset: PreferenceDataset, num_workers: int
) -> None:
    encoder, plan = encoder_of(fragile, "skip"), StepPlan(len(dataset), 5, seed=3)
    ranks = [
        list(
            build_step_loader(
                dataset, encoder, plan, Batching(512), dp_rank=rank, dp_size=2, num_workers=num_workers * (rank == 0)
            )
        )
        for rank in range(2)
    ]
    steps = [step for rank in ranks for step in rank]
    total = sum((step.stats for step in steps), StepStats())
    assert total.skipped == REASONS
    assert total.pairs + total.skipped.total() == len(dataset)
    seen = [row for step in steps for batch in step.microbatches for row in batch.pair_index.tolist()]
    assert sorted([*seen, *(pair.index for step in steps for pair in step.skipped)]) == list(range(len(dataset)))


@pytest.mark.usefixtures("capfd")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_and_row_also_in_a_worker(
    fragile: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path], name: str, num_workers: int
) -> None:
    dataset = open_preferences(write_jsonl([GOOD[0], GOOD[1], BAD[name]]))
    encoder = encoder_of(fragile, "stop")
    loader = build_step_loader(dataset, encoder, StepPlan.in_order(3, 3), Batching(512), num_workers=num_workers)
    with pytest.raises(InputError, match=r"^\S*pairs\.jsonl:3[,:]") as stopped:
        list(loader)
    assert "\n" not in str(stopped.value)


@pytest.mark.usefixtures("capfd")
def test_encoded_data_leaves_out_bad_rows_and_says_which(
    fragile: PreTrainedTokenizerFast, dataset: PreferenceDataset, tmp_path: Path
) -> None:
    encoder = encoder_of(fragile, "skip")
    manifest = Manifest.of(dataset, encoder, 4)
    list(write_encoded(tmp_path / "encoded", manifest, TextSource(dataset, encoder), num_workers=2))
    encoded = EncodedDataset(tmp_path / "encoded", manifest)
    assert encoded.skipped == REASONS
    rows = range(len(dataset))
    assert [ids_of(pair) for pair in encoded.pairs(rows)] == [ids_of(pair) for pair in encoder.encode(rows, dataset[:])]
    bad = [row for row in rows if isinstance(encoded.pairs([row])[0], Skipped)]
    assert encoded.first_skipped("refused_by_tokenizer") == bad[0] == 1
    source = TextSource(dataset, encoder_of(fragile, "stop"))
    for num_workers in (0, 2):
        with pytest.raises(InputError, match=r"pairs\.jsonl:2: found text on which a tokenizer gives up"):
            list(write_encoded(tmp_path / str(num_workers), manifest, source, num_workers))


def test_a_word_for_which_a_vocabulary_has_nothing_is_its_rows_fault(write_jsonl: Callable[..., Path]) -> None:
    """Where there is no unknown token, the library raises an exception of no class of its own."""
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["sea", "cold", "x", "<e>"])}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"
    rows = [{"prompt": "cold sea", "chosen": "cold", "rejected": word} for word in ("sea", "warm", "sea")]
    encoder = PairEncoder(Side(tokenizer), None, True, 64, on_bad="skip")
    found = encoder.encode(range(3), open_preferences(write_jsonl(rows))[:])
    assert [type(one) for one in found] == [EncodedPair, Skipped, EncodedPair]


def test_an_error_that_is_no_rows_is_raised(
    fragile: PreTrainedTokenizerFast, dataset: PreferenceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(fragile, "skip")
    for error in (KeyboardInterrupt(), MemoryError(), ValueError("ours"), InputError("a", "b", "c")):

        def fails(*_: Any, error: BaseException = error) -> Any:
            raise error

        monkeypatch.setattr(encoder, "_align", fails)
        with pytest.raises(type(error)):
            encoder.encode([0], [dataset[0]])


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected", "tools"])
def test_a_row_of_more_bytes_than_allowed_is_skipped_and_counted_or_named(
    field: str, write_jsonl: Callable[..., Path]
) -> None:
    long: Any = [{"type": "x" * 2000}] if field == "tools" else " " * 2000 + "x"
    path = write_jsonl([GOOD[0], {**GOOD[1], field: long}, GOOD[2]])
    dataset = open_preferences(path, on_bad="skip", max_bytes=1500)
    assert (len(dataset), dataset.skipped) == (2, Counter(too_many_bytes=1))
    with pytest.raises(InputError, match=r"pairs\.jsonl:2: found 2,\d+ bytes of text; expected at most 1,500"):
        open_preferences(path, max_bytes=1500)
    assert len(open_preferences(path)) == 3


def test_how_long_a_row_may_be_follows_the_longest_sequence() -> None:
    assert longest_row(2048) == 2**20
    assert longest_row(131072) == 64 * 131072
    assert longest_row(2048, 7) == 7
    with pytest.raises(InputError, match=r"data\.max_row_bytes: found 0"):
        DataConfig(max_row_bytes=0).check()
    with pytest.raises(InputError, match=r"data\.warn_skipped: found 1\.5"):
        DataConfig(warn_skipped=1.5).check()


def test_eleven_million_spaces_never_reach_a_tokenizer(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([GOOD[0], json.dumps({**GOOD[1], "prompt": " " * 11_000_000 + "x"}).encode()])
    dataset = open_preferences(path, on_bad="skip", max_bytes=longest_row(DataConfig().max_length))
    assert dataset.skipped == Counter(too_many_bytes=1)
    assert np.array_equal(dataset.text_bytes, [[11, 11, 6]])
