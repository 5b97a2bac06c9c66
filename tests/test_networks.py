"""Networks of torchvision and timm, converted, trained a step, packed and exported: python -m pytest -m slow -s."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from apot_fat import Reconstruction, export_onnx, load_packed, quantize, save_packed

timm = pytest.importorskip("timm")


def of_torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=10, **options)


def of_timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=10, **options)


NETWORKS = {
    "resnet18": of_torchvision("resnet18"),
    "resnext50_32x4d": of_torchvision("resnext50_32x4d"),
    "vgg11_bn": of_torchvision("vgg11_bn"),
    "densenet121": of_torchvision("densenet121"),
    "mobilenet_v2": of_torchvision("mobilenet_v2"),
    "mobilenet_v3_small": of_torchvision("mobilenet_v3_small"),
    "efficientnet_b0": of_torchvision("efficientnet_b0"),
    "regnet_y_400mf": of_torchvision("regnet_y_400mf"),
    "shufflenet_v2_x1_0": of_torchvision("shufflenet_v2_x1_0"),
    "squeezenet1_1": of_torchvision("squeezenet1_1"),
    "convnext_tiny": of_torchvision("convnext_tiny"),
    "vit_b_16": of_torchvision("vit_b_16", image_size=64),
    "swin_t": of_torchvision("swin_t"),
    "timm vit_tiny": of_timm("vit_tiny_patch16_224", img_size=64),
    "timm swin_tiny": of_timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2),
    "timm mixer_s32": of_timm("mixer_s32_224", img_size=64),
    "timm ghostnet_100": of_timm("ghostnet_100"),
    "timm convnext_atto": of_timm("convnext_atto"),
}
# FAT's products with a (4096, 4096) transform take minutes here
EXCLUDED = {("vgg11_bn", "fat"): ["classifier.*"]}
IN_THE_SUITE = (("squeezenet1_1", "fat"),)
ALL = [
    pytest.param(name, method, marks=() if (name, method) in IN_THE_SUITE else pytest.mark.slow)
    for name in NETWORKS
    for method in ("apot", "fat")
]


@pytest.mark.parametrize(("name", "method"), ALL)
def test_a_network_is_converted_trained_and_packed(name: str, method: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = NETWORKS[name]()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    if head and not head[0].weight.any():  # whose outputs would all be equal
        nn.init.normal_(head[0].weight, std=0.05)
    float_network = copy.deepcopy(model)
    x = torch.randn(4, 3, 64, 64)
    done = quantize(model, 4, method, calibration=x, exclude=EXCLUDED.get((name, method), []))
    y = model(x)
    y.square().mean().backward()
    assert y.isfinite().all()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    model.eval()
    path = tmp_path / "packed.safetensors"
    size = save_packed(model, path)
    loaded = load_packed(path, float_network)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), atol=0, rtol=0)
    report = "onnxruntime is not installed"
    if importlib.util.find_spec("onnxruntime"):
        # more than a few: where a value lies within rounding of a threshold, PyTorch in float64 differs from itself too
        written = export_onnx(model, tmp_path / "float.onnx", (3, 64, 64), verify_with=torch.randn(15, 3, 64, 64))
        report = f"{written.error:.1e} (allowed: {written.max_error:.1e})"
    left = Counter(row.note for row in done.rows if not row.is_quantized)
    full = 4 * sum(parameter.numel() for parameter in float_network.parameters())
    print(f"\n{name} | {method} | {len(done.converted)} | {dict(left) or 'nothing'} | {size / full:.3f} | {report}")


class LanguageBlock(nn.Module):
    """Tokens through a causal transformer block to logits, the embedding not tied to them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(97, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 97)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x: torch.Tensor = self.head(self.block(self.embedding(tokens), src_mask=mask, is_causal=True))
        return x


class Detector(nn.Module):
    """What a detector's heads say of every anchor, before boxes are chosen."""

    def __init__(self) -> None:
        super().__init__()
        detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=5
        )
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        heads: dict[str, torch.Tensor] = self.head(list(self.backbone(images).values()))
        return heads


def network_and_inputs(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network that was not trained, in evaluation mode, and some of what it takes."""
    torch.manual_seed(0)
    model: nn.Module
    if name == "language block":
        inputs, model = torch.randint(97, (16, 24)), LanguageBlock()
    elif name == "detector":
        inputs, model = torch.randn(4, 3, 128, 128), Detector()
    else:
        inputs, model = torch.randn(8, 3, 64, 64), NETWORKS[name]()
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        if head and not head[0].weight.any():
            nn.init.normal_(head[0].weight, std=0.05)
    return model.eval(), inputs


def eight_bit_error(name: str, method: str) -> float:
    """Relative error of a network's output on the inputs it was calibrated with."""
    model, inputs = network_and_inputs(name)
    error = quantize(model, 8, method, calibration=inputs).error
    assert error is not None
    print(f"\n{name} | {method} | 8 bits, calibrated: error {error:.3f}")
    return error


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "language block"])
def test_at_eight_bits_a_network_computes_what_it_did(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert eight_bit_error(name, "apot") <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [pytest.param("apot", marks=pytest.mark.xfail(reason="measured: largest 0.103, median 0.051")), "uniform"],
)
def test_at_eight_bits_every_network_computes_what_it_did(method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors = [eight_bit_error(name, method) for name in (*NETWORKS, "language block", "detector")]
    print(f"{method}: largest {max(errors):.3f}, median {statistics.median(errors):.3f}")
    assert max(errors) <= 0.1
    assert statistics.median(errors) <= 0.05


@pytest.mark.parametrize(
    "name",
    [
        "language block",
        *(pytest.param(name, marks=pytest.mark.slow) for name in (*NETWORKS, "detector")),
    ],
)
def test_a_network_is_reconstructed(name: str) -> None:
    model, inputs = network_and_inputs(name)
    calibrated, few = copy.deepcopy(model), Reconstruction(steps=4, joint_steps=8, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = quantize(calibrated, 3, calibration=inputs).error
        after = quantize(model, 3, calibration=inputs, reconstruct=few).error
    assert before is not None
    assert after is not None
    print(f"\n{name}, 3 bits: error {before:.3f}, after a few steps {after:.3f}")
    assert after < 1.1 * before + 0.01  # an untrained one may give little but its biases
