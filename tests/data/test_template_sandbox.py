"""Templates of others: what they write is what ``transformers`` writes, and nothing they ask for takes long."""

import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from ctpd_nemo.data.template_limits import TemplateFaultError
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
EACH = "{% for m in messages %}"
# Pieces that templates are made of; together they use every filter, method, operator and statement that is allowed.
PIECES = [
    EACH + "{{ m.role }}: {{ m['content'] }}\n{% endfor %}",
    EACH + "{{ m.content|string|trim|upper }}{{ loop.index }}{{ loop.last }}{{ loop.previtem.role }}{% endfor %}",
    EACH + "{% if not loop.first %}{% continue %}{% endif %}{{ m.role.strip().title() }}{% break %}{% endfor %}",
    EACH
    + "{{ m.reasoning_content }}{{ m.thinking }}{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}{% endfor %}",
    "{{ messages|tojson(indent=2) }}{{ messages|tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}",
    "{{ tools|tojson|safe }}{{ tools|tojson(indent=4)|indent(2) }}{{ 'é'|tojson }}{{ '<b>'|e }}{{ ('<'|safe) + '<' }}",
    "{% set x = messages|selectattr('role', 'equalto', 'tool') %}{% if x %}always{% endif %}{{ x|list|length }}",
    "{{ messages|map(attribute='role')|join(', ') }}{{ messages|map(attribute='x', default='-')|list }}",
    "{{ messages|rejectattr('role', 'eq', 'user')|map(attribute='role')|unique|sort|reverse|list }}",
    "{{ ['b', 'A', 'a']|sort }}{{ {'b': 1, 'a': 2}|dictsort }}{{ {'b': 1}|items|list }}{{ [3, 1]|min }}{{ [3, 1]|max }}",
    "{{ [1, 2.5]|sum }}{{ -3|abs }}{{ 2.567|round(1) }}{{ '7'|int + 1 }}{{ '1.5'|float }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}",
    "{% for a in [1, 2, 3]|batch(2, 0) %}{{ a }}{% endfor %}{% for a in [1, 2, 3]|slice(2) %}{{ a }}{% endfor %}",
    "{% for k, v in messages|groupby('role') %}{{ k }}{{ v|length }}{% else %}none{% endfor %}{{ (1, 2) + (3,) }}",
    "{{ '%s-%03d' % ('a', 7) }}{{ '%s'|format('b') }}{{ '{} {x!r:>5} {0[0]}'.format('ab', x='c') }}{{ 'a' * 3 ~ 1 ~ none }}",
    "{{ 'a,b,,c'.split(',') }}{{ 'a b'.rsplit(' ', 1)[0] }}{{ ','.join(['a', 'b']) }}{{ 'abc'[::-1][:2] }}{{ 'abc'[1] }}",
    "{{ 'x</think>y'.split('</think>')[-1].lstrip('\n') }}{{ 'aXb'.replace('X', 'YY') }}{{ 'abc'|replace('b', '') }}",
    "{{ 'a'.startswith('a') }}{{ 'abc'.find('c') }}{{ 'a-b'.partition('-') }}{{ 'ab'.removeprefix('a') }}{{ 'a'.isdigit() }}",
    "{% set ns = namespace(n=0, l=[]) %}"
    + EACH
    + "{% set ns.n = ns.n + 1 %}{% set ns.l = ns.l + [ns.n] %}{% endfor %}{{ ns.l }}",
    "{% macro f(a, b='x') %}<{{ a }}{{ b }}{{ caller() if caller else '' }}>{% endmacro %}{{ f('y') }}{% call f(1) %}c{% endcall %}",
    "{% set body %}{{ messages[0].role }}!{% endset %}{{ body }}{% filter upper %}abc{% endfilter %}{{ body|capitalize }}",
    "{% generation %}{{ messages[-1].content }}{% endgeneration %}{% if add_generation_prompt %}>{% endif %}{{ bos_token }}",
    "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable and a is not number else a }}{% endfor %}",
    "{{ undefined_thing }}{{ messages is defined }}{{ x is undefined }}{{ 1 is odd }}{{ 'a' in 'ab' }}{{ 1 < 2 <= 2 }}{{ not 1 }}",
    "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys(['a'], 0) }}{{ {'a': 1}.get('b', 2) }}{{ {'a': 1}.keys()|list }}{{ range(3)|list }}",
    "{{ x|default('d') }}{{ ''|default('d', true) }}{{ messages|first }}{{ [1, 2]|last }}{{ 'some words here'|truncate(9) }}",
    "{{ 'a b'|wordcount }}{{ 'ab'|center(6) }}|{{ 'a\nb'|indent(2, true) }}{{ 'ab cd'|title }}{{ [1, none, true, 1.0] }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner('; ') %}{{ j() }}{{ j() }}",
    "{% block a %}in{% endblock %}{{ self.a() }}  {%- if true -%}  trimmed  {%- endif %}\n  {% if true %}\nkept\n{% endif %}\n",
    "{{ raise_exception('refused: ' ~ messages[0].role) }}",
    "{{ messages[0].content.nothing.at.all }}",
]


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
