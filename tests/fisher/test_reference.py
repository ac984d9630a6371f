"""The reference loops against results worked out by hand."""

import torch
from torch import nn

from cl_runner.fisher import reference
from cl_runner.models.model import Model
from cl_runner.streams.base import Scenario

from .cases import FEATURES, OUTPUTS, examples, model


def linear_case() -> tuple[Model, torch.Tensor, torch.Tensor]:
    """A model, the probabilities [N, K] of its active outputs and the features [N, D] of its examples."""
    subject = model("linear", Scenario.CLASS).eval()
    with torch.no_grad():
        output = subject(examples().images)
        return subject, output.logits[:, :5].softmax(1), output.features


def test_exact_of_a_linear_head_is_p_times_one_less_p_times_the_squared_features() -> None:
    subject, p, features = linear_case()
    found = reference.exact(subject, examples()).values
    expected = torch.zeros(OUTPUTS, FEATURES, dtype=torch.float64)
    expected[:5] = torch.einsum("nk,nd->kd", p * (1 - p), features**2) / len(p)
    torch.testing.assert_close(found["head.weight"], expected)
    torch.testing.assert_close(found["head.bias"][:5], (p * (1 - p)).mean(0))


def test_empirical_of_a_linear_head_is_the_squared_residual_times_the_squared_features() -> None:
    subject, p, features = linear_case()
    residual = nn.functional.one_hot(examples().labels, 5) - p
    found = reference.empirical(subject, examples()).values["head.weight"][:5]
    torch.testing.assert_close(found, torch.einsum("nk,nd->kd", residual**2, features**2) / len(p))


def test_batched_over_all_of_a_linear_head_is_the_square_of_the_mean() -> None:
    subject, p, features = linear_case()
    residual = nn.functional.one_hot(examples().labels, 5) - p
    found = reference.batched(subject, examples(), batch_size=11).values["head.weight"][:5]
    torch.testing.assert_close(found, (residual.T @ features / len(p)) ** 2)


def test_reversed_of_a_linear_head_is_the_residual_of_the_reversed_probabilities() -> None:
    subject, p, _ = linear_case()
    inverse = 1 / p
    residual = nn.functional.one_hot(examples().labels, 5) - inverse / inverse.sum(1, keepdim=True)
    found = reference.reversed(subject, examples()).values["head.bias"][:5]
    torch.testing.assert_close(found, (residual**2).mean(0))


def test_the_model_given_is_left_alone() -> None:
    subject = model().float()
    reference.exact(subject, examples())
    assert subject.training
    assert all(values.grad is None and values.dtype == torch.float32 for values in subject.parameters())
