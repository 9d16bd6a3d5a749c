"""The arithmetic of a table, by hand, and the paper's figures."""

import json
import re
from itertools import combinations
from pathlib import Path
from statistics import fmean, median

import numpy as np
import pytest
from scipy import stats

from ctpd_nemo.errors import InputError
from ctpd_nemo.reproduce.config import TableConfig, known_tables, read_table
from ctpd_nemo.reproduce.scores import AVERAGE, BENCHMARKS, Cell, benchmark_scores, read_scores, tiny_scores
from ctpd_nemo.reproduce.significance import holm
from ctpd_nemo.reproduce.tables import as_values, difference_table, paper_cells, score_table, seed_table

TABLE = TableConfig(2, "Weights", "A", {"A": "ctpd", "B": "ctpd-random"})


def write_evaluation(run_dir: Path, seed: int, stage: str, **changed: float) -> None:
    folder = run_dir / f"seed-{seed}" / stage / "export"
    folder.mkdir(parents=True)
    shares = {"answer_accuracy": 0.5, "sampled_answer_accuracy": 0.3, "preference_accuracy_per_token": 0.8}
    preferences = {**shares, "preference_accuracy_by_fault": {"wrong": 0.6}, "chosen_logprob": -4.0, **changed}
    (folder / "evaluation.json").write_text(json.dumps({"preferences": preferences}))


def test_mean_and_standard_error_are_those_worked_out_by_hand() -> None:
    cell = Cell.of([1.0, 2.0, 6.0])
    # Deviations -2, -1, 3: squares 14, over 2 degrees of freedom 7, over 3 seeds 7/3.
    assert cell.mean == pytest.approx(3.0)
    assert cell.standard_error == pytest.approx((7 / 3) ** 0.5)
    assert cell.values == (1.0, 2.0, 6.0)
    assert Cell.of([5.0]).standard_error is None
    assert Cell.of([5.0], 0.7).standard_error == 0.7


def test_differences_are_taken_seed_by_seed() -> None:
    """Seeds differ by tens, rows by one or two: what seeds share must not be in the error."""
    difference = Cell.of([11.0, 32.0, 53.0]).less(Cell.of([10.0, 30.0, 50.0]))
    assert difference.values == (1.0, 2.0, 3.0)
    assert difference.mean == pytest.approx(2.0)
    assert difference.standard_error == pytest.approx((1 / 3) ** 0.5)


def test_a_table_of_a_tiny_world_has_every_score_in_its_cell(tmp_path: Path) -> None:
    for seed, (greedy, loglik) in enumerate([(0.50, -4.0), (0.60, -5.0)]):
        write_evaluation(tmp_path, seed, "ctpd", answer_accuracy=greedy, chosen_logprob=loglik)
        write_evaluation(tmp_path, seed, "ctpd-random", answer_accuracy=greedy - 0.1)
    rows = read_scores(tmp_path, TABLE, [0, 1], tiny_scores)
    # 50 and 60: mean 55, standard deviation 10 / sqrt 2, error 5. The average of 55, 30, 80 and 60 is 56.25.
    head, _, first, second = score_table(TABLE, rows, [0, 1], {}).as_markdown().splitlines()[2:]
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "Method", "answers, greedy", "answers, T = 1", "preference a token", "wrong answers", "Average", "log p(chosen)"
    ]  # fmt: skip
    assert first == ("| A | 55.00 ± 5.00 | 30.00 ± 0.00 | 80.00 ± 0.00 | 60.00 ± 0.00 | 56.25 ± 1.25 | -4.50 ± 0.50 |")
    assert second.startswith("| B | 45.00 ± 5.00 |")
    lines = seed_table(TABLE, rows, [0, 1]).as_markdown().splitlines()
    assert lines[4:6] == [
        "| A | 0 | 50.00 | 30.00 | 80.00 | 60.00 | 55.00 | -4.00 |",
        "| A | 1 | 60.00 | 30.00 | 80.00 | 60.00 | 57.50 | -5.00 |",
    ]
    values = as_values(rows, TABLE)
    assert values["rows"]["A"]["answers, greedy"]["values"] == (50.0, 60.0)
    assert values["differences"]["B"]["answers, greedy"]["mean"] == pytest.approx(-10.0)


