"""Whether weights have a row for every id that a tokenizer gives."""

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from ctpd_nemo.data.forms import Message
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.folder import check_vocabulary
from tests.data.conftest import CHATML, bpe_tokenizer, corpus

__all__ = ["bpe_tokenizer", "corpus"]  # fixtures


@pytest.fixture
def tokenizer(bpe_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return copy.deepcopy(bpe_tokenizer)


def test_a_pad_token_beyond_the_weights_that_nothing_writes_is_no_reason_to_refuse_a_model(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == rows
    side = Side(tokenizer)
    check_vocabulary(side, rows, "folder")
    assert side.pad_token_id < rows
    # Not even where a message names it.
    assert max(side.render_prompt([Message("user", "[PAD] is no padding [PAD]")])) < rows


@pytest.mark.parametrize(
    "template",
    [
        "[PAD]" + CHATML,
        "{{ pad_token }}" + CHATML,
        "{{ '[PA' ~ 'D]' }}" + CHATML,
        CHATML.replace("<|im_end|>", "[PAD]"),
    ],
    ids=["by its string", "by its name", "put together", "as the end of a turn"],
)
def test_a_pad_token_beyond_the_weights_that_the_template_writes_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(InputError, match=f"ids up to {rows} and weights of {rows} rows"):
        check_vocabulary(Side(tokenizer, template), rows, "folder")


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("<|im_start|>assistant", "<|im_start|>assistant[PAD]"),
        CHATML + "{{ pad_token }}",
        CHATML.replace("{{ '<|im_start|>assistant", "{{ '[PA' ~ 'D]' ~ '<|im_start|>assistant"),
    ],
    ids=["by its string", "by its name", "put together"],
)
def test_a_template_that_writes_a_pad_token_in_the_prompt_alone_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    """Whatever the weights: what is asked is not what is trained."""
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(InputError, match=r"found a prompt that ends .*\[PAD\]"):
        Side(tokenizer, template)


def test_a_token_beyond_the_weights_that_a_text_can_hold_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = len(tokenizer)
    tokenizer.add_tokens(["<think>"])
    with pytest.raises(InputError, match=f"ids up to {rows}"):
        check_vocabulary(Side(tokenizer), rows, "folder")


def test_a_piece_of_the_model_beyond_the_weights_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = len(tokenizer)
    check_vocabulary(Side(tokenizer), rows, "folder")
    with pytest.raises(InputError, match=f"ids up to {rows - 1} and weights of {rows - 1} rows"):
        check_vocabulary(Side(tokenizer), rows - 1, "folder")
