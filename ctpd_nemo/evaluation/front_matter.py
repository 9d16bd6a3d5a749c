"""The metadata in front of a README.md, of our cards and of strangers': a bounded read, whatever stands there."""

from pathlib import Path
from typing import Any

import yaml
from yaml.events import AliasEvent
from yaml.nodes import Node

# Real cards have a few hundred lines of it at most. Text behind it is never parsed.
_MOST_FRONT = 64 * 1024
_MOST_CARD = 4 * 1024 * 1024
_MOST_BRACKETS = 1000
_MARK = "---"


class _Plain(yaml.SafeLoader):
    """YAML without aliases: a part that is named again and again grows tenfold a level once it is merged or printed."""

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def read_card(path: str | Path) -> str | None:
    """The text of a README.md, or ``None`` where it is no regular file, or larger than a card."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size > _MOST_CARD:
        return None
    return path.read_bytes().decode("utf-8-sig", "replace")


def split_card(text: str) -> tuple[dict[str, Any], str] | None:
    """Metadata, and the text behind it.

    Returns:
        Metadata is empty where the card begins with none. ``None`` where it is no mapping, no YAML, has aliases, or is
        longer than any.
    """
    first, _, rest = text.partition("\n")
    if first.rstrip() != _MARK:
        return {}, text
    size = 0
    for line in rest[:_MOST_FRONT].split("\n"):
        if line.rstrip() == _MARK:
            break
        size += len(line) + 1
    else:
        return ({}, text) if len(rest) <= _MOST_FRONT else None
    # A parser of so many open brackets climbs down from its error for seconds.
    if rest[:size].count("[") + rest[:size].count("{") > _MOST_BRACKETS:
        return None
    try:
        metadata = yaml.load(rest[:size], _Plain)
    # Besides its own errors, values of YAML that Python has no room for, and nesting without end.
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if metadata is not None and not isinstance(metadata, dict):
        return None
    return metadata or {}, rest[size + len(line) + 1 :]
