"""Which source a string or an object is, and what is said when it is none; optional libraries stay optional."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_zoo import hf_model, same_bits, tiny_model

from xclip_fast import InputError
from xclip_fast.checkpoints import load_model, save_model

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """A hub with one repository, which holds both kinds of weights; downloads are recorded."""
    hf_model().save_pretrained(tmp_path / "repo")
    weights = tmp_path / "repo" / "model.safetensors"
    calls: list[tuple[str, list[str]]] = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        calls.append((repo, allow_patterns))
        if "pytorch_model.bin" in allow_patterns:
            torch.save(hf_model().state_dict(), tmp_path / "repo" / "pytorch_model.bin")
        if repo.endswith("pickled"):
            weights.unlink(missing_ok=True)
        return str(tmp_path / "repo")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_hub_id_brings_safetensors(hub: list[tuple[str, list[str]]]):
    assert load_model("microsoft/xclip-base-patch32").load_report.format == "hf"
    ((repo, patterns),) = hub
    assert repo == "microsoft/xclip-base-patch32"
    assert not [pattern for pattern in patterns if ".bin" in pattern]


def test_hub_id_brings_pickled_weights_only_when_there_are_no_others(hub: list[tuple[str, list[str]]]):
    assert load_model("someone/pickled").load_report.format == "hf"
    assert "pytorch_model.bin" in hub[1][1]


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("name not known\nno snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"cannot get 'a/b' from the hub: name not known no snapshot: .* their folder"):
        load_model("a/b")


@pytest.mark.parametrize(
    ("library", "source", "says"),
    [
        ("huggingface_hub", "microsoft/xclip-base-patch32", "pip install huggingface_hub, or download its files"),
        ("open_clip", "ViT-B-32", "pip install open_clip_torch, or give a checkpoint file"),
        ("open_clip", "ViT-B-32/openai", "pip install open_clip_torch"),
    ],
)
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, library: str, source: str, says: str):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=says):
        load_model(source)


@pytest.mark.parametrize("source", ["B/32", "L/14-336"])
def test_a_variant_is_no_checkpoint(source: str):
    with pytest.raises(InputError, match="is a variant, not a checkpoint: create_model"):
        load_model(source)


@pytest.mark.parametrize(
    "source",
    [
        "nowhere.pth",
        "no/where.safetensors",
        "./nowhere",
        "~/no/where/at/all",
        "/no/where",
        "a/b/c",
        "a b/c",
        "https://host/file",
        "a\\b",
        "nul\0byte/x",
        "x" * 5000 + "/y" * 3,
        Path("ViT-B-32"),
        Path("microsoft/xclip"),
    ],
)
def test_a_path_that_is_not_there(source: Any, hub: list[tuple[str, list[str]]]):
    with pytest.raises(InputError, match="does not exist: give a checkpoint file") as caught:
        load_model(source)
    assert str(caught.value).isprintable()
    assert not hub


@pytest.mark.parametrize("source", [None, 3, b"a.pth", ["a"], torch.zeros(2), object()])
def test_other_objects(source: Any):
    with pytest.raises(InputError, match=f"cannot load a model from a {type(source).__name__}"):
        load_model(source)


def test_other_modules():
    with pytest.raises(InputError, match=r"from a Linear: give .* the state_dict\(\) of an X-CLIP"):
        load_model(torch.nn.Linear(2, 2))


def test_state_dicts_without_data_or_sense():
    for source, says in (
        ({}, "no tensors by name"),
        ({"a": torch.zeros(2)}, "neither X-CLIP nor CLIP"),
        (tiny_model().to("meta").state_dict(), "on the meta device"),
        ({"model": tiny_model().state_dict(), "xclip_fast": 3}, "settings must be text, found int"),
    ):
        with pytest.raises(InputError, match=says):
            load_model(source)


def test_odd_paths_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("ünï cödé.safetensors", "a\nb.safetensors", "no suffix", "B", "~/home.safetensors"):
        save_model(model, name)
        same_bits(load_model(name), model)
    assert (tmp_path / "home.safetensors").is_file()


@pytest.mark.slow
def test_loading_imports_no_optional_library(tmp_path: Path):
    for format in ("xclip_fast", "official", "hf"):
        save_model(tiny_model(), tmp_path / format, format)
    # the compiler comes with triton and takes seconds: nothing here needs it
    code = (
        "import sys; from xclip_fast.checkpoints import load_model, save_model\n"
        "for name in ('xclip_fast', 'official', 'hf'):\n"
        "    save_model(load_model(name), 'again ' + name, name)\n"
        "optional = {'transformers', 'open_clip', 'huggingface_hub', 'torchvision', 'torch._dynamo'}\n"
        "print(sorted(optional & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
