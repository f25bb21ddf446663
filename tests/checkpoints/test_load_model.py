"""Every source of weights ends in the same model, and every tensor of it is accounted for."""

from __future__ import annotations

import copyreg
import sys
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkpoint_zoo import (
    TINY,
    clip_state,
    edit_json,
    hf_logits,
    hf_model,
    inputs,
    logits,
    same_bits,
    tiny_model,
    write_tensors,
)
from golden import Golden

from xclip_fast import InputError, XCLIPConfig, create_model, load_model, save_model
from xclip_fast.checkpoints import LoadReport
from xclip_fast.checkpoints.names import added_to_clip, hf_names
from xclip_fast.config import CLIP_MEAN, CLIP_STD
from xclip_fast.reference.positions import temporal_positions


def official_file(path: Path, model, prefix: str = "", **beside: object) -> Path:
    torch.save({"model": {prefix + name: tensor for name, tensor in model.state_dict().items()}, **beside}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_official_file(tmp_path: Path, prefix: str):
    model = tiny_model()
    loaded = load_model(official_file(tmp_path / "a b.pth", model, prefix, epoch=3, max_accuracy=0.7))
    same_bits(loaded, model)
    assert loaded.config == TINY
    assert loaded.load_report == LoadReport("official", len(model.state_dict()))


def test_loaded_model_is_ready_to_use_and_to_train(tmp_path: Path):
    model = load_model(official_file(tmp_path / "a.pth", tiny_model()))
    assert not model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model(*inputs()).sum().backward()
    assert model.visual.conv1.weight.grad.abs().sum() > 0


def test_golden_weights_load_and_give_the_golden_logits(golden: Golden):
    loaded = load_model({"model": golden.weights})
    assert loaded.config == golden.config
    same_bits(loaded, golden.model())
    video, tokens = golden.video, golden.tokens
    torch.testing.assert_close(logits(loaded, video, tokens), golden.outputs["logits"], rtol=1e-5, atol=1e-4)


def test_file_of_the_official_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It holds an optimiser and a yacs configuration, which is no reason to run its code."""

    class CfgNode(dict):
        def __init__(self) -> None:
            raise AssertionError("constructed")

        def __reduce__(self):
            return copyreg.__newobj__, (CfgNode,), {"frozen": True}, None, iter(self.items())

    fake = ModuleType("yacs.config")
    fake.CfgNode = CfgNode
    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", fake)
    node = dict.__new__(CfgNode)
    node["DATA"] = {"NUM_FRAMES": 8}
    model = tiny_model()
    optimiser = torch.optim.AdamW(model.parameters())
    path = official_file(tmp_path / "ckpt_epoch_1.pth", model, config=node, optimizer=optimiser.state_dict(), epoch=1)
    monkeypatch.undo()
    same_bits(load_model(path), model)


def test_old_pickle_format(tmp_path: Path):
    model = tiny_model()
    torch.save({"model": model.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same_bits(load_model(tmp_path / "old.pth"), model)


def test_state_dict_in_memory_is_copied():
    model = tiny_model()
    state = OrderedDict(model.state_dict())
    loaded = load_model(state)
    same_bits(loaded, model)
    ours = {parameter.data_ptr() for parameter in loaded.parameters()}
    assert ours.isdisjoint(parameter.data_ptr() for parameter in model.parameters())


def test_loaded_weights_do_not_depend_on_the_file(tmp_path: Path):
    model = tiny_model()
    for format, name in (("xclip_fast", "a.safetensors"), ("official", "a.pth")):
        save_model(model, tmp_path / name, format)
        loaded = load_model(tmp_path / name)
        with (tmp_path / name).open("r+b") as file:
            file.write(b"\xff" * (tmp_path / name).stat().st_size)
        same_bits(loaded, model)


def test_official_names_in_plain_safetensors(tmp_path: Path):
    model = tiny_model()
    loaded = load_model(str(write_tensors(tmp_path / "a.safetensors", model.state_dict())))
    same_bits(loaded, model)
    assert loaded.load_report.format == "official"


# Hugging Face


def test_hf_folder(tmp_path: Path):
    theirs = hf_model()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config == TINY
    assert ours.load_report == LoadReport("hf", len(ours.state_dict()))
    video, tokens = inputs()
    torch.testing.assert_close(logits(ours, video, tokens), hf_logits(theirs, video, tokens), rtol=1e-5, atol=1e-5)


def test_hf_instance_is_copied_not_shared():
    theirs = hf_model()
    ours = load_model(theirs)
    video, tokens = inputs()
    before = hf_logits(theirs, video, tokens)
    torch.testing.assert_close(logits(ours, video, tokens), before, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(hf_logits(theirs, video, tokens), before)


def test_hf_other_head_counts_are_kept(tmp_path: Path):
    heads = {
        "vision_config.num_attention_heads": 4,
        "vision_config.mit_num_attention_heads": 8,
        "prompt_num_attention_heads": 8,
        "text_config.num_attention_heads": 2,
    }
    theirs = hf_model(**heads)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (ours.config.vision_heads, ours.config.embed_heads, ours.config.text_heads) == (4, 8, 2)
    assert not ours.load_report.repairs
    video, tokens = inputs()
    torch.testing.assert_close(logits(ours, video, tokens), hf_logits(theirs, video, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beside", [True, False])
def test_hf_file_with_and_without_its_configuration(tmp_path: Path, beside: bool):
    theirs = hf_model(**{"vision_config.num_attention_heads": 4})
    theirs.save_pretrained(tmp_path)
    if not beside:
        (tmp_path / "config.json").unlink()
    ours = load_model(tmp_path / "model.safetensors")
    assert ours.config.vision_heads == (4 if beside else 2)
    assert any("head counts assumed" in repair for repair in ours.load_report.repairs) is not beside


def test_hf_old_pickle_weights_with_their_buffers(tmp_path: Path):
    theirs = hf_model()
    theirs.save_pretrained(tmp_path)
    expected = load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    buffers = {f"{tower}_model.embeddings.position_ids": torch.arange(20)[None] for tower in ("text", "vision")}
    torch.save({**theirs.state_dict(), **buffers}, tmp_path / "pytorch_model.bin")
    same_bits(load_model(tmp_path), expected)


def test_hf_shards(tmp_path: Path):
    theirs = hf_model()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="500KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    same_bits(load_model(tmp_path / "parts"), load_model(tmp_path / "whole"))


def test_hf_old_configuration_with_repeated_sections(tmp_path: Path):
    hf_model(**{"vision_config.num_attention_heads": 4}).save_pretrained(tmp_path)
    edit_json(
        tmp_path / "config.json",
        **{"vision_config.num_attention_heads": 8},
        vision_config_dict={"num_attention_heads": 4},
        text_config_dict=None,
    )
    assert load_model(tmp_path).config.vision_heads == 4


def test_hf_statistics_of_the_preprocessor(tmp_path: Path):
    hf_model().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 0.5, 0.25]}')
    config = load_model(tmp_path).config
    assert (config.pixel_mean, config.pixel_std) == ((0.5, 0.4, 0.3), (1.0, 0.5, 0.25))


LARGE = {
    "projection_dim": 768,
    "prompt_num_attention_heads": 8,
    "vision_config.mit_hidden_size": 768,
    "vision_config.mit_intermediate_size": 3072,
    "vision_config.mit_num_attention_heads": 8,
    "vision_config.mit_num_hidden_layers": 1,
}


@pytest.mark.parametrize("form", ["folder", "instance"])
def test_hf_large_variants_get_their_twelve_heads_back(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture):
    theirs = hf_model(**LARGE)
    theirs.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "xclip_fast"):
        ours = load_model(tmp_path if form == "folder" else theirs)
    assert ours.config.embed_heads == 12
    assert "from 8 to 12" in caplog.text
    assert [repair for repair in ours.load_report.repairs if "from 8 to 12" in repair]
    right = hf_model(**LARGE | {"prompt_num_attention_heads": 12, "vision_config.mit_num_attention_heads": 12})
    right.load_state_dict(theirs.state_dict())
    video, tokens = inputs()
    torch.testing.assert_close(logits(ours, video, tokens), hf_logits(right, video, tokens), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(ours, video, tokens), hf_logits(theirs, video, tokens), rtol=1e-3, atol=1e-3)


def test_eight_heads_at_the_large_width_can_be_meant(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = tiny_model(XCLIPConfig(**{**TINY.to_dict(), "embed_dim": 768, "embed_heads": 8}))
    save_model(model, tmp_path / "hf", "hf")
    loaded = load_model(tmp_path / "hf")
    assert loaded.config == model.config
    assert "heads" not in caplog.text


# CLIP


@pytest.mark.parametrize("form", ["file", "nested", "memory"])
def test_clip_state_dict(tmp_path: Path, form: str):
    model = tiny_model()
    state = clip_state(model)
    notes = {"input_resolution": 64, "context_length": 20, "vocab_size": torch.tensor(100)}
    path = tmp_path / "clip.pt"
    torch.save({**state, **notes} if form == "file" else {"state_dict": state, "epoch": 1}, path)
    torch.manual_seed(5)
    loaded = load_model(state if form == "memory" else path)
    ours = loaded.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())
    assert loaded.load_report.format == "clip"
    assert loaded.load_report.loaded == len(state)
    assert set(loaded.load_report.initialised) == set(ours) - set(state)
    assert loaded.config.frames == 8
    assert (loaded.config.pixel_mean, loaded.config.pixel_std) == (CLIP_MEAN, CLIP_STD)
    torch.manual_seed(5)
    fresh = create_model(loaded.config).state_dict()
    assert all(torch.equal(ours[name], fresh[name]) for name in loaded.load_report.initialised)


def test_what_x_clip_adds_starts_as_specified():
    state = load_model(clip_state(tiny_model()), frames=16).state_dict()
    assert state["mit.positional_embedding"].shape == (1, 16, 64)
    assert torch.equal(state["prompts_generator.alpha"], torch.full((64,), 0.1))
    assert 0.9 < state["prompts_visual_proj"].std() < 1.1
    for name, tensor in state.items():
        if not added_to_clip(name) or tensor.ndim != 1 or name == "prompts_generator.alpha":
            continue
        if name.endswith("message_fc.bias"):
            assert tensor.abs().sum() > 0
            continue
        norm = any(part in name for part in ("ln_", "_ln.", "norm"))
        assert torch.equal(tensor, torch.full_like(tensor, float(norm and name.endswith("weight")))), name
    assert 0.015 < state["mit.resblocks.0.mlp.c_fc.weight"].std() < 0.025


def test_half_of_a_clip_tower_is_not_initialised_silently():
    state = clip_state(tiny_model())
    del state["visual.ln_pre.weight"]
    with pytest.raises(InputError, match=r"lacks tensors: 'visual\.ln_pre\.weight'"):
        load_model(state)


def test_clip_files_of_other_head_sizes_are_refused():
    with pytest.raises(InputError, match="heads of a tower of width 1280"):
        load_model({"visual.conv1.weight": torch.zeros(1280, 3, 1, 1)})


# options


@pytest.mark.parametrize("frames", [1, 3, 4, 9])
def test_other_clip_length(tmp_path: Path, frames: int, caplog: pytest.LogCaptureFixture):
    model = tiny_model(dtype=torch.float16)
    save_model(model, tmp_path / "a.safetensors")
    loaded = load_model(tmp_path / "a.safetensors", frames=frames)
    assert loaded.config == TINY.with_frames(frames)
    expected = temporal_positions(model.mit.positional_embedding.float(), frames).half()
    assert torch.equal(loaded.mit.positional_embedding, expected)
    assert len(loaded.load_report.repairs) == (frames != 4)
    others = {**model.state_dict(), "mit.positional_embedding": expected}
    assert all(torch.equal(tensor, others[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_or_as_asked(tmp_path: Path, dtype: torch.dtype):
    model = tiny_model(dtype=dtype)
    save_model(model, tmp_path / "a.safetensors")
    same_bits(load_model(tmp_path / "a.safetensors"), model)
    for asked in (torch.float32, torch.bfloat16):
        same_bits(load_model(tmp_path / "a.safetensors", dtype=asked), deepcopy(model).to(asked))


@pytest.mark.parametrize(
    ("some", "rest", "ends"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_mixed_dtypes_end_in_the_one_that_holds_both(some: torch.dtype, rest: torch.dtype, ends: torch.dtype):
    mixed = {name: tensor.to(some if tensor.ndim > 1 else rest) for name, tensor in tiny_model().state_dict().items()}
    model = load_model(mixed)
    (said,) = model.load_report.repairs
    assert said.endswith(f"all became {str(ends).removeprefix('torch.')}")
    loaded = model.state_dict()
    assert all(torch.equal(tensor, mixed[name].to(ends)) and tensor.dtype == ends for name, tensor in loaded.items())


def test_clip_in_half_precision_stays_there():
    loaded = load_model({name: tensor.half() for name, tensor in clip_state(tiny_model()).items()})
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}


def test_a_dtype_too_narrow_is_said():
    state = tiny_model().state_dict()
    state["ln_final.bias"][3] = 1e6
    with pytest.raises(InputError, match=r"does not fit float16: 'ln_final\.bias' overflow"):
        load_model(state, dtype=torch.float16)
    assert load_model(state, dtype=torch.bfloat16).ln_final.bias[3] > 9e5


@pytest.mark.parametrize("frames", [0, -1, 2.0, True, "8"])
def test_frames_must_be_a_number(frames: object):
    with pytest.raises(ValueError, match="frames must be a positive integer"):
        load_model("nowhere.pth", frames=frames)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "float16"])
def test_dtype_must_be_one_of_weights(dtype: object):
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_model("nowhere.pth", dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "abacus", "-1"])
def test_device_must_be_there(device: str):
    with pytest.raises(InputError, match=f"device '{device}'"):
        load_model("nowhere.pth", device=device)


def test_device_is_used():
    assert load_model(tiny_model().state_dict(), device="cpu").logit_scale.device.type == "cpu"


def test_one_line_of_log_tells_it_all(caplog: pytest.LogCaptureFixture):
    state = clip_state(tiny_model())
    with caplog.at_level("INFO", "xclip_fast"):
        load_model(state)
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{len(state)} tensors in float32" in line
    assert "QuickGELU assumed" in line
    assert "\n" not in line


def test_names_swapped_between_norms_would_be_seen():
    """The comparison with transformers above rests on this: its weights differ in every tensor."""
    theirs = hf_model().state_dict()
    flat = [tensor.flatten()[:1].item() for name, tensor in theirs.items()]
    assert len(set(flat)) == len(flat)
    assert {name for ours in tiny_model().state_dict() for name in hf_names(ours)} == set(theirs)
