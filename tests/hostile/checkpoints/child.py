"""A process that has imported everything, and forks one for each attack: watched, it goes on from a checkpoint and
exports it.

Reads attacks from standard input, a JSON object a line: the ``folder`` of the case, that of the ``world``, the
``canary``, and whether the checkpoint is only loaded ``freely``, by the readers that this project does without. Answers
with what was seen of each job: ``events``, the ``kind`` of the error it ended with and what it ``said``, ``seconds`` of
the processor, and the ``memory`` that it took for itself, in bytes.
"""

import contextlib
import copyreg
import gc
import importlib
import io
import json
import os
import pickle
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hostile.checkpoints import run

_BOUND = 120
_STARTS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn"),
    *("subprocess.Popen", "ctypes.dlopen", "os.kill", "signal.pthread_kill"),
)
_MOVES = (
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    *("os.chown", "os.utime", "os.setxattr", "shutil.copyfile", "shutil.move", "shutil.rmtree"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


class _Watch:
    """What this process does, by an audit hook: all of Python, and nothing that a library's C code does by itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seen: list[str] | None = None
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is None:
            return
        if event in _STARTS or event.startswith("socket."):
            # With what is started: one process that a job may start is no leave for another.
            self.seen.append(f"{event} {arguments[1]}" if event == "subprocess.Popen" else event)
        elif event == "import" and arguments[0] == "planted":
            self.seen.append("import planted")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            self._write("open", arguments[:1])
        elif event in _MOVES:
            self._write(event, arguments[:2])

    def _write(self, event: str, paths: tuple[Any, ...]) -> None:
        for path in paths:
            if isinstance(path, str | bytes):
                at = Path(os.path.abspath(os.fsdecode(path)))
                if self._folder != at and self._folder not in at.parents:
                    self.seen.append(f"{event} {at}")  # type: ignore[union-attr]

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        self.seen = seen = []
        try:
            yield seen
        finally:
            self.seen = None


def _import_all() -> None:
    from ctpd_nemo.pipeline import quiet

    quiet.before_imports()
    jobs = ("ctpd_nemo.pipeline.export", "ctpd_nemo.pipeline.train", "tests.tools.refusal")
    for name in ("lightning.pytorch", "torch.distributed.checkpoint", *jobs):
        importlib.import_module(name)
    quiet.after_imports()
    sys.modules["torch"].set_num_threads(1)


def _try_tokenizer(case: dict[str, Any]) -> None:
    """Have it tried out, which takes a process, once and before anything is watched: that is no checkpoint's."""
    from ctpd_nemo.data.tokenizer_folder import load_tokenizer

    load_tokenizer(str(Path(case["world"]) / "student"))


def _jobs(case: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    from ctpd_nemo.pipeline.config import run_config
    from ctpd_nemo.pipeline.export import ExportConfig, export
    from ctpd_nemo.pipeline.train import train

    folder, world = Path(case["folder"]), Path(case["world"])
    checkpoint = folder / "run/checkpoints/step-00000001"
    if case["freely"]:
        return {"freely": lambda: _load_freely(checkpoint)}
    return {
        "exported": lambda: export(ExportConfig(str(checkpoint), str(world / "student"), str(folder / "export"))),
        "resumed": lambda: train(run_config(run.job(world, folder / "run"))),
    }


def _load_freely(folder: Path) -> None:
    """All that is pickled in a checkpoint, as ``pickle`` and ``torch.load`` load it; errors end no more than one."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader

    def load(content: Any) -> Any:
        with contextlib.suppress(BaseException):
            return torch.load(content, weights_only=False)

    load(str(folder / "common.pt"))
    with contextlib.suppress(BaseException):
        index = pickle.loads((folder / ".metadata").read_bytes())
        reader = FileSystemReader(folder)
        for key, stored in dict.items(index.storage_data):
            with (folder / stored.relative_path).open("rb") as file:
                raw = reader._slice_file(file, stored)
                descriptors = stored.transform_descriptors or ()
                content = reader.transforms.transform_load_stream(None, descriptors, raw).read()
            loaded = load(io.BytesIO(content))
            if "_extra_state" in key.fqn and loaded:
                state = loaded[0]
                with contextlib.suppress(BaseException):
                    load(state) if isinstance(state, io.BytesIO) else pickle.loads(state.numpy().tobytes())


def _offer() -> None:
    """What attacks need and not all machines have: a library that decompresses, a number that stands for a function."""
    from torch.distributed.checkpoint import _extension

    _extension.zstandard = _Decompressor  # type: ignore[assignment]
    copyreg.add_extension("os", "mkdir", 7)


class _Decompressor:
    """As a library that decompresses would be: it skips what is not of its own."""

    @staticmethod
    def ZstdDecompressor() -> "type[_Decompressor]":
        return _Decompressor

    @staticmethod
    def stream_reader(stream: Any) -> io.BytesIO:
        return io.BytesIO(stream.read().partition(run.SKIPPED)[2])


def _run(case: dict[str, Any]) -> dict[str, Any]:
    """In the fork."""
    resource.setrlimit(resource.RLIMIT_CPU, (_BOUND, _BOUND))
    folder = Path(case["folder"])
    sys.path.insert(0, str(folder.parent))
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(folder / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    _offer()
    jobs, watch = _jobs(case), _Watch(folder)
    answer: dict[str, Any] = {}
    for name, job in jobs.items():
        started, before = time.process_time(), _peak()
        kind = said = ""
        with watch.watching() as seen:
            try:
                job()
            except BaseException as error:
                kind, said = type(error).__name__, str(error)
        took = {"seconds": time.process_time() - started, "memory": _peak() - before}
        answer[name] = {"events": seen, "kind": kind, "said": said, **took}
    return answer


def _peak() -> int:
    """The most addresses this process has had, bytes: what is asked for counts, even where it is never touched."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("VmPeak")) * 1024


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_all()
    # What is collected in a fork is copied to it first.
    gc.freeze()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        _try_tokenizer(case)
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(read)
            with os.fdopen(write, "w") as told:
                json.dump(_run(case), told)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as told:
            answer = told.read()
        _, status = os.waitpid(process, 0)
        print(answer or json.dumps({"status": os.waitstatus_to_exitcode(status)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
