"""A world small enough for four processes on two cores: two tokenizers, pairs in plain ASCII, and tiny random models.

The teacher side is Qwen2-shaped (untied embeddings, QKV bias) and reads byte-level BPE; the student is Llama-shaped
(tied embeddings) and reads SentencePiece-style Unigram. Both have 4 layers, for 2 stages of 2 virtual stages, grouped
queries, and an odd number of vocabulary rows, which two tensor-parallel ranks cannot share without padding.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from ctpd_nemo.pipeline.tiny_world.tokenizers import settled_pieces
from tests.rounding import of_model

WORDS = [
    "the",
    "a",
    "river",
    "mountain",
    "answers",
    "question",
    "seven",
    "twelve",
    "number",
    "because",
    "house",
    "walks",
    "green",
    "letter",
    "always",
    "sometimes",
    "please",
    "explain",
    "write",
    "poem",
    "code",
    "returns",
    "value",
    "list",
    "of",
    "cities",
    "near",
    "sea",
    "and",
    "sky",
    "over",
    "under",
    "it's",
    "don't",
    "42",
    "307",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|header|>' + message['role'] + '\n' + message['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant\n' }}{% endif %}"
)
# No sequence is longer on either side, and of each pair one sequence is longer than half of it: padded, with room for
# two longest sequences, a microbatch then holds one pair.
MAX_LENGTH = 66
# Two steps: of 5 pairs, which two ranks cannot share equally, and of 1, which leaves nothing for the second.
NUM_PAIRS = 6
GLOBAL_BATCH = 5

LAYERS, WIDEST = 4, 76
# How far a job may be from what is exact: the products have sums of 76 terms at the most, the teacher's MLP.
TOLERANCE = of_model(LAYERS, WIDEST)
_SIZES = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}


def build_world(home: Path) -> None:
    """Fill ``home`` with ``pairs.jsonl`` and the folders of student, teacher, and the contrastive pairs of both."""
    rng = random.Random(1)
    rows = [_row(number, rng) for number in range(NUM_PAIRS)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = [_sentence(rng, rng.randint(3, 20)) for _ in range(300)]
    bpe, unigram = train_bpe(corpus), train_unigram(corpus)
    student = LlamaConfig(
        **_SIZES, hidden_size=32, intermediate_size=60, head_dim=16, tie_word_embeddings=True, vocab_size=_odd(unigram)
    )
    teacher = Qwen2Config(**_SIZES, hidden_size=40, intermediate_size=WIDEST, vocab_size=_odd(bpe))
    write_model(home / "student", student, unigram, seed=1)
    for seed, name in enumerate(("teacher", "positive", "negative"), start=2):
        write_model(home / name, teacher, bpe, seed)
    for seed, name in enumerate(("student_positive", "student_negative"), start=5):
        write_model(home / name, student, unigram, seed)


def train_bpe(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the bytes of ASCII text; no BOS, the end of turn is the EOS token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [*corpus, "system user assistant\n"], trainers.BpeTrainer(vocab_size=120, show_progress=False)
    )
    return _fast(
        backend, ["<|im_start|>", "<|im_end|>", "<|pad|>"], CHATML, eos_token="<|im_end|>", pad_token="<|pad|>"
    )


def train_unigram(corpus: list[str]) -> PreTrainedTokenizerFast:
    """SentencePiece-style Unigram, pieces across words included; BOS, and no padding token at all."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", max_piece_length=6, show_progress=False
    )
    backend.train_from_iterator([*corpus, "system\nuser\nassistant\n"], trainer)
    # The same losses in every run: where two probabilities are all but equal, rounding decides which way ULD pulls.
    pieces = settled_pieces(json.loads(backend.to_str())["model"]["vocab"][1:])
    backend.model = models.Unigram([("<unk>", 0.0), *pieces], unk_id=0)
    return _fast(backend, ["<|bos|>", "<|header|>", "<|eot|>"], HEADERS, bos_token="<|bos|>", eos_token="<|eot|>")


def _fast(backend: Tokenizer, special: list[str], template: str, **roles: str) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    tokenizer.chat_template = template
    return tokenizer


def _odd(tokenizer: PreTrainedTokenizerFast) -> int:
    """More rows than tokens, as real models have, and an odd number of them."""
    return len(tokenizer) + 4 | 1


def write_model(folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Save random fp32 weights; no bias is zero and no norm is one, which would hide a wrong place."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _row(number: int, rng: random.Random) -> dict[str, object]:
    prompt = [{"role": "system", "content": _sentence(rng, 2)}] if number % 3 == 0 else []
    prompt.append({"role": "user", "content": _sentence(rng, rng.randint(2, 6))})
    # Very unequal responses: ranks that share the pairs of a step get different numbers of microbatches.
    chosen, rejected = _sentence(rng, rng.randint(1, 12)), _sentence(rng, rng.randint(5, 9)) + "x"
    return {
        "id": f"pair-{number}",
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)) + rng.choice([".", "!", "?"])
