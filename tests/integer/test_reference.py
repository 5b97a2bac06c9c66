from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apot_fat.integer import IntegerLayer, compare_networks, integer_reference, simulated_accumulator
from apot_fat.integer.reference import layer_inputs
from apot_fat.models import create_model
from apot_fat.quant import QuantConv2d, QuantLinear, level_set, preset, threshold_layers
from apot_fat.quant.integers import shift_terms

if TYPE_CHECKING:
    from tests.export.conftest import Released

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "bias": True},
    {"kernel_size": 3, "padding": 1, "stride": 2, "relu": True},
    {"kernel_size": (3, 2), "padding": (2, 1), "stride": (1, 2), "dilation": (2, 3)},
    {"kernel_size": 3, "padding": 1, "groups": 4},
    {"kernel_size": 3, "padding": 1, "groups": 8, "bias": True},
    {"kernel_size": (4, 3), "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
]
VARIANTS = [
    ("apot-cifar", 2),
    ("apot-cifar", 3),
    ("apot-cifar", 5),
    ("apot-imagenet-pot", 4),
    ("apot-imagenet-uniform", 8),
    ("fat-cifar", 3),
    ("fat-imagenet", 5),
    ("uniform-mobilenet", 4),
]


@pytest.mark.parametrize("levels", ["apot", "pot", "uniform"])
def test_shift_terms_add_up_and_are_few(levels: str) -> None:
    numbers = torch.arange(-600, 601)
    added, subtracted = terms = shift_terms(numbers)
    assert torch.equal(added - subtracted, numbers)
    assert not (added & subtracted).any()
    assert torch.equal(terms.counts, terms.counts.flip(0))
    assert terms.powers == 10  # 512 + …, and 600 < 1024 − 424
    for bits in range(1, 6):
        numerators = torch.tensor(level_set(levels, bits).numerators)
        counts = shift_terms(numerators).counts
        if levels == "apot":  # a term of each base set at most
            assert counts.max() <= (bits + 1) // 2
        if levels == "pot":
            assert counts.max() == 1
    assert shift_terms(torch.empty(0, dtype=torch.int64)).powers == 0


def test_shift_terms_by_hand() -> None:
    added, subtracted = shift_terms(torch.tensor([[0, 10, 7], [-6, -7, 11]]))
    assert added.tolist() == [[0, 10, 8], [0, 1, 11]]
    assert subtracted.tolist() == [[0, 0, 1], [6, 8, 0]]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("name", "bits"), VARIANTS)
def test_the_three_accumulators_of_a_convolution_agree(name: str, bits: int, options: dict[str, Any]) -> None:
    layer = QuantConv2d(8, 8, spec=preset(name, bits=bits), **options).eval()
    check_layer(layer, 4 * torch.randn(2, 8, 7, 6))


@pytest.mark.parametrize(("name", "bits"), VARIANTS)
@pytest.mark.parametrize("shape", [(5, 40), (40,), (2, 3, 40)])
def test_the_three_accumulators_of_a_linear_layer_agree(name: str, bits: int, shape: tuple[int, ...]) -> None:
    check_layer(QuantLinear(40, 7, spec=preset(name, bits=bits)).eval(), 4 * torch.randn(shape))


def test_one_image_without_its_batch_dimension() -> None:
    check_layer(QuantConv2d(4, 6, 3, padding=1).eval(), 4 * torch.rand(4, 5, 6))


def test_negative_codes_of_uniform_levels_count() -> None:
    layer = QuantLinear(1, 1, bias=False, spec=preset("uniform-mobilenet", bits=4, weight_norm="none")).eval()
    with torch.no_grad():
        layer.weight.fill_(3.0)
    assert IntegerLayer(layer, "shift").accumulate(torch.tensor([[-10.0]])).item() == -30 * 7


def check_layer(layer: QuantConv2d | QuantLinear, x: Tensor) -> None:
    nn.init.normal_(layer.weight, std=2.0)  # beyond the threshold too where the weight is not normalised
    simulated = simulated_accumulator(layer, x)
    outputs = []
    for arithmetic in ("multiply", "shift"):
        integer = IntegerLayer(layer, arithmetic)
        accumulator = integer.accumulate(x)
        assert accumulator.dtype == torch.int32
        assert torch.equal(accumulator.long(), simulated)
        outputs.append(integer(x))
    assert simulated.abs().max() > 0
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], layer(x).detach(), rtol=1e-5, atol=1e-4)


def test_shifts_and_adds_multiply_nothing() -> None:
    seen = set()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    layer = IntegerLayer(QuantConv2d(4, 6, 3, spec=preset("fat-cifar", bits=5)), "shift")
    codes = layer._codes(torch.rand(2, 4, 5, 5))
    with Operations():
        layer._accumulate(codes)
    assert {"__lshift__", "add_", "sub_", "sum", "index_select"} <= seen
    assert not {name for name in seen if "mm" in name or "mul" in name or "conv" in name or "dot" in name}


def test_networks_agree_and_the_model_stays() -> None:
    model = create_model("mobilenet_v2_x0_35", "fat-imagenet", bits=4, num_classes=5)
    before = {name: type(module) for name, module in model.named_modules()}
    multiply, shift = integer_reference(model), integer_reference(model, "shift")
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.training
    assert not multiply.training
    names = [name for name, module in shift.named_modules() if isinstance(module, IntegerLayer)]
    assert names == [name for name, _ in threshold_layers(model)]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(multiply(x), shift(x))
    for divergence in compare_networks(model.eval(), multiply, x):
        assert divergence.distance < 1e-4


