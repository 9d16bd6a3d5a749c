"""Commands of a cluster that note how they were called, placed first on the path of the scripts under test."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_NOTE = 'printf "%s\\0" "${0##*/}" "$@" >> "$CALLS"; printf "\\n" >> "$CALLS"\n'


class Stubs:
    """A folder of stand-ins for commands, and the calls that they noted.

    Attributes:
        environment: What a script is to run with: these commands, the system's, and nothing of a cluster.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls_file = folder / "calls"
        self.environment = {"PATH": f"{folder}:/usr/bin:/bin", "CALLS": str(self.calls_file), "HOME": str(folder)}

    def add(self, name: str, script: str = "") -> None:
        """A command that notes its arguments and then runs ``script``, by bash."""
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{_NOTE}{script}\n")
        path.chmod(0o755)

    def calls(self) -> list[list[str]]:
        """The calls so far, oldest first: name, arguments."""
        if not self.calls_file.exists():
            return []
        return [line.split("\0")[:-1] for line in self.calls_file.read_text().splitlines()]

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one of the project's scripts to its end."""
        return subprocess.run(
            [ROOT / script, *arguments],
            env=self.environment | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start one of the project's scripts."""
        return subprocess.Popen(
            ["bash", ROOT / script, *arguments],
            env=self.environment | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            text=True,
        )


def without_a_job(environment: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment less what belongs to a job of several processes."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names and not name.startswith("SLURM_")}
    return kept | (environment or {})
