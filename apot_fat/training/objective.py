"""What training minimises: the cross entropy, and what the switches of a run add to it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.data.sharding import Batch


class Objective:
    """The loss of a batch.

    Equation: L = CE, see ``cross_entropy``.

    Args:
        label_smoothing: ε of the cross entropy, [0, 1).
    """

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, 0-d; logits (B, classes)) of the network in training, called once."""
        logits = model(batch.x)
        return cross_entropy(logits, batch, self.label_smoothing), logits


def cross_entropy(logits: Tensor, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of a batch with smoothed labels.

    Equation: −Σ_k t_k log p_k with t_k = (1 − ε) 1[k = y] + ε / K of K classes.

    Args:
        logits: (B, K).
        batch: its labels.
        smoothing: ε, [0, 1).

    Returns:
        The loss, 0-d, nats.

    Paper: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, section 7.
    """
    return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
