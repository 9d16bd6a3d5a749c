"""A special token's string inside a text is text, whatever the model; and the caller's tokenizer is left as it was."""

import copy

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ctpd_nemo.spans import align, align_batch, token_byte_ends
from tests.spans.conftest import SPECIAL
from tests.spans.oracle_match import assert_every_ordered_pair_matches


def special_strings(tokenizer) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens})


def test_no_special_string_of_any_real_tokenizer_gives_a_special_id(real):
    strings = sorted({string for hand in real.values() for string in special_strings(hand.tokenizer)})
    assert {"<|im_end|>", "<|im_start|>", "<|eot_id|>", "<s>", "</s>", "<unk>", "<|endoftext|>"} <= set(strings)
    texts = [text for string in strings for text in (string, f"a {string} b{string}\n", string[:-1] + string)]
    for name, hand in real.items():
        special_ids = {hand.tokenizer.convert_tokens_to_ids(string) for string in special_strings(hand.tokenizer)}
        for text, spans in zip(texts, align_batch(texts, hand.tokenizer, hand.tokenizer), strict=True):
            assert special_ids.isdisjoint(spans.teacher_ids.tolist()), (name, text)
    assert_every_ordered_pair_matches(texts[::20], real)


def test_no_special_string_gives_a_special_id_where_the_model_itself_knows_it(trained):
    """Unigram and WordPiece hold `</s>` in their own vocabulary, where `split_special_tokens` does not reach."""
    text = "ab".join(SPECIAL)
    for name, hand in trained.items():
        ids, ends = token_byte_ends(text, hand.tokenizer)
        named = {hand.tokenizer.convert_tokens_to_ids(string) for string in SPECIAL} - {hand.tokenizer.unk_token_id}
        assert named.isdisjoint(ids.tolist()), name
        assert ends[-1] == len(text)
    unigram = trained["metaspace"].tokenizer
    assert unigram.eos_token_id in unigram(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_no_special_string_gives_a_special_id_in_a_word_level_model():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    ids, ends = token_byte_ends("a </s> a", words)
    assert ids.tolist() == [2, 0, 2]
    assert ends.tolist() == [1, 6, 8]


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_no_special_string_gives_a_special_id_where_merges_build_it(ignore_merges):
    vocab = {piece: index for index, piece in enumerate(["E", "N", "D", "S", "EN", "END", "ENDS"])}
    merges = [("E", "N"), ("EN", "D"), ("END", "S")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="END")
    assert built("END", split_special_tokens=True)["input_ids"] == [vocab["END"]]
    ids, ends = token_byte_ends("ENDSEND", built)
    assert vocab["END"] not in ids
    assert ends[-1] == 7


def test_a_special_token_of_one_character_stays_a_letter(trained):
    """A pad token that is a plain letter of the alphabet must not drop that letter from texts."""
    tokenizer = copy.deepcopy(trained["byte level"].tokenizer)
    tokenizer.pad_token = "a"
    ids, ends = token_byte_ends("a b", tokenizer)
    assert tokenizer.decode(ids) == "a b"
    assert ends[-1] == 3


def test_added_tokens_that_are_not_special_work_as_before(trained):
    for name in ("byte level", "metaspace", "wordpiece", "nfkc"):
        tokenizer = copy.deepcopy(trained[name].tokenizer)
        tokenizer.add_tokens(["<tool>", AddedToken("<<", lstrip=True), AddedToken(">>", rstrip=True)])
        text = "ab<tool>cd  << ab >>  cd</s>"
        spans = align(text, tokenizer, trained["byte level"].tokenizer)
        tool, left, right = tokenizer.convert_tokens_to_ids(["<tool>", "<<", ">>"])
        assert [index for index in spans.teacher_ids if index in (tool, left, right)] == [tool, left, right]
        ids, ends = token_byte_ends(text, tokenizer)
        of = {int(index): int(end) for index, end in zip(ids, ends, strict=True)}
        assert of[tool] == text.index("cd"), name
        assert of[left] == text.index(" ab"), name
        assert of[right] in (text.rindex("cd"), text.rindex("  cd") + 2), name


def test_runs_of_spaces_of_gpt_neox_are_cut_where_its_tokens_end(real):
    ids, ends = token_byte_ends("a  b   c", real["gpt_neox"].tokenizer)
    assert real["gpt_neox"].tokenizer.convert_ids_to_tokens(ids.tolist()) == ["a", "  ", "b", "   ", "c"]
    assert ends.tolist() == [1, 3, 4, 7, 8]


def test_the_callers_tokenizer_is_left_as_it_was(trained):
    for hand in trained.values():
        tokenizer = copy.deepcopy(hand.tokenizer)
        backend = tokenizer.backend_tokenizer
        backend.enable_truncation(3)
        backend.enable_padding(length=50)
        backend.encode_special_tokens = False
        before, plain = backend.to_str(), tokenizer("ab </s> cd")["input_ids"]
        backend.enable_truncation(3)
        backend.enable_padding(length=50)
        spans = align("ab </s> abcdefgh cd", tokenizer, hand.tokenizer)
        assert spans.teacher_ids.tolist() == spans.student_ids.tolist()
        assert len(spans.teacher_ids) > 3
        assert backend.to_str() == before
        assert backend.encode_special_tokens is False
        assert tokenizer("ab </s> cd")["input_ids"] == plain


def test_tokens_added_after_the_first_use_are_seen(trained):
    tokenizer = copy.deepcopy(trained["byte level"].tokenizer)
    before = token_byte_ends("ab<tool>", tokenizer)[0].tolist()
    tokenizer.add_tokens(["<tool>"])
    after = token_byte_ends("ab<tool>", tokenizer)[0].tolist()
    assert after != before
    assert after[-1] == tokenizer.convert_tokens_to_ids("<tool>")


def test_bpe_dropout_does_not_reach_alignment():
    """Scores of spans are kept on disk: the same text must always give the same spans."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(["hello world"] * 9, trainers.BpeTrainer(vocab_size=40, show_progress=False))
    steady = token_byte_ends("hello world", PreTrainedTokenizerFast(tokenizer_object=tokenizer))[0].tolist()
    tokenizer.model.dropout = 0.9
    shaky = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert all(token_byte_ends("hello world", shaky)[0].tolist() == steady for _ in range(20))
