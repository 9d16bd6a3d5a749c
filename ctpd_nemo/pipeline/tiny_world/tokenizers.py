"""Two tokenizers of different algorithms, trained on the tiny world's own text.

The teacher's is a byte-level BPE with Qwen2's chat markup. The student's is a SentencePiece-style Unigram that falls
back to bytes, with Llama-3's chat markup. An emoji is one piece to the first and four bytes to the second; the second's
pieces run across words. So spans of one token against several, and of several against several, are common.
"""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

BPE_PIECES = 800
UNIGRAM_PIECES = 600

# Longer pieces would swallow whole sentences: the world's text repeats itself.
_MAX_PIECE_LENGTH = 7

_CHATML_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_HEADER_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n' }}{%- endif %}"
)


def train_bpe(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``BPE_PIECES`` pieces: no BOS, ``<|im_end|>`` ends a turn."""
    tokenizer = Tokenizer(models.BPE())
    # Qwen2's own rules, and no others: transformers puts them into any tokenizer that lies beside a Qwen2 model.
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_PIECES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return _fast(tokenizer, special, _CHATML_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def train_unigram(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A Unigram of at most ``UNIGRAM_PIECES`` pieces and 256 bytes: has a BOS, ``<|eot_id|>`` ends a turn."""
    trained = _unigram_backend(models.Unigram())
    # Emoji are kept out of the training text, so that they are spelled in bytes.
    trained.normalizer = normalizers.Replace(Regex(r"[\x{1F000}-\x{1FFFF}]"), "")
    trainer = trainers.UnigramTrainer(
        vocab_size=UNIGRAM_PIECES,
        special_tokens=["<unk>"],
        unk_token="<unk>",
        max_piece_length=_MAX_PIECE_LENGTH,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    pieces = settled_pieces(json.loads(trained.to_str())["model"]["vocab"][1:])
    # A byte must never beat a piece of text.
    worst = pieces[-1][1] - 10.0
    vocab = [("<unk>", 0.0), *((f"<0x{byte:02X}>", worst) for byte in range(256)), *pieces]
    tokenizer = _unigram_backend(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
    fast = _fast(
        tokenizer,
        special,
        _HEADER_TEMPLATE,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        unk_token="<unk>",
    )
    bos = (fast.bos_token, fast.bos_token_id)
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[bos]
    )
    return fast


def _unigram_backend(model: models.Unigram) -> Tokenizer:
    tokenizer = Tokenizer(model)
    # split=False lets pieces run across words: a text this plain has too few different words for the pieces wanted.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    # Not decoders.Metaspace, which drops every space of the first piece.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def settled_pieces(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The same pieces with scores that do not change from run to run, best first.

    The trainer gives the characters that it keeps only for coverage the lowest scores, 0.0001 apart in the order of a
    hash table; they all get the lowest. Sums of the others differ in their last bits.
    """
    lowest = min(score for _, score in pieces)
    is_cover = [len(piece) == 1 and score < lowest + 0.0001 * len(pieces) for piece, score in pieces]
    settled = [
        (piece, round(lowest if cover else score, 6)) for (piece, score), cover in zip(pieces, is_cover, strict=True)
    ]
    return sorted(settled, key=lambda item: (-item[1], item[0]))


def _fast(tokenizer: Tokenizer, special: Sequence[str], template: str, **roles: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=template,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
        **roles,
    )