def drawn(effects: list[float], n_seeds: int) -> tuple[TableConfig, dict[str, dict[str, Cell]]]:
    """Rows that are above the first one by an effect, as noisy as it is."""
    rng = np.random.default_rng(0)
    columns = ["one", "two", "three"]
    effects = [0.0, *effects]
    rows = {
        f"row {at}": {column: Cell.of(list(effect + rng.standard_normal(n_seeds))) for column in columns}
        for at, effect in enumerate(effects)
    }
    return TableConfig(1, "Drawn", "row 0", {name: name for name in rows}), rows


@pytest.mark.parametrize("n_seeds", [2, 3, 4, 20])
def test_every_difference_has_the_interval_and_p_value_of_a_paired_t_test(n_seeds: int) -> None:
    table, rows = drawn([0.0, 1.0, -3.0], n_seeds)
    printed = difference_table(table, rows)
    in_json = as_values(rows, table)["differences"]
    for name, *cells in printed.rows:
        for column, cell in zip(printed.columns[1:], cells, strict=True):
            mine, its = rows[name][column].values, rows["row 0"][column].values
            test = stats.ttest_rel(mine, its)
            lower, upper = test.confidence_interval(0.95)
            mean = np.mean(mine) - np.mean(its)
            assert cell.removesuffix("*").removesuffix("*").strip() == f"{mean:+.2f} [{lower:+.2f}, {upper:+.2f}]"
            assert ("*" in cell) == (lower > 0 or upper < 0)
            assert in_json[name][column]["interval"] == pytest.approx((lower, upper))
            assert in_json[name][column]["p_value"] == pytest.approx(test.pvalue)
    assert f"{n_seeds - 1} degree" in printed.title


def test_two_stars_survive_holms_correction_for_all_comparisons_of_the_table() -> None:
    table, rows = drawn([0.3, 0.9, 2.0, -4.0, 8.0], 5)
    cells = {name: cells for name, *cells in difference_table(table, rows).rows}
    p_values = {
        (name, at): stats.ttest_rel(rows[name][column].values, rows["row 0"][column].values).pvalue
        for name in cells
        for at, column in enumerate(["one", "two", "three"])
    }
    order = sorted(p_values, key=p_values.__getitem__)
    # Holm step down: as long as the next smallest is below 5 % of the comparisons that are left.
    survive = set()
    for rank, place in enumerate(order):
        if p_values[place] >= 0.05 / (len(order) - rank):
            break
        survive.add(place)
    stars = {place: cells[place[0]][place[1]].count("*") for place in p_values}
    assert {place for place, count in stars.items() if count == 2} == survive
    assert {place for place, count in stars.items() if count} == {place for place, p in p_values.items() if p < 0.05}
    assert set(stars.values()) == {0, 1, 2}, "the draw shows all three"


def test_holm_is_bonferroni_closed_over_all_subsets() -> None:
    """By definition: a comparison is one if it is in every set of comparisons that holds it, by Bonferroni."""
    rng = np.random.default_rng(1)
    for n in (1, 2, 5, 7):
        p_values = [float(p) for p in np.round(rng.beta(0.3, 2, n), 2)]
        closed = [
            max(
                min(1.0, size * min(p_values[at] for at in chosen))
                for size in range(1, n + 1)
                for chosen in combinations(range(n), size)
                if index in chosen
            )
            for index in range(n)
        ]
        assert holm(p_values) == pytest.approx(closed)


def test_one_seed_has_no_interval() -> None:
    table, rows = drawn([1.0], 1)
    printed = difference_table(table, rows)
    assert all(re.fullmatch(r"[+-]\d\.\d\d", cell) for _, *cells in printed.rows for cell in cells)
    assert "interval" not in printed.title
    assert as_values(rows, table)["differences"]["row 1"]["one"]["p_value"] is None


def test_seeds_that_do_not_differ_at_all_are_no_division_by_zero() -> None:
    same = {"one": Cell.of([1.0, 2.0, 3.0])}
    table = TableConfig(1, "Same", "A", {"A": "a", "B": "b", "C": "c"})
    (_, b), (_, c) = difference_table(table, {"A": same, "B": same, "C": {"one": Cell.of([3.0, 4.0, 5.0])}}).rows
    assert (b, c) == ("+0.00 [+0.00, +0.00]", "+2.00 [+2.00, +2.00] **")


