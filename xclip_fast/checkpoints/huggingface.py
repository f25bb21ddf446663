"""Hugging Face X-CLIP: its configuration, its folders, the hub and ``XCLIPModel`` instances."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from xclip_fast.checkpoints.names import listing
from xclip_fast.checkpoints.reading import read_checkpoint, state_dict_of
from xclip_fast.checkpoints.sizes import Claim
from xclip_fast.checkpoints.stored import Checkpoint, from_hf
from xclip_fast.config import HEAD_DIM, XCLIPConfig
from xclip_fast.errors import InputError, one_line
from xclip_fast.files import read_json

_log = logging.getLogger("xclip_fast")

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"
_INDEX_FILE = "model.safetensors.index.json"
_PICKLE_FILE = "pytorch_model.bin"

# section ("" is the top), key, the field of XCLIPConfig, the value transformers assumes when the key is absent
_FIELDS = (
    ("vision_config", "hidden_size", "vision_width", 768),
    ("vision_config", "intermediate_size", "vision_mlp_width", 3072),
    ("vision_config", "num_hidden_layers", "vision_layers", 12),
    ("vision_config", "num_attention_heads", "vision_heads", 12),
    ("vision_config", "patch_size", "patch_size", 32),
    ("vision_config", "num_frames", "frames", 8),
    ("vision_config", "mit_hidden_size", "embed_dim", 512),
    ("vision_config", "mit_num_hidden_layers", "mit_layers", 1),
    ("vision_config", "mit_num_attention_heads", "embed_heads", 8),
    ("text_config", "hidden_size", "text_width", 512),
    ("text_config", "num_hidden_layers", "text_layers", 12),
    ("text_config", "num_attention_heads", "text_heads", 8),
    ("text_config", "max_position_embeddings", "context_length", 77),
    ("text_config", "vocab_size", "vocab_size", 49408),
    ("", "projection_dim", "embed_dim", 512),
    ("", "prompt_layers", "prompt_layers", 2),
    ("", "prompt_num_attention_heads", "embed_heads", 8),
    ("", "prompt_alpha", "prompt_alpha", 0.1),
)
# what the model here can't vary
_FIXED = (
    ("vision_config", "hidden_act", "quick_gelu"),
    ("vision_config", "layer_norm_eps", 1e-5),
    ("vision_config", "num_channels", 3),
    ("text_config", "hidden_act", "quick_gelu"),
    ("text_config", "layer_norm_eps", 1e-5),
    ("", "prompt_hidden_act", "quick_gelu"),
)
_HEADS_KEPT = "xclip_fast_heads"  # in config.json: the head counts are meant as they stand
_LARGE_WIDTH, _DEFAULT_HEADS = 768, 8


def from_tensors(
    tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any] | None, preprocessor: Mapping[str, Any]
) -> Checkpoint:
    """A checkpoint from tensors with Hugging Face names.

    Args:
        tensors: a state dict of ``XCLIPModel``.
        where: the source, for messages.
        config: what its config.json holds; without it heads are taken as width / 64.
        preprocessor: the content of its preprocessor_config.json; empty where there is none.

    Raises:
        InputError: a name is foreign, or the configuration asks for what this library does not compute.
    """
    checkpoint = Checkpoint(where, "hf", from_hf(tensors, where))
    if config is None:
        checkpoint.repairs.append(f"no {CONFIG_FILE}: head counts assumed to be width / {HEAD_DIM}")
    else:
        checkpoint.claims += _read_config(config, where, checkpoint.repairs)
    for key, field in (("image_mean", "pixel_mean"), ("image_std", "pixel_std")):
        if key in preprocessor:
            value = preprocessor[key]
            if not isinstance(value, list) or not all(isinstance(number, (int, float)) for number in value):
                raise InputError(f"{where}: {PREPROCESSOR_FILE} must give {key} as three numbers, found {value!r:.60}")
            checkpoint.claims.append(Claim(PREPROCESSOR_FILE, field, tuple(float(number) for number in value)))
    return checkpoint


def from_instance(model: Any) -> Checkpoint:
    """The weights and configuration of a transformers ``XCLIPModel``."""
    where = type(model).__name__
    return from_tensors(state_dict_of(model.state_dict(), where), where, model.config.to_dict(), {})


def from_folder(folder: Path) -> Checkpoint:
    """A folder that ``save_pretrained`` wrote, or that the hub holds: safetensors if there are any.

    Raises:
        InputError: it has no configuration or no weights, or they are unusable.
    """
    where = repr(str(folder))
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{where} has no {CONFIG_FILE}: give a Hugging Face X-CLIP folder, or a checkpoint file")
    for name in (WEIGHTS_FILE, _INDEX_FILE, _PICKLE_FILE):
        if (folder / name).is_file():
            files = [folder / name] if name != _INDEX_FILE else _shards(folder)
            break
    else:
        raise InputError(f"{where} has no weights: expected {WEIGHTS_FILE} or {_PICKLE_FILE}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        content, _ = read_checkpoint(file)
        shard = state_dict_of(content, repr(str(file)), file.stat().st_size)
        if repeated := tensors.keys() & shard.keys():
            raise InputError(f"{where} holds tensors in two files at once: {listing(repeated)}")
        tensors |= shard
    return from_tensors(tensors, where, *read_configs(folder))


def read_configs(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The model's and the preprocessor's configuration beside a weights file: nothing and empty where absent."""
    config, preprocessor = folder / CONFIG_FILE, folder / PREPROCESSOR_FILE
    return (
        read_json(config) if config.is_file() else None,
        read_json(preprocessor) if preprocessor.is_file() else {},
    )


