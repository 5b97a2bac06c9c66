"""What training minimises: the cross entropy, and what the switches of a run add to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.data.sharding import Batch
from apot_fat.quant.all_layers import quant_layers
from apot_fat.quant.units import along_rows, threshold_in_use


class Objective:
    """The loss of a batch.

    Equation: L = (1 − w) · CE + w · KD + λ · D, see ``cross_entropy``, ``distillation`` and ``distance_to_levels``.

    Args:
        label_smoothing: ε of the cross entropy, [0, 1).
        teacher: the network distilled from, in evaluation mode; or None.
        distill_weight: w, [0, 1].
        distill_temperature: T, > 0.
        dampening: λ, ≥ 0.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        distill_weight: float = 0.0,
        distill_temperature: float = 1.0,
        dampening: float = 0.0,
    ) -> None:
        self.label_smoothing = label_smoothing
        self.teacher, self.distill_weight = teacher, distill_weight
        self.distill_temperature = distill_temperature
        self.dampening = dampening

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, 0-d; logits (B, classes)) of the network in training, called once."""
        taught = None
        if self.teacher is not None:  # before the network: nothing comes between its forward and its backward
            with torch.no_grad():
                taught = self.teacher(batch.x)
        logits = model(batch.x)
        loss = cross_entropy(logits, batch, self.label_smoothing)
        if taught is not None:
            loss = torch.lerp(loss, distillation(logits, taught, self.distill_temperature), self.distill_weight)
        if self.dampening:
            loss = loss + self.dampening * distance_to_levels(model)
        return loss, logits


def cross_entropy(logits: Tensor, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of a batch with smoothed, and with mixup mixed, labels.

    Equation: −Σ_k t_k log p_k with t_k = (1 − ε) 1[k = y] + ε / K of K classes; of an image mixed from two
    λ CE(y) + (1 − λ) CE(y').

    Args:
        logits: (B, K).
        batch: labels, and with mixup the other labels and λ.
        smoothing: ε, [0, 1).

    Returns:
        The loss, 0-d, nats.

    Paper: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, section 7; mixup, Zhang et al., 2018.
    """
    if batch.other_labels is None or batch.own_share is None:
        return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
    own, other = (
        F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        for labels in (batch.labels, batch.other_labels)
    )
    return other.lerp(own, batch.own_share.to(own.dtype)).mean()


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


def distance_to_levels(model: nn.Module) -> Tensor:
    """How far a network's weights are from the levels they are projected to: what dampens their oscillations.

    Equation: Σ over layers of ‖q(ŵ) − clip(ŵ, −α, α)‖², ŵ the weight just before projection (normalised, with FAT
    transformed), q(ŵ) = α times its level.

    Args:
        model: any network; only quantized weights count.

    Returns:
        The sum, 0-d, in squared units of ŵ.

    Gradient: of ŵ where it lies within its threshold, towards its level; q and α are constants.

    Paper: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, oscillation dampening;
    there of the weight itself. A weight of standard deviation σ has errors 1/σ times as large here, so λ is smaller by
    σ².
    """
    distances = []
    for _, layer in quant_layers(model):
        if layer.weight_alpha is None:
            continue
        with torch.no_grad():
            q = layer.quantized_weight()
            alpha = along_rows(threshold_in_use(layer.weight_alpha), q.dim())
        w = layer.transformed_weight()
        distances.append((q - w.clamp(-alpha, alpha)).square().sum())
    return torch.stack(distances).sum() if distances else torch.zeros((), device=next(model.parameters()).device)
