"""Quantize a network of your own and ship it: python scripts/examples/own_network.py [FOLDER].

A small network is trained on scikit-learn's digits in plain PyTorch, quantized to 3 bits without labels, and written as
a packed file and as ONNX.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from apot_fat import export_onnx, load_packed, quantize, save_packed


def make_network() -> nn.Sequential:
    """Three convolutions and a linear layer, for 1 × 8 × 8 images."""
    first = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()
    second = nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU()
    third = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()
    return nn.Sequential(*first, *second, *third, nn.Flatten(), nn.Linear(1024, 10))


def train(net: nn.Module, x: Tensor, labels: Tensor, epochs: int = 5) -> None:
    """Train as one likes: nothing here knows of quantization."""
    optimizer = torch.optim.Adam(net.train().parameters(), 3e-3)
    for batch in torch.cat([torch.randperm(len(x)) for _ in range(epochs)]).split(100):
        optimizer.zero_grad()
        cross_entropy(net(x[batch]), labels[batch]).backward()
        optimizer.step()
    net.eval()


def top1(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Accuracy, %."""
    with torch.inference_mode():
        return 100 * (net(x).argmax(1) == labels).float().mean().item()


def main(folder: Path) -> None:
    """Train, quantize, compare, ship."""
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = (images / 8 - 1).float().reshape(-1, 1, 8, 8)
    torch.manual_seed(0)
    net = make_network()
    train(net, x[:1400], labels[:1400])
    print(f"float: {top1(net, x[1400:], labels[1400:]):.1f}% of 397 test digits")
    print(quantize(net, bits=3, calibration=x[:256], reconstruct=True))
    print(f"3 bits: {top1(net, x[1400:], labels[1400:]):.1f}%")
    size = save_packed(net, folder / "digits.safetensors")
    same = load_packed(folder / "digits.safetensors", make_network())
    assert torch.equal(same(x[1400:]), net(x[1400:]))
    export_onnx(net, folder / "digits.onnx", (1, 8, 8))  # compared with PyTorch before it is written
    print(f"{folder / 'digits.safetensors'}: {size:,} bytes; {folder / 'digits.onnx'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
