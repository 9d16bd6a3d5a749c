"""Chat templates that do what well-known families' do, and tokenizers that have their tokens."""

import copy
from collections.abc import Sequence

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

_TURNS = "{% for m in messages %}"
_END = "{% endfor %}"


def _generation(text: str) -> str:
    return "{% if add_generation_prompt %}{{ '" + text + "' }}{% endif %}"


# Trims every message, and so a response.
LLAMA3 = (
    "{{ bos_token }}"
    + _TURNS
    + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}"
    + _END
    + _generation("<|start_header_id|>assistant<|end_header_id|>\\n\\n")
)
# Keeps messages as they are; a system turn of its own where there is none.
QWEN25 = (
    _TURNS
    + "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{% endif %}"
    + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    + _END
    + _generation("<|im_start|>assistant\\n")
)
CHATML = (
    _TURNS
    + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    + _END
    + _generation("<|im_start|>assistant\\n")
)
# Writes an empty block of reasoning before a plain last answer, and in the prompt where enable_thinking is false.
QWEN3 = (
    _TURNS
    + "{% set content = m.content %}{% set reasoning = '' %}"
    + "{% if m.role == 'assistant' and '</think>' in content %}"
    + "{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    + "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    + "{{ '<|im_start|>' + m.role + '\\n' }}"
    + "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{% endif %}"
    + "{{ content + '<|im_end|>\\n' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    + "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    + "{% endif %}"
)
# Opens reasoning in the prompt; drops it from answers.
R1_DISTILL = (
    "{{ bos_token }}"
    + _TURNS
    + "{% if m.role == 'assistant' %}"
    + "{{ '<\uff5cAssistant\uff5c>' + m.content.split('</think>')[-1].lstrip('\\n') }}"
    + "{{ '<\uff5cend\u2581of\u2581sentence\uff5c>' }}"
    + "{% elif m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}{% else %}{{ m.content }}{% endif %}"
    + _END
    + _generation("<\uff5cAssistant\uff5c><think>\\n")
)
# Closes reasoning in the prompt unless it is to think, and before every answer.
DEEPSEEK = (
    "{{ bos_token }}"
    + _TURNS
    + "{% if m.role == 'assistant' %}"
    + "{{ '<\uff5cAssistant\uff5c></think>' + m.content.split('</think>')[-1] }}"
    + "{{ '<\uff5cend\u2581of\u2581sentence\uff5c>' }}"
    + "{% elif m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}{% else %}{{ m.content }}{% endif %}"
    + _END
    + "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}"
    + "{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
# No system role, another name for the assistant; an end that may be no special token.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + _TURNS
    + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    + "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}"
    + _END
    + _generation("<start_of_turn>model\\n")
)
# No header and no generation prompt: brackets take turns.
MISTRAL = (
    "{{ bos_token }}"
    + _TURNS
    + "{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    + "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}"
    + _END
)
# Ends a conversation, but no prompt, with EOS behind the last turn's own end.
PHI3 = (
    _TURNS
    + "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Statements on lines of their own: line breaks behind every turn.
ZEPHYR = (
    "{% for m in messages %}\n{% if m.role == 'assistant' %}\n{{ '<|assistant|>\\n' + m.content + eos_token }}\n"
    "{% else %}\n{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
NO_GENERATION_PROMPT = _TURNS + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}" + _END

# By name: the template, its special tokens, other added tokens, EOS.
SHAPES: dict[str, tuple[str, Sequence[str], Sequence[str], str]] = {
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), (), "<|endoftext|>"),
    "qwen2.5": (QWEN25, (), ("<tool_call>", "</tool_call>"), "<|im_end|>"),
    "chatml": (CHATML, (), (), "<|endoftext|>"),
    "qwen3": (QWEN3, (), ("<think>", "</think>"), "<|im_end|>"),
    "r1": (
        R1_DISTILL,
        ("<\uff5cend\u2581of\u2581sentence\uff5c>",),
        ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    "deepseek": (
        DEEPSEEK,
        ("<\uff5cend\u2581of\u2581sentence\uff5c>",),
        ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    "gemma": (GEMMA, (), ("<start_of_turn>", "<end_of_turn>"), "<|endoftext|>"),
    "mistral": (MISTRAL, ("[INST]", "[/INST]"), (), "<|endoftext|>"),
    "phi3": (PHI3, ("<|assistant|>",), ("<|user|>", "<|system|>", "<|end|>"), "<|endoftext|>"),
    "zephyr": (ZEPHYR, (), (), "<|endoftext|>"),
}


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    """A copy with another template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def shaped(tokenizer: PreTrainedTokenizerFast, name: str) -> PreTrainedTokenizerFast:
    """A copy with the template and the tokens of a family."""
    template, special, added, eos = SHAPES[name]
    other = with_template(tokenizer, template)
    other.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    other.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    other.eos_token = eos
    other.bos_token = "<|endoftext|>"
    return other
