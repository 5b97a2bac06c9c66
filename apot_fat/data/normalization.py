"""Mean and standard deviation of the input channels, as the published networks were trained with (units of 255)."""

from __future__ import annotations

Channels = tuple[float, float, float]

DIGITS: tuple[Channels, Channels] = ((0.305, 0.305, 0.305), (0.376, 0.376, 0.376))
CIFAR_APOT: tuple[Channels, Channels] = ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
CIFAR_FAT: tuple[Channels, Channels] = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalization(source: str, network_dataset: str, preset: str) -> tuple[Channels, Channels]:
    """Mean and std for a data source.

    Args:
        source: what ``--data`` names; the digits have their own values.
        network_dataset: what the architecture's papers train it on, ``cifar10`` or ``imagenet``; decides for the rest.
        preset: FAT's CIFAR networks were trained with values of their own.
    """
    if source == "digits":
        return DIGITS
    if network_dataset == "imagenet":
        return IMAGENET
    return CIFAR_FAT if preset.startswith("fat") else CIFAR_APOT
