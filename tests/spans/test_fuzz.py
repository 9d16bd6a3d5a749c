"""Alignment of any text at all, by the oracle where it can read the text, and by what always holds where it cannot."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ctpd_nemo.spans import align_batch
from tests.fuzz import fuzz
from tests.spans.oracle_match import assert_covers, assert_every_ordered_pair_matches
from tests.spans.test_real_tokenizers import ATOMS

# Strings that tokenizers treat apart, bytes written out, marks that move, and what text files should not hold.
TOKENS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>", "<s>", "<unk>", "[INST]", "<fim_prefix>"]
ODD = ["\x00", "\x1b[2J", "\x85", "\u2028", "\u202e", "\ufeff", "\ufdd0", "\uffff", "\U0010ffff", "\U000e0001", "\r"]
RUNS = st.tuples(st.sampled_from([" ", "\n", "a", "\u0301", "🦙", "9", "\t", "가"]), st.integers(2, 200)).map(
    lambda run: run[0] * run[1]
)
ANY = st.one_of(st.sampled_from([*ATOMS, *TOKENS, *ODD]), st.characters(exclude_categories=["Cs"]), RUNS)
# Characters whose normal forms are the same in every version of Unicode of these years.
SETTLED = st.one_of(
    st.sampled_from([*ATOMS, *TOKENS, *ODD]), st.characters(exclude_categories=["Cs", "Cn", "Mn", "Mc", "Co"]), RUNS
)
ANY_TEXT, SETTLED_TEXT = (st.lists(part, max_size=25).map("".join) for part in (ANY, SETTLED))


@fuzz(25)
@given(text=SETTLED_TEXT)
def test_real_tokenizers_match_the_oracle(real, text):
    assert_every_ordered_pair_matches([text], real)


@fuzz(25)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=3))
def test_any_text_is_covered_by_real_tokenizers(real, texts):
    for teacher, student in itertools.permutations(real.values(), 2):
        for text, spans in zip(texts, align_batch(texts, teacher.tokenizer, student.tokenizer), strict=True):
            assert_covers(text, spans)


@fuzz(25)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=3))
def test_any_text_is_covered_by_small_tokenizers(trained, texts):
    for teacher, student in itertools.permutations(trained.values(), 2):
        for text, spans in zip(texts, align_batch(texts, teacher.tokenizer, student.tokenizer), strict=True):
            assert_covers(text, spans)
