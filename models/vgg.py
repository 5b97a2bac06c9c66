"""VGG networks for 32 × 32 images, with batch normalisation and the published parameter names."""

from __future__ import annotations

from torch import Tensor, nn

from apot_fat.models.registry import LayerMaker, register

# channels of each convolution; "M" is 2 × 2 max pooling
VGG_TINY = (16, 32, "M", 32, "M")
VGG_SMALL = (128, 128, "M", 256, 256, "M", 512, 512, "M")
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


class VGG(nn.Module):
    """Convolutions, average pooling and a classifier.

    Args:
        layers: what the network is composed of. At 32 bits every convolution is plain and has a bias, as published.
        plan: channels and poolings, in order.
        pooled: height and width the last average pooling leaves (on 32 × 32 images its window is 2 × 2).
        classifier: the network's end.
    """

    def __init__(self, layers: LayerMaker, plan: tuple[int | str, ...], pooled: int, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for index, item in enumerate(plan):
            if isinstance(item, str):
                self.features.add_module(f"pool{index}", nn.MaxPool2d(2))
                continue
            make_conv = layers.conv if index or layers.is_float else layers.first_conv
            conv = make_conv(channels, item, 3, padding=1, bias=layers.is_float)
            self.features.add_module(f"conv{index}", conv)
            self.features.add_module(f"norm{index}", nn.BatchNorm2d(item))
            self.features.add_module(f"relu{index}", nn.ReLU())
            channels = item
        self.avgpool = nn.AdaptiveAvgPool2d(pooled)
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → logits (N, num_classes)."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


@register("vgg_small", "cifar10", "vgg7bn", "vgg_7_bn", "vgg7")
def vgg_small(layers: LayerMaker, num_classes: int) -> VGG:
    """VGG-Small (published as ``vgg_7_bn``): 128-128-M-256-256-M-512-512-M, dropout, one linear layer."""
    classifier = nn.Sequential()
    classifier.add_module("dropout", nn.Dropout(0.5))
    classifier.add_module("linear2", layers.last_linear(2048, num_classes))
    return VGG(layers, VGG_SMALL, 2, classifier)


@register("vgg_tiny", "cifar10")
def vgg_tiny(layers: LayerMaker, num_classes: int) -> VGG:
    """Three convolutions for 8 × 8 digits on small processors: 16-32-M-32-M, one linear layer; no published network."""
    classifier = nn.Sequential()
    classifier.add_module("linear2", layers.last_linear(128, num_classes))
    return VGG(layers, VGG_TINY, 2, classifier)


@register("vgg16", "cifar10", "vgg16bn", "vgg_16_bn")
def vgg16(layers: LayerMaker, num_classes: int) -> VGG:
    """VGG-16 with batch normalisation (``vgg_16_bn``): thirteen convolutions and two 8-bit linear layers."""
    classifier = nn.Sequential()
    classifier.add_module("linear1", layers.last_linear(512, 512))
    classifier.add_module("norm1", nn.BatchNorm1d(512))
    classifier.add_module("relu1", nn.ReLU())
    classifier.add_module("linear2", layers.last_linear(512, num_classes))
    return VGG(layers, VGG16, 1, classifier)
