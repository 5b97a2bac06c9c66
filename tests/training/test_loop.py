from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from apot_fat.data import Batch
from apot_fat.models import create_model
from apot_fat.training.loop import NonFiniteError, train_epoch


class Batches:
    """Ten batches of two images."""

    num_images, num_batches = 20, 10

    def __len__(self) -> int:
        return 10

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


def epoch(model: nn.Module, skip: int = 0, lines: list[str] | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    log = None if lines is None else lines.append
    train_epoch(model, Batches(), optimizer, schedule, scaler, skip_nonfinite=skip, log=log)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_a_weight() -> None:
    model = create_model("resnet20", bits=3, num_classes=2)
    breaks = Breaks({4, 5})
    model.layer1[1].relu1 = breaks  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteError, match=r"epoch 0, step 3: .*loss nan; the first layer .*layer1.1.relu1"):
        epoch(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    quantized = create_model("resnet20", bits=3, num_classes=2)
    quantized.layer2[0].conv1.weight.data[0] = torch.inf  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteError, match=r"layer2.0.conv1, weight alpha 3, activation alpha 8"):
        epoch(quantized)


def test_a_few_such_steps_in_a_row_can_be_left_out() -> None:
    model = create_model("resnet20", bits=3, num_classes=2)
    model.layer1[1].relu1 = Breaks({2, 3, 6})  # type: ignore[index,union-attr]
    lines: list[str] = []
    epoch(model, skip=2, lines=lines)
    assert [line for line in lines if "left out" in line] == [
        f"epoch 0, step {step}: gradient not finite (loss nan), step left out" for step in (1, 2, 5)
    ]
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())  # batch statistics too
    model.layer1[1].relu1 = Breaks({2, 3, 4})  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteError, match="step 3"):
        epoch(model, skip=2)
