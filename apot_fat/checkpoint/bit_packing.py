"""Codes of few bits as bytes, without gaps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MOST_BITS = 16


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes: the lowest bit first, no gaps.

    Args:
        codes: integers from 0 to 2^bits − 1, any shape, taken row by row.
        bits: 1 to 16 (``MOST_BITS``).

    Returns:
        uint8, shape (ceil(codes · bits / 8),).
    """
    rows = codes.flatten().cpu().numpy().astype(np.uint16)[:, None] >> np.arange(bits, dtype=np.uint16)
    return torch.from_numpy(np.packbits((rows & 1).astype(np.uint8), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes of ``pack_bits``: int64, shape (count,)."""
    rows = np.unpackbits(packed.numpy(), bitorder="little")[: count * bits].reshape(count, bits)
    return torch.from_numpy(rows.astype(np.int64) @ (1 << np.arange(bits, dtype=np.int64)))
