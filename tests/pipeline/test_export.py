"""What is exported is what was trained: tokenizer, templates, stops and weights, read back by transformers."""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from ctpd_nemo.models import probe as probes
from ctpd_nemo.pipeline import read_back
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.export import ExportConfig, export
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.pipeline.recipe import SMALL_BATCHES, composed, small_world

pytestmark = pytest.mark.usefixtures("one_quiet_thread")

# Written for the tokens of the student's tokenizer; it trims, and reads a variable.
TEMPLATE = (
    "{{ bos_token }}{% if tone is defined %}{{ tone }}{% endif %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n' }}{% endif %}"
)
NAMED = "{% for m in messages %}{{ m.content }}{% endfor %}"
ASKED = [{"role": "user", "content": "Add 6 and 9."}]


@dataclass(frozen=True)
class Job:
    """A base model that was trained with a template of the config, in a folder of its own."""

    folder: Path
    base: Path
    run_dir: Path
    checkpoint: Path
    lines: list[str]

    def export(self, name: str, **more: Any) -> Path:
        return export(ExportConfig(str(self.checkpoint), str(self.base), str(self.folder / name), **more))


def base_model(source: Path, folder: Path) -> Path:
    """A copy as a base model is: no template but a named one, and the end of a text for EOS."""
    shutil.copytree(source, folder)
    ids = AutoTokenizer.from_pretrained(source).get_vocab()
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "plain.jinja").write_text(NAMED)
    for name, change in (
        ("tokenizer_config.json", {"eos_token": "<|pad|>"}),
        ("config.json", {"eos_token_id": ids["<|pad|>"]}),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    stops = {"eos_token_id": ids["<|pad|>"], "bos_token_id": ids["<|begin_of_text|>"]}
    GenerationConfig(**stops, temperature=0.25, do_sample=True).save_pretrained(folder)
    return folder


def padded(world: TinyWorld, path: Path) -> Path:
    """The pairs of a world, of which three chosen responses end in white space."""
    rows = [json.loads(line) for line in world.train.read_text().splitlines()]
    for row in rows[:3]:
        row["chosen"][-1]["content"] += " \n"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return small_world(tmp_path_factory.mktemp("export") / "world")


@pytest.fixture(scope="module")
def job(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    base = base_model(world.student, folder / "Base-Model")
    (folder / "chat.jinja").write_text(TEMPLATE)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ctpd_nemo")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        overrides = [
            "method=sft",
            "model.student.path=Base-Model",
            "model.student.chat_template=chat.jinja",
            "model.student.chat_template_kwargs={tone: Kind}",
            f"data.train=[{padded(world, folder / 'pairs.jsonl')}]",
            "run_dir=run",
            "trainer.max_steps=2",
            "trainer.epochs=1",
            *SMALL_BATCHES,
        ]
        checkpoint = folder / train(run_config(composed("train", overrides)))
    logger.removeHandler(handler)
    logger.setLevel(level)
    return Job(folder, base, folder / "run", checkpoint, lines)


@pytest.fixture(scope="module")
def exported(job: Job) -> Path:
    return job.export("exported")


def test_the_folder_s_own_template_is_the_one_that_was_trained_and_named_ones_stay(job: Job, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template == {"default": TEMPLATE, "plain": NAMED}
    trained = Side(AutoTokenizer.from_pretrained(job.base), TEMPLATE, {"tone": "Kind"})
    side = Side(tokenizer, None, {"tone": "Kind"})
    assert side.template_fingerprint == trained.template_fingerprint
    assert side.tokenizer_fingerprint == trained.tokenizer_fingerprint
    assert side.end_of_turn_ids.tolist() == [tokenizer.convert_tokens_to_ids("<|eot_id|>")]


def test_generation_stops_where_training_ended_turns_and_where_the_base_did(job: Job, exported: Path) -> None:
    defaults = GenerationConfig.from_pretrained(exported)
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    begin, end, pad = tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|eot_id|>", "<|pad|>"])
    assert defaults.eos_token_id == [end, pad]
    assert (defaults.temperature, defaults.do_sample, defaults.bos_token_id) == (0.25, True, begin)
    assert tokenizer.eos_token == "<|pad|>"
    # A model that has the end of turn for the likeliest token of all, whatever it is asked.
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.embed_tokens.weight[end] = 2.0
    inputs = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :].tolist() == [end]


def test_the_export_is_read_back_before_it_has_its_name(
    job: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        job.export("read")
    (line,) = [record.getMessage() for record in caplog.records if "read back" in record.getMessage()]
    end = AutoTokenizer.from_pretrained(job.base).convert_tokens_to_ids("<|eot_id|>")
    assert (
        f"end of turn {end} and all tensors are those of the run; generation stops there; log-probs of a probe" in line
    )
    difference = float(line.split("within ")[1].split(" nats")[0])
    assert difference < 1e-5
    caplog.clear()
    monkeypatch.setattr(read_back, "RUN_BYTES", 0)
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        job.export("large")
    assert any("GB of weights are not run here" in record.getMessage() for record in caplog.records)


def test_a_dtype_that_is_asked_for_rounds_and_says_by_how_much(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ctpd_nemo"):
        folder = job.export("rounded", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    assert "in this dtype log-probs of a probe are" in caplog.text
    with pytest.raises(InputError, match="dtype: found 'fp8'; expected null, or one of float32, bfloat16, float16"):
        job.export("unknown", dtype="fp8")


def test_an_export_that_computes_something_else_has_no_name(job: Job, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(job.run_dir, tmp_path / "run"))
    probe = json.loads((run_dir / probes.FILE).read_text())
    probe["responses"][1]["logprobs"][2] -= 0.5
    (run_dir / probes.FILE).write_text(json.dumps(probe))
    moved = Job(job.folder, job.base, run_dir, run_dir / "checkpoints" / job.checkpoint.name, [])
    with pytest.raises(
        InputError, match=r"log-probs of a probe that are off by 0\.0\d+ nats a token; expected at most"
    ):
        moved.export("other")
    assert not [path.name for path in job.folder.iterdir() if "other" in path.name]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ({"step": "two"}, "what no job wrote"),
        ({"responses": [{"prompt": [1], "response": [2], "span": [5], "logprobs": [0.0]}]}, "spans without log-probs"),
        ({"responses": [{"prompt": [10**9], "response": [2], "span": [0], "logprobs": [0.0]}]}, "off by inf nats"),
        ({"responses": 7}, "what no job wrote"),
    ],
)
def test_a_probe_that_no_job_wrote_is_named(damage: dict[str, Any], found: str, job: Job, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(job.run_dir, tmp_path / "run"))
    there = json.loads((run_dir / probes.FILE).read_text())
    (run_dir / probes.FILE).write_text(json.dumps({**there, **damage}))
    checkpoint = run_dir / "checkpoints" / job.checkpoint.name
    with pytest.raises(InputError, match=found):
        export(ExportConfig(str(checkpoint), str(job.base), str(tmp_path / "out")))


def test_another_template_or_tokenizer_than_the_run_s_is_refused_and_its_own_can_be_given(
    job: Job, world: TinyWorld, tmp_path: Path
) -> None:
    folder = Path(
        shutil.copytree(job.folder, tmp_path / "moved", ignore=shutil.ignore_patterns("export*", "read", "large"))
    )
    checkpoint, base = folder / "run/checkpoints" / job.checkpoint.name, folder / "Base-Model"
    starts = (folder / "run/starts.jsonl").read_text().replace(str(job.folder), str(folder))
    (folder / "run/starts.jsonl").write_text(starts)
    (folder / "chat.jinja").write_text(TEMPLATE.replace("Kind", "Kind").replace("| trim", "| trim | trim"))

    def to(name: str, **more: str) -> Path:
        return export(ExportConfig(str(checkpoint), str(base), str(folder / name), **more))

    with pytest.raises(
        InputError, match=r"another chat template than the run was trained with; .*chat_template=\.\.\."
    ):
        to("one")
    (folder / "kept.jinja").write_text(TEMPLATE)
    assert (
        AutoTokenizer.from_pretrained(to("two", chat_template=str(folder / "kept.jinja"))).chat_template["default"]
        == TEMPLATE
    )
    path = base / "tokenizer.json"
    path.write_text(path.read_text().replace("<|pad|>", "<|pod|>"))
    with pytest.raises(InputError, match=r"another tokenizer than the run was trained with|Base-Model: found"):
        to("three", chat_template=str(folder / "kept.jinja"))
    assert to("four", chat_template=str(folder / "kept.jinja"), tokenizer=str(job.base)).is_dir()
    (folder / "chat.jinja").unlink()
    with pytest.raises(InputError, match=r"chat_template: found no file"):
        to("five")


def other_tokenizer(world: TinyWorld, folder: Path) -> Path:
    """The student's tokenizer, alone, with a token more among its special ones, and in words of no class."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(world.student / name, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["tokenizer_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|pad|>", "pad_token": "<unk>"}))
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["normalized"] = True
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def trained_with(tokenizer: Path, policy: str, model: Path, world: TinyWorld, run_dir: Path) -> Path:
    overrides = [
        "method=sft",
        f"policy={policy}",
        f"model.{policy}.path={model}",
        f"model.{policy}.tokenizer={tokenizer}",
        f"data.train=[{world.train}]",
        f"run_dir={run_dir}",
        "trainer.max_steps=1",
        *SMALL_BATCHES,
    ]
    return train(run_config(composed("train", overrides)))


def test_a_tokenizer_of_another_folder_is_exported_with_its_own_ids(world: TinyWorld, tmp_path: Path) -> None:
    other = other_tokenizer(world, tmp_path / "other")
    checkpoint = trained_with(other, "student", world.student, world, tmp_path / "run")
    folder = export(ExportConfig(str(checkpoint), str(world.student), str(tmp_path / "out")))
    tokenizer, trained = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(other)
    text = "Add 6 and 9: \U0001f642 caf\u00e9's"
    assert tokenizer(text)["input_ids"] == trained(text)["input_ids"]
    assert (folder / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    defaults = GenerationConfig.from_pretrained(folder)
    # Ids of the base's own defaults are of another vocabulary.
    begin, end, pad = trained.convert_tokens_to_ids(["<|begin_of_text|>", "<|eot_id|>", "<|pad|>"])
    assert (defaults.eos_token_id, defaults.bos_token_id, defaults.pad_token_id) == ([end, pad], begin, 0)


def test_a_tokenizer_that_would_be_another_one_beside_the_weights_is_refused_before_it_is_trained(
    world: TinyWorld, tmp_path: Path
) -> None:
    """Beside a Qwen2 model, transformers puts Qwen2's own rules into any tokenizer."""
    other = other_tokenizer(world, tmp_path / "other")
    with pytest.raises(
        InputError, match=r"model\.teacher\.tokenizer: found .*reads otherwise beside the config\.json of"
    ):
        trained_with(other, "teacher", world.teacher, world, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_says_at_its_start_what_it_trains_otherwise_than_the_template_and_at_its_end_how_often(job: Job) -> None:
    warned = (
        "model.student, chat template, white space around a response: trained is ' \\n Yes. \\n ', the template writes"
        " 'Yes.'; data.response_text=rendered trains what it writes"
    )
    (told,) = [line for line in job.lines if "trained on" in line]
    assert job.lines.index(warned) < job.lines.index(told)
    assert "responses not as a chat template writes them: policy_white_space " in told
    record = json.loads((job.run_dir / "starts.jsonl").read_text().splitlines()[-1])
    side = Side(AutoTokenizer.from_pretrained(job.base), TEMPLATE, {"tone": "Kind"})
    assert record["fingerprints"]["policy_template"] == side.template_fingerprint
    assert record["config"]["model"]["student"]["chat_template_kwargs"] == {"tone": "Kind"}


def test_no_text_of_an_export_names_a_place_of_the_machine(job: Job, exported: Path) -> None:
    texts = {path.name: path.read_text() for path in exported.rglob("*") if path.suffix in (".md", ".json", ".jinja")}
    assert {"README.md", "ctpd_nemo.json", "config.json"} <= texts.keys()
    assert not [name for name, text in texts.items() if str(job.folder) in text or "/tmp" in text]
    card = ModelCard.load(exported / "README.md")
    assert card.data.base_model == ["Base-Model"]
    assert '| `model.student.chat_template_kwargs` | `{"tone": "Kind"}` |' in card.text
    assert "| `model.student.chat_template` | `chat.jinja` |" in card.text


@pytest.mark.slow
def test_a_base_model_that_learned_to_end_its_turns_stops_by_itself(world: TinyWorld, tmp_path: Path) -> None:
    base = base_model(world.student, tmp_path / "base")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "pairs.jsonl").write_text("".join(world.train.read_text().splitlines(keepends=True)[:8]))
    overrides = [
        "method=sft",
        f"model.student.path={base}",
        f"model.student.chat_template={tmp_path / 'chat.jinja'}",
        f"data.train=[{tmp_path / 'pairs.jsonl'}]",
        f"run_dir={tmp_path / 'run'}",
        "optim.lr=1e-2",
        "trainer.epochs=200",
        *SMALL_BATCHES,
    ]
    checkpoint = train(run_config(composed("train", overrides)))
    folder = export(ExportConfig(str(checkpoint), str(base), str(tmp_path / "out")))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        inputs = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**inputs, max_new_tokens=100, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(written) == row["chosen"][-1]["content"].strip() + "<|eot_id|>"
