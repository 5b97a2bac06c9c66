"""ResNets for ImageNet with torchvision's parameter names; every convolution but the first is an inner layer."""

from __future__ import annotations

from torch import Tensor, nn

from apot_fat.models.registry import LayerMaker, register


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, layers: LayerMaker, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, channels, 3, stride=stride, padding=1, rectified=True)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.relu1, self.conv2 = layers.relu_conv(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(layers, in_channels, channels * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) → (N, channels, H / stride, W / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 (with the stride) and 1 × 1 convolutions and a shortcut; four times the channels come out."""

    expansion = 4

    def __init__(self, layers: LayerMaker, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, channels, 1, rectified=True)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1, self.conv2 = layers.relu_conv(channels, channels, 3, stride=stride, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2, self.conv3 = layers.relu_conv(channels, channels * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(layers, in_channels, channels * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) → (N, 4 · channels, H / stride, W / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ImageNetResNet(nn.Module):
    """A first 7 × 7 convolution, four stages of blocks, one linear layer. At 32 bits torchvision's network.

    Args:
        layers: what the network is composed of.
        block: ``BasicBlock`` or ``Bottleneck``.
        blocks: blocks a stage.
        num_classes: outputs.
    """

    def __init__(
        self,
        layers: LayerMaker,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1 = layers.first_conv(3, 64, 7, stride=2, padding=3, eight_bit=not layers.is_float)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for index, count in enumerate(blocks):
            width = 64 << index
            stage = nn.Sequential()
            for i in range(count):
                stage.append(block(layers, channels, width, stride=2 if index and not i else 1))
                channels = width * block.expansion
            self.add_module(f"layer{index + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = layers.last_linear(channels, num_classes, eight_bit=not layers.is_float)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(name)(x)
        return self.fc(self.avgpool(x).flatten(1))


def _shortcut(layers: LayerMaker, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        layers.conv(in_channels, out_channels, 1, stride=stride, rectified=True), nn.BatchNorm2d(out_channels)
    )


_DEPTHS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}

for _depth in _DEPTHS:

    @register(f"resnet{_depth}", "imagenet", f"res{_depth}", f"resnet_{_depth}")
    def _build(layers: LayerMaker, num_classes: int, depth: int = _depth) -> nn.Module:
        return ImageNetResNet(layers, *_DEPTHS[depth], num_classes)
