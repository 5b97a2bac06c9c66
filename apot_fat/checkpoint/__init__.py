"""Checkpoints: published formats and ours."""

from apot_fat.checkpoint.files import atomic_write, read_checkpoint, write_checkpoint
from apot_fat.checkpoint.weights import best_accuracy, checkpoint_thresholds, load_weights, state_dict_of

__all__ = [
    "atomic_write",
    "best_accuracy",
    "checkpoint_thresholds",
    "load_weights",
    "read_checkpoint",
    "state_dict_of",
    "write_checkpoint",
]
