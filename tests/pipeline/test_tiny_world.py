"""The generated world: its questions, pairs, tokenizers, models and folder."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ctpd_nemo.data.forms import Message
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld, build_tiny_world
from ctpd_nemo.pipeline.tiny_world.models import ModelSize
from ctpd_nemo.pipeline.tiny_world.pairs import answer_of, generate_pairs
from ctpd_nemo.pipeline.tiny_world.tasks import KINDS
from ctpd_nemo.pipeline.tiny_world.tokenizers import train_unigram
from ctpd_nemo.spans import align_batch

SMALL: dict[str, Any] = {
    "n_train": 300,
    "n_test": 50,
    "teacher": ModelSize(num_layers=2, hidden_size=32, ffn_hidden_size=48),
    "student": ModelSize(num_layers=1, hidden_size=16, ffn_hidden_size=24),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_tiny_world(tmp_path_factory.mktemp("worlds") / "world", seed=3, **SMALL)


@pytest.fixture(scope="module")
def tokenizers(world: TinyWorld) -> dict[str, PreTrainedTokenizerFast]:
    return {
        "teacher": AutoTokenizer.from_pretrained(world.teacher),
        "student": AutoTokenizer.from_pretrained(world.student),
    }


def text(row: dict[str, Any], field: str) -> str:
    return row[field][0]["content"]


def all_texts(rows: list[dict[str, Any]]) -> list[str]:
    return [text(row, field) for row in rows for field in ("prompt", "chosen", "rejected")]


def numbers(prompt: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", prompt)]


def asked_word(prompt: str) -> str:
    match = re.search(r"(?:word|Say|down) (\w+)", prompt)
    assert match
    return match[1]


def letter(prompt: str) -> str:
    match = re.search(r"the (first|last) letter of (\w+)", prompt)
    assert match
    return match[2][0 if match[1] == "first" else -1]


def colour(prompt: str) -> str:
    things = dict(re.findall(r"[Tt]he (\w+) is (\w+)", prompt))
    asked = re.findall(r"the (\w+)\?", prompt)
    return things[asked[-1]]


# The answer, read from the prompt by other means than the one that made it.
ANSWERS: dict[str, Callable[[str], str]] = {
    "add": lambda prompt: str(sum(numbers(prompt))),
    "subtract": lambda prompt: str(numbers(prompt)[0] - numbers(prompt)[1]),
    "larger": lambda prompt: str(max(numbers(prompt))),
    "parity": lambda prompt: ["even", "odd"][numbers(prompt)[0] % 2],
    "sort": lambda prompt: ", ".join(str(number) for number in sorted(numbers(prompt))),
    "copy": asked_word,
    "letter": letter,
    "colour": colour,
}


def test_the_answer_is_what_stands_alone_between_two_marks() -> None:
    assert answer_of("The answer is **7**.") == "7"
    assert answer_of("Oh 🙂 in order they are **3, 5, 8**!") == "3, 5, 8"
    for response in ("The answer is 7.", "It is **7", "**7** or **8**", "", "****7", "It is **7**. Or **"):
        assert answer_of(response) != "7"
    # Containing the answer, or the answer in another dress, is not giving it.
    for response in ("**17**", "**7 or 8**", "**7.**", "** 7**", "***7***", "**seven**"):
        assert answer_of(response) != "7"


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_can_be_worked_out_from_the_prompt(kind: str) -> None:
    rows = [row for row in generate_pairs("train", 2000, seed=0) if row["kind"] == kind]
    assert len(rows) == 200
    assert [row["answer"] for row in rows] == [ANSWERS[kind](text(row, "prompt")) for row in rows]


def test_days_months_and_opposites_go_both_ways() -> None:
    rng = Random(0)
    tasks = [KINDS["calendar"].draw(rng) for _ in range(2000)]
    after = {(task.question.rstrip("?.").split()[-1], task.right) for task in tasks if " after " in task.question}
    before = {(task.right, task.question.rstrip("?.").split()[-1]) for task in tasks if " before " in task.question}
    assert after == before
    assert len(after) == 7 + 12
    assert {("Sunday", "Monday"), ("December", "January"), ("May", "June")} < after

    tasks = [KINDS["opposite"].draw(rng) for _ in range(2000)]
    opposites = {(task.question.rstrip("?.").split()[-1], task.right) for task in tasks}
    assert {(right, word) for word, right in opposites} == opposites
    assert len(dict(opposites)) == len(opposites) == 50


def test_chosen_gives_the_right_answer_and_rejected_never_does() -> None:
    rows = generate_pairs("train", 3000, seed=1)
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(KINDS, 300)
    assert all(answer_of(text(row, "chosen")) == row["answer"] for row in rows)
    rejected = {fault: [row for row in rows if row["fault"] == fault] for fault in ("wrong", "evasive")}
    assert len(rejected["wrong"]) + len(rejected["evasive"]) == len(rows)
    # 60% wrong, give or take four standard errors.
    assert abs(len(rejected["wrong"]) / len(rows) - 0.6) < 4 * (0.6 * 0.4 / len(rows)) ** 0.5
    assert all(answer_of(text(row, "rejected")) is None for row in rejected["evasive"])
    for row in rejected["wrong"]:
        wrong = answer_of(text(row, "rejected"))
        assert wrong not in (None, row["answer"])
        assert text(row, "rejected").replace(f"**{wrong}**", f"**{row['answer']}**") == text(row, "chosen")


def fact(row: dict[str, Any]) -> tuple[str, frozenset[str]]:
    """What a row is about, read from its question: kind and operands, whatever dress, greeting, order and direction."""
    prompt, kind = text(row, "prompt"), row["kind"]
    if kind == "copy":
        operands = [asked_word(prompt)]
    elif kind == "letter":
        operands = list(re.search(r"the (first|last) letter of (\w+)", prompt)[0].split()[1::3])  # type: ignore[index]
    elif kind in ("calendar", "opposite"):
        # One thing to know, from either of its ends.
        operands = [re.findall(r"\w+", prompt)[-1], row["answer"]]
    elif kind == "colour":
        operands = [" is ".join(one) for one in re.findall(r"[Tt]he (\w+) is (\w+)", prompt)]
    else:
        operands = [str(number) for number in numbers(prompt)]
    return kind, frozenset(operands)


# By combinatorics: unordered sums, differences, pairs of 30, numbers below 50, three of nine digits, words, their two
# ends, neighbours among days and months, opposites, and two things of ten in two colours of nine.
HOW_MANY_FACTS = {
    **{"add": 10 * 11 // 2, "subtract": 13 * 14 // 2, "larger": 30 * 29 // 2, "parity": 50, "sort": 9 * 8 * 7 // 6},
    **{"copy": 40, "letter": 2 * 40, "calendar": 7 + 12, "opposite": 25, "colour": (10 * 9 // 2) * (9 * 8)},
}


def test_no_fact_of_a_test_is_in_any_training_file_of_any_seed(world: TinyWorld) -> None:
    train = [row for seed in range(5) for row in generate_pairs("train", 4000, seed, flip=0.3)]
    test = [row for seed in range(5) for row in generate_pairs("test", 1000, seed)]
    for path in (world.train, world.sft):
        train += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    test += [json.loads(line) for line in world.test.read_text(encoding="utf-8").splitlines()]
    trained, tested = ({fact(row) for row in rows} for rows in (train, test))
    assert not trained & tested
    for kind, n_facts in HOW_MANY_FACTS.items():
        n_held_out = math.ceil(n_facts / 5)
        found = [sum(of == kind for of, _ in facts) for facts in (trained, tested)]
        if n_facts < 100:
            # Every fact is asked somewhere: none is left that another seed could put elsewhere.
            assert found == [n_facts - n_held_out, n_held_out], kind
        else:
            assert found[0] <= n_facts - n_held_out, kind
            assert n_held_out // 2 < found[1] <= n_held_out, kind


def test_rows_name_the_fact_that_their_question_is_about(world: TinyWorld) -> None:
    """Equal names for equal facts, and other names for others: what errors are taken over."""
    rows = [row for split in ("train", "test") for row in generate_pairs(split, 4000 if split == "train" else 1500, 0)]
    names = {(row["fact"], fact(row)) for row in rows}
    assert len(names) == len(dict(names)) == len({of for _, of in names})
    for kind, of in KINDS.items():
        assert len(of.facts) == len(set(of.facts)) == HOW_MANY_FACTS[kind]
        assert {name for name, _ in names if name.split()[0] == kind} <= {f"{kind} {one}" for one in of.facts}


def test_a_held_out_answer_is_not_even_a_wrong_one_in_training() -> None:
    """Else training on preferences teaches that it is always wrong."""
    train, test = generate_pairs("train", 8000, seed=0), generate_pairs("test", 1000, seed=0)
    for kind in ("copy", "opposite"):
        said = {answer_of(text(row, side)) for row in train if row["kind"] == kind for side in ("chosen", "rejected")}
        assert not said & {row["answer"] for row in test if row["kind"] == kind}


def test_test_prompts_are_all_different_and_none_is_a_training_prompt() -> None:
    train = {text(row, "prompt") for seed in (0, 1) for row in generate_pairs("train", 3000, seed)}
    test = [text(row, "prompt") for row in generate_pairs("test", 1500, seed=0)]
    assert len(set(test)) == len(test)
    assert not train & set(test)


def test_more_test_pairs_than_prompts_is_an_error() -> None:
    with pytest.raises(InputError, match="n_test: found more than there are different test prompts of kind"):
        generate_pairs("test", 5000, seed=0)


def test_flipping_exchanges_responses_and_nothing_else() -> None:
    clean, flipped = (generate_pairs("train", 1000, seed=0, flip=flip) for flip in (0.0, 0.25))
    exchanged = [a["chosen"] == b["rejected"] for a, b in zip(clean, flipped, strict=True)]
    assert abs(np.mean(exchanged) - 0.25) < 4 * (0.25 * 0.75 / 1000) ** 0.5
    for before, after, exchange in zip(clean, flipped, exchanged, strict=True):
        if exchange:
            after = after | {"chosen": after["rejected"], "rejected": after["chosen"]}
        assert after == before


def test_sft_may_read_what_is_rejected_of_the_same_pairs(tmp_path: Path) -> None:
    mixed = build_tiny_world(tmp_path / "mixed", **SMALL | {"n_train": 400}, mixed=0.4, kinds=["copy", "parity"])
    train, sft = ([json.loads(line) for line in path.read_text().splitlines()] for path in (mixed.train, mixed.sft))
    assert all(answer_of(text(row, "chosen")) == row["answer"] for row in train)
    assert {row["kind"] for row in train} == {"copy", "parity"}
    exchanged = [after["chosen"] == before["rejected"] for before, after in zip(train, sft, strict=True)]
    assert abs(np.mean(exchanged) - 0.4) < 4 * (0.4 * 0.6 / 400) ** 0.5
    assert [row["prompt"] for row in sft] == [row["prompt"] for row in train]


def test_rows_are_read_as_preference_pairs(world: TinyWorld) -> None:
    rows = generate_pairs("train", SMALL["n_train"], seed=3)
    pairs = open_preferences(world.train)
    assert [(pair.id, pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (row["id"], (Message("user", text(row, "prompt")),), text(row, "chosen"), text(row, "rejected")) for row in rows
    ]
    assert len(open_preferences(world.test)) == SMALL["n_test"]


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_tokenizers_give_every_text_back(name: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers[name]
    texts = all_texts(generate_pairs("train", 2000, seed=9) + generate_pairs("test", 500, seed=9))
    texts += ["日本語 🦙 и ещё", "two  spaces\nand a line", "tail ▲ "]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts
    assert tokenizer.unk_token_id not in {index for row in ids for index in row}


def test_tokenizers_have_the_sizes_they_claim(tmp_path: Path) -> None:
    world = build_tiny_world(tmp_path / "world", **SMALL | {"n_train": 1000})
    teacher, student = (AutoTokenizer.from_pretrained(folder) for folder in (world.teacher, world.student))
    assert len(teacher) == 800 + 3
    assert len(student) == 600 + 256 + 5
    vocab = student.get_vocab()
    assert {f"<0x{byte:02X}>" for byte in range(256)} < set(vocab)
    assert max(len(piece) for piece in vocab if not re.fullmatch(r"<.*>", piece)) == 7


def test_the_library_loads_the_tokenizer_that_was_trained(
    world: TinyWorld, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    texts = [*all_texts(generate_pairs("train", 500, seed=5)), "don't  12 345\n\n x", "e\u0301", "DON'T <|im_end|>"]
    for name, folder in (("teacher", world.teacher), ("student", world.student)):
        saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert tokenizers[name](texts)["input_ids"] == [encoding.ids for encoding in saved.encode_batch(texts)]


def test_spans_of_many_shapes_are_common(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    rows = generate_pairs("train", 500, seed=4)
    spans = align_batch(
        [text(row, field) for row in rows for field in ("chosen", "rejected")],
        tokenizers["teacher"],
        tokenizers["student"],
    )
    shapes = Counter(
        (min(teacher, 2), min(student, 2))
        for item in spans
        for teacher, student in zip(
            np.bincount(item.teacher_span).tolist(), np.bincount(item.student_span).tolist(), strict=True
        )
    )
    shares = {shape: count / shapes.total() for shape, count in shapes.items()}
    assert set(shares) == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert min(shares.values()) > 0.02
    assert np.mean([item.n_spans for item in spans]) > 3


def test_chat_templates_open_and_close_turns_once(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    prompt = [Message("system", "Be brief."), Message("user", "Zoë asks: 🙂?")]
    for name, eos in (("teacher", "<|im_end|>"), ("student", "<|eot_id|>")):
        tokenizer = tokenizers[name]
        side = Side(tokenizer)
        assert side.end_of_turn_ids.tolist() == [tokenizer.eos_token_id] == [tokenizer.convert_tokens_to_ids(eos)]
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        ids = side.render_prompt(prompt).tolist()
        assert ids.count(tokenizer.eos_token_id) == 2
        assert tokenizer.decode(ids) == side.render_text(prompt)
        closed = side.render_text([*prompt, Message("assistant", "Yes.")], add_generation_prompt=False)
        assert closed.startswith(side.render_text(prompt) + "Yes." + eos)
    student, bos = tokenizers["student"], tokenizers["student"].bos_token_id
    assert Side(student).render_prompt(prompt).tolist().count(bos) == 1
    assert student("Hi")["input_ids"].count(bos) == 1
    assert tokenizers["teacher"].bos_token_id is None


def test_unigram_training_settles_on_one_result() -> None:
    texts = all_texts(generate_pairs("train", 200, seed=0))
    first, second = (train_unigram(texts).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_folders_load_and_generate(world: TinyWorld) -> None:
    for folder, family, tied, extra_rows in (
        (world.teacher, "qwen2", False, True),
        (world.student, "llama", True, False),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.model_type == family
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert (model.config.vocab_size > len(tokenizer)) == extra_rows
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        chat = [{"role": "user", "content": "Add 1 and 2."}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=3)
        assert output.shape[1] > inputs["input_ids"].shape[1]


def test_the_same_arguments_give_the_same_bytes(world: TinyWorld, tmp_path: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    again = contents(build_tiny_world(tmp_path / "again", seed=3, **SMALL).train.parent)
    assert again == contents(world.train.parent)
    other = contents(build_tiny_world(tmp_path / "other", seed=4, **SMALL).train.parent)
    same = {name for name in again if other[name] == again[name]}
    assert not same & {"train.jsonl", "test.jsonl", "teacher/model.safetensors", "student/model.safetensors"}


def test_a_finished_world_is_reused_and_a_stale_one_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "world"
    (tmp_path / ".world.partial").mkdir()
    (tmp_path / ".world.partial" / "left behind").touch()
    first = build_tiny_world(folder, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["world"]
    written = first.train.stat().st_mtime_ns
    assert build_tiny_world(folder, **SMALL) == first
    assert first.train.stat().st_mtime_ns == written
    build_tiny_world(folder, flip=0.5, **SMALL)
    assert first.train.stat().st_mtime_ns != written
    assert not (folder / "left behind").exists()


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match=r"something without a tiny_world\.json"):
        build_tiny_world(tmp_path, **SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


@pytest.mark.parametrize(("name", "value"), [("n_train", 0), ("n_test", -1), ("flip", 1.5), ("mixed", -0.5)])
def test_arguments_out_of_range_are_named(name: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{name}: found {value}"):
        build_tiny_world(tmp_path / "world", **SMALL | {name: value})
