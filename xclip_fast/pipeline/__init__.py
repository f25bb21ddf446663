"""Files in, labels or features out: what the commands ``classify`` and ``embed`` run, as a library."""

from xclip_fast.pipeline.classifier import Classifier, FileScores, Prediction, classify_files, each_file, read_labels
from xclip_fast.pipeline.embedding import FileFeatures, embed, embed_files
from xclip_fast.pipeline.features import check_features_path, save_features
from xclip_fast.pipeline.shards import Request, Written, embed_to_shards, weights_digest

__all__ = [
    "Classifier",
    "FileFeatures",
    "FileScores",
    "Prediction",
    "Request",
    "Written",
    "check_features_path",
    "classify_files",
    "each_file",
    "embed",
    "embed_files",
    "embed_to_shards",
    "read_labels",
    "save_features",
    "weights_digest",
]
