"""Parts of dual-space distillation with known values; the whole is compared in ``tests/distributed``."""

import torch
import torch.nn.functional as F

from ctpd_nemo.losses.dskd import Projectors, cross_attention, divergence, unit_deviation
from tests.rounding import of_sum


def test_divergence_is_the_kl_of_torch_at_the_temperature() -> None:
    torch.manual_seed(0)
    target, logits = torch.randn(2, 5, 9, dtype=torch.double)
    expected = F.kl_div((logits / 2).log_softmax(-1), (target / 2).softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(divergence(target, logits, 2.0), expected)


def test_attention_that_is_sure_gives_each_side_the_other_ones_values() -> None:
    """Keys that are their queries, far apart: token i of one side is token order[i] of the other."""
    order = torch.tensor([2, 0, 1])
    key = 100 * torch.eye(3, 8)
    student_value, teacher_value = torch.randn(3, 4), torch.randn(3, 6)
    t2s, s2t = cross_attention(key[order], key, student_value, teacher_value)
    torch.testing.assert_close(t2s, teacher_value[order])
    torch.testing.assert_close(s2t[order], student_value)


def test_scores_are_scaled_by_the_root_of_the_width() -> None:
    query, key = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 0]])
    t2s, _ = cross_attention(query, key, torch.ones(1, 1), torch.tensor([[1.0], [0.0]]))
    torch.testing.assert_close(t2s, torch.sigmoid(torch.tensor([[1.0]])))


def test_deviation_is_one_over_all_values_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    values = 3 + 5 * torch.randn(50, 20)
    found = unit_deviation(values)
    # The deviation is the root of a sum of squares.
    near = {"rtol": of_sum(values.numel()), "atol": 0}
    torch.testing.assert_close(found.double().std(), torch.tensor(1.0, dtype=torch.double), **near)
    torch.testing.assert_close(found.double() * values.double().std(), values.double(), **near)
    assert unit_deviation(values[:0]).shape == (0, 20)


def test_projectors_are_drawn_from_the_seed_alone() -> None:
    drawn = []
    for before in (1, 2):
        torch.manual_seed(before)
        drawn.append(Projectors(8, 12, seed=7, dtype=torch.float32).state_dict())
    other = Projectors(8, 12, seed=8, dtype=torch.float32).state_dict()
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], other[name]) for name in other)
    shapes = {name: tuple(tensor.shape) for name, tensor in other.items() if name.endswith("weight")}
    assert shapes == {"query.weight": (24, 16), "s2t.weight": (12, 8), "t2s.weight": (8, 12)}
