"""Hold on to what an image was built around: torch, and the compiled packages that fit it and each other.

``python docker/image_packages.py freeze FILE`` writes the versions that are installed as constraints for pip, before
anything else is installed. ``check FILE`` stops with status 1 where one of them is another version afterwards, or gone.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

# The CUDA libraries, what is compiled against torch, and NumPy, whose binary interface torch was compiled for.
KEPT = re.compile(r"(torch|pytorch|triton|transformer-engine|apex|flash-attn|nvidia|cuda|nccl)([-_].+)?|torch.+|numpy")


def installed() -> dict[str, str]:
    """Version by name of each installed package that the image's torch depends on or fits; what is imported counts."""
    found: dict[str, str] = {}
    for distribution in distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if KEPT.fullmatch(name):
            # A package may lie in two folders of the path; the first is the one that is imported.
            found.setdefault(name, distribution.version)
    return found


def freeze(path: Path) -> None:
    """Write the constraints."""
    found = installed()
    if "torch" not in found:
        sys.exit("error: image: found no torch; expected an image that brings its own build")
    path.write_text("".join(f"{name}=={version}\n" for name, version in sorted(found.items())), encoding="utf-8")


def check(path: Path) -> None:
    """Compare with the constraints."""
    found = installed()
    for line in path.read_text(encoding="utf-8").splitlines():
        name, version = line.split("==")
        if found.get(name) != version:
            sys.exit(f"error: {name}: found {found.get(name)}; expected the image's own {version}")


if __name__ == "__main__":
    {"freeze": freeze, "check": check}[sys.argv[1]](Path(sys.argv[2]))
