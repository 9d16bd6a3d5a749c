"""A chat template at work: a conversation in, text out, and nothing else decides that text."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta, nodes
from transformers import PreTrainedTokenizerBase

from ctpd_nemo.conf_folder import in_conf
from ctpd_nemo.data.messages import Message
from ctpd_nemo.data.template_limits import TemplateFaultError
from ctpd_nemo.data.template_sandbox import compiled, render_template
from ctpd_nemo.errors import InputError

# What a template is given by the conversation and by transformers, and what names its renderer has.
GIVEN = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", "template", "seconds"}
GIVEN |= {"range", "dict", "cycler", "joiner", "lipsum", "loop", "self", "caller", "varargs", "kwargs"}
GIVEN |= set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


class RefusedConversationError(InputError):
    """One conversation that a side cannot read: its row's fault, not the run's.

    Attributes:
        reason: Countable.
    """

    def __init__(self, place: str, found: str, expected: str, reason: str = "refused_by_template") -> None:
        super().__init__(place, found, expected)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.place, self.found, self.expected, self.reason)


class ChatTemplate:
    """A Jinja template with the special tokens of a tokenizer.

    Attributes:
        text: The template.
        variables: What else it is given, such as ``enable_thinking``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        given: str | Path | None,
        variables: Mapping[str, Any] | None,
        place: str,
    ) -> None:
        """Find the template.

        Args:
            tokenizer: Has the special tokens, and a template of its own unless one is given.
            given: A template or the path of one, also of one in ``conf``.
            variables: What it is given beside messages.
            place: The tokenizer, to name in errors.

        Raises:
            InputError: There is no template, or it does not read one of the variables.
        """
        self._tokenizer = tokenizer
        self._place = place
        self.text = self._find(given)
        self._special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self.variables = dict(variables or {})
        self._check_variables()

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        place: str = "",
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the template writes it.

        Args:
            messages: The conversation.
            add_generation_prompt: Whether the assistant's turn is opened behind it.
            place: Where it was read, for errors.
            variables: What else the template is given for this conversation alone, tools among them.

        Raises:
            RefusedConversationError: The template refuses the conversation.
            InputError: It takes more than rendering does, or its text is no function of the conversation.
        """
        conversation = [message.as_dict() for message in messages]
        roles = ", ".join(message.role for message in messages)
        given = {**self._special, **self.variables, **(variables or {})}
        try:
            return render_template(self.text, conversation, add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # a template is a program: it can raise anything
            found = f"a template that fails on the roles {roles} ({str(error) or type(error).__name__})"
            # What is wrong with the template itself is no row's fault.
            kind = InputError if isinstance(error, TemplateFaultError) else RefusedConversationError
            raise kind(self.place(place), found, "a template that renders them") from error

    def place(self, of: str = "") -> str:
        """What to name in an error: the template, and the row it was rendering."""
        return f"{of}, {self._place}, chat template".removeprefix(", ")

    @cached_property
    def names_read(self) -> frozenset[str]:
        """Names that the template takes from outside."""
        tree = self._parsed()
        return frozenset() if tree is None else frozenset(meta.find_undeclared_variables(tree))

    @cached_property
    def words(self) -> frozenset[str]:
        """Strings and attributes in its source: fields of messages that it reads and roles that it knows among them."""
        tree = self._parsed()
        if tree is None:
            return frozenset()
        strings = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return frozenset(strings | {node.attr for node in tree.find_all(nodes.Getattr)})

    def _parsed(self) -> nodes.Template | None:
        """Its source, parsed; ``None`` where it cannot be, of which rendering says what is wrong."""
        try:
            return compiled(self.text).environment.parse(self.text)
        except (TemplateError, TemplateFaultError, RecursionError):
            return None

    @property
    def other_dates(self) -> bool:
        """Whether it prints the pinned date in another form than Llama-3's, or may do so."""
        formats = re.findall(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)", self.text)
        return self.text.count("strftime_now(") > sum("%d %b %Y" in one for one in formats)

    @property
    def own_names(self) -> list[str]:
        """Those of them that only a user gives."""
        return sorted(self.names_read - GIVEN - set(self._special))

    def _find(self, given: str | Path | None) -> str:
        if given is None:
            return self._own()
        if isinstance(given, str) and "{" in given:
            return given
        path = in_conf(given)
        try:
            if path.is_file():
                return path.read_text(encoding="utf-8")
            found = f"no file {str(given)!r}"
        except (OSError, UnicodeDecodeError) as error:
            found = f"a file that cannot be read ({error})"
        raise InputError("chat_template", found, "a Jinja template or the path of one")

    def _own(self) -> str:
        """The tokenizer's own template."""
        if not self._tokenizer.chat_template:
            keys = "model.student.chat_template, model.teacher.chat_template"
            expected = f"one in the tokenizer's folder or in the config ({keys})"
            raise InputError(self._place, "no chat template", expected)
        try:
            template = self._tokenizer.get_chat_template()
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{self._place}, chat template", str(error), "one template, or a default") from error
        if not isinstance(template, str):
            found = f"a {type(template).__name__}"
            raise InputError(f"{self._place}, chat template", found, "the text of a Jinja template")
        return template

    def _check_variables(self) -> None:
        """Stop where a variable is none of the template's: it would change nothing, and nobody would know.

        And where it is a clock of the place that a template runs in.
        """
        if "now" in self.names_read - set(self.variables):
            found, expected = "now, which is another time each time", "strftime_now, which stands still in training"
            raise InputError(self.place(), found, expected)
        for name, value in self.variables.items():
            place = f"{self._place}, chat_template_kwargs"
            if not isinstance(name, str) or name in GIVEN:
                raise InputError(place, repr(name), "a variable of the template that is not given by the conversation")
            if name not in self.names_read:
                read = ", ".join(self.own_names)
                found = f"{name!r}, which the template does not read"
                raise InputError(place, found, f"one of {read}" if read else "nothing: it reads no variables")
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise InputError(place, f"{name} = {value!r} ({error})", "values as of JSON") from error
