"""Templates that ask for time or memory without end, write what their messages do not decide, or look around."""

from tests.hostile.tokenizers import ESCAPES


def _again(start: str, step: str, end: str = "{{ ns.a|length }}", turns: int = 60) -> str:
    """A value that is made of itself, sixty times."""
    loop = f"{{% for i in range({turns}) %}}{{% set ns.a = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(a={start}) %}}{loop}{end}"


def _chain(define: str, begin: str, end: str, count: int) -> str:
    return begin + "".join(define.format(now=at + 1, before=at) for at in range(count)) + end


BLOCK = "{{% block b{now} %}}{{{{ self.b{before}() }}}}{{{{ self.b{before}() }}}}{{% endblock %}}"
MACRO = "{{% macro m{now}() %}}{{{{ m{before}() }}}}{{{{ m{before}() }}}}{{% endmacro %}}"

# What is asked for, and that nothing may come of: text, unless it is short.
COSTLY: dict[str, str] = {
    "a power": "{{ 9**(9**9) }}",
    "a negative power": "{{ (-9)**(9**9) }}",
    "a power of squares": _again("9", "ns.a * ns.a"),
    "a power in a condition": "{% if messages|length > 0 and 9**(9**9) %}{% endif %}",
    "a long text": "{{ 'a' * 10**10 }}",
    "a long list": "{{ ([1] * 10**9)|length }}",
    "doubling by ~": _again("'ab'", "ns.a ~ ns.a"),
    "doubling by +": _again("'ab'", "ns.a + ns.a"),
    "doubling lists": _again("[1]", "ns.a + ns.a"),
    "lists of themselves": _again("[1]", "[ns.a, ns.a]", "{{ ns.a }}"),
    "tuples of themselves": _again("(1,)", "(ns.a, ns.a)", "{{ ns.a }}"),
    "tuples as keys": _again("(1,)", "(ns.a, ns.a)", "{{ {ns.a: 1} }}"),
    "mappings of themselves": _again("{}", "{'a': ns.a, 'b': ns.a}", "{{ ns.a|tojson }}"),
    "dict() of itself": _again("{}", "dict(a=ns.a, b=ns.a)", "{{ ns.a|tojson }}"),
    "a namespace in itself": "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a }}",
    "depth without end": _again("[]", "[ns.a]", "{{ ns.a }}", 99_999),
    "deep tuples": _again("(1,)", "(ns.a, 1)", "{{ {ns.a: 1} }}", 99_999),
    "blocks of text": "{% set a %}abcdefgh{% endset %}"
    + "{% set a %}" * 0
    + ("{% set a %}" + "{{ a }}" * 8 + "{% endset %}") * 20,
    "macros that call": _chain(MACRO, "{% macro m0() %}abcdefgh{% endmacro %}", "{{ m60() }}", 60),
    "macros that write nothing": _chain(MACRO, "{% macro m0() %}{% endmacro %}", "{{ m60() }}", 60),
    "a macro that calls itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "blocks that call": _chain(BLOCK, "{% block b0 %}{% endblock %}", "", 60),
    "a block that calls itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "a loop that calls itself": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that choose": "{% for a in range(99999) %}{% for b in range(99999) if b == -1 %}{% endfor %}{% endfor %}",
    "a long range": "{% for i in range(10**10) %}{% endfor %}",
    "a wide field": "{{ '%10000000000d' % 1 }}",
    "a field as wide as it is told": "{{ '%*d' % (10000000000, 1) }}",
    "many wide fields": "{{ ('%9999d' * 1000) % ((1,) * 1000) }}",
    "one value in many fields": "{{ ('%(a)s' * 9999) % {'a': 'x' * 90000} }}",
    "doubling by %": _again("'ab'", "'%s%s' % (ns.a, ns.a)"),
    "a wide format": "{{ '{:10000000000}'.format(1) }}",
    "a format as wide as it is told": "{{ '{:{}}'.format(1, 10000000000) }}",
    "a precise format": "{{ '{:.1000000000f}'.format(1.0) }}",
    "doubling by format": _again("'ab'", "'{0}{0}'.format(ns.a)"),
    "a filter that formats": "{{ '%10000000000d'|format(1) }}",
    **{
        f"str.{name}": f"{{{{ 'a'.{name}(10000000000) }}}}"
        for name in ("center", "ljust", "rjust", "zfill", "expandtabs", "encode")
    },
    "a filter that pads": "{{ 'a'|center(10000000000) }}",
    "a join of characters": "{{ ('a' * 999000)|join('b' * 999000) }}",
    "str.join": "{{ ('b' * 999000).join('a' * 999000) }}",
    "a join of an attribute": "{% set ns = namespace(x='a' * 900000) %}{{ ([ns] * 90000)|join(attribute='x') }}",
    "a join of a generator": "{{ range(99999)|map('default', 1)|join('a' * 999000) }}",
    "a filter that replaces": "{{ ('a' * 999000)|replace('a', 'b' * 999000) }}",
    "str.replace": "{{ ('a' * 999000).replace('a', 'b' * 999000) }}",
    "replacing nothing": "{{ ('a' * 999000).replace('', 'b' * 999000) }}",
    "replacing with what is escaped": "{{ (('a' * 999000)|safe).replace('a', '<' * 9999) }}",
    "a deep indent": "{{ ('\n' * 999000)|indent(999000) }}",
    "an indent of text": "{{ ('\n' * 999000)|indent('a' * 999000, blank=true) }}",
    "indented JSON": "{{ ([[[[1] * 1000]]] * 100)|tojson(indent=1000000) }}",
    "separated JSON": "{{ ([1] * 99999)|tojson(separators=('a' * 99999, ':')) }}",
    "a search from the right": "{{ ('a' * 999000).rfind('b' ~ 'a' * 499000) }}",
    "a split from the right": "{{ ('a' * 999000).rsplit('b' ~ 'a' * 499000)|length }}",
    "many characters to strip": "{{ ('a' * 999000).strip('b' * 499000 ~ 'a') }}",
    "many characters to trim": "{{ ('a' * 999000)|trim('b' * 499000 ~ 'a') }}",
    "many keys": "{{ dict.fromkeys(range(99999))|length }}",
    "keys that collide": "{{ (range(0, 99999)|list + range(0, 99999)|list)|unique|list|length }}",
    "a sum of lists": "{{ ([[1] * 1000] * 900)|sum(start=[])|length }}",
    "a fine round": "{{ 1|round(10000000, 'ceil') }}",
    "a coarse round": "{{ 1|round(-100000000) }}",
    "a number of many digits": "{{ " + "9" * 5000 + " }}",
    "a number of many bits": "{{ 0x" + "f" * 90_000 + " * 2 }}",
    "wide batches": "{{ [1]|batch(1000000000, 1)|list|length }}",
    "many slices": "{{ [1]|slice(1000000000)|list|length }}",
    "copies by slice": "{% set a = 'x' * 900000 %}{% set b = [" + "a[1:]," * 9000 + "] %}",
    "many values of one": "{{ range(99999)|map('default', 'x' * 900000, true)|list|length }}",
    "much at once": "{{ 'x'|center(900000) }}" * 4000,
    "much from little": "{% for i in range(9999) %}{{ 'abcdefghij' * 100 }}{% endfor %}",
    "nested calls": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 18
    + "x"
    + "{% endcall %}" * 18,
    "nested filters": "{% filter replace('a', 'aaaaaaaaaa') %}" * 15 + "a" + "{% endfilter %}" * 15,
    "brackets": "{{ " + "[" * 40_000 + "]" * 40_000 + " }}",
    "brackets that hold": "{{ " + "(" * 40_000 + ")" * 40_000 + " }}",
    "conditions in conditions": "{% if 1 %}" * 4000 + "{% endif %}" * 4000,
    "a chain of attributes": "{{ a" + ".b" * 40_000 + " }}",
    "a sum without end": "{{ 1" + "+1" * 40_000 + " }}",
    "a chain of filters": "{{ a" + "|upper" * 15_000 + " }}",
    "comments": "{#" * 40_000,
    "a long template": "x" * 100_001,
    "a wide year": "{{ strftime_now('%9999999999Y') * 2000000 }}",
}
# Text that would be another the next time, or elsewhere.
UNSTEADY: dict[str, str] = {
    "a choice": "{{ [1, 2]|random }}",
    "a choice by name": "{{ [[1, 2]]|map('random')|list }}",
    "an unread choice": "{% if false %}{{ [1, 2]|random }}{% endif %}",
    "lorem ipsum": "{{ lipsum() }}",
    "the order of a set": "{{ {'a': 1, 'b': 2}.keys() - {'c': 1}.keys() }}",
    **{
        f"an address by {how}": written
        for how, written in {
            "print": "{{ messages[0].items }}",
            "~": "{{ 'a' ~ joiner }}",
            "%": "{{ '%s' % cycler }}",
            "format": "{{ '{}'.format(cycler) }}",
            "format with !r": "{{ '{0!r}'.format(range) }}",
            "a filter": "{{ cycler|upper }}",
            "string": "{{ namespace|string }}",
            "join": "{{ ('a', cycler)|join }}",
            "a list": "{{ [namespace] }}",
            "a generator": "{{ [1]|map('upper') }}",
            "JSON": "{{ [range]|tojson }}",
            "an error": "{{ raise_exception(range) }}",
            "a macro": "{% macro m() %}{% endmacro %}{{ m }}",
            "itself": "{{ self }}",
        }.items()
    },
}
LOOKING = {
    **ESCAPES,
    "an attribute by name": "{{ ''|attr('join') }}",
    "a format of a mapping": "{{ '{a}'.format_map({}) }}",
}
