"""Chat templates of others, rendered where nothing they ask for takes long or much memory.

The environment is that of ``transformers`` (``utils/chat_template_utils.py``): its sandbox, globals, ``tojson`` and
``generation`` blocks, so that a template writes here what it writes at inference. Beyond it, every operation is counted
(:mod:`~ctpd_nemo.data.template_limits`), filters and methods are those of a list, and the text is a function of what is
rendered: the clock stands still, nothing is drawn at random, and no object writes its address.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace
from markupsafe import Markup

from ctpd_nemo.data.template_filters import FILTERS, tests
from ctpd_nemo.data.template_limits import (
    Ledger,
    TemplateFaultError,
    check_format,
    check_keys,
    check_method,
    check_operands,
    joined,
    ledger,
    made,
    measure,
    step,
    text,
    whole,
)

# A template that prints today's date would render other prompts tomorrow: cached scores would no longer belong to them,
# and a resumed run would not continue the one before. The date is the one Llama-3's templates fall back to.
_TODAY = datetime(2024, 7, 26)
_LONGEST_TEMPLATE = 100_000
_RENDER_SECONDS = 10.0
# The names under which transformers takes a message's reasoning; templates read the first, gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXT_METHODS = """
    capitalize casefold center count endswith find format index isalnum isalpha isascii isdecimal isdigit islower
    isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace
    rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill
"""
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, frozenset(re.findall(r"\w+", _TEXT_METHODS))),
    (dict, frozenset({"copy", "get", "items", "keys", "values"})),
    (list, frozenset({"copy", "count", "index"})),
    (tuple, frozenset({"count", "index"})),
    (LoopContext, frozenset({"changed", "cycle"})),
    (Cycler, frozenset({"next", "reset"})),
)


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    seconds: float = _RENDER_SECONDS,
    **variables: Any,
) -> str:
    """What ``tokenizer.apply_chat_template`` renders, within bounds; the clock stands at 26 July 2024.

    Bounds are of what is given: one value and the whole text may have a million characters and 16 times as many as are
    given, all values of a rendering together 64 million and 256 times.

    Args:
        template: A Jinja template.
        messages: Plain values, as of JSON. Keys whose value is ``None`` are left out.
        tools: JSON schemas of functions.
        documents: Each with ``title`` and ``text``.
        add_generation_prompt: Open the assistant's turn.
        seconds: CPU time that it may take.
        variables: What else the template may read: special tokens by name, ``chat_template_kwargs``.

    Raises:
        TemplateFaultError: The template takes more than it may, or its text is not a function of what is given. The
            fault is the template's own.
        Exception: The template refuses these messages, or is none: whatever Jinja or an operation of Python raises.
    """
    conversation = [_message(message) for message in messages]
    given = {
        **variables,
        "messages": conversation,
        "tools": tools,
        "documents": documents,
        "add_generation_prompt": add_generation_prompt,
    }
    token = ledger.set(Ledger(measure(given, float("inf")), seconds))
    try:
        return compiled(template).render(given)
    finally:
        ledger.reset(token)


@functools.lru_cache(maxsize=64)
def compiled(template: str) -> jinja2.Template:
    """A template, ready to be rendered by :func:`render_template` alone.

    Raises:
        TemplateFaultError: It is longer than any, or has what makes its text no function of its messages.
        jinja2.TemplateError: It is no template.
    """
    if len(template) > _LONGEST_TEMPLATE:
        raise TemplateFaultError(f"{len(template):,} characters, of {_LONGEST_TEMPLATE:,} at most")
    return _ENVIRONMENT.from_string(template)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as ``transformers`` hands it to a template."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in _REASONING if key in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


class _Counting(CodeGenerator):
    """Code in which what the sandbox does not see by itself is counted: see ``SandboxedEnvironment.call_binop``."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        # On the fields of a copy: a node may be visited twice.
        turn = nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None))
        node = nodes.For(node.target, node.iter, [turn, *node.body], node.else_, node.test, node.recursive)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self._counted(super().visit_Compare, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._counted(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._counted(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        # As a target, it is names.
        if node.ctx == "load":
            self._counted(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        # A slice is a copy; what is looked up is there already.
        if isinstance(node.arg, nodes.Slice):
            self._counted(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _counted(self, visit: Any, node: nodes.Node, frame: Frame) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class _Formatter(SandboxedFormatter):
    """``str.format``, field by field."""

    def format_field(self, value: Any, format_spec: str) -> str:
        check_format(format_spec)
        return made(format(value, format_spec) if format_spec else text(value))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is not None:
            measure(value, ledger.get().most)
        return made(super().convert_field(value, conversion))


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Counting
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    concat = staticmethod(joined)
    made = staticmethod(made)
    step = staticmethod(step)

    @staticmethod
    def concatenated(parts: tuple[Any, ...]) -> str:
        """``~``."""
        return joined(map(text, parts))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        if tree.find(nodes.EvalContextModifier):
            raise TemplateFaultError("an autoescape block")
        used = {node.name for node in tree.find_all(nodes.Filter)} & {"random"}
        used |= {node.name for node in tree.find_all(nodes.Name)} & {"lipsum"}
        for name in used:
            raise TemplateFaultError(f"{name}, which writes something else each time")
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operands(operator, left, right)
        return made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(value, BuiltinMethodType | MethodType) and not isinstance(obj, Namespace | _Dict):
            return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS)
        return True

    def wrap_str_format(self, value: Any) -> Any:
        if not isinstance(value, BuiltinMethodType | MethodType) or value.__name__ not in ("format", "format_map"):
            return None
        of = value.__self__
        if not isinstance(of, str):
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map" or isinstance(of, Markup):
                raise TemplateFaultError(f"{value.__name__} of a {type(of).__name__}")
            return made(_Formatter(self).vformat(of, args, kwargs))

        return formatted

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        step()
        if isinstance(__obj, BuiltinMethodType | MethodType) and isinstance(of := __obj.__self__, str):
            args = tuple(whole(argument) for argument in args)
            check_method(of, __obj.__name__, (*args, *kwargs.values()))
        value = super().call(__context, __obj, *args, **kwargs)
        # What keeps state of its own is no value: it is asked, never printed.
        return value if isinstance(value, Namespace | Cycler | Joiner) else made(value)


class _Generation(Extension):
    """``{% generation %}``: what it encloses is rendered; which tokens they become is asked by nobody here."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Extension

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    def _enclosed(self, caller: Any) -> str:
        return caller()


class _Dict:
    """``dict`` of a template."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        args = tuple(whole(argument) for argument in args)
        for argument in args:
            check_keys(argument)
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        keys = whole(keys)
        check_keys(keys)
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """``namespace`` of a template: no attribute begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace with {name!r}: an underscore begins no name of it")


def _raise(message: Any) -> None:
    raise TemplateError(text(message))


def _strftime_now(format: str) -> str:
    return _TODAY.strftime(format)


def _write(context: Context, value: Any) -> str:
    return text(value)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        # Nothing is computed while a template is read.
        optimized=False,
        extensions=[_Generation, loopcontrols],
        finalize=jinja2.pass_context(_write),
    )
    environment.filters = dict(FILTERS)
    environment.tests = tests(environment.tests)
    environment.globals |= {
        "dict": _Dict(),
        "namespace": _Namespace,
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
    }
    environment.globals.pop("lipsum")
    return environment


_ENVIRONMENT = _environment()
