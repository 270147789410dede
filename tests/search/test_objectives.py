"""The Fisher-weighted squared error of a matmul's output."""

import pytest
import torch

from tqdit.search.objectives import MatmulObjective, linear, scores, values, within_groups


def test_loss_is_the_weighted_squared_error() -> None:
    x, w = torch.randn(5, 4), torch.randn(3, 4)
    fisher = torch.rand(5, 3)
    objective = MatmulObjective.weighted(linear, x, w, fisher)
    x_hat = x + 0.1
    expected = fisher / fisher.mean() * (x_hat @ w.T - x @ w.T) ** 2
    assert torch.allclose(objective.loss(x_hat, w), expected, atol=1e-6)


@pytest.mark.parametrize("fisher", [torch.zeros(5, 3), torch.full((5, 3), float("nan"))])
def test_fisher_without_information_falls_back_to_the_plain_error(fisher: torch.Tensor) -> None:
    x, w = torch.randn(5, 4), torch.randn(3, 4)
    objective = MatmulObjective.weighted(linear, x, w, fisher)
    assert objective.weights is None
    assert torch.allclose(objective.loss(x + 1, w), (w.sum(1) ** 2).expand(5, 3), atol=1e-5)


def test_float_operands_have_no_loss() -> None:
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    for combine, b in ((scores, k), (values, torch.randn(2, 3, 8, 6))):
        assert not MatmulObjective.weighted(combine, q, b, torch.ones(1)).loss(q, b).any()


def test_scores_are_scaled_as_in_attention() -> None:
    q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 5, 16)
    expected = torch.einsum("bhqd,bhkd->bhqk", q, k) / 4
    assert torch.allclose(scores(q, k), expected, atol=1e-5)
    assert torch.allclose(scores(q[0], k[0]), expected[0], atol=1e-5)


def test_values_are_the_rows_of_v_weighted_by_their_probabilities() -> None:
    p, v = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 5, 16)
    assert torch.allclose(values(p, v), torch.einsum("bhqk,bhkd->bhqd", p, v), atol=1e-5)


def test_without_fisher_weights_every_error_counts_alike() -> None:
    x, w = torch.randn(5, 4), torch.randn(3, 4)
    objective = MatmulObjective.weighted(linear, x, w, None)
    assert objective.weights is None
    assert torch.equal(objective.target, linear(x, w))
    assert torch.allclose(objective.loss(x + 1, w), (w.sum(1) ** 2).expand(5, 3), atol=1e-5)


def test_a_group_without_fisher_weights_weighs_what_counts_alike() -> None:
    """Masked keys count in no group."""
    fisher, group = torch.rand(4, 2, 3, 5) + 1, torch.tensor([0, 0, 1, 1])
    fisher[2:] = 0
    counts = torch.ones(4, 1, 1, 5)
    counts[:, ..., 3:] = 0
    found = within_groups(fisher * counts, group, counts)
    assert torch.equal(found[2:], counts[2:].expand(2, 2, 3, 5))
    assert not found[..., 3:].any()
    assert torch.allclose(found[:2].mean(), torch.tensor(1.0))
    assert torch.equal(within_groups(fisher, group)[2:], torch.ones(2, 2, 3, 5))
