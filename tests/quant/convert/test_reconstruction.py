from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apot_fat import Reconstruction, quantize, reconstruct
from apot_fat.quant.convert.batches import split_batches
from apot_fat.quant.convert.norms import align_batch_norms
from tests.quant.convert.conftest import Released

QUICK = Reconstruction(steps=40, joint_steps=40, batch_size=16)


class Block(nn.Module):
    """A residual block that overwrites its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = F.relu(x, inplace=True)
        return x + scale * self.conv2(F.relu(self.bn1(self.conv1(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.second = Block(8), Block(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.norm(self.stem(x)), scale=0.5))
        return self.head(F.relu(x).mean((2, 3)))


@pytest.fixture
def trained() -> Net:
    """A network whose batch norms have seen other inputs than those it is calibrated on."""
    torch.manual_seed(0)
    model = Net()
    for _ in range(20):
        model(torch.randn(32, 3, 8, 8) * 1.5 + 0.3)
    return model.eval()


def images(count: int = 96) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def error(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y, y_q = reference(x), model(x)
    return float((y_q - y).norm() / y.norm())


@pytest.mark.parametrize("method", ["apot", "pot", "uniform", "fat"])
def test_a_network_comes_closer_to_the_float_one_on_inputs_it_was_not_tuned_on(method: str, trained: Net) -> None:
    unseen = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(8))
    model, calibrated = copy.deepcopy(trained), copy.deepcopy(trained)
    quantize(calibrated, 2, method, calibration=images())
    done = quantize(model, 2, method, calibration=images(), reconstruct=QUICK)
    assert done.error is not None
    assert done.error == pytest.approx(error(model, trained, images()), rel=1e-4)
    assert error(model, trained, unseen) < 0.7 * error(calibrated, trained, unseen)


def test_the_same_seed_gives_the_same_bits_and_nothing_else_moves(trained: Net) -> None:
    trained.train()
    trained.norm.eval()
    trained.norm.momentum = 0.3
    trained.head.weight.requires_grad_(False)
    trained.stem.weight.grad = torch.ones_like(trained.stem.weight)
    states, parameters = [], dict(trained.named_parameters())
    before = copy.deepcopy(trained)
    torch.manual_seed(5)
    expected = torch.rand(3)
    for seed, memory in ((0, None), (0, 0), (1, None)):
        model = copy.deepcopy(trained)
        torch.manual_seed(5)
        quantize(model, 3, calibration=images(), reconstruct=replace(QUICK, seed=seed, memory=memory, drop=0.3))
        assert torch.equal(torch.rand(3), expected), "random numbers of the caller's"
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True)), "streamed"
    assert not all(torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values(), strict=True))
    for name, value in before.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name
    quantize(trained, 3, calibration=images(), reconstruct=QUICK)
    assert all(parameter is dict(trained.named_parameters())[name] for name, parameter in parameters.items())
    assert trained.training
    assert not trained.norm.training
    assert trained.norm.momentum == 0.3
    assert trained.norm.num_batches_tracked == before.norm.num_batches_tracked
    assert not trained.head.weight.requires_grad
    assert trained.stem.weight.grad is not None
    assert trained.first.conv1.weight.grad is None


def test_batch_norms_take_the_inputs_statistics_and_keep_the_function(trained: Net) -> None:
    model, parts = copy.deepcopy(trained), list(images().split(16))
    norms = align_batch_norms(model, trained, parts)
    assert norms == [model.norm, model.first.bn1, model.second.bn1]
    with torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for part in parts:
            model(part)
        for x in (images(), images() + 1):
            assert error(model.eval(), trained, x) < 0.02


def test_a_step_that_makes_a_block_worse_is_undone(trained: Net) -> None:
    model = copy.deepcopy(trained)
    wild = Reconstruction(steps=3, joint_steps=3, lr=1.0, joint_lr=1.0, batch_size=16)
    calibrated = copy.deepcopy(trained)
    quantize(calibrated, 8, calibration=images())
    quantize(model, 8, calibration=images(), reconstruct=wild)
    assert error(model, trained, images()) < 2 * error(calibrated, trained, images())
    assert torch.equal(model.first.conv1.weight, trained.first.conv1.weight)


def test_an_interruption_leaves_the_float_network(trained: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    y = trained(x)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("apot_fat.quant.convert.reconstruction._Tuner._tune_together", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(trained, 3, calibration=x, reconstruct=QUICK)
    assert type(trained.first.conv1) is nn.Conv2d
    assert torch.equal(trained(x), y)
    assert trained.first.conv1.weight.requires_grad


def test_inputs_come_as_people_have_them() -> None:
    parts = split_batches([torch.arange(10.0), torch.arange(10.0, 25.0)], 4)
    assert sorted(torch.cat(parts).tolist()) == list(range(25))
    assert {len(part) for part in parts} <= {3, 4}
    by_name = split_batches([{"x": torch.arange(6), "mask": torch.arange(6) * 2}], 3)
    assert all(torch.equal(part["mask"], part["x"] * 2) and len(part["x"]) == 3 for part in by_name)
    uneven = [torch.zeros(2, 3), torch.zeros(2, 4)]
    assert split_batches(uneven, 1) is uneven


class Decoder(nn.Module):
    """Takes its inputs by name; normalises tokens; gives two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(12, 2, 24, activation="gelu", batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(12, 20)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return {"logits": self.head(x), "hidden": x}


def test_a_transformer_that_takes_its_inputs_by_name() -> None:
    torch.manual_seed(0)
    model = Decoder()
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    batches = [{"tokens": torch.randint(20, (8, 6)), "mask": mask} for _ in range(6)]
    calibrated = copy.deepcopy(model)
    before = quantize(calibrated, 3, calibration=batches)
    after = quantize(model, 3, calibration=batches, reconstruct=replace(QUICK, steps=60, joint_steps=60))
    assert before.error is not None
    assert after.error is not None
    assert after.error < 0.8 * before.error


class Frozen(Net):
    """Its first block runs without gradients, and its output is no tensor."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = self.first(self.norm(self.stem(x)))
        return self.head(F.relu(self.second(x)).mean((2, 3))).argmax(1).tolist()


def test_a_part_that_runs_without_gradients_is_tuned_as_a_block() -> None:
    torch.manual_seed(0)
    model = Frozen().eval()
    before = copy.deepcopy(model)
    done = quantize(model, 3, calibration=images(), reconstruct=QUICK)
    assert done.error is None
    for block in ("first", "second"):
        assert not torch.equal(
            model.get_parameter(f"{block}.conv1.weight"), before.get_parameter(f"{block}.conv1.weight")
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": -1}, "steps -1: choose a number from 0"),
        ({"drop": 1.5}, "drop 1.5: choose a number from 0 to 1"),
        ({"batch_size": 0}, "batch_size 0: choose a number from 1"),
        ({"memory": -1}, "memory -1: choose a number from 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Reconstruction(**options)


def test_bad_requests_change_nothing(trained: Net) -> None:
    with pytest.raises(ValueError, match="reconstruct without calibration: give calibration"):
        quantize(trained, 3, reconstruct=True)
    with pytest.raises(ValueError, match="reconstruct 3: choose True, False"):
        quantize(trained, 3, calibration=images(), reconstruct=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no quantized layer: quantize it first"):
        reconstruct(trained, trained, images())
    assert type(trained.first.conv1) is nn.Conv2d


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "at_least"), [(4, 940), (3, 930), (2, 875)])
def test_the_released_network_is_reconstructed(bits: int, at_least: int, released: Released) -> None:
    model = released.model.to(memory_format=torch.channels_last)
    chosen = torch.randperm(len(released.images), generator=torch.Generator().manual_seed(0))[:1024]
    quantize(model, bits, calibration=released.images[chosen], reconstruct=True)
    correct = released.correct(model)
    print(f"apot, {bits} bits, reconstructed: {correct} of 1,017")
    assert correct >= at_least
