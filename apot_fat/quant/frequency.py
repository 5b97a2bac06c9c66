"""FAT's frequency transform: a learned soft mask on the spectrum of each output channel.

Shape suffixes: ``_OK`` (C_out, K) with K = C_in · k_h · k_w, ``_OF`` (C_out, K // 2 + 1) the half spectrum, ``_OO``
(C_out, C_out).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def frequency_transform(weight: Tensor, transform_OO: Tensor) -> tuple[Tensor, Tensor]:
    """Mask the spectrum of a weight.

    Equation: W = weight as (C_out, K); F = DFT of each row; S = sigmoid(T |F|); W' = Re(IDFT(F ⊙ S)).
    W is real, so |F| and S are symmetric: the product with T and the mask are computed on the half spectrum, at half
    the work. The two Fourier transforms are complex ones all the same: they cost little beside the product, and their
    rounding is the published code's, which decides on which side of a threshold a weight falls (real transforms move
    about one weight in a million to the next level).

    Args:
        weight: shape (C_out, …), any unit.
        transform_OO: T, shape (C_out, C_out), the unit of 1 / weight.

    Returns:
        W' in the shape and memory format of ``weight``, and the mask S on the half spectrum, shape (C_out, K // 2 + 1),
        range (0, 1).

    Computed in float32 under autocast too.

    Gradient, with G the DFT of the upstream gradient, c = 2 where a frequency stands for two and else 1:
    ∂L/∂S = c / K · Re(F conj(G)); ∂L/∂T and ∂L/∂|F| from it through the sigmoid and the product;
    ∂L/∂W = IDFT(S ⊙ G + K / c · ∂L/∂|F| ⊙ F / |F|), where F / |F| is 0 at 0. All on the half spectrum.

    Paper: FAT, the frequency-aware transformation.
    """
    w_OK = weight.reshape(weight.shape[0], -1).to(torch.promote_types(weight.dtype, torch.float32))
    with torch.autocast(weight.device.type, enabled=False):  # bfloat16 moves weights to other levels
        restored_OK, mask_OF = _FrequencyTransform.apply(w_OK, transform_OO.to(w_OK.dtype))
    restored = restored_OK.reshape(weight.shape).to(weight.dtype)
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        restored = restored.contiguous(memory_format=torch.channels_last)  # a convolution takes its layout from it
    return restored, mask_OF


class _FrequencyTransform(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_OK: Tensor, transform_OO: Tensor) -> tuple[Tensor, Tensor]:
        length = w_OK.shape[1]
        spectrum_OK = torch.fft.fft(w_OK.to(torch.promote_types(w_OK.dtype, torch.complex64)))
        half_OF = spectrum_OK[:, : length // 2 + 1]
        mask_OF = torch.sigmoid(transform_OO @ half_OF.abs())
        mask_OK = torch.cat([mask_OF, mask_OF[:, 1 : (length + 1) // 2].flip(1)], dim=1)
        restored_OK = torch.fft.ifft(spectrum_OK * mask_OK).real.contiguous()
        ctx.save_for_backward(half_OF, mask_OF, transform_OO)
        ctx.length = length
        ctx.mark_non_differentiable(mask_OF)
        return restored_OK, mask_OF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OK: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(grad_OK.device.type, enabled=False):
            half_OF, mask_OF, transform_OO = ctx.saved_tensors
            return _transform_backward(grad_OK, half_OF, mask_OF, transform_OO, ctx.length)


def _transform_backward(
    grad_OK: Tensor, half_OF: Tensor, mask_OF: Tensor, transform_OO: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    twice_F = torch.full((half_OF.shape[1],), 2.0, dtype=mask_OF.dtype, device=mask_OF.device)
    twice_F[:1].fill_(1)
    if length % 2 == 0:
        twice_F[-1:].fill_(1)
    grad_spectrum_OF = torch.fft.rfft(grad_OK)
    grad_mask_OF = (half_OF * grad_spectrum_OF.conj()).real * (twice_F / length)
    grad_score_OF = grad_mask_OF * mask_OF * (1 - mask_OF)
    grad_magnitude_OF = transform_OO.T @ grad_score_OF
    direction_OF = half_OF.sgn() * (grad_magnitude_OF * (length / twice_F))
    grad_w_OK = torch.fft.irfft(mask_OF * grad_spectrum_OF + direction_OF, n=length)
    return grad_w_OK, grad_score_OF @ half_OF.abs().T


def weight_deactivate_freq(
    weight: Tensor, transform: nn.Linear | Tensor, fc: bool = False
) -> tuple[Tensor, tuple[float, float]]:
    """The published form of ``frequency_transform``.

    Args:
        weight: (C_out, C_in, k_h, k_w), or (C_out, C_in) with ``fc``.
        transform: the bias-free linear layer C_out → C_out that holds T, or T itself.
        fc: whether the weight is a linear layer's.

    Returns:
        The restored weight and (largest, smallest) value of the mask, as floats.

    Raises:
        ValueError: a weight whose rank does not fit ``fc``, or a transform that is not (C_out, C_out).
    """
    if weight.dim() != (2 if fc else 4):
        raise ValueError(f"weight of shape {tuple(weight.shape)}: {'2-d with' if fc else '4-d without'} fc is expected")
    matrix = transform if isinstance(transform, Tensor) else getattr(transform, "weight", None)
    channels = weight.shape[0]
    if not isinstance(matrix, Tensor) or matrix.shape != (channels, channels):
        shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(transform).__name__
        raise ValueError(f"transform {shape}: expected a ({channels}, {channels}) tensor or bias-free linear layer")
    restored, mask = frequency_transform(weight, matrix)
    return restored, (mask.max().item(), mask.min().item())
