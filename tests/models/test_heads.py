import math

import pytest
import torch
from torch import nn

from cl_runner.models.heads import draw, keep_unreached_rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(init: str, features: int = 100, outputs: int = 50, seed: int = 0) -> nn.Linear:
    linear = nn.Linear(features, outputs)
    draw(linear, init, generator(seed))
    return linear


def test_torch_is_uniform_up_to_one_over_the_root_of_the_inputs_bias_too():
    linear = drawn("torch")
    for values in linear.parameters():
        assert 0.09 < values.abs().max() <= 0.1
    assert linear.weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)


def test_xavier_is_uniform_up_to_glorots_bound_with_zero_bias():
    linear = drawn("xavier")
    bound = math.sqrt(6 / 150)
    assert 0.98 * bound < linear.weight.abs().max() <= bound
    assert not linear.bias.any()


def test_a_truncated_normal_stays_within_two_standard_deviations_with_zero_bias():
    linear = drawn("truncated_normal")
    assert 0.035 < linear.weight.abs().max() <= 0.04
    assert linear.weight.std().item() == pytest.approx(0.88 * 0.02, rel=0.05)  # of a normal cut at two
    assert not linear.bias.any()


@pytest.mark.parametrize("init", ["torch", "xavier", "truncated_normal"])
def test_a_seed_gives_the_same_rows_and_another_seed_others(init):
    assert torch.equal(drawn(init).weight, drawn(init).weight)
    assert not torch.equal(drawn(init).weight, drawn(init, seed=1).weight)


def test_only_the_chosen_rows_are_drawn():
    linear = nn.Linear(4, 3)
    before = linear.weight.detach().clone(), linear.bias.detach().clone()
    draw(linear, "torch", generator(), torch.tensor([False, True, False]))
    for values, old in zip((linear.weight, linear.bias), before, strict=True):
        assert torch.equal(values[[0, 2]], old[[0, 2]])
        assert not torch.equal(values[1], old[1])


def test_a_head_without_a_bias_can_be_drawn():
    linear = nn.Linear(4, 3, bias=False)
    draw(linear, "xavier", generator())
    assert linear.bias is None


def step(head: nn.Linear, optimizer: torch.optim.Optimizer, rows: list[int]) -> None:
    """One step on a loss of only `rows`."""
    optimizer.zero_grad()
    head(torch.ones(2, head.in_features))[:, rows].square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
def test_a_row_without_a_gradient_does_not_decay_and_a_reached_row_learns_as_ever(make):
    head, free = nn.Linear(4, 3), nn.Linear(4, 3)
    free.load_state_dict(head.state_dict())
    before = head.weight.detach().clone()
    held, loose = (make(layer.parameters(), lr=0.1, weight_decay=0.1) for layer in (head, free))
    keep_unreached_rows(head, held)
    for _ in range(3):
        step(head, held, [1])
        step(free, loose, [1])
    assert torch.equal(head.weight[[0, 2]], before[[0, 2]])
    assert not torch.equal(free.weight[[0, 2]], before[[0, 2]])
    assert torch.equal(head.weight[1], free.weight[1])
    assert torch.equal(head.bias[1], free.bias[1])


def test_a_row_once_reached_decays_from_then_on():
    head = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, weight_decay=0.1)
    keep_unreached_rows(head, optimizer)
    step(head, optimizer, [0, 1])
    before = head.weight[0].detach().clone()
    step(head, optimizer, [1])
    torch.testing.assert_close(head.weight[0], before * (1 - 0.1 * 0.1))


def test_a_frozen_bias_is_no_trouble():
    head = nn.Linear(4, 2)
    head.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([head.weight], lr=0.1, weight_decay=0.1)
    keep_unreached_rows(head, optimizer)
    before = head.bias.clone()
    step(head, optimizer, [0])
    assert torch.equal(head.bias, before)
