"""The fake device behaves as CUDA does where devices meet, and computes what the CPU computes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fake_cuda import CPU, DEVICE, FakeCuda, fake_cuda

Operation = Callable[[Tensor, Tensor], object]


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, y: x + y,
        lambda x, y: x.add_(y),
        lambda x, y: y.add_(x),
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.stack([x, y[:3]]),
        lambda x, y: torch.bucketize(x, y),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: x.lerp(x, y.sum()),
        lambda x, y: y.sum().add_(x.sum()),
        lambda x, y: y + x.sum(),
        lambda x, y: F.linear(x[None], y[None]),
        lambda x, y: x.gather(0, y.long()),
        lambda x, y: x.index_select(0, y.long()),
        lambda x, y: y[x.long()],
        lambda x, y: x.index_put_((x.long(),), y),
        lambda x, y: torch._foreach_mul_([x], y.sum()),
    ],
)
def test_devices_do_not_mix(fake: FakeCuda, operation: Operation) -> None:
    operation(torch.ones(3), torch.ones(3))
    operation(torch.ones(3).cuda(), torch.ones(3, device="cuda"))
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
        operation(torch.ones(3, device="cuda:0"), torch.ones(3))


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, y: x * y.sum(),
        lambda x, y: x.clamp(-y.sum(), y.sum()),
        lambda x, y: torch.where(x > 0, x, y.sum()),
        lambda x, y: x.masked_fill(x > 0, y.sum()),
        lambda x, y: x[y.long()],
        lambda x, y: x[y > 0],
        lambda x, y: x.copy_(y),
        lambda x, y: x.fill_(y.sum()),
        lambda x, y: x.to(y),
        lambda x, y: x.cpu() + y,
        lambda x, y: x + y.to(x.device),
        lambda x, y: y.to(x) + x,
    ],
)
def test_where_they_may(fake: FakeCuda, operation: Operation) -> None:
    x, y = torch.tensor([0.0, 1.0, 2.0]), torch.ones(3)
    expected, found = operation(x.clone(), y), operation(x.to(DEVICE), y)
    assert isinstance(found, Tensor)
    assert torch.equal(found.cpu(), expected)  # type: ignore[arg-type]


def test_a_tensor_lies_where_its_memory_does(fake: FakeCuda) -> None:
    x = torch.arange(6.0, device="cuda")
    layer = nn.Linear(2, 2)
    weight, optimizer = layer.weight, torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, fused=True)
    layer.to("cuda")
    assert layer.weight is weight
    y = layer(x.view(3, 2))
    y.sum().backward()
    optimizer.step()
    assert weight.grad is not None
    of_device = [x, x[1:], x.view(2, 3).T, x.data, x > 2, x.double(), x.new_tensor([1]), torch.zeros_like(x), y]
    of_device += [weight, weight.grad, layer.state_dict()["bias"], optimizer.state[weight]["momentum_buffer"]]
    of_device += [*copy.deepcopy(layer).parameters(), copy.deepcopy(x), torch.where(x > 2, 1, 0), F.one_hot(x.long())]
    assert all(tensor.device == DEVICE and tensor.is_cuda and not tensor.is_cpu for tensor in of_device)
    assert all(type(tensor) in (Tensor, nn.Parameter) for tensor in of_device)
    of_cpu = [
        x.cpu(),
        x.to("cpu", torch.float64),
        torch.zeros(2),
        torch.empty(3).copy_(x[:3]),
        torch.tensor(x.tolist()),
    ]
    assert all(tensor.device == CPU and not tensor.is_cuda for tensor in of_cpu)
    assert x.get_device() == 0
    layer.cpu()
    assert weight.device == CPU
    buffer = io.BytesIO()
    torch.save(x, buffer)
    assert b"cuda:0" in buffer.getvalue()


def test_its_memory_cannot_be_read(fake: FakeCuda) -> None:
    x = torch.ones(2, device="cuda")
    for read in (Tensor.numpy, np.asarray):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            read(x)
    assert x.cpu().numpy().sum() == np.asarray(torch.ones(2)).sum()


class _Doubled(torch.autograd.Function):
    seen: torch.device

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _Doubled.seen = grad.device
        return 2 * grad


def test_gradients_that_python_defines_see_it_too(fake: FakeCuda) -> None:
    x = torch.ones(3, device="cuda", requires_grad=True)
    _Doubled.apply(x).sum().backward()
    assert _Doubled.seen == DEVICE


def test_autocast_casts(fake: FakeCuda) -> None:
    layer, x = nn.Linear(4, 4, device="cuda"), torch.ones(2, 4, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert (y.dtype, y.device) == (torch.bfloat16, DEVICE)
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("what", "operation"),
    [
        ("aten::_local_scalar_dense", lambda x: x.sum().item()),
        ("aten::_local_scalar_dense", lambda x: bool(x.sum() > 0)),
        ("aten::_local_scalar_dense", lambda x: float(x[0])),
        ("tolist", lambda x: x.tolist()),
        ("copy between devices", lambda x: x.cpu()),
        ("copy between devices", lambda x: torch.ones(2).cuda()),
        ("copy between devices", lambda x: torch.ones(3).copy_(x)),
        ("copy between devices", lambda x: x.__setitem__(0, 1.0)),  # a number is a tensor of the CPU first
        ("copy to the device", lambda x: torch.tensor(1.0, device="cuda")),
        ("copy to the device", lambda x: x.new_tensor([1.0])),
        ("indexing by a mask", lambda x: x[x > 0]),
        ("indexing with operands of the CPU", lambda x: x[torch.tensor([0, 1])]),
        ("aten::nonzero", lambda x: x.nonzero()),
        ("aten::bincount", lambda x: x.long().bincount()),
        ("aten::equal", lambda x: torch.equal(x, x)),
        ("synchronize", lambda x: torch.cuda.synchronize()),
    ],
)
def test_what_waits(fake: FakeCuda, what: str, operation: Callable[[Tensor], object]) -> None:
    x = torch.ones(3, device="cuda")
    assert fake.waits == []
    operation(x)
    assert fake.waits == [what]


def test_what_does_not_wait(fake: FakeCuda) -> None:
    x, indices = torch.ones(3, device="cuda"), torch.arange(3, device="cuda")
    host = torch.empty(3, pin_memory=True)
    host.copy_(x, non_blocking=True)
    x.to("cpu", non_blocking=True)
    x[:2] = 3.0
    x[indices] + torch.full((), 2.0, device="cuda") * 2
    assert fake.waits == []


def test_nothing_of_it_is_left() -> None:
    with fake_cuda():
        x = torch.ones(2, device="cuda")
        assert torch.cuda.is_available()
        assert x.device == DEVICE
    assert torch.cuda.is_available() == (torch.cuda.device_count() > 0)
    assert torch.zeros(1).device == CPU
    assert x.numpy().sum() == 2
