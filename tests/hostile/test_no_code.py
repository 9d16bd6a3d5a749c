"""No pickle of a model, cache or data file is loaded, no code beside a model runs, templates stay in their box."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.convert.fingerprint import weights_fingerprint
from ctpd_nemo.convert.safetensors_folder import SafetensorsFolder
from ctpd_nemo.data.encoded import EncodedDataset, Manifest
from ctpd_nemo.data.forms import Message
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.templates import Side
from ctpd_nemo.data.tokenizer_folder import load_tokenizer
from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.model import load_model
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.parallel.checkpoint_files import write_manifest
from ctpd_nemo.parallel.checkpoint_reader import CheckpointReader
from ctpd_nemo.pipeline.export import ExportConfig, export
from ctpd_nemo.pipeline.score_cache import ScoreReader, read_manifest
from tests.hostile.caches import Evil
from tests.hostile.case import Scene
from tests.hostile.rows import GOOD
from tests.hostile.tokenizers import ESCAPES
from tests.hostile.watch import watched

# What pickles of a checkpoint ask for: records of its index, tensors, and kinds of numbers.
OF_CHECKPOINTS = (
    "torch.distributed.checkpoint.",
    "torch._utils.",
    "torch.serialization._get_layout",
    "torch.Size",
    "torch.float32",
    "collections.OrderedDict",
    "_io.BytesIO",
)


@pytest.fixture(autouse=True)
def nothing_evil(monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> Any:
    """Whatever a hostile file would do, it would do where one stands."""
    monkeypatch.chdir(elsewhere)
    yield
    assert list(elsewhere.iterdir()) == []


def test_the_watch_sees_a_pickle_and_a_file(elsewhere: Path) -> None:
    with watched() as seen:
        pickle.loads(pickle.dumps(Evil()))
    assert seen.named == {"posix.mkdir"}
    assert seen.written == {elsewhere / "evil-was-here"}
    (elsewhere / "evil-was-here").rmdir()


def _hostile_model(scene: Scene) -> Path:
    """A model folder with pickles in all places where such folders have them, and code."""
    folder = Path(shutil.copytree(scene.world.student, scene.folder / "model"))
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "consolidated.00.pth",
    ):
        torch.save(Evil(), folder / name)
    (folder / "vocab.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("modeling_evil.py", "tokenization_evil.py", "__init__.py", "conftest.py", "setup.py"):
        (folder / name).write_text("import os\nos.mkdir('evil-was-here')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_evil.Evil")
    config["trust_remote_code"] = True
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    tokenizer["trust_remote_code"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def _read_model(scene: Scene) -> None:
    folder = _hostile_model(scene)
    SafetensorsFolder(folder, read_architecture(folder))
    weights_fingerprint(folder)


def _read_tokenizer(scene: Scene) -> None:
    Side(load_tokenizer(str(_hostile_model(scene))))


def _evaluate(scene: Scene) -> None:
    load_model(_hostile_model(scene), "cpu")


def _read_parquet(scene: Scene) -> None:
    """Pickles as text, as the type of a column, and in the description of the file."""
    evil = pickle.dumps(Evil(), protocol=0).decode()
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": evil}
    fields = [pa.field("prompt", pa.string()), pa.field("chosen", pa.string(), metadata=extension)]
    schema = pa.schema([*fields, pa.field("rejected", pa.string())], metadata={"pandas": evil, "evil": evil})
    pq.write_table(pa.table([[evil], ["b"], ["c"]], schema=schema), scene.folder / "pairs.parquet")
    list(open_preferences(scene.folder / "pairs.parquet"))


def _read_dataset(scene: Scene) -> None:
    rows = datasets.Dataset.from_list([GOOD, {**GOOD, "chosen": "b"}])
    rows.save_to_disk(scene.folder / "saved")
    (scene.folder / "saved" / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    (scene.folder / "saved" / "saved.py").write_text("import os\nos.mkdir('evil-was-here')\n")
    state = json.loads((scene.folder / "saved" / "state.json").read_text())
    state["_fingerprint"] = pickle.dumps(Evil(), protocol=0).decode()
    (scene.folder / "saved" / "state.json").write_text(json.dumps(state))
    list(open_preferences(scene.folder / "saved"))


def _read_lines(scene: Scene) -> None:
    (scene.folder / "pairs.jsonl").write_text(json.dumps({**GOOD, "id": pickle.dumps(Evil(), protocol=0).decode()}))
    list(open_preferences(scene.folder / "pairs.jsonl"))


def _read_scores(scene: Scene) -> None:
    manifest = read_manifest(scene.cache)
    reader = ScoreReader(scene.cache, manifest["fingerprints"], manifest["teacher_weights"], CTPDConfig(scores="x"))
    assert len(reader) > 0


def _read_encoded(scene: Scene) -> None:
    (manifest,) = scene.encoded.glob("*/manifest.json")
    dataset = EncodedDataset(manifest.parent, Manifest(**json.loads(manifest.read_text())))
    assert len(dataset.pairs(range(len(dataset)))) == len(dataset)


@pytest.mark.parametrize(
    "read",
    [_read_lines, _read_parquet, _read_dataset, _read_tokenizer, _read_model, _evaluate, _read_scores, _read_encoded],
    ids=lambda read: read.__name__.strip("_"),
)
def test_readers_ask_no_pickle_and_run_no_code(scene: Scene, read: Callable[[Scene], None]) -> None:
    with watched() as seen:
        read(scene)
    # ``Evil`` itself is pickled above, which asks for nothing.
    assert seen.named == set()
    assert seen.commands == []
    outside = {path for path in seen.written if scene.folder not in path.parents and path != Path(os.devnull)}
    assert outside == set()


def test_pickles_of_a_checkpoint_ask_for_its_records_and_nothing_else(scene: Scene) -> None:
    with watched() as seen:
        export(ExportConfig(str(scene.checkpoint), str(scene.world.student), str(scene.folder / "export")))
    assert seen.named
    assert {name for name in seen.named if not name.startswith(OF_CHECKPOINTS)} == set()


def test_a_checkpoint_may_hold_half_precision_and_text(scene: Scene, tmp_path: Path) -> None:
    """The rules let pass what training writes; other dtypes are the same kind of name."""
    content = {"a": torch.zeros(2, dtype=torch.bfloat16), "b": [1, "text", None, (2.5,)], "c": torch.Size([1])}
    folder = Path(shutil.copytree(scene.checkpoint, tmp_path / "checkpoint"))
    torch.save(content, folder / "common.pt")
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    found = CheckpointReader(folder).common()
    assert torch.equal(found.pop("a"), content.pop("a"))
    assert found == content


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_reaches_nothing_outside_its_sandbox(scene: Scene, name: str) -> None:
    tokenizer = load_tokenizer(str(scene.world.student))
    with watched() as seen, pytest.raises(InputError, match="a template that fails"):
        Side(tokenizer, ESCAPES[name])
    assert seen.written == set()
    assert seen.commands == []


def test_a_class_of_python_is_blank_to_a_template(scene: Scene) -> None:
    """A name that the sandbox hides is no error by itself: it is nothing."""
    side = Side(load_tokenizer(str(scene.world.student)))
    body = "{{ ''.__class__ }}{{ messages.__init__ }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert Side(side.tokenizer, body).render_text([Message("user", "x")]) == "x"
