"""A CUDA device that is not there: tensors in the CPU's memory that say they lie on ``cuda:0`` and are treated so.

The mark is on a tensor's storage: views, ``.data``, parameters and copies lie where their memory does, and every tensor
stays a plain one, on which autograd, optimisers and autocast compute as on the CPU, to the bit. Between program and
PyTorch sit two modes. The upper one sees what Python calls: it answers ``x.device``, makes what is asked for on
``cuda`` there, and refuses ``.numpy()``. The lower one sees every ATen operator, those of backward too: it refuses to
mix devices where CUDA does, notes what waits for the device, and marks what is computed.

It does not show whether CUDA has a kernel for an operator, how that rounds and how fast it is; nor memory, streams,
several devices, compiled code, or other threads than the one it was made in. Autocast has the CPU's list of operators,
random numbers are the CPU's, and the gradient of a copy to the device stays there.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE, CPU = torch.device("cuda", 0), torch.device("cpu")
PACKAGE = "apot_fat"
_MARK = "lies_on_fake_cuda"

aten: Any = torch.ops.aten
# A CPU tensor of no dimensions may be the other operand of a pointwise operator of two, and an operand of these; CUDA
# takes it in a few others of three.
_TAKE_SCALARS = {
    aten.where.self,
    aten.clamp.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.fill_.Tensor,
}
_COPIES = {aten.copy_.default, aten._foreach_copy_.default}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class FakeCuda:
    """The device, in force within ``fake_cuda``.

    ``waits``: what made the program wait for the device so far: an operator, and the package's line that called it.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self._calls: list[bool] = []  # of each Python call under way whether it is one of the device
        self._target: torch.device | None = None  # where the copy under way goes

    def lies_here(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the device."""
        with torch._C.DisableTorchFunction():
            return _is_marked(tensor)

    def put(self, value: Any) -> Any:
        """Say of all tensors in a value that they lie on the device."""
        with torch._C.DisableTorchFunction():
            for tensor in _tensors(value):
                setattr(tensor.untyped_storage(), _MARK, True)
        return value

    def wait(self, what: str) -> None:
        """Note that the program waits for the device."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and not _is_ours(frame.f_globals.get("__name__", "")):
            frame = frame.f_back
        self.waits.append(f"{what} at {frame.f_globals['__name__']}:{frame.f_lineno}" if frame else what)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What Python calls: a function or method of PyTorch."""
        here = any(map(_is_marked, _tensors(args, *kwargs.values())))
        if func in _ANSWERS:
            return _ANSWERS[func](self, here, *args, **kwargs)
        kwargs.pop("pin_memory", None)  # a driver's business
        device = torch.device(kwargs.pop("device")) if kwargs.get("device") is not None else None
        if device is not None:
            here = device.type == "cuda"
            kwargs["device"] = CPU if here else device
        self._calls.append(here)
        try:
            result = func(*args, **kwargs)
        finally:
            self._calls.pop()
        if not here or (device is None and func not in _MAKE_ANOTHER):
            return result
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            self.wait("copy to the device")
        return self.put(result)

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What PyTorch computes: an ATen operator, below autograd."""
        with torch._C.DisableTorchFunction():
            tensors = _tensors(args, *kwargs.values())
            here = [_is_marked(tensor) for tensor in tensors]
            if any(here):
                if not all(here):
                    self._check(func, args, tensors, here)
                self._note_waits(func, args, kwargs, here)
            result = func(*args, **kwargs)
        if func is aten._to_copy.default and self._target is not None:
            is_of_device = self._target == DEVICE
        elif func in _COPIES:
            is_of_device = False  # nothing new
        else:  # what is made of nothing lies where the call under way does
            is_of_device = any(here) if tensors else self._calls[-1:] == [True]
        return self.put(result) if is_of_device else result

    def _check(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor], here: list[bool]) -> None:
        strangers = [tensor for tensor, lies_here in zip(tensors, here, strict=True) if not lies_here]
        if func in _COPIES:
            return
        if func in _INDEXING and here[0]:
            strangers = [value for value in _tensors(args[2:]) if not _is_marked(value)]
            takes_scalar = True
        else:
            takes_scalar = (torch.Tag.pointwise in func.tags and len(tensors) == 2) or func in _TAKE_SCALARS
        is_written = func._schema.is_mutable and not here[0]
        if is_written or not takes_scalar or any(stranger.dim() for stranger in strangers):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(operands of {func}: {', '.join('cuda:0' if lies_here else 'cpu' for lies_here in here)})"
            )

    def _note_waits(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], here: list[bool]) -> None:
        if func in _INDEXING:
            if any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1])):
                self.wait("indexing by a mask")
            elif not all(here):
                self.wait("indexing with operands of the CPU")
        elif func in _COPIES:
            if not all(here) and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                self.wait("copy between devices")
        elif _reads_results(func):
            self.wait(func.name())

    def _device(self, here: bool, tensor: Tensor) -> torch.device:
        return DEVICE if here else tensor.device

    def _to(self, here: bool, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy, here = kwargs.pop("copy", False), self.lies_here(tensor)
        others = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if others:
            args, kwargs = (DEVICE if self.lies_here(others[0]) else others[0].device, others[0].dtype), {}
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        device = DEVICE if device is not None and device.type == "cuda" else device
        moves = device is not None and device != self._device(here, tensor)
        if moves and not non_blocking:
            self.wait("copy between devices")
        place = CPU if device == DEVICE else device or tensor.device
        layout = {} if memory_format is None else {"memory_format": memory_format}
        self._target = device if moves else None
        try:
            return tensor.to(place, dtype or tensor.dtype, non_blocking, copy or moves, **layout)
        finally:
            self._target = None

    def _numpy(self, here: bool, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if here:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
                "first."
            )
        return tensor.numpy(*args, **kwargs)

    def _array(self, here: bool, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._numpy(here, tensor) if here else tensor.__array__(*args, **kwargs)

    def _tolist(self, here: bool, tensor: Tensor) -> Any:
        if here:
            self.wait("tolist")
        return tensor.tolist()


_Property: Any = Tensor
_ANSWERS: dict[Any, Callable[..., Any]] = {
    _Property.device.__get__: FakeCuda._device,
    _Property.is_cuda.__get__: lambda fake, here, tensor: here,
    _Property.is_cpu.__get__: lambda fake, here, tensor: not here and tensor.is_cpu,
    Tensor.get_device: lambda fake, here, tensor: 0 if here else tensor.get_device(),
    Tensor.to: FakeCuda._to,
    Tensor.cpu: lambda fake, here, tensor, **options: fake._to(here, tensor, CPU, **options),
    Tensor.cuda: lambda fake, here, tensor, device=None, **options: fake._to(here, tensor, DEVICE, **options),
    Tensor.numpy: FakeCuda._numpy,
    Tensor.__array__: FakeCuda._array,
    Tensor.tolist: FakeCuda._tolist,
    Tensor.pin_memory: lambda fake, here, tensor: tensor,
}
_MAKE_ANOTHER = {Tensor.__deepcopy__, Tensor.new_tensor}  # not by operators on their operand


class _Upper(TorchFunctionMode):
    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.fake.call(func, args, dict(kwargs or {}))


class _Lower(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # telling the compiler to keep out costs as much as all else here

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.fake.compute(func, args, dict(kwargs or {}))


class _Event:
    """What has been computed already needs no waiting for."""

    def record(self, stream: object = None) -> None:
        """Nothing."""

    def synchronize(self) -> None:
        """Nothing."""


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """A machine with one CUDA device, within the block."""
    fake = FakeCuda()
    with pytest.MonkeyPatch.context() as patch:
        upper = _Upper(fake)
        _patch_cuda(patch, fake)
        _patch_pytorch(patch, upper)
        _forget_devices()
        try:
            with upper, _Lower(fake):
                yield fake
        finally:
            _forget_devices()


def _patch_cuda(patch: pytest.MonkeyPatch, fake: FakeCuda) -> None:
    values: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "get_device_name": "a fake device",
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "mem_get_info": (1 << 30, 1 << 30),
        "set_rng_state": None,  # what is random comes from the CPU's numbers
    }
    for name, value in values.items():
        patch.setattr(torch.cuda, name, lambda *args, _value=value, **kwargs: _value)
    patch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
    patch.setattr(torch.cuda, "synchronize", lambda device=None: fake.wait("synchronize"))
    patch.setattr(torch.cuda, "Event", _Event)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    patch.setattr(torch.accelerator, "is_available", lambda: True)


def _patch_pytorch(patch: pytest.MonkeyPatch, upper: TorchFunctionMode) -> None:
    autocast, group, tag = torch.autocast.__init__, torch._C._group_tensors_by_device_and_dtype, _location_tag
    apply = torch.autograd.function.BackwardCFunction.apply

    def applied(self: Any, *grads: Any) -> Any:
        with upper:  # autograd leaves it out when it calls gradients that Python defines
            return apply(self, *grads)

    def grouped(tensors: Any, with_indices: bool = False) -> Any:
        found = group(tensors, with_indices)  # by where C++ sees them
        return {
            (next(t for part in lists for t in part if t is not None).device, dtype): (lists, indices)
            for (_, dtype), (lists, indices) in found.items()
        }

    def autocast_on_cpu(self: Any, kind: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if kind == "cuda" else kind, *args, **kwargs)

    patch.setattr(torch.autograd.function.BackwardCFunction, "apply", applied)
    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
    patch.setattr(torch.autocast, "__init__", autocast_on_cpu)
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # by version; of Adam
        patch.setattr(torch.optim.Optimizer, name, lambda self: None, raising=False)
    patch.setattr(
        torch.serialization,
        "location_tag",
        lambda storage: str(DEVICE) if hasattr(storage, _MARK) else tag(storage),
    )


_location_tag = torch.serialization.location_tag


def _forget_devices() -> None:
    # what the package keeps for a device: this one is not that of another block, nor a true one
    for name, module in list(sys.modules.items()):
        if _is_ours(name):
            for value in vars(module).values():
                if hasattr(value, "cache_clear") and "device" in inspect.signature(value).parameters:
                    value.cache_clear()


def _is_marked(tensor: Tensor) -> bool:
    try:
        return hasattr(tensor.untyped_storage(), _MARK)
    except NotImplementedError:  # without a storage, such as oneDNN's
        return False


@functools.cache
def _reads_results(func: Any) -> bool:
    # by what PyTorch says of an operator: whether its outcome or its shape depends on values
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags)


def _tensors(*values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(*value)
    return found


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE
