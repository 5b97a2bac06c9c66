"""The quantizers' code for a GPU, generated and assembled on a machine without one.

``kernels.pointwise`` compiles for fake tensors on ``cuda:0``, and PyTorch is told that they lie on an H100. From there
it is PyTorch's own way from a function to a kernel: graph, Triton source, and with Triton's compiler and the ``ptxas``
that comes with it PTX and machine code for sm_90. A whole network is traced on the CPU, since autograd asks the driver,
and moved to ``cuda:0`` where Inductor takes over its forward and backward graphs.

That shows: each function is compiled, and calls no library; quotients are correctly rounded; an index has the bits it
needs; a kernel is right for every size that it is looked up for, and not one block's work where the tensor is large.
It cannot show that a kernel runs, what it computes and how fast; nor which of several configurations PyTorch would
take after timing them (the first is assembled), nor CUDA graphs. That takes a GPU.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _triton

from apot_fat import QuantConv2d, QuantLinear, preset
from apot_fat.quant import fake_quant, level_set
from apot_fat.quant.fast import codes as byte_codes
from apot_fat.quant.fast import kernels
from apot_fat.quant.fast.kernels import inductor_options, pointwise
from apot_fat.quant.seam import set_kernels
from apot_fat.quant.spec import PRESETS

# before a launch PyTorch looks where tensors lie
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

GPU = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=1 << 16,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block_optin=227 << 10,
)
FAMILIES = ("apot", "pot", "uniform", "twos-complement", "odd")
FUNCTIONS = (
    "weight_forward",
    "weight_backward",
    "activation_forward",
    "activation_backward",
    "activation_forward_with_codes",
    "activation_codes",
    "activation_from_codes",
    "activation_backward_from_codes",
)
QUICK = (
    ("apot", "float32", "weight_forward"),
    ("pot", "bfloat16", "activation_forward"),
    ("uniform", "float32", "activation_forward_with_codes"),
)
BOUNDS = (1 << 13, 1 << 16, 1 << 19, 1 << 22, 1 << 25, 1 << 28, (1 << 31) - (1 << 15), (1 << 31) - 1, 1 << 34)
# the smallest and the largest size given to a kernel, of whole rows of 1024 and of others (the first from 2 on, but
# that is also the value of other numbers)
SIZES = [
    (1000, BOUNDS[0] - 1),
    *((low + 1 + low % 2, high - 1 + high % 2) for low, high in pairwise(BOUNDS)),
    (3 << 10, BOUNDS[0]),
    *(((low // 1024 + 1) * 1024, high // 1024 * 1024) for low, high in pairwise(BOUNDS)),
]


@dataclass
class Graph:
    """A graph that Inductor compiled.

    ``source``: the module it wrote; ``guards``: what it takes for granted about sizes and other numbers; ``numbers``:
    their values by symbol.
    """

    source: str
    guards: list[Any]
    numbers: dict[Any, Any]

    @property
    def triton(self) -> dict[str, str]:
        """The source of each kernel."""
        calls = [node for node in ast.walk(ast.parse(self.source)) if isinstance(node, ast.Call)]
        args = [call.args for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "triton"]
        return {ast.literal_eval(name): ast.literal_eval(source) for name, source in args}

    @property
    def library_calls(self) -> set[str]:
        """What is not a kernel of its own."""
        return set(re.findall(r"(?:extern_kernels|torch\.ops)\.([\w.]+)\(", self.source))

    @property
    def blocks(self) -> int:
        """How many blocks of threads share a sum."""
        return max(map(int, re.findall(r"empty_strided_cuda\(\((\d+), \)", self.source)), default=1)

    def holds_for(self, size: int, compiled_for: int) -> bool:
        """Whether it is right for tensors of another size."""
        numbers = {symbol: size if value == compiled_for else value for symbol, value in self.numbers.items()}
        return all(guard.xreplace(numbers) for guard in self.guards)


class NotLaunchedError(Exception):
    """There is no device to run a graph that was compiled."""

    def __init__(self, graph: Graph) -> None:
        super().__init__("not launched")
        self.graph = graph


@dataclass
class Compiler:
    """For a GPU that is not there. ``graphs``: what it compiled in this test."""

    triton: Any
    graphs: list[Graph] = field(default_factory=list)

    def run(self, function: Callable[..., Any], tensors: tuple[Tensor, ...], *rest: Any, **options: Any) -> Graph:
        """``kernels.pointwise`` up to the launch: the graph that would run."""
        with pytest.raises(NotLaunchedError) as caught:
            pointwise(function, tensors, *rest, **options)
        return caught.value.graph

    def assemble(self, source: str, name: str) -> dict[str, Any]:
        """The stages of one kernel, from Triton's ``ttir`` to ``ptx`` and ``cubin``, compiled as Inductor would."""
        tuned = getattr(PyCodeCache.load(source), name)
        compiled = []

        def keep(*args: Any, **options: Any) -> Any:
            compiled.append(triton_compile(*args, **options))
            return compiled[-1]

        triton_compile = self.triton.compile
        with patch.object(self.triton, "compile", keep):
            tuned._precompile_config(tuned.configs[0])
        assert compiled[0].metadata.target.arch == 90
        return compiled[0].asm


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Compiler]:
    """A compiler for an H100."""
    triton: Any = pytest.importorskip("triton", reason="triton is not installed")
    compiler = Compiler(triton)

    def generate(graph: Any) -> Any:
        shapes = graph.sizevars.shape_env
        guards = [guard.expr for guard in shapes.guards]
        code, _ = graph.codegen()
        compiled = Graph(code.value, guards, dict(shapes.backed_var_to_val))
        compiler.graphs.append(compiled)

        def call(args: Any) -> None:
            raise NotLaunchedError(compiled)

        return SimpleNamespace(call=call, __file__="")

    fold = UniformValueConstantFolder._deduce_value

    def fold_on_cpu(folder: Any, node: torch.fx.Node) -> Any:
        # Inductor computes constants where they are used
        kwargs = node.kwargs
        if "device" in kwargs:
            node.kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            return fold(folder, node)
        finally:
            node.kwargs = kwargs

    for place in (CudaInterface, CudaInterface.Worker, torch.cuda):
        monkeypatch.setattr(place, "get_device_properties", lambda device=None: H100)
    for question in ("is_available", "is_bf16_supported"):
        monkeypatch.setattr(CudaInterface, question, lambda **options: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(UniformValueConstantFolder, "_deduce_value", fold_on_cpu)
    monkeypatch.setattr(GraphLowering, "compile_to_module", generate)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: target))
    monkeypatch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    set_kernels("compiled")
    forget()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True),
    ):
        yield compiler
    forget()


