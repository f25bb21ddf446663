"""Files nobody vouches for: each is refused in one line, fast, and nothing in it runs."""

from __future__ import annotations

import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_zoo import TINY, clip_state, edit_json, hf_model, tiny_model, write_tensors

from xclip_fast import InputError, create_model
from xclip_fast.checkpoints import load_model, save_model

MARK = "executed"


class Code:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


class Expression:
    def __reduce__(self):
        return eval, (f"open({MARK!r}, 'w')",)


def state() -> dict[str, torch.Tensor]:
    return create_model(TINY).state_dict()


def header(path: Path, tensors: object, data: bytes = b"") -> Path:
    """A safetensors file with any header."""
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def saved(path: Path, content: object, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def halved(path: Path) -> Path:
    return written(path, path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path, offset: int) -> Path:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    return written(path, bytes(content))


def own(path: Path, settings: object) -> Path:
    """A file of our format with other metadata."""
    return write_tensors(path, state(), {"xclip_fast": settings if isinstance(settings, str) else json.dumps(settings)})


def own_config(path: Path, **changes: object) -> Path:
    return own(path, {"version": 1, "config": TINY.to_dict() | changes})


def recompressed(path: Path) -> Path:
    saved(path, {"model": state()})
    squeezed = path.with_name("bomb.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return squeezed


def overlapping_zip(path: Path) -> Path:
    """The central directory names one record a hundred times: small on disk, large when read."""
    record = path.with_name("record.zip")
    with zipfile.ZipFile(record, "w") as archive:
        archive.writestr("a/data.pkl", b"x" * 10_000)
        entry = archive.infolist()[0]
        archive.filelist.extend([entry] * 100)
    return record.rename(path)


def torchscript(path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    return path


def without(path: Path, name: str) -> Path:
    tensors = state()
    del tensors[name]
    return write_tensors(path, tensors)


def replaced(path: Path, name: str, value: torch.Tensor) -> Path:
    return write_tensors(path, {**state(), name: value})


def hf(path: Path, **changes: object) -> Path:
    path.mkdir()
    save_model(tiny_model(), path, "hf")
    edit_json(path / "config.json", **changes)
    return path


def hf_with(path: Path, name: str, content: str | bytes) -> Path:
    hf(path)
    (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def hf_bare(path: Path, removed: str, name: str = "", content: object = None) -> Path:
    """A folder without one of its files; ``content`` is saved as another one."""
    (hf(path) / removed).unlink()
    if name:
        saved(path / name, content)
    return path


def hf_index(path: Path, weight_map: object) -> Path:
    edited = hf_with(path, "model.safetensors.index.json", json.dumps({"weight_map": weight_map}))
    (path / "model.safetensors").unlink()
    return edited


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    # code
    "code": (lambda p: saved(p, {"model": {**state(), "x": Code()}}), r"Python code or objects \('posix.system'\)"),
    "code at the top": (lambda p: saved(p, Code()), "Python code or objects"),
    "eval": (lambda p: saved(p, {"model": Expression()}), r"Python code or objects \('eval'\)"),
    "code, old format": (
        lambda p: saved(p, {"model": Code()}, _use_new_zipfile_serialization=False),
        "Python code or objects",
    ),
    "bare pickle": (lambda p: written(p, pickle.dumps(Code(), protocol=2)), "Python code or objects"),
    "new bare pickle": (lambda p: written(p, pickle.dumps(Code(), protocol=5)), "a Python pickle of more than tensors"),
    "text pickle": (lambda p: written(p, pickle.dumps(Code(), protocol=0)), "is no checkpoint"),
    "code named safetensors": (
        lambda p: saved(p, {"model": Code()}).rename(p.with_suffix(".safetensors")),
        "under the name of a safetensors file: rename it",
    ),
    "whole module": (lambda p: saved(p, torch.nn.Linear(2, 2)), r"objects \('torch.nn.modules.linear.Linear'\)"),
    "torchscript": (torchscript, r"TorchScript archive.*torch\.jit\.load"),
    # damage
    "empty": (lambda p: written(p, b""), "is empty"),
    "one byte": (lambda p: written(p, b"\x80"), "is damaged"),
    "text": (lambda p: written(p, b"version https://git-lfs.github.com/spec/v1\n"), "is no checkpoint"),
    "zeros": (lambda p: written(p, bytes(4096)), "is no checkpoint"),
    "html": (lambda p: written(p, b"<!DOCTYPE html>" * 99), "is no checkpoint"),
    "truncated zip": (lambda p: halved(saved(p, {"model": state()})), "truncated or damaged"),
    "truncated old format": (
        lambda p: halved(saved(p, {"model": state()}, _use_new_zipfile_serialization=False)),
        "is damaged",
    ),
    "truncated safetensors": (lambda p: halved(write_tensors(p, state())), "damaged safetensors"),
    "truncated header": (lambda p: written(p, write_tensors(p, state()).read_bytes()[:500]), "is damaged: its header"),
    "flipped header": (lambda p: flipped(write_tensors(p, state()), 20), "is not valid JSON"),
    "trailing bytes": (lambda p: written(p, write_tensors(p, state()).read_bytes() + b"x"), "damaged safetensors"),
    "other zip": (lambda p: written(p, b"PK\x03\x04" + bytes(99)), "truncated or damaged"),
    "wheel": (overlapping_zip, "claims more than its"),
    "compressed zip": (recompressed, "is compressed or claims more"),
    # headers
    "header beyond the file": (lambda p: written(p, struct.pack("<Q", 1 << 60) + b"{}"), "its header claims"),
    "header is a list": (lambda p: header(p, b"{}\n[1]"), "is not valid JSON"),
    "header nested deep": (lambda p: header(p, b'{"a":' + b"[" * 200_000), "is not valid JSON"),
    "name twice": (
        lambda p: header(p, b'{"a":' + json.dumps(tensor([1], 0, 4)).encode() + b',"a":{}}', bytes(4)),
        "a key occurs twice",
    ),
    "overlap": (
        lambda p: header(p, {"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
        "damaged safetensors",
    ),
    "hole": (lambda p: header(p, {"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)), "damaged safetensors"),
    "beyond the data": (lambda p: header(p, {"a": tensor([1 << 40], 0, 1 << 42)}, bytes(8)), "damaged safetensors"),
    "shape overflows": (lambda p: header(p, {"a": tensor([1 << 62, 1 << 62], 0, 4)}, bytes(4)), "damaged safetensors"),
    "negative shape": (lambda p: header(p, {"a": tensor([-1], 0, 4)}, bytes(4)), "damaged safetensors"),
    "unknown dtype": (lambda p: header(p, {"a": tensor([1], 0, 4, "F33")}, bytes(4)), "damaged safetensors"),
    "no tensors": (lambda p: header(p, {}), "no tensors"),
    "only metadata": (lambda p: header(p, {"__metadata__": {"xclip_fast": "{}"}}), "no tensors"),
    # tensors
    "expanded": (lambda p: saved(p, {"model": {"a": torch.zeros(1).expand(1 << 50)}}), "claims 4503599627370496 bytes"),
    "shared a thousand times": (
        lambda p: saved(p, dict.fromkeys((f"mit.{i}" for i in range(1000)), torch.zeros(9999))),
        "claims 39996000 bytes",
    ),
    "meta": (lambda p: saved(p, {"a": torch.zeros(1 << 40, device="meta")}), "on the meta device"),
    "sparse": (lambda p: saved(p, {"a": torch.eye(3).to_sparse()}), "found float32, sparse_coo"),
    "integers": (lambda p: replaced(p, "ln_final.weight", torch.ones(64, dtype=torch.int64)), "found int64"),
    "float8": (lambda p: replaced(p, "ln_final.weight", torch.ones(64).to(torch.float8_e4m3fn)), "found float8"),
    "complex": (lambda p: replaced(p, "ln_final.weight", torch.ones(64, dtype=torch.complex64)), "found complex64"),
    "number for a tensor": (lambda p: saved(p, {"model": {**state(), "ln_final.weight": 3.0}}), "found float"),
    "list": (lambda p: saved(p, [1, 2]), "holds list, not a state dict"),
    "numbers as names": (lambda p: saved(p, {1: torch.zeros(2)}), "no tensors by name"),
    "empty dictionary": (lambda p: saved(p, {"model": {}}), "no tensors by name"),
    "not a number": (
        lambda p: replaced(p, "mit.resblocks.0.ln_1.bias", torch.tensor([float("nan")] + [0.0] * 63)),
        r"NaN or infinity in 'mit\.resblocks\.0\.ln_1\.bias'",
    ),
    "infinity": (lambda p: replaced(p, "logit_scale", torch.tensor(float("-inf"))), "NaN or infinity in 'logit_scale'"),
    # models
    "missing": (lambda p: without(p, "visual.ln_post.bias"), r"lacks tensors: 'visual\.ln_post\.bias'"),
    "missing, with a size": (lambda p: without(p, "text_projection"), "lacks tensors: 'text_projection'"),
    "missing layer": (
        lambda p: write_tensors(p, {k: v for k, v in state().items() if "transformer.resblocks.0." not in k}),
        "lacks tensors",
    ),
    "unexpected": (lambda p: replaced(p, "visual.extra", torch.zeros(1)), r"no X-CLIP model has: 'visual\.extra'"),
    "hostile name": (lambda p: replaced(p, "\x1b[2J\n" * 99, torch.zeros(1)), r"no X-CLIP model has: '\\x1b"),
    "wrong shape": (
        lambda p: replaced(p, "ln_final.bias", torch.zeros(65)),
        r"ln_final\.bias is \(65,\) and must be \(64,\)",
    ),
    "one dimension more": (lambda p: replaced(p, "logit_scale", torch.zeros(1)), r"is \(1,\) and must be \(\)"),
    "no grid": (lambda p: replaced(p, "visual.positional_embedding", torch.zeros(7, 128)), "square grid"),
    "no dimensions": (lambda p: replaced(p, "visual.positional_embedding", torch.zeros(())), "square grid"),
    "flat convolution": (lambda p: replaced(p, "visual.conv1.weight", torch.zeros(128)), "must have 4 dimensions"),
    "wide": (lambda p: replaced(p, "text_projection", torch.zeros(1, 100_000)), "embed_dim 100000"),
    "narrow": (lambda p: replaced(p, "ln_final.weight", torch.zeros(32)), "is no X-CLIP model|wrong shape"),
    "huge clip": (
        lambda p: write_tensors(p, {**clip_state(create_model(TINY)), "text_projection": torch.zeros(64, 1984)}),
        "wrong shape",
    ),
    "resnet clip": (lambda p: write_tensors(p, {"visual.layer1.0.conv1.weight": torch.zeros(2)}), "is a ResNet"),
    "timm tower": (lambda p: write_tensors(p, {"visual.trunk.cls_token": torch.zeros(2)}), "is a timm model"),
    "coca": (lambda p: write_tensors(p, {"text_decoder.x": torch.zeros(2)}), "it is CoCa"),
    "hf clip": (
        lambda p: write_tensors(p, {"text_model.final_layer_norm.bias": torch.zeros(2)}),
        "without the modules",
    ),
    "other model": (lambda p: write_tensors(p, {"model.layers.0.w": torch.zeros(2)}), "neither X-CLIP nor CLIP"),
    # our own format
    "newer version": (lambda p: own(p, {"version": 2, "config": {}}), "version 2 of the format"),
    "no version": (lambda p: own(p, {}), "version None of the format"),
    "no settings": (lambda p: own(p, ""), "is not valid JSON"),
    "settings are a list": (lambda p: own(p, "[]"), "must hold a JSON object"),
    "no configuration": (lambda p: own(p, {"version": 1}), "not of this version of xclip_fast: found NoneType"),
    "configuration is a list": (lambda p: own(p, {"version": 1, "config": [1]}), "found list"),
    "settings are tensors": (lambda p: saved(p, {"model": state(), "xclip_fast": torch.ones(3)}), "must be text"),
    "settings that lie": (
        lambda p: saved(p, {"model": state(), "xclip_fast": '{"version": 1, "config": {"frames": 5}}'}),
        "says frames 5, the rest of the checkpoint says 4",
    ),
    "unknown field": (lambda p: own_config(p, depth=3), "not of this version of xclip_fast: found 'depth'"),
    "sizes that lie": (lambda p: own_config(p, vision_layers=24), "says vision_layers 24, the rest .* says 2"),
    "a billion layers": (lambda p: own_config(p, text_layers=10**9), "says text_layers 1000000000"),
    "heads that do not divide": (lambda p: own_config(p, vision_heads=3), "multiple of vision_heads"),
    "no heads": (lambda p: own_config(p, vision_heads=0), "found 0"),
    "negative heads": (lambda p: own_config(p, text_heads=-1), "is no X-CLIP model"),
    "text for heads": (lambda p: own_config(p, text_heads="1"), "is no X-CLIP model"),
    "text for statistics": (lambda p: own_config(p, pixel_std="abc"), "is no X-CLIP model"),
    "two statistics": (lambda p: own_config(p, pixel_std=[1.0, 2.0]), "is no X-CLIP model"),
    "endless statistics": (lambda p: own_config(p, pixel_mean=[10**400] * 3), "is no X-CLIP model"),
    "nothing for alpha": (lambda p: own_config(p, prompt_alpha=None), "is no X-CLIP model"),
    "NaN for alpha": (lambda p: own_config(p, prompt_alpha=float("nan")), "NaN is no number"),
    "other activation": (lambda p: own_config(p, activation=["relu"]), "is no X-CLIP model"),
    # hugging face folders
    "folder without anything": (lambda p: hf_bare(p, "config.json"), r"has no config\.json"),
    "folder without weights": (lambda p: hf_bare(p, "model.safetensors"), r"no weights: expected model\.safetensors"),
    "folder of another model": (lambda p: hf(p, model_type="clip"), "is of a 'clip' model"),
    "folder with eps": (lambda p: hf(p, **{"vision_config.layer_norm_eps": 1e-6}), "layer_norm_eps 1e-06"),
    "folder with gelu": (lambda p: hf(p, **{"text_config.hidden_act": "gelu"}), "hidden_act 'gelu'"),
    "folder that lies": (lambda p: hf(p, **{"vision_config.num_frames": 8}), "num_frames, says frames 8, .* says 4"),
    "folder of two minds": (lambda p: hf(p, prompt_num_attention_heads=2), "says embed_heads 2, .* says 1"),
    "folder of lists": (lambda p: hf(p, vision_config=[1]), "must hold an object as vision_config"),
    "folder with huge json": (lambda p: hf_with(p, "config.json", b" " * (2 << 20)), "too long for a configuration"),
    "folder with bad json": (lambda p: hf_with(p, "config.json", b"\xff\xfe{"), "is not valid JSON"),
    "folder with bad statistics": (
        lambda p: hf_with(p, "preprocessor_config.json", '{"image_mean": [0.5, "x"]}'),
        "image_mean as three numbers",
    ),
    "folder with code": (
        lambda p: hf_bare(p, "model.safetensors", "pytorch_model.bin", {"model": Code()}),
        "Python code or objects",
    ),
    "shards elsewhere": (
        lambda p: hf_index(p, {"a": "../a.safetensors"}),
        "to a file of the same folder",
    ),
    "shards of numbers": (lambda p: hf_index(p, {"a": 3}), "to a file of the same folder"),
    "no shards": (lambda p: hf_index(p, []), "to a file of the same folder"),
    "lost shards": (lambda p: hf_index(p, {"a": "a.safetensors"}), "cannot read .*No such file"),
    "foreign hf tensor": (
        lambda p: write_tensors(p, {**hf_model().state_dict(), "vision_model.head.weight": torch.zeros(1)}),
        r"no X-CLIP model has: 'vision_model\.head\.weight'",
    ),
    "two of three projections": (
        lambda p: write_tensors(
            p,
            {k: v for k, v in hf_model().state_dict().items() if k != "mit.encoder.layers.1.self_attn.k_proj.bias"},
        ),
        r"q, k and v of 'mit\.resblocks\.1\.attn\.in_proj_bias'",
    ),
    "unlike projections": (
        lambda p: write_tensors(
            p, {**hf_model().state_dict(), "mit.encoder.layers.1.self_attn.k_proj.bias": torch.zeros(())}
        ),
        "must be there and of one shape",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.filterwarnings("error")
def test_hostile_checkpoint_is_one_line(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch):
    build, says = HOSTILE[case]
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = build(tmp_path / "checkpoint.bin")
    with pytest.raises(InputError, match=says) as caught:
        load_model(place)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 900
    assert not Path(MARK).exists()


def test_the_code_would_have_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Expression())).close()
    assert Path(MARK).exists()


@pytest.mark.slow
def test_a_mutated_file_never_brings_anything_but_an_input_error(tmp_path: Path):
    """Flipped bits in the first bytes and in the last, in every format; a flip in a weight may pass unseen."""
    model = create_model(TINY)
    generator = torch.Generator().manual_seed(1)
    messages = []
    for format in ("xclip_fast", "official"):
        path = tmp_path / format
        save_model(model, path, format)
        content = path.read_bytes()
        for _ in range(60):
            offset = int(torch.randint(0, 6000, (), generator=generator))
            end = int(torch.randint(0, 2, (), generator=generator))
            mutant = bytearray(content)
            mutant[-offset - 1 if end else offset] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
            path.write_bytes(mutant)
            try:
                load_model(path)
            except InputError as error:
                messages.append(str(error))
    assert len(messages) > 30
    assert all(map(str.isprintable, messages))


def test_special_files(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        load_model(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        load_model("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="does not exist"):
        load_model(tmp_path / "loop")


def test_a_failure_leaves_no_allow_list_behind(tmp_path: Path):
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(InputError):
        load_model(saved(tmp_path / "a.pth", Code()))
    assert set(torch.serialization.get_safe_globals()) == before
