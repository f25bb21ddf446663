"""Round trips are bit-equal, files are whole or absent, and transformers reads what we write."""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_zoo import TINY, hf_logits, inputs, logits, same_bits, tiny_model
from safetensors import safe_open

from xclip_fast import InputError, XCLIPConfig
from xclip_fast.checkpoints import load_model, save_model

PLACES = {"xclip_fast": "a b.safetensors", "official": "a b.pth", "hf": "a folder"}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

# sizes that each format can hold
CONFIGS = {
    "tiny": TINY,
    "long": replace(TINY, frames=7, mit_layers=1, prompt_layers=3, prompt_alpha=0.25),
    "wide text": replace(TINY, text_width=128, text_heads=2, vision_width=64, vision_heads=1, vision_mlp_width=256),
}
ODD = replace(TINY, vision_heads=4, embed_heads=8, text_heads=4, vision_mlp_width=320, pixel_mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("format", PLACES)
def test_round_trip_is_bit_equal(tmp_path: Path, format: str, config: XCLIPConfig, dtype: torch.dtype):
    model = tiny_model(config, dtype)
    save_model(model, str(tmp_path / PLACES[format]), format)
    loaded = load_model(tmp_path / PLACES[format])
    same_bits(loaded, model)
    assert loaded.config == config
    assert loaded.load_report.format == format
    assert not loaded.load_report.repairs
    assert not loaded.load_report.initialised


@pytest.mark.parametrize("format", ["xclip_fast", "hf"])
def test_odd_sizes_survive(tmp_path: Path, format: str):
    model = tiny_model(ODD)
    save_model(model, tmp_path / "m", format)
    loaded = load_model(tmp_path / "m")
    same_bits(loaded, model)
    assert loaded.config == ODD


def test_own_format_holds_every_field(tmp_path: Path):
    config = replace(ODD, activation="gelu", prompt_alpha=-2.5, pixel_std=(0.5, 1.5, 2.5))
    save_model(tiny_model(config), tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors").config == config


def test_one_format_after_the_other(tmp_path: Path):
    model = source = tiny_model()
    for step, format in enumerate(["official", "hf", "xclip_fast", "hf", "official", "xclip_fast"]):
        save_model(source, tmp_path / f"{step}", format)
        source = load_model(tmp_path / f"{step}")
    same_bits(source, model)


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_heads": 4},
        {"text_heads": 2},
        {"embed_heads": 8},
        {"vision_mlp_width": 320},
        {"activation": "gelu"},
    ],
)
def test_official_format_refuses_what_the_official_code_cannot_build(tmp_path: Path, changes: dict):
    (field,) = changes
    with pytest.raises(InputError, match=f"official format cannot hold {field}"):
        save_model(tiny_model(replace(TINY, **changes)), tmp_path / "m.pth", "official")
    assert not any(tmp_path.iterdir())


def test_official_format_keeps_the_statistics_and_says_that_official_code_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = replace(TINY, pixel_mean=(0.1, 0.2, 0.3))
    save_model(tiny_model(config), tmp_path / "m.pth", "official")
    assert "ImageNet" in caplog.text
    assert load_model(tmp_path / "m.pth").config == config


def test_hf_format_refuses_gelu_towers(tmp_path: Path):
    with pytest.raises(InputError, match="hf format cannot hold activation 'gelu'"):
        save_model(tiny_model(replace(TINY, activation="gelu")), tmp_path / "m", "hf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["xclip_fast", "official"])
def test_the_same_model_is_the_same_bytes(tmp_path: Path, format: str):
    model = tiny_model()
    for name in "ab":
        save_model(model, tmp_path / name, format)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_official_file_is_what_official_code_reads(tmp_path: Path):
    model = tiny_model()
    save_model(model, tmp_path / "m.pth", "official")
    content = torch.load(tmp_path / "m.pth", weights_only=True)
    assert list(content["model"]) == list(model.state_dict())
    assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in content["model"].values())


def test_long_names_are_written(tmp_path: Path):
    save_model(tiny_model(), tmp_path / ("ö" * 120))
    assert load_model(tmp_path / ("ö" * 120)).config == TINY


