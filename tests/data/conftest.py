"""Two small tokenizers of different algorithms, preference rows, and files of them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.forms import Message, PreferencePair
from ctpd_nemo.data.templates import Side

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRACKETS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'].strip() + ' </s>' }}"
    "{% else %}{{ '<s>[' + message['role'] + '] ' + message['content'].strip() + ' [/' + message['role'] + ']' }}"
    "{% endif %}{% endfor %}"
)
TEXT = (
    "the a river mountain answers question seven twelve number because house walks green letter always sometimes "
    "please explain write poem code returns value list of cities near sea and sky über café 日本 語 🙂 don't it's"
)
WORDS = TEXT.split()


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)) + rng.choice([".", "!", "?", "\n", " "])


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    rng = random.Random(0)
    return [sentence(rng, rng.randint(3, 20)) for _ in range(400)]


@pytest.fixture(scope="session")
def bpe_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a ChatML template; as in Qwen2 the end of turn is the EOS token and there is no BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=100_000
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def unigram_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """SentencePiece-style Unigram with a template that trims; its control tokens are pieces of the model, too."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=250,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        max_piece_length=7,
        show_progress=False,
    )
    backend.train_from_iterator([*corpus, "<s></s>[user] [/user] [system] [/system] []/"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=100_000
    )
    tokenizer.chat_template = BRACKETS
    return tokenizer


@pytest.fixture(scope="session")
def bpe_side(bpe_tokenizer: PreTrainedTokenizerFast) -> Side:
    return Side(bpe_tokenizer)


@pytest.fixture(scope="session")
def unigram_side(unigram_tokenizer: PreTrainedTokenizerFast) -> Side:
    return Side(unigram_tokenizer)


@pytest.fixture(scope="session")
def encoder(unigram_side: Side, bpe_side: Side) -> PairEncoder:
    """The Unigram side is the policy (student), the BPE side the reference (teacher)."""
    return PairEncoder(unigram_side, bpe_side, include_eos=True, max_length=128)


@pytest.fixture(scope="session")
def make_pairs() -> Callable[..., list[PreferencePair]]:
    """``make_pairs(n, seed)`` gives n generated pairs, with system messages and earlier turns here and there."""

    def make(n: int, seed: int = 0) -> list[PreferencePair]:
        rng = random.Random(seed)
        pairs = []
        for number in range(n):
            prompt = [Message("system", sentence(rng, 3))] if rng.random() < 0.3 else []
            prompt.append(Message("user", sentence(rng, rng.randint(1, 12))))
            if rng.random() < 0.3:
                prompt += [Message("assistant", sentence(rng, 4)), Message("user", sentence(rng, 4))]
            chosen, rejected = sentence(rng, rng.randint(1, 20)), sentence(rng, rng.randint(1, 20)) + "x"
            pairs.append(PreferencePair(f"pair-{number}", tuple(prompt), chosen, rejected, f"made:{number}"))
        return pairs

    return make


def as_messages(messages: Any) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.fixture(scope="session")
def as_row() -> Callable[[PreferencePair], dict[str, Any]]:
    """The conversational row of a pair."""

    def convert(pair: PreferencePair) -> dict[str, Any]:
        return {
            "id": pair.id,
            "prompt": as_messages(pair.prompt),
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }

    return convert


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """``write_jsonl(rows, name)`` writes a JSON Lines file; a row may be raw bytes."""

    def write(rows: list[Any], name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture(scope="session")
def real_side(shared_dir: Path) -> Callable[[str], Side]:
    """``real_side("llama3")`` is the side of a real tokenizer, loaded once."""
    loaded: dict[str, Side] = {}

    def load(name: str) -> Side:
        if name not in loaded:
            loaded[name] = Side(AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / name))
        return loaded[name]

    return load
