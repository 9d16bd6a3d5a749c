"""Score caches, encoded datasets, checkpoints and run folders that cannot be used."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ctpd_nemo.parallel.checkpoint_files import write_manifest
from ctpd_nemo.pipeline.score_sums import with_sums
from tests.hostile.case import Case, Scene, Values

Edit = Callable[[Path], object]
SCORES, SHARD = "a span score cache", "positive-00001.parquet"


class Evil:
    """Calls a function of the system where a pickle of it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil-was-here",)


def _json(name: str, **changed: Any) -> Edit:
    def edit(folder: Path) -> None:
        content = {**json.loads((folder / name).read_text()), **changed}
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return edit


def _bytes(name: str, content: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content)


def _half(name: str) -> Edit:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def _removed(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


# Score caches


def _table(change: Callable[[pa.Table], pa.Table]) -> Edit:
    return lambda folder: pq.write_table(with_sums(change(pq.read_table(folder / SHARD))), folder / SHARD)


def _chosen(change: Callable[[list[list[Any]]], Any]) -> Edit:
    """The scores of chosen responses, changed."""

    def edit(table: pa.Table) -> pa.Table:
        rows = table["chosen"].to_pylist()
        change(rows)
        return table.set_column(1, "chosen", pa.array(rows, table.schema.field("chosen").type))

    return _table(edit)


def _ids(change: Callable[[list[str]], Any]) -> Edit:
    def edit(table: pa.Table) -> pa.Table:
        ids = table["pair_id"].to_pylist()
        change(ids)
        return table.set_column(0, "pair_id", pa.array(ids, pa.string()))

    return _table(edit)


def _set(at: int, value: float | None) -> Edit:
    return _chosen(lambda rows: rows[2].__setitem__(at, value))


M = "manifest.json"
CACHES: dict[str, tuple[Edit, str, str, str]] = {
    "no folder": (shutil.rmtree, "cache", "no manifest.json", SCORES),
    "no manifest": (_removed(M), "cache", "no manifest.json", SCORES),
    "a manifest that is no JSON": (_bytes(M, b"{"), M, "no JSON", "the manifest of a score cache"),
    "a manifest that is a list": (_bytes(M, b"[1]"), M, "a JSON list", "the manifest of a score cache"),
    "a manifest that is a pickle": (_bytes(M, pickle.dumps({})), M, "no JSON", "the manifest of a score cache"),
    "a manifest without end": (_bytes(M, b'{"a":' * 100_000), M, "no JSON", "the manifest of a score cache"),
    "another format": (_json(M, format=99), M, "format 99", "format 1"),
    "no format": (_json(M, format=...), M, "format None", "format 1"),
    "no fingerprints": (_json(M, fingerprints=...), f"{M}, fingerprints", "None", "a value of type dict"),
    "fingerprints that are text": (_json(M, fingerprints="a"), f"{M}, fingerprints", "'a'", "a value of type dict"),
    "no teachers": (_json(M, teacher_weights=...), f"{M}, teacher_weights", "None", "a value of type dict"),
    "teachers that are a list": (_json(M, teacher_weights=[]), f"{M}, teacher_weights", "[]", "a value of type dict"),
    "a teacher in another folder": (
        _json(M, teacher_weights={"../../evil": "a"}),
        f"{M}, teacher_weights",
        "'../../evil'",
        "parts of file names",
    ),
    "another teacher": (
        _json(M, teacher_weights={"reference": "a"}),
        f"{M}, teacher_weights.reference",
        "a",
        "as this run has it",
    ),
    "a role that was not scored": (
        lambda folder: _json(
            M,
            teacher_weights={
                key: value
                for key, value in json.loads((folder / M).read_text())["teacher_weights"].items()
                if key[0] != "p"
            },
        )(folder),
        M,
        "roles ['negative', 'reference']",
        "positive",
    ),
    "no number of shards": (_json(M, shards=...), f"{M}, shards", "None", "a value of type int"),
    "shards that are text": (_json(M, shards="3"), f"{M}, shards", "'3'", "a value of type int"),
    "a true number of shards": (_json(M, shards=True), f"{M}, shards", "True", "a value of type int"),
    "negative shards": (_json(M, shards=-3), M, "-3 shards of 10 for 24 pairs", "numbers that belong together"),
    "a billion shards": (_json(M, shards=10**9), M, "1000000000 shards", "numbers that belong together"),
    "shards of no pairs": (_json(M, pairs_per_shard=0), M, "3 shards of 0 for 24 pairs", "numbers that belong"),
    "no pairs": (_json(M, pairs=0), M, "3 shards of 10 for 0 pairs", "numbers that belong together"),
    "other data": (_json(M, fingerprints={"data": "other"}), f"{M}, data", "other", "as this run has it"),
    "a shard that is gone": (_removed(SHARD), "cache", f"no {SHARD}", "3 shards; finish scoring first"),
    "half a shard": (_half(SHARD), SHARD, "a shard that cannot be read", "remove it and score again"),
    "an empty shard": (_bytes(SHARD, b""), SHARD, "a shard that cannot be read", "remove it and score again"),
    "a shard that is a pickle": (_bytes(SHARD, pickle.dumps([])), SHARD, "cannot be read", "remove it and score again"),
    "a shard that is a folder": (
        lambda folder: ((folder / SHARD).unlink(), (folder / SHARD).mkdir()),
        "cache",
        f"no {SHARD}",
        "3 shards",
    ),
    "a shard without a column": (
        _table(lambda t: t.drop_columns(["chosen"])),
        SHARD,
        "rows without chosen",
        "scores in",
    ),
    "a shard without ids": (_table(lambda t: t.drop_columns(["pair_id"])), SHARD, "rows without pair_id", "scores in"),
    "scores that are text": (
        _table(lambda t: t.set_column(1, "chosen", pa.array([["a"]] * len(t)))),
        SHARD,
        "cannot be read",
        "remove it",
    ),
    "no scores of a pair": (
        _chosen(lambda rows: rows.__setitem__(2, None)),
        SHARD,
        "1 rows without chosen",
        "scores in",
    ),
    "a score that is no number": (_set(0, float("nan")), f"{SHARD}, pair", "nan", "a finite score"),
    "a score without end": (_set(1, float("-inf")), "chosen, span 1", "-inf", "a finite score"),
    "a score that is null": (_set(0, None), f"{SHARD}, pair", "nan", "a finite score"),
    "a probability above one": (_set(1, 0.5), f"{SHARD}, pair", "0.5", "a log-prob, which is 0 or less"),
    "a span too few": (_chosen(lambda rows: rows[2].pop()), "cache, positive, pair", "spans", "as the reference has"),
    "a span too many": (_chosen(lambda rows: rows[2].append(-1.0)), "positive, pair", "spans", "as the reference has"),
    "a pair twice": (_ids(lambda ids: ids.__setitem__(1, ids[0])), "cache, positive", "twice", "each pair once"),
    "a pair of other data": (_ids(lambda ids: ids.__setitem__(1, "evil")), "cache, ", "no pair", "every pair of the"),
    "a pair too few": (_table(lambda table: table.slice(1)), "cache, positive", "no pair", "scores of every pair"),
    "scores of two shards alike": (
        lambda folder: shutil.copy(folder / "positive-00000.parquet", folder / SHARD),
        "cache, positive",
        "twice",
        "each",
    ),
    "scores in another order": (
        _table(lambda table: table.take(pc.sort_indices(table, [("pair_id", "descending")]).slice(1))),
        "cache, positive",
        "no pair",
        "scores of every pair",
    ),
}


# Encoded datasets


def _shard(edit: Edit) -> Edit:
    """The one shard of the one dataset."""

    def change(folder: Path) -> None:
        (shard,) = folder.glob("*/shard-00000")
        edit(shard)

    return change


def _dataset(edit: Edit) -> Edit:
    def change(folder: Path) -> None:
        (manifest,) = folder.glob("*/manifest.json")
        edit(manifest.parent)

    return change


def _array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """An array and its checksum, both changed: nothing but its content can give it away."""

    def edit(shard: Path) -> None:
        from ctpd_nemo.data.encoded import checksum

        np.save(shard / f"{name}.npy", change(np.load(shard / f"{name}.npy")), allow_pickle=True)
        _json("checks.json", **{name: checksum(shard / f"{name}.npy")})(shard)

    return _shard(edit)


def _record(field: str, value: int) -> Edit:
    def change(index: np.ndarray) -> np.ndarray:
        index[field][0] = value
        return index

    return _array("index", change)


AGAIN, POINTS = "to encode it again", "a record that points out of its shard"
ENCODED: dict[str, tuple[Edit, str, str, str]] = {
    "no manifest": (_dataset(_removed(M)), "encoded/", "no manifest.json", "an encoded dataset, or an empty folder"),
    "a manifest that is no JSON": (_dataset(_bytes(M, b"{")), M, "no JSON", "to encode again"),
    "a manifest that is a list": (_dataset(_bytes(M, b"[]")), M, "a JSON list", "to encode again"),
    "other pairs": (_dataset(_json(M, pairs=7)), f"{M}, pairs", "7", "24, as this run has it"),
    "fingerprints that are a list": (_dataset(_json(M, fingerprints=[])), f"{M}, data", "None", "as this run has it"),
    "no checksums": (_shard(_removed("checks.json")), "checks.json", "no such file", AGAIN),
    "checksums that are text": (_shard(_json("checks.json", ids="a")), "checks.json", "ids = 'a'", AGAIN),
    "half an array": (_shard(_half("tokens.npy")), "tokens.npy", "CRC-32", AGAIN),
    "an array that is gone": (_shard(_removed("index.npy")), "index.npy", "No such file", AGAIN),
    "a bit that has turned": (
        _shard(lambda s: (s / "ids.npy").write_bytes((s / "ids.npy").read_bytes()[:-1] + b"!")),
        "ids.npy",
        "CRC-32",
        "",
    ),
    "objects in an array": (_array("tokens", lambda a: np.array([Evil()], object)), "tokens.npy", "mapped", AGAIN),
    "another dtype": (_array("tokens", lambda a: a.astype("f8")), "tokens.npy", "float64 of shape", AGAIN),
    "two dimensions": (_array("tokens", lambda a: a[None]), "tokens.npy", "int32 of shape (1,", AGAIN),
    "a row too few": (_array("index", lambda a: a[1:]), "index.npy", "of shape (23,)", AGAIN),
    "a record behind the end": (_record("tokens_at", 2**40), "index.npy", POINTS, AGAIN),
    "a record before the beginning": (_record("tokens_at", -5), "index.npy", POINTS, AGAIN),
    "a prompt of two billion tokens": (_record("prompt", 2**31 - 1), "index.npy", POINTS, AGAIN),
    "a negative response": (_record("response", -1), "index.npy", POINTS, AGAIN),
    "an id behind the end": (_record("id_bytes", 2**30), "index.npy", POINTS, AGAIN),
    "a reason that is none": (_record("skipped", 99), "index.npy", POINTS, AGAIN),
}


# Checkpoints


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _object(content: bytes) -> Edit:
    """Another object in place of one in the checkpoint, as long as that was."""

    def edit(folder: Path) -> None:
        index = pickle.loads((folder / ".metadata").read_bytes())
        at = next(stored for key, stored in index.storage_data.items() if key.fqn.startswith("rng_state"))
        path = folder / at.relative_path
        data = path.read_bytes()
        index.storage_data = {
            key: type(at)(stored.relative_path, len(data), len(content)) if stored == at else stored
            for key, stored in index.storage_data.items()
        }
        path.write_bytes(data + content)
        (folder / ".metadata").write_bytes(pickle.dumps(index))

    return edit


def _named(module: str, name: str) -> bytes:
    """A pickle that asks for a name of a module, and for nothing else."""
    strings = (pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, name))
    return pickle.PROTO + b"\x04" + b"".join(strings) + pickle.STACK_GLOBAL + pickle.STOP


