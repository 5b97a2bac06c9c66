from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from apot_fat.data import Batch
from apot_fat.models import create_model
from apot_fat.training.averaging import WeightAverage
from apot_fat.training.finite import FP16_SEARCH, FiniteGuard, NonFiniteError
from apot_fat.training.loop import Position, train_epoch


class Batches:
    """Ten batches of two images."""

    num_images, num_batches, steps, sizes = 20, 10, 10, Counter({2: 10})

    def set_epoch(self, epoch: int) -> None:
        pass

    def unmixed(self) -> Batches:
        return self

    def __iter__(self) -> Iterator[Batch]:
        for i in range(10):
            generator = torch.Generator().manual_seed(i)
            yield Batch(torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([0, 1]))


class Breaks(nn.Module):
    """NaN in the passes named."""

    def __init__(self, passes: set[int]) -> None:
        super().__init__()
        self.passes, self.count = passes, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * torch.nan if self.count in self.passes else x


def epoch(
    model: nn.Module,
    skip: int = 0,
    lines: list[str] | None = None,
    *,
    fused: bool = True,
    every: int = 1,
    fp16: bool = False,
    after_step: Callable[[int, Callable[[], Position]], None] | None = None,
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    guard = FiniteGuard(model, optimizer, scaler, skip, every=every)
    for _ in range(1 + FP16_SEARCH // 10 if fp16 else 1):
        log = None if lines is None else lines.append
        train_epoch(model, Batches(), optimizer, schedule, scaler, guard=guard, log=log, after_step=after_step)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("every", [1, 4])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_a_weight(fused: bool, every: int) -> None:
    model = create_model("resnet20", bits=3, num_classes=2)
    model.layer1[1].relu1 = Breaks({*range(4, 99)})  # type: ignore[index,union-attr]
    seen: list[int] = []
    with pytest.raises(NonFiniteError, match=r"epoch 0, step 3: .*loss nan; the first layer .*layer1.1.relu1"):
        epoch(model, fused=fused, every=every, after_step=lambda batches, _: seen.append(batches))
    assert len(seen) == 3  # it is found at the fourth step, both ways
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    quantized = create_model("resnet20", bits=3, num_classes=2)
    quantized.layer2[0].conv1.weight.data[0] = torch.inf  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteError, match=r"step 0: .*layer2.0.conv1, weight alpha 3, activation alpha 8"):
        epoch(quantized, every=every)


def test_found_late_the_weights_are_those_of_the_step_and_nothing_is_saved_meanwhile() -> None:
    weights: list[Tensor] = []

    def after_step(batches: int, position: Callable[[], Position]) -> None:
        weights.append(model.fc.weight.detach().clone())  # type: ignore[union-attr,operator]
        if batches == 4:
            with pytest.raises(NonFiniteError, match="step 2"):
                position()

    model = create_model("resnet20", bits=3, num_classes=2)
    model.layer1[1].relu1 = Breaks({3})  # type: ignore[index,union-attr]
    late = r"epoch 0, step 2: gradient not finite, loss nan; with the same weights .* on a later batch"
    with pytest.raises(NonFiniteError, match=late):
        epoch(model, every=100, after_step=after_step)
    assert len(weights) == 10  # seen at the epoch's end
    assert not torch.equal(weights[0], weights[1])
    assert all(torch.equal(weights[1], later) for later in weights[2:])


@pytest.mark.parametrize("every", [1, 2])
def test_a_few_such_steps_in_a_row_can_be_left_out(every: int) -> None:
    model = create_model("resnet20", bits=3, num_classes=2)
    model.layer1[1].relu1 = Breaks({3, 4, 8})  # type: ignore[index,union-attr]
    lines: list[str] = []
    epoch(model, skip=2, lines=lines, every=every)
    said = [line for line in lines if "left out" in line]
    if every == 1:
        assert said == [f"epoch 0, step {step}: gradient not finite (loss nan), step left out" for step in (2, 3, 7)]
    else:
        assert said == [
            "epoch 0, step 3: gradient not finite (loss nan), 2 steps left out by now",
            "epoch 0, step 7: gradient not finite (loss nan), step left out",
        ]
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())  # batch statistics too
    model.layer1[1].relu1 = Breaks({2, 3, 4})  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteError, match="step 3: gradient not finite, loss nan, 3 steps in a row"):
        epoch(model, skip=2, every=every)


def test_steps_left_out_count_in_no_average() -> None:
    model, plain = (create_model("resnet20", bits=3, num_classes=2) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    model.layer1[1].relu1 = Breaks({1, 5})  # type: ignore[index,union-attr]
    optimizer = torch.optim.SGD(model.parameters(), 0.01, fused=True)
    average = WeightAverage(model, 0.5, optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    guard = FiniteGuard(model, optimizer, scaler, 1, every=10)
    result = train_epoch(model, Batches(), optimizer, schedule, scaler, guard=guard)
    assert average.steps == 8
    assert result.total == 16
    assert result.loss == result.loss  # and not in the loss
    assert all(value.isfinite().all() for value in average.state_dict().values())
    initial = plain.state_dict()["fc.weight"]
    assert not torch.equal(average.state_dict()["fc.weight"], initial)


def test_fp16_that_never_becomes_finite_says_so() -> None:
    model = create_model("resnet20", bits=3, num_classes=2)
    model.layer1[1].relu1 = Breaks({*range(1000)})  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteError, match=f"gradient not finite, loss nan, {FP16_SEARCH + 1} steps in a row"):
        epoch(model, fp16=True)
    finite = create_model("resnet20", bits=3, num_classes=2)
    finite.layer1[1].relu1 = Breaks({*range(20)})  # type: ignore[index,union-attr]
    epoch(finite, fp16=True)


def test_with_fp16_too_no_step_follows_those_that_were_too_many() -> None:
    model = create_model("resnet20", bits=3, num_classes=2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.layer1[1].relu1 = Breaks({*range(FP16_SEARCH + 2)})  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteError, match=f"{FP16_SEARCH + 1} steps in a row"):
        epoch(model, fp16=True, every=100)  # seen at an epoch's end, some finite steps later
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
