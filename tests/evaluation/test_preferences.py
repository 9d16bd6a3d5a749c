"""Evaluation of a Hugging Face folder, against a slow computation of one response and one token at a time."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.model import load_model
from ctpd_nemo.evaluation.preferences import evaluate_folder
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld, build_tiny_world
from ctpd_nemo.pipeline.tiny_world.models import ModelSize
from tests.rounding import of_model

Rows = list[dict[str, Any]]
SIZE = ModelSize(num_layers=2, hidden_size=64, ffn_hidden_size=96)
# Of a model of two layers, whose products have sums of 96 terms at the most.
TOLERANCE = of_model(2, 96)
COIN = {"role": "user", "content": "Heads or tails?"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    folder = tmp_path_factory.mktemp("worlds") / "world"
    return build_tiny_world(folder, seed=0, n_train=300, n_test=40, teacher=SIZE, student=SIZE)


@pytest.fixture(scope="module")
def rows(world: TinyWorld) -> Rows:
    return [json.loads(line) for line in world.test.read_text(encoding="utf-8").splitlines()]


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def save(rows: Rows, path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def token_ids(tokenizer: Any, prompt: list[dict[str, str]], response: str) -> tuple[list[int], list[int]]:
    """A rendered prompt, and a response by itself with its end of turn."""
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return prompt_ids, [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def memorise(folder: Path, rows: Rows, out: Path) -> Path:
    """Teach the model of a folder the chosen responses of a few rows."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pairs = [token_ids(tokenizer, row["prompt"], row["chosen"][0]["content"]) for row in rows]
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    ids, labels = torch.zeros(len(pairs), longest, dtype=torch.long), torch.full((len(pairs), longest), -100)
    for index, (prompt, response) in enumerate(pairs):
        ids[index, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        labels[index, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(60):
        optimizer.zero_grad()
        # Causal attention behind right padding needs no mask.
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    shutil.copytree(folder, out)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def student(world: TinyWorld, rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that knows the answers to the first rows, and that a coin falls on either side."""
    coins: Rows = [{"prompt": [COIN], "chosen": say(f"It is **{side}**.")} for side in ("heads", "tails")]
    folder = memorise(world.student, [*rows[:12], *coins], tmp_path_factory.mktemp("students") / "student")
    # Generation defaults of a folder must not change the numbers.
    defaults = json.loads((folder / "generation_config.json").read_text())
    defaults |= {"do_sample": True, "temperature": 0.2, "top_k": 1, "repetition_penalty": 5.0, "max_new_tokens": 2}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    return folder


class Slow:
    """One response at a time, one token at a time: no batch, no padding, no cache."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).double()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def logprobs(self, prompt: list[dict[str, str]], response: str) -> list[float]:
        prompt_ids, response_ids = token_ids(self.tokenizer, prompt, response)
        steps = torch.log_softmax(self.model(torch.tensor([prompt_ids + response_ids])).logits[0], dim=-1)
        return [steps[len(prompt_ids) + at - 1, token].item() for at, token in enumerate(response_ids)]

    @torch.no_grad()
    def answer(self, prompt: list[dict[str, str]], max_new_tokens: int) -> str:
        ids, _ = token_ids(self.tokenizer, prompt, "")
        start = len(ids)
        while len(ids) < start + max_new_tokens:
            ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == self.tokenizer.eos_token_id:
                return self.tokenizer.decode(ids[start:-1])
        return self.tokenizer.decode(ids[start:])

    def pairs(self, rows: Rows) -> list[tuple[list[float], list[float]]]:
        return [
            (
                self.logprobs(row["prompt"], row["chosen"][0]["content"]),
                self.logprobs(row["prompt"], row["rejected"][0]["content"]),
            )
            for row in rows
        ]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def standard_error(values: list[float], facts: list[str]) -> float:
    """Of as many independent sums as there are facts: with one pair a fact the usual one."""
    middle = mean(values)
    sums = [math.fsum(v - middle for v, of in zip(values, facts, strict=True) if of == one) for one in set(facts)]
    return math.sqrt(math.fsum(one**2 for one in sums) * len(sums) / (len(sums) - 1)) / len(values)


def test_every_number_equals_the_slow_one(world: TinyWorld, rows: Rows, student: Path) -> None:
    found = evaluate_folder(student, world.test, reference=world.teacher, batch_size=7, max_new_tokens=20)

    slow, reference = Slow(student), Slow(world.teacher).pairs(rows)
    pairs = slow.pairs(rows)
    margins = [sum(chosen) - sum(rejected) for chosen, rejected in pairs]
    responses = [slow.answer(row["prompt"], 20) for row in rows]
    # Read the answer with a regular expression's help alone: one pair of marks in the whole response.
    right = [
        float(response.count("**") == 2 and f"**{row['answer']}**" in response)
        for row, response in zip(rows, responses, strict=True)
    ]
    expected = {
        "preference_accuracy": [float(margin > 0) for margin in margins],
        "preference_accuracy_per_token": [float(mean(chosen) > mean(rejected)) for chosen, rejected in pairs],
        "logprob_margin": margins,
        "chosen_logprob": [sum(chosen) for chosen, _ in pairs],
        "rejected_logprob": [sum(rejected) for _, rejected in pairs],
        "reward_margin": [
            margin - (sum(chosen) - sum(rejected))
            for margin, (chosen, rejected) in zip(margins, reference, strict=True)
        ],
        "answer_accuracy": right,
    }
    assert found.n == len(rows)
    assert found.skipped == {}
    # Differences are as far off as what they are taken between.
    off = 4 * TOLERANCE * max(abs(sum(part)) for both in (*pairs, *reference) for part in both)
    for name, values in expected.items():
        assert getattr(found, name) == pytest.approx(mean(values), rel=TOLERANCE, abs=off), name
        error = standard_error(values, [row["fact"] for row in rows])
        assert found.standard_errors[name] == pytest.approx(error, rel=TOLERANCE, abs=off), name
        assert found.facts[name] == len({row["fact"] for row in rows}) < found.counts[name] == len(rows)
    assert found.standard_errors.keys() == expected.keys()
    assert [sample.response for sample in found.samples] == responses[:10]
    assert [sample.is_right for sample in found.samples] == [bool(value) for value in right[:10]]
    for kind, accuracy in found.answer_accuracy_by_kind.items():
        assert accuracy == mean([value for row, value in zip(rows, right, strict=True) if row["kind"] == kind])
    for fault, accuracy in found.preference_accuracy_by_fault.items():
        assert accuracy == mean([float(m > 0) for row, m in zip(rows, margins, strict=True) if row["fault"] == fault])
    # The model was made to know some answers, and to not know others.
    assert 0.2 < found.answer_accuracy < 0.8  # type: ignore[operator]


def test_batches_and_limits_change_nothing_else(world: TinyWorld, student: Path) -> None:
    def numbers(**options: Any) -> dict[str, Any]:
        return evaluate_folder(student, world.test, limit=15, max_new_tokens=16, sample_seed=1, **options).as_dict()

    one, many = numbers(batch_size=1), numbers(batch_size=100)
    assert one["n"] == many["n"] == 15
    assert one["samples"] == many["samples"]
    for name in ("preference_accuracy", "chosen_logprob", "rejected_logprob", "answer_accuracy"):
        assert one[name] == pytest.approx(many[name], rel=2 * TOLERANCE)
    assert many == numbers(batch_size=100)
    assert json.loads(json.dumps(many)) == many


def test_the_margin_over_itself_is_zero(world: TinyWorld, student: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(student, tmp_path / "copy")
    for reference in (None, student, copy):
        found = evaluate_folder(student, world.test, reference=reference, limit=5, max_new_tokens=1)
        assert found.reward_margin == 0
        assert found.standard_errors["reward_margin"] == 0


def test_no_sequence_is_longer_than_the_model_knows(student: Path, world: TinyWorld, tmp_path: Path) -> None:
    narrow = shutil.copytree(student, tmp_path / "narrow")
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 36}))
    cut, asked = (
        evaluate_folder(folder, world.test, limit=5, max_new_tokens=1, max_length=length)
        for folder, length in ((narrow, 2048), (student, 36))
    )
    assert cut.as_dict() == asked.as_dict()


def test_sampling_follows_the_whole_distribution(student: Path, tmp_path: Path) -> None:
    row = {"prompt": [COIN], "chosen": say("It is **heads**."), "rejected": say("It is **tails**."), "answer": "heads"}
    pairs = save([row] * 400, tmp_path / "coins.jsonl")
    probability = math.exp(sum(Slow(student).logprobs([COIN], "It is **heads**.")))
    assert 0.2 < probability < 0.8
    found = evaluate_folder(student, pairs, max_new_tokens=16, sample_seed=3, batch_size=100)
    # Other wordings of heads would count too; the model knows next to none.
    assert found.sampled_answer_accuracy == pytest.approx(probability, abs=4 * math.sqrt(0.25 / 400))
    assert found.answer_accuracy in (0, 1)
    assert evaluate_folder(student, pairs, max_new_tokens=16, limit=5).sampled_answer_accuracy is None


def flat(world: TinyWorld, folder: Path) -> Path:
    """A student that gives every token the same probability."""
    model = AutoModelForCausalLM.from_pretrained(world.student)
    torch.nn.init.zeros_(model.lm_head.weight)
    shutil.copytree(world.student, folder)
    model.save_pretrained(folder)
    return folder


def test_a_flat_model_costs_the_logarithm_of_the_vocabulary(world: TinyWorld, rows: Rows, tmp_path: Path) -> None:
    folder = flat(world, tmp_path / "flat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = [len(token_ids(tokenizer, row["prompt"], row["chosen"][0]["content"])[1]) for row in rows]
    found = evaluate_folder(folder, world.test, max_new_tokens=1)
    assert found.chosen_logprob == pytest.approx(
        -mean([float(n) for n in lengths]) * math.log(len(tokenizer)), rel=TOLERANCE
    )
    without_end = evaluate_folder(folder, world.test, max_new_tokens=1, include_eos=False)
    assert found.chosen_logprob - without_end.chosen_logprob == pytest.approx(-math.log(len(tokenizer)), rel=1e-4)


def test_the_same_prompts_again_make_no_error_smaller(world: TinyWorld, rows: Rows, tmp_path: Path) -> None:
    """Rows that name no fact are about what they ask, word for word."""
    plain = [{name: row[name] for name in ("prompt", "chosen", "rejected", "answer")} for row in rows[:12]]
    once, thrice = (
        evaluate_folder(world.student, save(plain * times, tmp_path / f"{times}.jsonl"), max_new_tokens=2)
        for times in (1, 3)
    )
    assert (once.facts["answer_accuracy"], thrice.facts["answer_accuracy"], thrice.n) == (12, 12, 36)
    for name, error in once.standard_errors.items():
        assert thrice.standard_errors[name] == pytest.approx(error, rel=1e-5), name
    assert thrice.lengths["greedy"].mean_standard_error == pytest.approx(once.lengths["greedy"].mean_standard_error)


def test_a_tie_counts_half(world: TinyWorld, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Which?", "chosen": chosen, "rejected": rejected} for chosen, rejected in (("▲", "▼"), ("▼", "▲"))
    ]
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    assert len(tokenizer("▲")["input_ids"]) == len(tokenizer("▼")["input_ids"])
    found = evaluate_folder(flat(world, tmp_path / "flat"), save(rows, tmp_path / "ties.jsonl"), max_new_tokens=1)
    assert found.preference_accuracy == found.preference_accuracy_per_token == 0.5
    assert found.standard_errors["preference_accuracy"] == 0


def test_rows_without_answers_have_no_answer_accuracy(world: TinyWorld, tmp_path: Path) -> None:
    rows = [{"prompt": f"Number {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(12)]
    found = evaluate_folder(world.student, save(rows, tmp_path / "plain.jsonl"), max_new_tokens=2, sample_seed=0)
    assert found.n == 12
    assert found.answer_accuracy is None
    assert found.sampled_answer_accuracy is None
    assert found.answer_accuracy_by_kind == found.preference_accuracy_by_fault == {}
    assert len(found.samples) == 10
    assert found.samples[0].is_right is None


def test_pairs_that_do_not_fit_either_model_are_counted(world: TinyWorld, student: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Short?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Long? " * 60, "chosen": "Yes.", "rejected": "No."},
        # Four bytes each to the student, a piece or a few to the teacher.
        {"prompt": "🙂" * 20, "chosen": "Yes.", "rejected": "No."},
    ]
    pairs = save(rows, tmp_path / "pairs.jsonl")
    teacher = evaluate_folder(world.teacher, pairs, max_length=60, max_new_tokens=1)
    assert (teacher.n, teacher.skipped) == (2, {"too_long": 1})
    both = evaluate_folder(world.teacher, pairs, reference=student, max_length=60, max_new_tokens=1)
    assert (both.n, both.skipped) == (1, {"too_long": 2})
    with pytest.raises(InputError, match=r"max_length: found no pair that fits \({'too_long': 3}\)"):
        evaluate_folder(world.teacher, pairs, max_length=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda world, path: {"folder": path / "nothing"}, "nothing: found no such folder"),
        (lambda world, path: {"pairs_file": path / "no.jsonl"}, "no such file or folder"),
        (lambda world, path: {"limit": 0}, "limit: found 0; expected 1 or more"),
        (
            lambda world, path: {
                "pairs_file": save([{"prompt": "A?", "chosen": "B", "rejected": "C", "answer": 7}], path / "int.jsonl")
            },
            r"int\.jsonl:1, field 'answer': found int; expected a string",
        ),
    ],
)
def test_bad_input_is_named(
    make: Callable[[TinyWorld, Path], dict[str, Any]], message: str, world: TinyWorld, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"folder": world.student, "pairs_file": world.test} | make(world, tmp_path)
    with pytest.raises(InputError, match=message):
        evaluate_folder(arguments.pop("folder"), arguments.pop("pairs_file"), **arguments)


def test_a_folder_without_weights_is_named(world: TinyWorld, tmp_path: Path) -> None:
    folder = shutil.copytree(world.student, tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="empty: found no model"):
        evaluate_folder(folder, world.test)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda:77"}, r"device: found 'cuda:77' \(.*\); expected a device of this machine"),
        ({"device": "gpu"}, r"device: found 'gpu' \(.*\); expected"),
        ({"dtype": "float"}, None),
        ({"dtype": "int32"}, "dtype: found 'int32'; expected auto"),
        ({"dtype": "fp16"}, "dtype: found 'fp16'; expected auto"),
    ],
)
def test_a_place_that_is_not_there_is_named(changes: dict[str, str], message: str | None, world: TinyWorld) -> None:
    place = {"device": "cpu", "dtype": "auto"} | changes
    if message is None:
        assert load_model(world.student, **place).dtype == torch.float32
    else:
        with pytest.raises(InputError, match=message):
            load_model(world.student, **place)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"cut"),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": 0}'),
        ("config.json", b'{"model_type": "llama", "vocab_size": 7}'),
    ],
)
def test_a_broken_folder_is_named(file: str, content: bytes, world: TinyWorld, tmp_path: Path) -> None:
    folder = shutil.copytree(world.student, tmp_path / "broken")
    if file == "config.json":
        values = json.loads((folder / file).read_text()) | json.loads(content)
        content = json.dumps(values).encode()
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=r"broken: found no model \("):
        load_model(folder, "cpu")


def test_weights_that_are_not_all_there_are_named(world: TinyWorld, tmp_path: Path) -> None:
    folder = shutil.copytree(world.student, tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        evaluate_folder(folder, world.test)


def test_importing_the_module_is_light() -> None:
    code = "import sys, ctpd_nemo.evaluation.preferences; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
