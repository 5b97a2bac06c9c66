"""Data sets in memory or on disk, and batches of them on the device."""

from apot_fat.data.images import FILE_SIZE, Augmentation, Dataset, FileSet, ImageBatches, ImageSet
from apot_fat.data.sharding import Batch, Batches, Sharding
from apot_fat.data.sources import NAMED, load_dataset
from apot_fat.data.stream import FileBatches

__all__ = [
    "FILE_SIZE",
    "NAMED",
    "Augmentation",
    "Batch",
    "Batches",
    "Dataset",
    "FileBatches",
    "FileSet",
    "ImageBatches",
    "ImageSet",
    "Sharding",
    "load_dataset",
]
