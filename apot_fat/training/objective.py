"""What training minimises: the cross entropy, and what the switches of a run add to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.data.sharding import Batch


class Objective:
    """The loss of a batch.

    Equation: L = (1 − w) · CE + w · KD: the mean cross entropy with smoothed labels, (1 − ε) 1[k = y] + ε / K for class
    k of K, and ``distillation``. With ``distill_mixup`` both networks see (1 − s) x + s x̃ in place of a share of the
    images, x̃ the next of the batch and s ~ U(0, 1): the network is to be the teacher's function between the images too.

    Args:
        label_smoothing: ε of the cross entropy, [0, 1).
        teacher: the network distilled from, in evaluation mode; or None.
        distill_weight: w, [0, 1].
        distill_temperature: T, > 0.
        distill_mixup: share of the images that are mixed, [0, 1]. Its random numbers are the process's.

    Raises:
        ValueError: ``distill_mixup`` with w < 1.

    Paper: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, section 7, for ε; Beyer et al.,
    "Knowledge Distillation: A Good Teacher Is Patient and Consistent", CVPR 2022, section 3.1, for mixed images.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        distill_weight: float = 0.0,
        distill_temperature: float = 1.0,
        distill_mixup: float = 0.0,
    ) -> None:
        check_mixup(distill_mixup, distill_weight)
        self.label_smoothing, self.distill_mixup = label_smoothing, distill_mixup
        self.teacher, self.distill_weight = teacher, distill_weight
        self.distill_temperature = distill_temperature

    def inputs(self, x: Tensor) -> Tensor:
        """What both networks see of a batch of images, (B, C, H, W): some of them mixed."""
        return mixed(x, self.distill_mixup) if self.teacher is not None and self.distill_mixup else x

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss, 0-d; logits (B, classes)) of the network in training, called once."""
        x, taught = self.inputs(batch.x), None
        if self.teacher is not None:  # before the network: nothing comes between its forward and its backward
            with torch.no_grad():
                taught = self.teacher(x)
        logits = model(x)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        if taught is not None:
            loss = torch.lerp(loss, distillation(logits, taught, self.distill_temperature), self.distill_weight)
        return loss, logits


def check_mixup(distill_mixup: float, distill_weight: float) -> None:
    """Raise ``ValueError`` where images would be mixed whose labels count."""
    if distill_mixup and distill_weight < 1:
        raise ValueError(
            f"distill_mixup {distill_mixup}: mixed images have no label; give distill_weight 1, not {distill_weight}"
        )


def mixed(x: Tensor, share: float) -> Tensor:
    """That share of the images of a batch (B, …), chosen at random, become (1 − s) x + s x̃, s ~ U(0, 1), x̃ the next."""
    chosen, shares = torch.rand(2, len(x), *[1] * (x.dim() - 1), device=x.device)
    return x.lerp(x.roll(-1, 0), (shares * (chosen < share)).to(x.dtype))


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
