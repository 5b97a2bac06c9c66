"""ResNets for 32 × 32 images: 16, 32 and 64 channels, projection shortcuts, global average pooling."""

from __future__ import annotations

from torch import Tensor, nn

from apot_fat.models.registry import LayerMaker, register


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut; where the shape changes the shortcut is a 1 × 1 convolution."""

    def __init__(self, layers: LayerMaker, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layers.conv(in_channels, channels, 3, stride=stride, padding=1, rectified=True)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1, self.conv2 = layers.relu_conv(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            shortcut = layers.conv(in_channels, channels, 1, stride=stride, rectified=True)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) → (N, channels, H / stride, W / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class CifarResNet(nn.Module):
    """6n + 2 layers: a first convolution, three stages of n blocks, one linear layer.

    Args:
        layers: what the network is composed of.
        blocks: n, blocks a stage.
        num_classes: outputs.
    """

    def __init__(self, layers: LayerMaker, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = layers.first_conv(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(layers, 16, 16, blocks, stride=1)
        self.layer2 = _stage(layers, 16, 32, blocks, stride=2)
        self.layer3 = _stage(layers, 32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = layers.last_linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(layers: LayerMaker, in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(layers, in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(layers, channels, channels, 1) for _ in range(blocks - 1)))


for _depth in (20, 32, 44, 56, 110):

    @register(f"resnet{_depth}", "cifar10", f"res{_depth}", f"resnet_{_depth}")
    def _build(layers: LayerMaker, num_classes: int, blocks: int = (_depth - 2) // 6) -> nn.Module:
        return CifarResNet(layers, blocks, num_classes)
