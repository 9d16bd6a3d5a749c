"""The tiny world on disk: two untrained models with their tokenizers, training pairs and test pairs."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.tiny_world.models import ModelSize, student_config, teacher_config, write_model
from ctpd_nemo.pipeline.tiny_world.pairs import generate_pairs
from ctpd_nemo.pipeline.tiny_world.tasks import KINDS
from ctpd_nemo.pipeline.tiny_world.tokenizers import train_bpe, train_unigram

logger = logging.getLogger(__name__)

TEACHER = ModelSize(num_layers=3, hidden_size=128, ffn_hidden_size=352)
STUDENT = ModelSize(num_layers=2, hidden_size=96, ffn_hidden_size=256)

_MANIFEST = "tiny_world.json"

# As many training pairs as the two tokenizers are trained on: more change little and cost seconds.
_TOKENIZER_PAIRS = 1000


@dataclass(frozen=True, slots=True)
class TinyWorld:
    """Where the parts of a tiny world are.

    Attributes:
        teacher: Hugging Face folder of the untrained teacher, Qwen2-shaped.
        student: Hugging Face folder of the untrained student, Llama-shaped, with another tokenizer.
        train: JSON Lines of training pairs.
        sft: The same pairs as SFT reads them: with ``mixed``, some of what is called chosen is the rejected response.
        test: JSON Lines of held-out pairs, about facts that neither these files nor the tokenizers' training have.
    """

    teacher: Path
    student: Path
    train: Path
    sft: Path
    test: Path


def build_tiny_world(
    folder: str | Path,
    *,
    seed: int = 0,
    n_train: int = 4000,
    n_test: int = 300,
    flip: float = 0.0,
    mixed: float = 0.0,
    kinds: Sequence[str] = tuple(KINDS),
    teacher: ModelSize = TEACHER,
    student: ModelSize = STUDENT,
) -> TinyWorld:
    """Build a world, or find it where an earlier call with the same arguments left it.

    The same arguments give the same files, byte for byte, with the same versions of the libraries. The folder appears
    under its name when it is complete; a tiny world of other arguments or versions that is in its place is replaced.
    One process calls this at a time.

    Args:
        folder: Where the world is, or will be.
        seed: Of the pairs and of the models' first weights.
        n_train: Training pairs.
        n_test: Test pairs, all of them about the fifth of the facts that is held out. A kind has 180 different prompts
            or more.
        flip: Share of training pairs whose chosen and rejected are exchanged; test pairs are never flipped.
        mixed: Share of the pairs whose rejected response is what SFT learns. Models that have learnt right answers
            alone tell them from others before any preference is learnt; a web's worth of text has both.
        kinds: Kinds of questions, of ``tasks.KINDS``.
        teacher: Size of the teacher.
        student: Size of the student.

    Raises:
        InputError: The folder holds something else; a number of pairs is out of range; a share is not in [0, 1].
    """
    folder = Path(folder)
    _check({"n_train": n_train, "n_test": n_test}, {"flip": flip, "mixed": mixed}, kinds)
    arguments = {
        **{"seed": seed, "n_train": n_train, "n_test": n_test, "flip": flip, "mixed": mixed, "kinds": [*kinds]},
        **{"teacher": asdict(teacher), "student": asdict(student)},
    }
    manifest = {"arguments": arguments, "versions": _versions()}
    names = ("teacher", "student", "train.jsonl", "sft.jsonl", "test.jsonl")
    world = TinyWorld(*(folder / name for name in names))
    found = _read_manifest(folder)
    if found == manifest:
        logger.info("%s: the tiny world is there already", folder)
        return world

    train, sft = (generate_pairs("train", n_train, seed, share, kinds) for share in (flip, mixed))
    test = generate_pairs("test", n_test, seed, kinds=kinds)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path, rows in ((world.train, train), (world.sft, sft), (world.test, test)):
        _write_rows(partial / path.name, rows)
    texts = _tokenizer_texts(train)
    bpe, unigram = train_bpe(texts), train_unigram(texts)
    write_model(partial / world.teacher.name, teacher_config(teacher, bpe), bpe, seed)
    write_model(partial / world.student.name, student_config(student, unigram), unigram, seed)
    (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)
    logger.info("%s: a tiny world of %d training and %d test pairs", folder, n_train, n_test)
    return world


def _check(counts: Mapping[str, int], shares: Mapping[str, float], kinds: Sequence[str]) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(name, str(count), "1 or more")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise InputError(name, str(share), "a share between 0 and 1")
    if not kinds or not set(kinds) <= set(KINDS):
        raise InputError("kinds", ", ".join(kinds) or "none", "some of " + ", ".join(KINDS))


def _versions() -> dict[str, str]:
    """What besides the arguments decides the content of the files: the libraries, and the code of this package."""
    code = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    libraries = {name: version(name) for name in ("tokenizers", "torch", "transformers")}
    return {"tiny_world": code.hexdigest(), **libraries}


def _read_manifest(folder: Path) -> Any:
    """The manifest of a finished world; ``None`` where there is nothing yet."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    path = folder / _MANIFEST
    if not path.is_file():
        raise InputError(str(folder), f"something without a {_MANIFEST}", "a tiny world, or nothing yet")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(str(path), f"no JSON ({error})", "what an earlier run wrote") from error


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _tokenizer_texts(rows: list[dict[str, Any]]) -> list[str]:
    messages = [row[field][0] for row in rows[:_TOKENIZER_PAIRS] for field in ("prompt", "chosen", "rejected")]
    # The chat templates write the roles on lines of their own.
    return [message["content"] for message in messages] + [f"\n{message['role']}\n" for message in messages]
