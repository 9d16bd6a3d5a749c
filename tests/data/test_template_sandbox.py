"""Templates of others: what they write is what ``transformers`` writes, and nothing they ask for takes long."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from ctpd_nemo.data.template_sandbox import render_template

TOKENIZERS = Path(__file__).parents[3] / "shared" / "tokenizers"
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, "é"], "b": {"c": None}}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b> & 'you'"}],
    [{"role": "system", "content": "S\n"}, {"role": "user", "content": " Hi "}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n"}, {"role": "user", "content": "c"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "r"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<d>", "parameters": {"type": "object"}}}]
# Pieces that templates are made of: every filter, method, operator and statement that is allowed is in one.
PIECES = Path(__file__).with_name("template_pieces.jinja").read_text().removesuffix("\n").split("\n{# ---- #}\n")


def _written(render: Any) -> str:
    try:
        return render()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("template", PIECES, ids=range(len(PIECES)))
def test_a_template_writes_what_transformers_writes(template: str) -> None:
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            given: dict[str, Any] = {"tools": TOOLS, "add_generation_prompt": prompt, "bos_token": "<s>"}
            kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
            theirs = _written(lambda: render_jinja_template([kept], chat_template=template, **given)[0][0])  # noqa: B023
            assert _written(lambda: render_template(template, messages, **given)) == theirs  # noqa: B023


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="no shared tokenizers")
@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen2"])
def test_real_templates_write_what_transformers_writes(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    for messages in CONVERSATIONS:
        theirs = _written(lambda: tokenizer.apply_chat_template(messages, tokenize=False))  # noqa: B023
        ours = _written(
            lambda: render_template(tokenizer.get_chat_template(), messages, **tokenizer.special_tokens_map)  # noqa: B023
        )
        assert ours == theirs or "strftime_now" in tokenizer.get_chat_template()
