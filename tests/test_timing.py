from __future__ import annotations

import torch
from torch import nn

from apot_fat.timing import MIN_ROUNDS, forward_backward, median_milliseconds, passes_over, training_step

CPU = torch.device("cpu")


def test_each_work_is_called_warm_and_then_in_every_round() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    medians = median_milliseconds(works, CPU, seconds=0, calls=3)
    assert list(medians) == ["a", "b"]
    assert all(0 <= value < 100 for value in medians.values())
    warm_up = calls[: -2 * 3 * MIN_ROUNDS]
    assert warm_up == sorted(warm_up)
    assert set(warm_up) == {"a", "b"}
    assert calls[len(warm_up) :] == ["a", "a", "a", "b", "b", "b"] * MIN_ROUNDS


def test_passes_count_what_backward_reads() -> None:
    x = torch.rand(64, requires_grad=True)
    assert passes_over(x, lambda: 2 * x) == 4  # keeps nothing
    assert passes_over(x, lambda: x.relu()) == 5  # its result
    assert passes_over(x, lambda: x * x) == 5  # x, once


def test_gradients_do_not_add_up() -> None:
    x = torch.ones(3, requires_grad=True)
    work = forward_backward(lambda: 2 * x, torch.ones(3), (x,))
    work()
    work()
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]


def test_a_training_step_learns_its_batch() -> None:
    network = nn.Linear(4, 3)
    x, labels = torch.randn(6, 4), torch.arange(6) % 3
    before = nn.functional.cross_entropy(network(x), labels).item()
    step = training_step(network, torch.optim.SGD(network.parameters(), 0.1), x, labels)
    for _ in range(20):
        step()
    assert nn.functional.cross_entropy(network(x), labels).item() < before
