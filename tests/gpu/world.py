"""Tiny models whose widths are multiples of 128, so that every FP8 recipe can multiply them, and pairs to score."""

import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from tests.distributed.world import WORDS, train_bpe, train_unigram

MAX_LENGTH = 192
NUM_PAIRS = 24
_SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def build_world(home: Path) -> None:
    """Fill ``home`` with ``pairs.jsonl`` and the folders ``student``, ``teacher``, ``positive`` and ``negative``."""
    rng = random.Random(0)
    corpus = [_sentence(rng, 20) for _ in range(300)]
    bpe, unigram = train_bpe(corpus), train_unigram(corpus)
    _write(home / "student", LlamaConfig(**_SIZES, tie_word_embeddings=True, vocab_size=160), unigram, 1)
    teacher = Qwen2Config(**_SIZES, vocab_size=160)
    _write(home / "teacher", teacher, bpe, 2)
    # The contrastive pair stands a little to either side of the teacher, as training leaves it.
    for name, seed in (("positive", 3), ("negative", 4)):
        _write(home / name, teacher, bpe, 2, seed)
    rows = [
        {
            "id": f"pair-{number}",
            "prompt": _sentence(rng, rng.randint(2, 8)),
            "chosen": _sentence(rng, rng.randint(2, 14)),
            "rejected": _sentence(rng, rng.randint(2, 14)) + " no",
        }
        for number in range(NUM_PAIRS)
    ]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write(
    folder: Path,
    config: LlamaConfig | Qwen2Config,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    away: int | None = None,
) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for scale, drawn in ((0.06, seed), (0.003, away)):
        if drawn is None:
            continue
        generator = torch.Generator().manual_seed(drawn)
        for name, parameter in model.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            start = parameter.data if drawn == away else torch.full_like(parameter.data, float("norm" in name))
            parameter.data.copy_(start + noise)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."
