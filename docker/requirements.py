"""Print the dependencies of a ``pyproject.toml``, one a line: ``python docker/requirements.py pyproject.toml``.

They are installed before the source is there, so that a change of the source leaves their layer as it is.
"""

import sys
import tomllib
from pathlib import Path

print("\n".join(tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]["dependencies"]))
