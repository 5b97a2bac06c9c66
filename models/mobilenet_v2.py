"""MobileNetV2 with torchvision's parameter names, at several widths."""

from __future__ import annotations

from torch import Tensor, nn

from apot_fat.models.registry import LayerMaker, register

# expansion, channels, blocks, stride of the first block
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
WIDTHS = (1.0, 1.4, 0.75, 0.5, 0.35)


class InvertedResidual(nn.Module):
    """Expansion 1 × 1, depthwise 3 × 3, linear bottleneck 1 × 1; a shortcut where the shape stays.

    FAT transforms the linear bottleneck alone; its input may be negative nowhere else than after one.
    """

    def __init__(self, layers: LayerMaker, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        plain = layers.without_transform()
        hidden = in_channels * expansion
        self.conv = nn.Sequential()
        if expansion != 1:
            self.conv.append(_conv_norm_relu(plain.conv(in_channels, hidden, 1)))
        self.conv.append(_conv_norm_relu(plain.conv(hidden, hidden, 3, stride=stride, padding=1, groups=hidden)))
        self.conv.append(layers.conv(hidden, out_channels, 1))
        self.conv.append(nn.BatchNorm2d(out_channels))
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) → (N, C_out, H / stride, W / stride)."""
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """First convolution, 17 inverted residuals, a last 1 × 1 convolution, dropout, one linear layer.

    With a FAT preset the linear bottlenecks are transformed and the other inner convolutions are
    ``uniform-mobilenet``, as published; with any other preset all inner convolutions are alike. At 32 bits
    torchvision's network.

    Args:
        layers: what the network is composed of.
        width: multiplier on the channels.
        num_classes: outputs.
    """

    def __init__(self, layers: LayerMaker, width: float = 1.0, num_classes: int = 1000) -> None:
        super().__init__()
        channels = _divisible_by_8(32 * width)
        first = layers.first_conv(3, channels, 3, stride=2, padding=1, eight_bit=not layers.is_float)
        self.features = nn.Sequential(_conv_norm_relu(first))
        for expansion, stage_channels, blocks, stride in STAGES:
            out_channels = _divisible_by_8(stage_channels * width)
            for i in range(blocks):
                block = InvertedResidual(layers, channels, out_channels, 1 if i else stride, expansion)
                self.features.append(block)
                channels = out_channels
        last = _divisible_by_8(1280 * max(1.0, width))
        self.features.append(_conv_norm_relu(layers.without_transform().conv(channels, last, 1)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        classifier = layers.last_linear(last, num_classes, eight_bit=not layers.is_float)
        self.classifier = nn.Sequential(nn.Dropout(0.2), classifier)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(classifier.weight, 0, 0.01)
        nn.init.zeros_(classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → logits (N, num_classes)."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _conv_norm_relu(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU6())


def _divisible_by_8(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


for _width in WIDTHS:
    _suffix = "" if _width == 1.0 else f"_x{_width:g}".replace(".", "_")

    @register(f"mobilenet_v2{_suffix}", "imagenet")
    def _build(layers: LayerMaker, num_classes: int, width: float = _width) -> nn.Module:
        return MobileNetV2(layers, width, num_classes)
