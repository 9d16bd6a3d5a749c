"""The real tokenizers, and small trained ones, with the way to read each of them by hand."""

import json
import random
import unicodedata
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.spans import oracle
from tests.spans.oracle import Letter, Side


class Hand:
    """A tokenizer and how the oracle reads it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        letters: Callable[[str], list[Letter]],
        pieces: Callable[[PreTrainedTokenizerFast, list[int]], list[bytes]],
        dropped: Callable[[str], bool] = lambda char: False,
    ) -> None:
        self.tokenizer = tokenizer
        self.letters = letters
        self.pieces = pieces
        self.dropped = dropped
        self.missing = oracle.missing_bytes(tokenizer) if pieces is oracle.byte_level_pieces else set()

    def side(self, text: str) -> Side:
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        pieces = self.pieces(self.tokenizer, ids)
        return Side(ids, oracle.token_ends(text, self.letters(text), pieces, self.dropped, self.missing))


REAL = {
    "gpt2": (oracle.plain_letters, oracle.byte_level_pieces),
    "gpt_neox": (oracle.nfc_letters, oracle.byte_level_pieces),
    "llama2": (oracle.sentencepiece_letters, oracle.sentencepiece_pieces),
    "llama3": (oracle.plain_letters, oracle.byte_level_pieces),
    "qwen2": (oracle.nfc_letters, oracle.byte_level_pieces),
    "starcoder2": (oracle.plain_letters, oracle.byte_level_pieces),
}


@pytest.fixture(scope="session")
def real(shared_dir) -> dict[str, Hand]:
    """The six real tokenizers."""
    folder = shared_dir / "tokenizers"
    return {name: Hand(AutoTokenizer.from_pretrained(folder / name), *how) for name, how in REAL.items()}


# Characters that every trained tokenizer below knows. None composes with its neighbour, so NFKC works one by one.
KNOWN = "abcdefgh ABC.,'012\nçñé漢字हि한🦙İßﬁ①Ａ㎏"
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]


def corpus() -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices(KNOWN.replace(" ", ""), k=rng.randint(1, 6))) for _ in range(60)]
    return [" ".join(rng.choices(words, k=8)) for _ in range(200)]


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level(add_prefix_space: bool, normalizer=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return wrapped(tokenizer)


def unigram(pre_tokenizer, normalizer=None, byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=list(KNOWN), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if byte_fallback:
        vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
        pieces = [(piece, score) for piece, score in vocabulary] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
        tokenizer.model = models.Unigram(pieces, unk_id=0, byte_fallback=True)
    return wrapped(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=1000))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=list(KNOWN), show_progress=False
    )
    # Every character can start a word and continue one, so no word is unknown.
    letters = [letter.char for char in KNOWN for letter in bert_letters(char) if letter.char != " "]
    tokenizer.train_from_iterator(corpus() + [letter + letter for letter in letters] * 3, trainer)
    return wrapped(tokenizer)


def prefixed_letters(text: str) -> list[Letter]:
    """A space in front of a text that does not begin with one."""
    letters = oracle.plain_letters(text)
    return letters if text[:1] in ("", " ") else [Letter(" ", None), *letters]


def folded_letters(text: str) -> list[Letter]:
    """NFKC and lower case, one character at a time, and a space in front."""
    folded = [
        Letter(lower, index)
        for index, char in enumerate(text)
        for part in unicodedata.normalize("NFKC", char)
        for lower in part.lower()
    ]
    return folded if text[:1] in ("", " ") else [Letter(" ", None), *folded]


def unprefixed_metaspace_letters(text: str) -> list[Letter]:
    return [Letter(oracle.META if char == " " else char, index) for index, char in enumerate(text)]


def nfkc_metaspace_letters(text: str) -> list[Letter]:
    letters = [Letter(part, i) for i, char in enumerate(text) for part in unicodedata.normalize("NFKC", char)]
    spaced = [letter._replace(char=oracle.META) if letter.char == " " else letter for letter in letters]
    return spaced if not spaced or spaced[0].char == oracle.META else [Letter(oracle.META, None), *spaced]


def bert_letters(text: str) -> list[Letter]:
    """White space to spaces, no accents, lower case; one character at a time."""
    return [
        Letter(" " if char.isspace() else lower, index)
        for index, char in enumerate(text)
        for part in unicodedata.normalize("NFD", char)
        if unicodedata.category(part) != "Mn"
        for lower in part.lower()
    ]


@pytest.fixture(scope="session")
def trained() -> dict[str, Hand]:
    """Small tokenizers of every kind, trained on the spot; each knows all characters of ``KNOWN``."""
    Metaspace = pre_tokenizers.Metaspace
    pieces = oracle.sentencepiece_pieces
    return {
        "byte level": Hand(byte_level(False), oracle.plain_letters, oracle.byte_level_pieces),
        "byte level with prefix": Hand(byte_level(True), prefixed_letters, oracle.byte_level_pieces),
        "byte level folded": Hand(
            byte_level(True, normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
            folded_letters,
            oracle.byte_level_pieces,
        ),
        "metaspace": Hand(unigram(Metaspace(split=False)), oracle.metaspace_letters, pieces),
        "metaspace first": Hand(
            unigram(Metaspace(prepend_scheme="first", split=False)), oracle.metaspace_letters, pieces
        ),
        "metaspace never": Hand(unigram(Metaspace(prepend_scheme="never")), unprefixed_metaspace_letters, pieces),
        "byte fallback": Hand(unigram(Metaspace(), byte_fallback=True), oracle.metaspace_letters, pieces),
        "nfkc": Hand(unigram(Metaspace(), normalizers.NFKC()), nfkc_metaspace_letters, pieces),
        "wordpiece": Hand(word_piece(), bert_letters, oracle.wordpiece_pieces, lambda char: char == " "),
    }
