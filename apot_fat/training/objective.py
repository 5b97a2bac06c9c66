"""What training minimises: the cross entropy, and what the switches of a run add to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.data.sharding import Batch


class Objective:
    """The loss of a batch.

    Equation: L = (1 − w) · CE + w · KD: the mean cross entropy with smoothed labels, (1 − ε) 1[k = y] + ε / K for class
    k of K, and ``distillation``.

    Args:
        label_smoothing: ε of the cross entropy, [0, 1).
        teacher: the network distilled from, in evaluation mode; or None.
        distill_weight: w, [0, 1].
        distill_temperature: T, > 0.

    Paper: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, section 7, for ε.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        distill_weight: float = 0.0,
        distill_temperature: float = 1.0,
    ) -> None:
        self.label_smoothing = label_smoothing
        self.teacher, self.distill_weight = teacher, distill_weight
        self.distill_temperature = distill_temperature

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, 0-d; logits (B, classes)) of the network in training, called once."""
        taught = None
        if self.teacher is not None:  # before the network: nothing comes between its forward and its backward
            with torch.no_grad():
                taught = self.teacher(batch.x)
        logits = model(batch.x)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        if taught is not None:
            loss = torch.lerp(loss, distillation(logits, taught, self.distill_temperature), self.distill_weight)
        return loss, logits


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """How far a network's softened predictions are from its teacher's.

    Equation: T² · mean over the batch of Σ_k p_k log(p_k / q_k), with p = softmax(teacher_logits / T) and
    q = softmax(logits / T).

    Args:
        logits, teacher_logits: (B, K), any float type; computed in float32 or more.
        temperature: T, > 0.

    Returns:
        The loss, 0-d, nats, ≥ 0.

    Gradient: T · (q − p) / B of the logits; T² keeps it of a size while T changes. None of the teacher's.

    Paper: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015; for low-precision networks
    Mishra, Marr, "Apprentice", ICLR 2018.
    """
    kind = torch.promote_types(logits.dtype, torch.float32)
    log_q = (logits.to(kind) / temperature).log_softmax(1)
    log_p = (teacher_logits.detach().to(kind) / temperature).log_softmax(1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * temperature**2
