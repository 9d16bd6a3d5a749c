"""A template of a stranger writes a text of its messages, of bounded length and cost, or it is refused."""

import resource
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpd_nemo.data.template_limits import TemplateFaultError
from ctpd_nemo.data.template_sandbox import render_template
from tests.fuzz import fuzz
from tests.hostile.templates import COSTLY, LOOKING, UNSTEADY
from tests.hostile.watch import watched

MESSAGES = [{"role": "user", "content": "Hi"}]
LONGEST = 1_100_000
# Characters may take four bytes, and all that one rendering makes is 64 million of them.
MOST_MEMORY = 2**29


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    """What asks for gigabytes is to fail, and not to take them from others."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statistics:
        has = int(statistics.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MOST_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _render(template: str) -> str:
    """The text, or what it was refused with."""
    try:
        return render_template(template, MESSAGES, seconds=60)
    except MemoryError:
        return pytest.fail("it took all memory")
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("name", COSTLY)
def test_a_template_that_asks_for_time_or_memory_without_end_is_refused(name: str) -> None:
    # An error of Jinja, or of an operation of Python, will do.
    text = _render(COSTLY[name])
    assert text.endswith(("Error", "Exception")) or len(text) < 1000, text[:80]


@pytest.mark.parametrize("name", UNSTEADY)
def test_a_template_whose_text_its_messages_do_not_decide_is_refused(name: str) -> None:
    with pytest.raises(Exception) as refused:  # noqa: PT011 - Jinja's own where a filter is named by its name
        render_template(UNSTEADY[name], MESSAGES)
    assert isinstance(refused.value, TemplateFaultError) or "No filter named" in str(refused.value)


@pytest.mark.parametrize("name", LOOKING)
def test_a_template_reaches_nothing_but_its_messages(name: str) -> None:
    with watched() as seen, pytest.raises(Exception):  # noqa: B017, PT011 - whatever it fails with
        render_template(LOOKING[name], MESSAGES)
    assert (seen.commands, seen.written) == ([], set())


GROWING = """
({a} ~ {b})
({a} + {b})
({a} * 7)
({a} * {a}|length)
[{a}, {b}]
({a}, {b})
{{'k': {a}, 'l': {b}}}
{a}|join({b})
{a}|replace('a', {b})
{a}|string
{a}|tojson(indent=8)
{a}|list
{a}|center(5000)
'%s%s' % ({a}, {b})
'{{}}{{}}'.format({a}, {b})
{a}|upper
{a}|indent(20)
{a}|escape
({a}|string)[1:]
({a}|string).split('a')
({b}|string).join({a}|list)
({a}|string).replace('', 'bc')
{a}|map('string')|list
{a}|batch(3)|list
{a}|sort
{a}|unique|list
dict(a={a}, b={b})
({a}|length) ** ({b}|length)
{a}|length
""".strip().splitlines()


@fuzz(60)
@given(
    steps=st.lists(st.tuples(st.sampled_from(GROWING), st.booleans()), min_size=1, max_size=6),
    start=st.sampled_from(["'ab'", "['a']", "7", "messages", "('a', 1)", "{'a': 'b'}"]),
)
def test_whatever_grows_in_a_loop_ends(steps: list[tuple[str, bool]], start: str) -> None:
    body = "".join(
        "{% set ns.a = " + step.format(a="ns.a", b="ns.b" if other else "ns.a") + " %}" for step, other in steps
    )
    text = f"{{% set ns = namespace(a={start}, b='xy') %}}{{% for i in range(40) %}}{body}{{% endfor %}}{{{{ ns.a }}}}"
    assert len(_render(text)) < LONGEST
