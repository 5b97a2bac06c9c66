"""Checkpoints: published formats and ours."""

from apot_fat.checkpoint.files import (
    atomic_write,
    before,
    checksum,
    copy_checkpoint,
    drop_damaged,
    file_checksum,
    output_file,
    read_checkpoint,
    read_newest,
    remove_leftovers,
    write_checkpoint,
)
from apot_fat.checkpoint.packed import (
    PACKED_SUFFIX,
    load_packed,
    packed_normalization,
    packed_thresholds,
    save_packed,
)
from apot_fat.checkpoint.released import TORCHVISION, Released, fetch_released, read_manifest, torchvision_weights
from apot_fat.checkpoint.weights import best_accuracy, checkpoint_thresholds, load_weights, num_outputs, state_dict_of

__all__ = [
    "PACKED_SUFFIX",
    "TORCHVISION",
    "Released",
    "atomic_write",
    "before",
    "best_accuracy",
    "checkpoint_thresholds",
    "checksum",
    "copy_checkpoint",
    "drop_damaged",
    "fetch_released",
    "file_checksum",
    "load_packed",
    "load_weights",
    "num_outputs",
    "output_file",
    "packed_normalization",
    "packed_thresholds",
    "read_checkpoint",
    "read_manifest",
    "read_newest",
    "remove_leftovers",
    "save_packed",
    "state_dict_of",
    "torchvision_weights",
    "write_checkpoint",
]
