"""Data sets in memory and batches on the device."""

from apot_fat.data.images import Augmentation, Dataset, ImageBatches, ImageSet
from apot_fat.data.sources import NAMED, load_dataset

__all__ = ["NAMED", "Augmentation", "Dataset", "ImageBatches", "ImageSet", "load_dataset"]
