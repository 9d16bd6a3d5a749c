"""How every benchmark reports: a Markdown table for people, JSON with every single measurement for programs.

    parser = argparse.ArgumentParser(description=__doc__)
    add_report_arguments(parser)            # --json FILE, --markdown FILE, --threads N
    arguments = parser.parse_args()
    begin(arguments)                        # sets the threads
    ...
    write_report("Title", [Table(...)], results, arguments)

The report begins with the machine: processor, cores, threads, device, versions, and the command that made it.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = (
    "ctpd-nemo",
    "torch",
    "megatron-core",
    "transformer-engine",
    "nemo-toolkit",
    "lightning",
    "transformers",
    "tokenizers",
    "trl",
    "liger-kernel",
)


@dataclass(frozen=True)
class Table:
    """One table of a report.

    Attributes:
        caption: A line above it.
        header: Its columns.
        rows: Cells as text, a list a row.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As GitHub draws it; every column but the first is right-aligned."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join([self.caption, "", *("| " + " | ".join(line) + " |" for line in lines)])


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks share."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement to this file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch on the CPU")


def begin(arguments: argparse.Namespace) -> None:
    """Set the number of threads, for this process and those it starts."""
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)


def machine() -> dict[str, Any]:
    """Where a report was made: processor, cores, threads, devices, versions, date, command."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
    }


def _processor() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def machine_lines(found: dict[str, Any]) -> str:
    """What ``machine`` found, in a few lines of text."""
    device = ", ".join(found["gpus"]) + f", CUDA {found['cuda']}" if found["gpus"] else "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join(
        [
            f"    {found['command']}",
            "",
            f"{found['processor']}, {found['cores']} cores, {found['threads']} threads; {device}; {versions}; "
            f"{found['date']}",
        ]
    )


def write_report(title: str, tables: Sequence[Table], results: Any, arguments: argparse.Namespace) -> None:
    """Print the tables, and write the files that were asked for.

    Args:
        title: What was compared.
        tables: For people.
        results: Every measurement; dataclasses become objects, paths become text.
        arguments: Of the command line; written too.
    """
    found = machine()
    text = "\n\n".join([f"## {title}", machine_lines(found), *(table.markdown() for table in tables)]) + "\n"
    print(text, flush=True)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.json:
        report = {"title": title, "machine": found, "arguments": vars(arguments), "results": results}
        arguments.json.write_text(json.dumps(report, indent=2, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} in a report")