def forget() -> None:
    """Forget what is remembered of a device: the one before is not that of the test."""
    torch.compiler.reset()
    kernels._kernels.clear()
    for cached in (DeviceProperties.create, *vars(_triton).values()):
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


@pytest.fixture
def fake(compiler: Compiler) -> Iterator[None]:
    """Tensors without memory, on any device."""
    with FakeTensorMode():
        yield


def arguments(
    name: str, family: str, kind: str, *shape: int, thresholds: tuple[int, ...] = ()
) -> tuple[Callable[..., Any], Any, Any, Any]:
    """A function of ``fake_quant``, and what ``pointwise`` is given with it: tensors, scalars and settings."""
    levels, dtype = level_set(family, 4), getattr(torch, kind)
    x, y, z = (torch.empty(shape, dtype=dtype, device=GPU) for _ in range(3))
    codes = torch.empty(shape, dtype=torch.uint8, device=GPU)
    operands: dict[str, tuple[Any, ...]] = {
        "weight_forward": ((x,), levels),
        "weight_backward": ((x, y, z), True, levels.levels[0] if levels.is_signed else -1.0),
        "activation_forward": ((x,), levels, "both"),
        "activation_backward": ((x, y, z), "both", "full"),
        "activation_forward_with_codes": ((x,), levels, "both"),
        "activation_codes": ((x,), levels, "both"),
        "activation_from_codes": ((codes,), levels, dtype),
        "activation_backward_from_codes": ((x, codes, y), levels, "both", "full"),
    }
    tensors, *settings = operands[name]
    return (
        getattr(byte_codes if "codes" in name else fake_quant, name),
        tensors,
        (torch.empty(thresholds, device=GPU),),
        settings,
    )


def exists(name: str, family: str) -> bool:
    levels = level_set(family, 4)
    if levels.is_signed:
        return name.startswith("weight")
    return "codes" not in name or byte_codes.has_codes(levels, "both")


def check_division(source: str) -> None:
    assert not re.search(r"tmp\d+ / ", source)  # of indices it would be //


def check_machine_code(source: str, stages: dict[str, Any]) -> None:
    check_division(source)
    assert ".target sm_90" in stages["ptx"]
    assert ("div.rn.f32" in stages["ptx"]) == ("div_rn" in source)
    if not re.search(r"sigmoid|tanh", source):  # Triton's own have approximate quotients inside
        assert not re.findall(r"div\.full|(?:div|rcp)\.approx", stages["ptx"])
    assert stages["cubin"].startswith(b"\x7fELF")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("family", "kind", "name"), [
    pytest.param(family, kind, name, marks=[] if (family, kind, name) in QUICK else pytest.mark.slow)
    for family in FAMILIES for kind in ("float32", "bfloat16") for name in FUNCTIONS if exists(name, family)
])  # fmt: skip
def test_every_function_becomes_machine_code(family: str, kind: str, name: str, compiler: Compiler) -> None:
    function, tensors, scalars, settings = arguments(name, family, kind, 100_000)
    graph = compiler.run(function, tensors, scalars, *settings)
    assert not graph.library_calls
    for kernel, source in graph.triton.items():
        check_machine_code(source, compiler.assemble(source, kernel))
    assert "div_rn" in graph.source