def _elsewhere(folder: Path) -> None:
    """An index that reads a file beside the checkpoint."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    key, stored = next(iter(index.storage_data.items()))
    index.storage_data[key] = type(stored)(f"../{stored.relative_path}", stored.offset, stored.length)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def _without_common_state(folder: Path) -> None:
    """Of releases of Megatron-Core from 0.19 on, it is an object in the shards."""
    name = "common.pt"
    if not (folder / name).exists():
        index = pickle.loads((folder / ".metadata").read_bytes())
        (name,) = {at.relative_path for key, at in index.storage_data.items() if key.fqn.startswith("common_state")}
    (folder / name).unlink()


OWN = "nothing but its own records"
CHECKPOINTS: dict[str, tuple[Edit, str, str, str]] = {
    "no folder": (shutil.rmtree, "step", "nothing", "a checkpoint folder written by training"),
    "an empty folder": (
        lambda f: (shutil.rmtree(f), f.mkdir()),
        "step",
        "without manifest.json",
        "a checkpoint folder",
    ),
    "no index": (_removed(".metadata"), ".metadata", "no such file in the manifest", "a checkpoint of Megatron-Core"),
    "an empty index": (_bytes(".metadata", b""), ".metadata", "a pickle of another protocol than 2 to 5", OWN),
    "half an index": (_half(".metadata"), ".metadata", "a pickle that cannot be read", OWN),
    "an index that is another record": (
        _bytes(".metadata", pickle.dumps({})),
        ".metadata",
        "an index with a dict",
        OWN,
    ),
    "an index that calls": (_bytes(".metadata", pickle.dumps(Evil())), ".metadata", "asks for posix.mkdir", OWN),
    "an index that calls by dots": (
        _bytes(".metadata", _named("torch.distributed.checkpoint.filesystem", "os.mkdir")),
        ".metadata",
        "asks for torch.distributed.checkpoint.filesystem.os.mkdir",
        OWN,
    ),
    "an index that reads elsewhere": (_elsewhere, ".metadata", "in '../__0_", "names of files in the same folder"),
    "an object that calls": (_object(_saved([Evil()])), ".distcp", "asks for posix.mkdir", OWN),
    "a common state that is gone": (_without_common_state, "step", "no ", ""),
    "a common state that calls": (_bytes("common.pt", _saved(Evil())), "common.pt", "asks for posix.mkdir", OWN),
    "a common state of plain pickle": (_bytes("common.pt", pickle.dumps(Evil(), 2)), "common.pt", "no archive", OWN),
    "another backend": (
        _json("metadata.json", sharded_backend="zarr"),
        "metadata.json, sharded_backend",
        "'zarr'",
        "torch_dist",
    ),
}


def _method(edit: Edit) -> Callable[[Scene], Values]:
    def make(scene: Scene) -> Values:
        folder = Path(shutil.copytree(scene.cache, scene.folder / "cache"))
        edit(folder)
        return {"method": {"name": "ctpd", "scores": str(folder)}}

    return make


def _data(edit: Edit) -> Callable[[Scene], Values]:
    def make(scene: Scene) -> Values:
        folder = Path(shutil.copytree(scene.encoded, scene.folder / "encoded"))
        edit(folder)
        return {"data": {"encoded": str(folder)}}

    return make


def _export(edit: Edit) -> Callable[[Scene], Values]:
    def make(scene: Scene) -> Values:
        folder = Path(shutil.copytree(scene.checkpoint, scene.folder / scene.checkpoint.name))
        edit(folder)
        if (folder / "manifest.json").exists():
            # Whoever means harm gives it a manifest that fits.
            (folder / "manifest.json").unlink()
            write_manifest(folder)
        exported = {"reference": str(scene.world.student), "folder": str(scene.folder / "export")}
        return {"checkpoint": str(folder), **exported}

    return make


def cache_cases() -> list[Case]:
    return [
        *(Case(name, "score cache", _method(edit), *rest) for name, (edit, *rest) in CACHES.items()),
        *(Case(name, "encoded dataset", _data(edit), *rest) for name, (edit, *rest) in ENCODED.items()),
        *(
            Case(name, "checkpoint", _export(edit), *rest, tool="export_hf")
            for name, (edit, *rest) in CHECKPOINTS.items()
        ),
    ]
