"""Where the configs are that travel with the code."""

from pathlib import Path

CONF = Path(__file__).resolve().parents[1] / "conf"


def in_conf(name: str | Path) -> Path:
    """A path as it is where there is such a file; else the file of that name in ``conf``, where that one is there.

    So an experiment can name a file that comes with it, from whatever folder a job is started in.
    """
    path = Path(name)
    try:
        if not path.is_absolute() and not path.exists() and (CONF / path).is_file():
            return CONF / path
    except (OSError, ValueError):
        # A name that no file system takes: whoever opens it says so.
        return path
    return path