def test_own_file_shows_its_configuration_to_any_reader(tmp_path: Path):
    save_model(tiny_model(), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert XCLIPConfig.from_dict(json.loads(metadata["xclip_fast"])["config"]) == TINY


@pytest.mark.parametrize("config", [TINY, ODD, replace(TINY, embed_dim=192, embed_heads=3, frames=5)])
def test_transformers_reads_the_folder_and_agrees(tmp_path: Path, config: XCLIPConfig):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(config)
    save_model(model, tmp_path / "m", "hf")
    theirs, report = transformers.XCLIPModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(report.values())
    video, tokens = inputs(config)
    torch.testing.assert_close(
        hf_logits(theirs.eval(), video, tokens), logits(model, video, tokens), rtol=1e-5, atol=1e-5
    )
    # what transformers writes in its turn still has all of it
    theirs.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again")
    same_bits(again, model)
    assert replace(again.config, pixel_mean=config.pixel_mean) == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_transformers_takes_the_dtype_of_the_folder(tmp_path: Path, dtype: torch.dtype):
    transformers = pytest.importorskip("transformers")
    save_model(tiny_model(dtype=dtype), tmp_path / "m", "hf")
    assert transformers.XCLIPModel.from_pretrained(tmp_path / "m", dtype="auto").dtype == dtype


def test_transformers_reads_the_preprocessor(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    save_model(tiny_model(ODD), tmp_path / "m", "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "m")
    assert tuple(processor.image_mean) == ODD.pixel_mean


def test_weights_that_are_views_do_not_drag_their_base_along(tmp_path: Path):
    model = tiny_model()
    whole = torch.randn(100, *model.visual.proj.shape)
    model.visual.proj = torch.nn.Parameter(whole[3])
    model.text_projection = torch.nn.Parameter(torch.randn(64, 64).T)
    for format, place in PLACES.items():
        save_model(model, tmp_path / place, format)
        same_bits(load_model(tmp_path / place), model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert (tmp_path / PLACES["official"]).stat().st_size < 1.1 * weights + 60_000


def test_saving_changes_nothing_in_the_model(tmp_path: Path):
    model = tiny_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for format, place in PLACES.items():
        save_model(model, tmp_path / place, format)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("format", PLACES)
def test_saving_twice_replaces_and_leaves_no_litter(tmp_path: Path, format: str):
    target = tmp_path / PLACES[format]
    save_model(tiny_model(), target, format)
    other = tiny_model(replace(TINY, frames=6))
    save_model(other, target, format)
    same_bits(load_model(target), other)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    if format == "hf":
        assert sorted(os.listdir(target)) == ["config.json", "model.safetensors", "preprocessor_config.json"]


def test_hf_folder_keeps_the_files_of_others(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    save_model(tiny_model(), tmp_path, "hf")
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("format", PLACES)
def test_files_have_ordinary_permissions(tmp_path: Path, format: str):
    save_model(tiny_model(), tmp_path / PLACES[format], format)
    (tmp_path / "probe").touch()
    expected = stat.S_IMODE((tmp_path / "probe").stat().st_mode)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {expected}


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files can't grow beyond 1 MB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", PLACES)
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, format: str, request: pytest.FixtureRequest):
    model, target = tiny_model(), tmp_path / PLACES[format]
    save_model(model, target, format)
    request.getfixturevalue("small_disk")
    with pytest.raises(InputError, match="cannot write") as caught:
        save_model(tiny_model(replace(TINY, frames=6)), target, format)
    assert "\n" not in str(caught.value)
    same_bits(load_model(target), model)
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert not [name for name in files if name.endswith(".tmp")]


def test_an_interrupt_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, target = tiny_model(), tmp_path / "m.pth"
    save_model(model, target, "official")
    write = torch.save

    def interrupted(content: object, file: object) -> None:
        write(content, file)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(), target, "official")
    same_bits(load_model(target), model)
    assert os.listdir(tmp_path) == ["m.pth"]


@pytest.mark.parametrize(
    ("place", "format", "says"),
    [
        ("no/where/m.safetensors", "xclip_fast", "its folder does not exist"),
        ("file/m.safetensors", "xclip_fast", "its folder does not exist"),
        (".", "xclip_fast", "is a .safetensors file"),
        (".", "official", "is a .pth file"),
        ("m.pth", "xclip_fast", "is a .safetensors file"),
        ("m.safetensors", "official", "is a .pth file"),
        ("file", "hf", "is a folder"),
        ("m", "onnx", "unknown checkpoint format 'onnx': choose one of xclip_fast, official, hf"),
    ],
)
def test_unfit_places_are_refused(tmp_path: Path, place: str, format: str, says: str):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match=says):
        save_model(tiny_model(), tmp_path / place, format)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


def test_unfit_models_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="found Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(InputError, match="on the meta device"):
        save_model(tiny_model().to("meta"), tmp_path / "m")
    strange = tiny_model()
    strange.visual.proj = torch.nn.Parameter(strange.visual.proj.to(torch.complex64))
    with pytest.raises(InputError, match=r"'visual\.proj': found complex64"):
        save_model(strange, tmp_path / "m")
    changed = tiny_model()
    changed.mit.positional_embedding = torch.nn.Parameter(torch.zeros(1, 9, 64))
    with pytest.raises(InputError, match=r"is \(1, 9, 64\) and must be \(1, 4, 64\)"):
        save_model(changed, tmp_path / "m")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_compiled_model_is_saved_by_its_own_names(tmp_path: Path):
    model = tiny_model()
    save_model(torch.compile(model), tmp_path / "m")
    same_bits(load_model(tmp_path / "m"), model)
