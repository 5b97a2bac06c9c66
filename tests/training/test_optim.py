from __future__ import annotations

import pytest
import torch

from apot_fat.models import create_model
from apot_fat.training import TrainConfig
from apot_fat.training.finite import FiniteGuard
from apot_fat.training.optim import RelativeAdamW, lr_factor, make_optimizer, make_schedule


def test_published_parameter_groups() -> None:
    model = create_model("resnet_20", bits=4)
    optimizer = make_optimizer(model, TrainConfig(arch="resnet_20", lr=0.04, weight_decay=5e-4))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups.values()][1:] == [
        (0.1, 1e-4, 20),
        (0.02, 1e-4, 40),
    ]
    assert (groups["weights"]["lr"], groups["weights"]["weight_decay"]) == (0.04, 5e-4)
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    (single,) = make_optimizer(model, TrainConfig(threshold_groups=False)).param_groups
    assert len(single["params"]) == len(list(model.parameters()))
    assert len(make_optimizer(create_model("res20", bits=32), TrainConfig(bit=32)).param_groups) == 1


def test_step_schedule_divides_all_groups_at_the_epochs() -> None:
    config = TrainConfig(lr=0.04, epochs=10, lr_steps=(3, 6))
    optimizer = make_optimizer(create_model("res20", bits=4), config)
    schedule = make_schedule(optimizer, config, steps_per_epoch=2)
    seen = []
    for _ in range(20):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    for epoch, factor in ((0, 1), (2, 1), (3, 0.1), (5, 0.1), (6, 0.01), (9, 0.01)):
        assert seen[2 * epoch] == pytest.approx([0.04 * factor, 0.1 * factor, 0.02 * factor])
        assert seen[2 * epoch + 1] == seen[2 * epoch]


def test_cosine_equals_pytorchs() -> None:
    config = TrainConfig(schedule="cosine", epochs=8, lr=0.3)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    for epoch in range(8):
        assert 0.3 * lr_factor(config, epoch, 1) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_onecycle_and_warm_up() -> None:
    config = TrainConfig(schedule="onecycle", epochs=100)
    assert lr_factor(config, 0, 10) == pytest.approx(1 / 25)
    assert lr_factor(config, 300, 10) == pytest.approx(1)
    assert lr_factor(config, 1000, 10) == pytest.approx(1e-4)
    warm = TrainConfig(warmup=4, epochs=100)
    assert [lr_factor(warm, step, 10) for step in (0, 9, 39, 40)] == [1 / 40, 0.25, 1, 1]


def test_schedules_in_steps() -> None:
    config = TrainConfig(lr_unit="steps", lr_steps=(30, 60), warmup=5, epochs=100)
    factors = [lr_factor(config, step, 10) for step in (0, 1, 4, 29, 30, 60)]
    assert factors == pytest.approx([0.2, 0.4, 1, 1, 0.1, 0.01])


def test_adams_steps_are_relative_to_each_parameter() -> None:
    config = TrainConfig(arch="res20", optimizer="adam", lr=1e-3, act_alpha_lr=0.01, momentum=0.8, epochs=10)
    model = create_model("res20", bits=4)
    optimizer = make_optimizer(model, config)
    assert isinstance(optimizer, RelativeAdamW)
    schedule = make_schedule(optimizer, config, 1)
    before = {p: p.detach().clone() for p in model.parameters()}
    optimizer.take_sizes()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    rates = {"weights": 1e-3, "act_alpha": 0.01, "weight_alpha": 0.02}
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == rates
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            start = before.pop(parameter)
            rate = rates[group["name"]] * max(start.square().mean().sqrt().item(), 1e-3)
            moved = (parameter - start).abs().max().item()
            assert moved == pytest.approx(rate, rel=0.02)  # Adam's first step is its rate
    assert not before
    schedule.step()  # one curve for all, whatever their sizes
    after = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert after == pytest.approx({name: rate * lr_factor(config, 1, 1) for name, rate in rates.items()})


def test_relative_adam_is_adam_with_a_rate_for_each_parameter_also_when_resumed() -> None:
    config = TrainConfig(arch="res20", optimizer="adam", lr=2e-3, act_alpha_lr=0.01, weight_decay=0.01)
    model, other, later = (create_model("res20", bits=4).double() for _ in range(3))
    other.load_state_dict(model.state_dict())
    ours, resumed = make_optimizer(model, config), make_optimizer(later, config)
    assert isinstance(ours, RelativeAdamW)
    ours.take_sizes()
    names = {id(p): name for name, p in model.named_parameters()}
    theirs = torch.optim.AdamW(
        [
            {"params": [other.get_parameter(names[id(p)])], "lr": g["lr"] * size, "weight_decay": g["weight_decay"]}
            for g in ours.param_groups
            for p, size in zip(g["params"], g["sizes"], strict=True)
        ],
        betas=(0.9, 0.999),
    )
    optimizer: torch.optim.Optimizer = ours
    trained = model
    for step in range(6):
        if step == 3:
            resumed.load_state_dict(ours.state_dict())
            later.load_state_dict(model.state_dict())
            optimizer, trained = resumed, later
        for mine, its in zip(trained.parameters(), other.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        optimizer.step()
        theirs.step()
    for mine, its in zip(later.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_first_step_that_is_left_out_leaves_no_momentum(name: str) -> None:
    config = TrainConfig(arch="res20", bit=4, optimizer=name)
    models = [create_model("res20", bits=4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, losses in zip(models, ([float("inf"), 1.0, 1.0], [1.0, 1.0]), strict=True):
        poison = [torch.full_like(parameter, 1e30) for parameter in model.parameters()]
        optimizer = make_optimizer(model, config)
        guard = FiniteGuard(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), allowed=1)
        for number, loss in enumerate(losses):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, loss)
            poison.clear()  # memory that the optimiser takes next
            guard.step(number, torch.tensor(loss))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
