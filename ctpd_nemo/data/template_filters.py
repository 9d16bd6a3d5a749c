"""The filters and tests of Jinja that chat templates use, each within bounds.

Left out are those that draw (``random``), take the square of a text's length, or write HTML.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import filters, pass_eval_context
from jinja2.filters import make_attrgetter
from jinja2.nodes import EvalContext
from markupsafe import Markup

from ctpd_nemo.data.template_limits import (
    TemplateFaultError,
    check_conversions,
    check_join,
    check_keys,
    check_replace,
    check_stripped,
    check_widths,
    joined,
    ledger,
    made,
    measure,
    step,
    text,
    whole,
)

Filter = Callable[..., Any]
_MOST_PRECISION = 1000
_MOST_INDENT = 32


def _counted(function: Filter, check: Callable[..., None] | None = None, written: bool = False) -> Filter:
    """A filter that looks at its arguments and counts what it makes.

    Args:
        function: The filter.
        check: Called with its arguments, what Jinja passes in front left out.
        written: It takes its value for text, whatever it is.
    """
    passed = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        step()
        given = list(args[passed:])
        if written:
            given[:1] = [value if isinstance(value, str) else text(value) for value in given[:1]]
        if check is not None:
            check(*given, **kwargs)
        return made(function(*args[:passed], *given, **kwargs))

    return run


def _of_all(function: Filter, check: Callable[..., None] | None = None) -> Filter:
    """The same for a filter that goes through all of its values at once."""
    counted, passed = _counted(function, check), int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return counted(*args[:passed], *map(whole, args[passed:]), **kwargs)

    return run


def _check_width(value: Any, *widths: Any, **named: Any) -> None:
    check_widths((*widths, *named.values()))


def _check_trim(value: Any, *chars: Any, **named: Any) -> None:
    check_stripped((*chars, *named.values()))


def _check_indent(value: str, width: Any = 4, first: bool = False, blank: bool = False) -> None:
    size = len(width) if isinstance(width, str) else width
    ledger.get().expect(len(value) + (len(value.splitlines()) + 1) * (size + 1))


def _check_round(value: Any, precision: Any = 0, method: str = "common") -> None:
    if isinstance(precision, int) and abs(precision) > _MOST_PRECISION:
        raise TemplateFaultError(f"a number rounded to {precision} digits")


def _check_sum(values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        raise TemplateFaultError(f"a sum that begins with a {type(start).__name__}")


def _check_truncate(
    value: Any, length: Any = 255, killwords: Any = False, end: Any = "...", leeway: Any = None
) -> None:
    check_widths((length,))


def _check_unique(values: Any, *rest: Any, **named: Any) -> None:
    check_keys(values)


def _check_format(value: str, *args: Any, **kwargs: Any) -> None:
    check_conversions(value, kwargs or args)


@pass_eval_context
def _replace(eval_ctx: EvalContext, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    value, old, new = text(value), text(old), text(new)
    check_replace(value, old, new)
    return filters.do_replace(eval_ctx, value, old, new, count)


@pass_eval_context
def _join(eval_ctx: EvalContext, value: Any, d: Any = "", attribute: Any = None) -> str:
    value = whole(value)
    if attribute is not None:
        value = made([made(part) for part in map(make_attrgetter(eval_ctx.environment, attribute), value)])
    check_join(separator := text(d), value)
    return str(separator).join(map(str, value))


def _tojson(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    """``json.dumps``, as ``transformers`` has it."""
    measure(value, ledger.get().most)
    for part in (indent, *(separators or ())):
        if (len(part) if isinstance(part, str) else part or 0) > _MOST_INDENT:
            raise TemplateFaultError(f"JSON with more than {_MOST_INDENT} characters between its parts")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return joined(map(made, encoder.iterencode(value)))


def _string(value: Any) -> str:
    return value if isinstance(value, str) else text(value)


def _escape(value: Any) -> Markup:
    return filters.escape(value if isinstance(value, str) else text(value))


def tests(functions: Mapping[str, Any]) -> dict[str, Any]:
    """Jinja's tests, each a step."""
    return {name: _counted(function) for name, function in functions.items()}


_TEXTS = ("capitalize", "lower", "title", "upper", "wordcount")
_VALUES = ("d", "default", "dictsort", "first", "float", "int", "items", "last")
_SEQUENCES = ("groupby", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort")

FILTERS: dict[str, Any] = {
    **{name: _counted(filters.FILTERS[name], written=True) for name in _TEXTS},
    **{name: _counted(filters.FILTERS[name]) for name in _VALUES},
    **{name: _of_all(filters.FILTERS[name]) for name in _SEQUENCES},
    "abs": _counted(abs),
    "batch": _of_all(filters.do_batch, _check_width),
    "center": _counted(filters.do_center, _check_width, written=True),
    "count": _counted(len),
    "e": _counted(_escape),
    "escape": _counted(_escape),
    "format": _counted(filters.do_format, _check_format, written=True),
    "indent": _counted(filters.do_indent, _check_indent, written=True),
    "join": _counted(_join),
    "length": _counted(len),
    "replace": _counted(_replace),
    "round": _counted(filters.do_round, _check_round),
    "safe": _counted(filters.do_mark_safe, written=True),
    "slice": _of_all(filters.do_slice, _check_width),
    "string": _counted(_string),
    "sum": _of_all(filters.do_sum, _check_sum),
    "tojson": _counted(_tojson),
    "trim": _counted(filters.do_trim, _check_trim, written=True),
    "truncate": _counted(filters.do_truncate, _check_truncate, written=True),
    "unique": _of_all(filters.do_unique, _check_unique),
}
"""By name."""