@pytest.mark.slow
@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["weight_forward", "weight_backward"])
def test_so_does_one_of_a_threshold_a_channel(family: str, name: str, compiler: Compiler) -> None:
    function, tensors, scalars, settings = arguments(name, family, "float32", 8, 16, 3, 3, thresholds=(8,))
    graph = compiler.run(function, tensors, scalars, *settings)
    assert not graph.library_calls
    for kernel, source in graph.triton.items():
        check_machine_code(source, compiler.assemble(source, kernel))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("family", "name"), [
    ("uniform", "weight_forward"), ("apot", "activation_backward_from_codes"), ("odd", "weight_forward"),
    pytest.param("apot", "activation_forward", marks=pytest.mark.slow),
])  # fmt: skip
def test_levels_are_quotients(family: str, name: str, compiler: Compiler) -> None:
    function, tensors, scalars, settings = arguments(name, family, "float32", 1000)
    graph = compiler.run(function, tensors, scalars, *settings)
    assert str(level_set(family, 4).steps) in graph.source
    assert str(1 / level_set(family, 4).steps)[:8] not in graph.source  # or products with the rounded reciprocal
    assert graph.source.count("div_rn") == 2


@pytest.mark.usefixtures("fake")
def test_without_the_option_quotients_are_approximate(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "inductor_options", lambda device_type: {})
    function, tensors, scalars, settings = arguments("activation_forward", "uniform", "float32", 100_000)
    ((kernel, source),) = compiler.run(function, tensors, scalars, *settings).triton.items()
    assert "div.full.f32" in compiler.assemble(source, kernel)["ptx"]
    with pytest.raises(AssertionError):
        check_division(source)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("sizes", [SIZES[::5], pytest.param(SIZES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_kernel_is_right_for_all_sizes_that_share_it(sizes: Sequence[tuple[int, int]], compiler: Compiler) -> None:
    for smallest, largest in sizes:
        for size in (smallest, largest):
            function, tensors, scalars, settings = arguments("activation_backward", "apot", "float32", size)
            graph = compiler.run(function, tensors, scalars, *settings, into=tensors[0])
            assert graph is compiler.graphs[-1]
            assert graph.holds_for(size, compiled_for=smallest)
            summed = size >> 10 if size % 1024 == 0 else size  # what a block of its own sums of each row first
            assert graph.blocks >= min(summed >> 16, 512)  # no block sums more than 2^16, or there are very many
            assert ("tl.program_id(0).to(tl.int64)" in graph.source) == (size >= 1 << 31)
    assert len(compiler.graphs) == len(sizes)
    for kernel, source in graph.triton.items():  # of the largest
        check_machine_code(source, compiler.assemble(source, kernel))


def test_sizes_that_differ_in_their_code_are_given_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[Any] = []

    class Kernels(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Callable[..., Any]:
            keys.append(key)
            return torch.mul

    monkeypatch.setattr(kernels, "_kernels", Kernels())
    set_kernels("compiled")
    with FakeTensorMode():
        for size in (size for pair in SIZES for size in pair):
            pointwise(torch.mul, (torch.empty(size, device=GPU),), (torch.empty((), device=GPU),))
    assert keys[::2] == keys[1::2]
    assert len(set(keys)) == len(SIZES)


def test_auto_compiles_for_tensors_of_any_size_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compiler_works", lambda device_type: True)
    monkeypatch.setattr(kernels, "AUTO_ELEMENTS", 1000)
    set_kernels("auto")
    with FakeTensorMode():
        compiled = [
            kernels._compiles(torch.empty(size, device=device)) for device in ("cpu", GPU) for size in (1, 2, 999, 1000)
        ]
    assert compiled == [False, False, False, True, False, True, True, True]
    monkeypatch.setattr(kernels, "compiler_works", lambda device_type: False)
    with FakeTensorMode():
        assert not kernels._compiles(torch.empty(1000, device=GPU))


def test_options_are_those_that_this_pytorch_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inductor_options("cuda") == {"eager_numerics.division_rounding": True}
    monkeypatch.setattr(torch._inductor, "list_options", list)
    assert inductor_options("cuda") == {}


def on_gpu(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
    """Inductor's part of a compilation, of a graph traced on the CPU."""
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
    graph.recompile()
    mode = inputs[0].fake_mode
    with mode:
        moved = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU) for x in inputs]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    return compile_fx_inner(graph, moved, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_a_network_becomes_machine_code(name: str, autocast: bool, compiler: Compiler) -> None:
    spec = preset(name, bits=4)
    if spec.transform and torch.__version__ < "2.12":
        pytest.skip("PyTorch 2.11 approximates reciprocals, which FAT's transform has, whatever it is asked")
    conv = QuantConv2d(4, 6, 3, padding=1, spec=spec)
    model = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), QuantLinear(96, 3, spec=spec))
    backend = partial(compile_fx, inner_compile=on_gpu, config_patches=inductor_options("cuda"))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(NotLaunchedError):
        compiled(torch.rand(2, 4, 4, 4))
    forward, backward = compiler.graphs
    if not spec.transform:  # Fourier transforms and complex numbers are the library's
        assert forward.library_calls == {"convolution", "addmm"}
        assert backward.library_calls == {"aten.convolution_backward.default", "mm"}
    for graph in (forward, backward):
        for kernel, source in graph.triton.items():
            check_machine_code(source, compiler.assemble(source, kernel))
