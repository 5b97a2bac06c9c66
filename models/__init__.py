"""Networks composed of quantized layers. A new one: a file here with ``@register``, and its import below."""

from apot_fat.models import cifar_resnet, imagenet_resnet, mobilenet_v2, vgg  # noqa: F401 (importing registers)
from apot_fat.models.registry import (
    Architecture,
    LayerMaker,
    create_model,
    default_preset,
    find_architecture,
    list_models,
    register,
)

__all__ = [
    "Architecture",
    "LayerMaker",
    "create_model",
    "default_preset",
    "find_architecture",
    "list_models",
    "register",
]
