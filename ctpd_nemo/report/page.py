"""From a template to one HTML file that needs nothing else."""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ctpd_nemo.text_files import replace_text


def write_page(path: str | Path, name: str, **values: Any) -> Path:
    """Render a page of this package and write it whole, or not at all.

    Args:
        path: The HTML file; its folder is made where there is none.
        name: Of ``<name>.html`` and ``<name>.js`` in ``templates``.
        values: What it shows; every text among them is escaped.
    """
    path = Path(path)
    environment = _environment()
    script = "".join(environment.get_template(file).render() for file in ("tip.js", f"{name}.js"))
    # The page's content policy lets this script run and no other, should a text ever get past the escaping.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template(f"{name}.html")
    page = template.render(script=Markup(script), script_digest=digest, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A path or a file's content may hold what UTF-8 cannot.
    replace_text(path, page, errors="replace")
    return path


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ctpd_nemo.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "decimals": _decimals, "grouped": _grouped}
    return environment


def _percent(share: float | None) -> str:
    return "\u2013" if share is None else f"{100 * share:.2f} %"


def _decimals(value: float | None, digits: int = 3) -> str:
    return "\u2013" if value is None else f"{value:.{digits}f}"


def _grouped(number: int) -> str:
    return f"{number:,}"