def download(repo: str) -> Path:
    """The local snapshot of a hub repository: its safetensors, or its pickled weights when it has no others.

    Raises:
        InputError: the hub can't be reached, or has no such repository.
    """
    by_hand = "download its files elsewhere and give their folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"{repo!r} is no local path, and the hub needs huggingface_hub: pip install huggingface_hub, or {by_hand}"
        ) from error
    settings = [CONFIG_FILE, PREPROCESSOR_FILE]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=[*settings, "model*.safetensors", _INDEX_FILE]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo, allow_patterns=[*settings, _PICKLE_FILE]))
    except Exception as error:  # the client lets the errors of its transport through
        raise InputError(f"cannot get {repo!r} from the hub: {one_line(error)}: {by_hand}") from error
    return folder


def configs_of(config: XCLIPConfig, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json and the preprocessor_config.json of a model.

    Raises:
        InputError: Hugging Face's X-CLIP has no such model.
    """
    if config.activation != "quick_gelu":
        raise InputError(
            f"the hf format cannot hold activation {config.activation!r}: it has one activation for the CLIP towers "
            "and the modules of X-CLIP, which is quick_gelu: use format='xclip_fast'"
        )
    sections: dict[str, dict[str, Any]] = {
        "": {"model_type": "xclip", "architectures": ["XCLIPModel"], "dtype": dtype, _HEADS_KEPT: True},
        "text_config": {"model_type": "xclip_text_model", "intermediate_size": 4 * config.text_width},
        "vision_config": {
            "model_type": "xclip_vision_model",
            "image_size": config.image_size,
            "mit_intermediate_size": 4 * config.embed_dim,
        },
    }
    for section, key, field, _ in _FIELDS:
        sections[section][key] = getattr(config, field)
    for section, key, value in _FIXED:
        sections[section][key] = value
    top = sections.pop("")
    side = {"height": config.image_size, "width": config.image_size}
    preprocessor = {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": config.image_size},
        "do_center_crop": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
    }
    return top | sections, preprocessor


def _read_config(config: Mapping[str, Any], where: str, repairs: list[str]) -> list[Claim]:
    if config.get("model_type", "xclip") != "xclip":
        raise InputError(f"{where}: {CONFIG_FILE} is of a {config['model_type']!r:.60} model, not of xclip")
    sections = {"": config}
    for name in ("text_config", "vision_config"):
        # old files repeat a section as text_config_dict, and transformers lets that one win
        both = [config.get(name) or {}, config.get(f"{name}_dict") or {}]
        if not all(isinstance(part, Mapping) for part in both):
            raise InputError(f"{where}: {CONFIG_FILE} must hold an object as {name}")
        sections[name] = {**both[0], **both[1]}
    for section, key, required in _FIXED:
        value = sections[section].get(key, required)
        if value != required:
            label = ".".join(filter(None, (section, key)))
            raise InputError(f"{where}: {CONFIG_FILE} says {label} {value!r:.60}, and only {required!r} is supported")
    claims = []
    for section, key, field, default in _FIELDS:
        value = sections[section].get(key, default)
        if field == "patch_size" and isinstance(value, (list, tuple)) and list(value) == [*value[:1]] * 2:
            value = value[0]
        claims.append(Claim(f"{CONFIG_FILE}, {'.'.join(filter(None, (section, key)))},", field, value))
    return claims if config.get(_HEADS_KEPT) is True else _repair_heads(claims, where, repairs)


def _repair_heads(claims: list[Claim], where: str, repairs: list[str]) -> list[Claim]:
    """The converter of the released large checkpoints left the heads of MIT and prompts at the default."""
    width = next(claim.value for claim in claims if claim.field == "embed_dim")
    wrong = [claim for claim in claims if claim.field == "embed_heads" and claim.value == _DEFAULT_HEADS]
    if width != _LARGE_WIDTH or not wrong:
        return claims
    right = _LARGE_WIDTH // HEAD_DIM
    repairs.append(f"heads of MIT and prompts set from {_DEFAULT_HEADS} to {right}, which is {_LARGE_WIDTH} / 64")
    _log.warning(
        "%s: %s, since the large checkpoints on the hub were converted with a wrong count "
        "(a model really trained with %d says so by '%s': true in its %s)",
        where,
        repairs[-1],
        _DEFAULT_HEADS,
        _HEADS_KEPT,
        CONFIG_FILE,
    )
    return [claim._replace(value=right) if claim in wrong else claim for claim in claims]


def _shards(folder: Path) -> list[Path]:
    index = read_json(folder / _INDEX_FILE).get("weight_map")
    names = list(index.values()) if isinstance(index, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(f"{str(folder)!r}: {_INDEX_FILE} must map each tensor to a file of the same folder")
    return [folder / name for name in sorted(set(names))]
