"""Credit against the paper's equations in Python's own exact numbers, and against the gradient it stands for."""

import math
import random
from fractions import Fraction

import pytest
import torch

from ctpd_nemo.losses.credit import CREDIT_RULES, clamped_chunks, token_advantages

RULES = pytest.mark.parametrize("rule", CREDIT_RULES)


def drawn(seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of sampled tokens, their chunks (some in none), and the teacher's of each chunk."""
    draw = random.Random(seed)
    sizes = [draw.choice([1, 1, 1, 2, 3, 8]) for _ in range(draw.randint(1, 12))]
    chunk = [number for number, size in enumerate(sizes) for _ in range(size)] + [-1] * draw.randint(0, 3)
    student = [-draw.expovariate(1.0) * scale for _ in chunk]
    teacher = [-draw.expovariate(1.0) * scale * size for size in sizes]
    as_float = {"dtype": torch.float32}
    return torch.tensor(student, **as_float), torch.tensor(chunk), torch.tensor(teacher, **as_float)


def by_the_equations(student, chunk, teacher, limit: float) -> list[float]:
    """Equations 8 and 9 in exact fractions, with the chunk's difference clamped."""
    logps = [Fraction(value) for value in student.tolist()]
    placed = list(zip(logps, chunk.tolist(), strict=True))
    sums = [sum((logp for logp, k in placed if k == number), Fraction()) for number in range(len(teacher))]
    found = []
    for logp, k in placed:
        if k < 0:
            found.append(0.0)
            continue
        target = sums[k] + max(-Fraction(limit), min(Fraction(limit), Fraction(float(teacher[k])) - sums[k]))
        found.append(float(target / sums[k] * logp - logp))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_semantic_credit_is_that_of_equations_8_and_9(seed: int) -> None:
    student, chunk, teacher = drawn(seed)
    found = token_advantages(student, chunk, teacher)
    assert found.dtype == torch.float32
    # The smoothing moves a share by its size relative to the chunk's log-prob.
    assert found.tolist() == pytest.approx(by_the_equations(student, chunk, teacher, 10.0), abs=1e-3, rel=1e-4)


@pytest.mark.parametrize("rule", ["semantic", "uniform"])
@pytest.mark.parametrize("seed", range(20))
def test_advantages_of_a_chunk_sum_to_its_clamped_difference(rule: str, seed: int) -> None:
    student, chunk, teacher = drawn(seed, scale=0.3 + seed)
    advantages = token_advantages(student, chunk, teacher, rule, limit=5.0).double()
    for number in range(len(teacher)):
        mine = chunk == number
        difference = float(teacher[number].double() - student[mine].double().sum())
        assert float(advantages[mine].sum()) == pytest.approx(max(-5.0, min(5.0, difference)), abs=1e-6)
        assert (advantages[mine].abs() <= abs(difference) + 1e-6).all()


@RULES
def test_chunks_of_one_token_are_the_plain_difference_under_every_rule(rule: str) -> None:
    student, teacher = torch.tensor([-0.5, -2.0, -0.0, -7.25]), torch.tensor([-1.0, -0.25, -3.0, -7.25])
    assert token_advantages(student, torch.arange(4), teacher, rule).tolist() == [-0.5, 1.75, -3.0, 0.0]


@RULES
def test_a_teacher_that_is_the_student_gives_nothing(rule: str) -> None:
    student, chunk, _ = drawn(3)
    size = int(chunk.max()) + 1
    sums = torch.zeros(size, dtype=torch.float64).index_add(0, chunk[chunk >= 0], student[chunk >= 0].double())
    # The teacher's sum is fp32: what is left is the rounding of that one number.
    largest = float(sums.abs().max())
    assert token_advantages(student, chunk, sums.float(), rule).abs().max() <= largest * 2**-24
    assert token_advantages(student[:1], torch.tensor([0]), student[:1], rule).tolist() == [0.0]


def test_certain_tokens_share_equally_and_nearly_certain_ones_nearly() -> None:
    chunk, teacher = torch.zeros(2, dtype=torch.int64), torch.tensor([-6.0])
    assert token_advantages(torch.tensor([0.0, 0.0]), chunk, teacher).tolist() == [-3.0, -3.0]
    shares = []
    for tiny in (1e-9, 1e-6, 1e-3, 1.0):
        advantages = token_advantages(torch.tensor([-tiny, 0.0]), chunk, teacher)
        shares.append(float(advantages[0] / (-6.0 + tiny)))
    assert shares == sorted(shares)
    assert float(shares[0]) == pytest.approx(0.5, abs=1e-3)
    assert float(shares[-1]) == pytest.approx(1.0, abs=1e-5)


@RULES
def test_an_impossible_chunk_costs_the_limit_and_is_counted(rule: str) -> None:
    student, chunk = torch.tensor([-1.0, -1.0, -0.5]), torch.tensor([0, 0, 1])
    teacher = torch.tensor([-math.inf, -0.25])
    found = token_advantages(student, chunk, teacher, rule, limit=4.0)
    assert found.tolist() == pytest.approx([-4.0, -4.0, 0.25] if rule == "chunk" else [-2.0, -2.0, 0.25])
    assert clamped_chunks(student, chunk, teacher, limit=4.0).tolist() == [True, False]


@RULES
def test_tokens_in_no_chunk_have_no_advantage_and_change_no_other(rule: str) -> None:
    student, chunk, teacher = drawn(5)
    more = torch.cat([torch.tensor([-9.0, -1e4]), student])
    found = token_advantages(more, torch.cat([torch.tensor([-1, -1]), chunk]), teacher, rule)
    assert found[:2].tolist() == [0.0, 0.0]
    assert torch.equal(found[2:], token_advantages(student, chunk, teacher, rule))


@RULES
def test_no_tokens_and_no_chunks_give_no_advantages(rule: str) -> None:
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert token_advantages(empty, none, empty, rule).shape == (0,)
    assert token_advantages(torch.tensor([-1.0]), torch.tensor([-1]), empty, rule).tolist() == [0.0]


@RULES
def test_advantages_carry_no_gradient(rule: str) -> None:
    student, chunk, teacher = drawn(7)
    assert not token_advantages(student.requires_grad_(), chunk, teacher.requires_grad_(), rule).requires_grad


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match="semantic, chunk, uniform"):
        token_advantages(torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1), "other")  # type: ignore[arg-type]


def test_credit_by_chunk_is_the_gradient_of_the_reverse_kl_of_two_token_chunks() -> None:
    """Four texts of two tokens each, all sampled: the expected gradient is that of the KL to the teacher."""
    torch.manual_seed(0)
    first = torch.randn(2, dtype=torch.float64, requires_grad=True)
    second = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(torch.randn(4, dtype=torch.float64), 0)

    def logps() -> torch.Tensor:
        return torch.stack(
            [torch.stack([first.log_softmax(0)[a], second.log_softmax(1)[a, b]]) for a in range(2) for b in range(2)]
        )

    text = logps().sum(1)
    reverse_kl = (text.exp() * (text - teacher)).sum()
    expected = torch.autograd.grad(reverse_kl, [first, second])
    token = logps()
    advantages = token_advantages(
        token.flatten(), torch.arange(4).repeat_interleave(2), teacher, rule="chunk", limit=1e9
    ).reshape(4, 2)
    probability = token.detach().sum(1).exp()
    loss = -(probability[:, None] * advantages.double() * token).sum()
    found = torch.autograd.grad(loss, [first, second])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