def test_an_evaluation_that_is_none_is_named(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 0, "ctpd")
    path = tmp_path / "seed-0/ctpd/export/evaluation.json"
    path.write_text('{"preferences": {}}')
    with pytest.raises(InputError, match=r"evaluation\.json: found what no evaluation wrote"):
        read_scores(tmp_path, TABLE, [0], tiny_scores)


def test_the_average_waits_for_all_six_benchmarks() -> None:
    tasks = {name: {"value": 0.1 * (at + 1), "standard_error": 0.01} for at, name in enumerate(BENCHMARKS.values())}
    scores, errors = benchmark_scores({"tasks": tasks})
    assert list(scores) == [*BENCHMARKS, AVERAGE]
    assert scores[AVERAGE] == pytest.approx(35.0)
    assert errors["ARC"] == pytest.approx(1.0)
    del tasks["mmlu"]
    assert AVERAGE not in benchmark_scores({"tasks": tasks})[0]


@pytest.mark.parametrize("number", known_tables())
def test_the_papers_averages_are_those_of_its_scores(number: int) -> None:
    """A figure that was copied wrong would show: the paper rounds to two digits, and miscounts one row of all."""
    table = read_table(number)
    assert table.against in table.rows
    for rows in table.paper.values():
        for name, values in rows.items():
            *cells, average = paper_cells(values).values()
            mean = fmean(cell.mean for cell in cells)
            assert mean == pytest.approx(67.467 if average.mean == 67.42 else average.mean, abs=0.011), name


# Questions of the test sets that the harness asks.
N_QUESTIONS = {"HellaSwag": 10042, "ARC": 1172, "MMLU": 14042, "TruthfulQA": 817, "WinoGrande": 1267, "GSM8K": 1319}


def test_four_columns_of_the_papers_errors_are_a_tenth_of_binomial_ones() -> None:
    """What docs/tables.md says of them, and of the gaps of which they are the errors."""
    for experiment, rows in read_table(1).paper.items():
        cells = {name: paper_cells(values) for name, values in rows.items()}
        binomial = {
            name: {title: (row[title].mean * (100 - row[title].mean) / n) ** 0.5 for title, n in N_QUESTIONS.items()}
            for name, row in cells.items()
        }
        ratios = {
            title: median((cells[name][title].standard_error or 0) / binomial[name][title] for name in cells)
            for title in N_QUESTIONS
        }
        tenth = {title for title, ratio in ratios.items() if ratio < 0.12}
        assert all(ratio > 0.85 for title, ratio in ratios.items() if title not in tenth), ratios
        assert tenth == {"ARC", "TruthfulQA", "WinoGrande"} | ({"GSM8K"} if "14b" in experiment else set())
        gap = cells["CTPD"][AVERAGE].mean - cells["TIS-DPO"][AVERAGE].mean
        error = sum(binomial[name][title] ** 2 for name in ("CTPD", "TIS-DPO") for title in N_QUESTIONS) ** 0.5 / 6
        assert (round(gap, 2), round(gap / error, 1)) == ((1.26, 1.8) if "14b" in experiment else (0.66, 1.0))


def test_the_papers_figures_stand_beside_ours_in_brackets() -> None:
    table = read_table(3)
    paper = table.paper["paper_qwen2.5-14b_to_llama3.1-8b"]
    ours = {"Origin": {"ARC": Cell.of([60.0], 1.4)}, "Using student": {}}
    text = score_table(table, ours, [0], paper).as_markdown()
    assert "60.00 ± 1.40 (63.92)" in text
    assert "- (59.76)" in text


def test_some_rows_of_a_table_may_be_asked_for() -> None:
    table = read_table(2, ["Shuffled", "Origin"])
    assert table.rows == {"Origin": "ctpd", "Shuffled": "ctpd-shuffled"}, "in the order of the table"
    assert {name for reported in table.paper.values() for name in reported} == {"Origin"}
    with pytest.raises(InputError, match=r"rows: found 'Original'; expected rows of table 2: Origin, Random"):
        read_table(2, ["Original"])
    with pytest.raises(InputError, match="rows: found none"):
        read_table(2, [])
