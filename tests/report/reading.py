"""A page as Python's own HTML parser reads it, without this project's escaping."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path


@dataclass
class Element:
    """A tag with its attributes and the text inside it, that of inner elements included."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    children: list["Element"] = field(default_factory=list)

    def find(self, **wanted: str) -> list["Element"]:
        """The elements below, in order, that have these classes or other attributes; ``class_`` asks for one class."""
        found = []
        for child in self.children:
            own = {**child.attributes, "tag": child.tag}
            classes = own.get("class", "").split()
            if all(value in classes if name == "class_" else own.get(name) == value for name, value in wanted.items()):
                found.append(child)
            found += child.find(**wanted)
        return found


class _Reader(HTMLParser):
    _EMPTY = ("meta", "link", "input", "br")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("page", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in self._EMPTY:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def read_page(path: Path) -> Element:
    """Read a page whose elements are all closed; no script but the one at its end, no handlers, nothing fetched."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert len(reader.open) == 1, [element.tag for element in reader.open]
    page = reader.open[0]
    assert len(page.find(tag="script")) == 1
    for element in _all(page):
        assert element.tag not in ("img", "iframe", "object", "embed", "base", "form", "a", "video", "audio")
        for name, value in element.attributes.items():
            assert not name.startswith("on"), (element.tag, name)
            assert name not in ("src", "srcset", "action"), (element.tag, name)
            assert name != "href" or value == "data:,", value
    return page


def _all(element: Element) -> list[Element]:
    return [element, *(inner for child in element.children for inner in _all(child))]