def test_layers_used_twice_or_alone_are_converted() -> None:
    layer = QuantLinear(6, 6)
    model = nn.Sequential(layer, layer, nn.ModuleDict({"a": layer}))
    network = integer_reference(model)
    assert isinstance(network, nn.Sequential)
    assert isinstance(network[0], IntegerLayer)
    assert network[0] is network[1]
    assert network.get_submodule("2.a") is network[0]
    assert isinstance(integer_reference(layer, "shift"), IntegerLayer)
    assert isinstance(integer_reference(layer).get_submodule("layer"), QuantLinear)


def test_comparison_names_the_first_layer_that_differs() -> None:
    model = nn.Sequential(QuantLinear(4, 4, bias=False), nn.ReLU(), QuantLinear(4, 3)).eval()
    integer = integer_reference(model)
    x = torch.rand(5, 4) + 0.1
    assert compare_networks(model, integer, x, batch_size=2) == []
    other = copy.deepcopy(integer)
    with torch.no_grad():
        get_layer(model, "0").weight.copy_(torch.eye(4) + 1)
        get_layer(model, "2").weight.mul_(-1)
    found = compare_networks(model, other, 8 * x, batch_size=2)
    assert {divergence.layer for divergence in found} == {"2"}
    assert max(divergence.distance for divergence in found) > 1e-3
    get_layer(model, "2").bias.data = torch.tensor([0.0, 0.0, 99.0])
    last_float, last_integer = (nn.Sequential(network.get_submodule("2")) for network in (model, integer))
    (last, *_) = compare_networks(last_float, last_integer, x)
    assert (last.layer, last.codes, last.changes_prediction) == ("", 0, True)


def get_layer(model: nn.Module, name: str) -> QuantLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    return layer


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Linear has no layer with quantized weight and input"):
        integer_reference(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="arithmetic 'add': choose one of multiply, shift"):
        integer_reference(QuantLinear(2, 2), "add")  # type: ignore[arg-type]
    half = QuantLinear(2, 2, spec=preset("apot-cifar", act_bits=32))
    with pytest.raises(ValueError, match="4-bit weight and 32-bit input: integer arithmetic needs both"):
        IntegerLayer(half)
    with pytest.raises(ValueError, match="needs quantized weight and input"):
        simulated_accumulator(half, torch.ones(1, 2))
    wide = nn.Sequential(QuantLinear(64, 2, spec=preset("fat-cifar-log", bits=5)))
    with pytest.raises(ValueError, match=r"layer 0: accumulator up to \d+: int32 holds less than 2\^31; use fewer"):
        integer_reference(wide)
    layer = IntegerLayer(QuantLinear(64, 2, spec=preset("uniform-mobilenet", bits=8)))
    layer(torch.full((1, 64), 1e6))
    with pytest.raises(ValueError, match="accumulator up to"):
        layer(torch.full((1, 64), -1e7))


RELEASED = [(3, 947), (4, 941)]


@pytest.mark.parametrize(("bits", "correct"), RELEASED)
def test_released_layers_agree_to_the_last_bit(released: Released, bits: int, correct: int) -> None:
    model, images, _ = released(bits)
    layers = dict(threshold_layers(model))
    _, inputs = layer_inputs(model, list(layers), images[:3])
    assert len(inputs) == 20
    for name, x in inputs:
        check_accumulators(layers[name], x)
    multiply, shift = integer_reference(model), integer_reference(model, "shift")
    assert torch.equal(multiply(images[:3]), shift(images[:3]))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "correct"), RELEASED)
def test_released_networks_agree_but_for_rounding_ties(released: Released, bits: int, correct: int) -> None:
    model, images, labels = released(bits)
    layers = dict(threshold_layers(model))
    multiply, shift = integer_reference(model), integer_reference(model, "shift")
    right = {"float": 0, "multiply": 0, "shift": 0}
    for start in range(0, len(images), 32):
        batch, label = images[start : start + 32], labels[start : start + 32]
        logits, inputs = layer_inputs(model, list(layers), batch)
        for name, x in inputs:
            check_accumulators(layers[name], x)
        outputs = {"float": logits, "multiply": multiply(batch), "shift": shift(batch)}
        assert torch.equal(outputs["multiply"], outputs["shift"])
        for kind, output in outputs.items():
            right[kind] += int((output.argmax(1) == label).sum())
    ties = compare_networks(model, multiply, images)
    print(f"\n{bits} bits: {right} of {len(images)} right; {len(ties)} images with a rounding tie,")
    print(f"the farthest {max(tie.distance for tie in ties):.1e} levels from its midpoint; other predictions:")
    for tie in ties:
        if tie.changes_prediction:
            print(f"  {tie}, label {int(labels[tie.image])}")
    assert right["float"] == correct
    assert all(tie.layer and tie.distance < 1e-4 for tie in ties)


def check_accumulators(layer: QuantConv2d | QuantLinear, x: Tensor) -> None:
    multiply, shift = (IntegerLayer(layer, arithmetic).accumulate(x) for arithmetic in ("multiply", "shift"))
    assert torch.equal(multiply, shift)
    assert torch.equal(multiply.long(), simulated_accumulator(layer, x))
