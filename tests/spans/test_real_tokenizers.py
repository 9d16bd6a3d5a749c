"""Alignment against the oracle with six real tokenizers, every ordered pair."""

import json
import random
import unicodedata

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ctpd_nemo.spans import align
from tests.spans.oracle_match import as_lists, assert_every_ordered_pair_matches

KOREAN, HINDI, ARABIC = "한국어 문장입니다. 각각", "हिन्दी नमस्ते क़ दुनिया", "العربية مرحبا بكم ١٢٣ لُغَةٌ"
SAMPLES = [
    "",
    " ",
    "Hello world",
    "I 🦙 u",
    "e\u0301x",
    "12345",
    " Hello  world\n\n\n",
    "日本語のテキストと漢字、ひらがなカタカナ。𠮷𠀋",
    KOREAN,
    unicodedata.normalize("NFD", KOREAN),
    HINDI,
    unicodedata.normalize("NFD", HINDI),
    ARABIC,
    unicodedata.normalize("NFD", ARABIC),
    unicodedata.normalize("NFD", "Ünïcödé àéîõü ệ ở ṩ Å"),
    "\u0301 starts with a mark, q\u0307\u0323 reorders, a\u0315\u0300\u05aeb too",
    "👨‍👩‍👧‍👦👍🏽🇺🇳 🏳️‍🌈 ☃️ 🦙🦙\u0301🦙",
    "def f(x):\n\tif x > 0:\n\t\treturn {'a': [1, 2,  3]}  # comment\r\n\r\n",
    "a  b   c    d" + " " * 40 + "e\t\t\tf \u00a0\u3000\u2003g",
    "1234567890 3.14159 1,000,000 2024-01-01 ٣٤ ४५ ½",
    "\ufffd\ufffd a\ufffd",
    "\x00\x01\x1f\x7f nul\x00\x00",
    "zero\u200bwidth\u200djoin\ufeffBOM \u2028 \u202e",
    "▁ literal ▁▁meta 🦙▁<0x0A><0xF0>",
    "<|im_start|>user\nhi<|im_end|><|eot_id|></s><s><unk><|endoftext|> <fim_prefix>",
    "\ufdd0\uffff\U0010ffff\u0378",
    # A mark that canonical ordering moves into a decomposed character: it must not be cut inside.
    "\U0001d15e\u0f72<|reserved_special_token_184|>",
    # Marks of which two end up at the place of one, both equal to the mark of the text there.
    "\u0327\u0f72\u0f73\u092e\u0308",
    # StarCoder2 has no token for the first byte of the unassigned planes 4 to 7 and drops it.
    "a\U00040000b🦙\U00040000\U00050000",
    "\U00040000",
    # Runs of spaces that are added tokens of GPT-NeoX, in a text that its NFC changes.
    "e\u0301   🦙     x  \u0301",
]
ATOMS = [
    *"aé e\u0301\u0327\u0323\u0307 \u0344\u0958\u1100\u1161\u11a8\uac00\u0f71\u0f72\u0f73\u2126\U0001d15e q\u0308Z19.'",
    *"\n\t\r ▁\u200d\ufeff\ufe0f\u00a0\u3000\ufffd\x00\x7f日ﬁ①ßİमस्तेر",
    *["🦙", "👨‍👩‍👧", "🇺🇸", "\r\n", "    ", "<0x0A>", "<|im_end|>", "</s>", "ing", " the", "'s"],
]


@pytest.mark.parametrize("text", SAMPLES)
def test_spans_match_the_oracle_on_every_kind_of_text(real, text):
    assert_every_ordered_pair_matches([text], real)


def test_spans_match_the_oracle_on_the_stress_texts(real, shared_dir):
    lines = (shared_dir / "stress_texts.jsonl").read_text().splitlines()
    assert_every_ordered_pair_matches([json.loads(line)["text"] for line in lines], real)


def test_spans_match_the_oracle_on_real_responses(real, shared_dir):
    assert_every_ordered_pair_matches(responses(shared_dir)[::40], real)


@pytest.mark.slow
def test_spans_match_the_oracle_on_all_responses_of_the_test_split(real, shared_dir):
    assert_every_ordered_pair_matches(responses(shared_dir), real)


def responses(shared_dir) -> list[str]:
    rows = [json.loads(line) for line in (shared_dir / "preferences" / "test.jsonl").read_text().splitlines()]
    return [row[side][-1]["content"] for row in rows for side in ("chosen", "rejected")]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(ATOMS), max_size=12).map("".join), min_size=1, max_size=4))
@example(texts=["", "a", ""])
@example(texts=["▁", "\u0301"])  # the byte that one text lacks makes up for the dummy space of the next
def test_spans_match_the_oracle_on_hostile_texts(real, texts):
    assert_every_ordered_pair_matches(texts, real)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20))
def test_spans_match_the_oracle_on_any_unicode(real, text):
    nfc = real["qwen2"].tokenizer.backend_tokenizer.normalizer
    # The two know different versions of Unicode; where they disagree the oracle cannot read the tokens.
    assume(nfc.normalize_str(text) == unicodedata.normalize("NFC", text))
    assert_every_ordered_pair_matches([text], real)


@pytest.mark.parametrize("composed", [True, False])
def test_spans_match_the_oracle_on_100_000_characters(real, composed):
    rng = random.Random(0)
    words = [*SAMPLES[2:20], "the", "quick", "brown", "fox", "\n", "über", "naïve", "漢字"]
    text = " ".join(rng.choices(words, k=12_000))[:100_000]
    text = unicodedata.normalize("NFC", text) if composed else unicodedata.normalize("NFD", text)[:100_000]
    pairs = [("qwen2", "llama3"), ("llama2", "gpt_neox")]
    for pair in pairs if composed else pairs[:1]:
        assert_every_ordered_pair_matches([text], {name: real[name] for name in pair})


def test_the_measured_example_of_a_token_with_a_space_and_half_an_emoji(real):
    """Llama-3 joins the space with the first bytes of the emoji; Llama-2 spends a token on each byte after a space."""
    spans = align("I 🦙 u", real["llama3"].tokenizer, real["llama2"].tokenizer)
    assert as_lists(spans) == [
        [0, 1, 4, 5, 6, 8],
        [40, 11410, 99, 247, 577],
        [306, 29871, 243, 162, 169, 156, 318],
        [0, 1, 2, 3, 4],
        [0, 1, 1, 1, 2, 3, 4],
    ]


def test_a_character_that_a_normalizer_composed_away_belongs_to_the_next_token(real):
    spans = align("e\u0301x", real["qwen2"].tokenizer, real["llama3"].tokenizer)
    assert spans.bounds.tolist() == [0, 1, 4]
    assert spans.teacher_span.tolist() == [0, 1]
    assert spans.student_span.tolist() == [0, 1, 1]
