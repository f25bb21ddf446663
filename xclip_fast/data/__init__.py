"""Data sets: which videos there are, of which classes, and batches of them for training."""

from xclip_fast.data.augment import Augmentation
from xclip_fast.data.batches import Batch, Draw, training_batches
from xclip_fast.data.dataset import Dataset, Sample, read_dataset
from xclip_fast.data.labels import normalise_names, read_labels
from xclip_fast.data.lists import read_captions
from xclip_fast.data.quarantine import Quarantine

__all__ = [
    "Augmentation",
    "Batch",
    "Dataset",
    "Draw",
    "Quarantine",
    "Sample",
    "normalise_names",
    "read_captions",
    "read_dataset",
    "read_labels",
    "training_batches",
]
