"""Whole runs on tiny videos: what is learned, what is left in the folder, what stops a run, and in which words."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_cases import CLASSES, run_settings, write_videos

from xclip_fast import InputError, create_model, load_model
from xclip_fast.train import load_config, train
from xclip_fast.train.prepare import open_model


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder)
    return folder


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_learns_and_leaves_all_it_promises(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    settings = run_settings(
        videos,
        data={"validation": str(videos / "validation.txt")},
        optimizer={"epochs": 12, "lr": 2e-3},
        loss={"mixup": 0, "cutmix": 0, "label_smoothing": 0},
        run={"trackers": ["tensorboard"]},
    )
    seen: list[dict[str, Any]] = []
    result = train(settings, out, progress=seen.append)
    lines = log_of(out)
    assert [line["step"] for line in lines] == [*range(1, 37)] == [line["step"] for line in seen]
    assert {line["steps"] for line in seen} == {36}
    assert result.loss == lines[-1]["loss"] < 0.3 * lines[0]["loss"]
    assert result.top1 == lines[-1]["top1"] == 1.0
    assert (lines[-1]["validated"], lines[-1]["not_validated"], result.quarantined) == (11, 0, 0)
    assert [line["step"] for line in lines if "top1" in line] == [*range(3, 37, 3)]
    assert all(line["compute_clips_per_second"] > 0 and line["decode_clips_per_second"] > 0 for line in lines)
    names = {path.name for path in out.iterdir()}
    assert names >= {"model.safetensors", "best.safetensors", "log.jsonl", "run.json", "loss.svg", "accuracy.svg"}
    assert names >= {"checkpoints", "tensorboard"}
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-0000000033", "step-0000000036"]
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["optimizer"]["epochs"] == 12
    assert run["data"]["classes"] == list(CLASSES)
    assert (run["data"]["videos"], run["processes"]) == (11, 1)
    assert run["machine"]["torch"] == torch.__version__
    # what it says repeats it
    again = train(run["settings"], tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert again.loss == result.loss
    model = load_model(result.weights)
    assert model.config.frames == 4
    assert (out / "loss.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_what_is_frozen_stays_and_the_rest_moves(videos: Path, tmp_path: Path) -> None:
    for text in ("frozen", "tuned"):
        settings = run_settings(videos, model={"text": text})
        start = open_model(load_config(settings).model, seed=1024).state_dict()
        found = load_file(train(settings, tmp_path / text).weights)
        of_text = ("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_projection", "logit")
        for name, before in start.items():
            stays = text == "frozen" and name.startswith(of_text)
            assert torch.equal(before, found[name]) == stays, name


@pytest.mark.slow
def test_the_average_follows_the_weights(videos: Path, tmp_path: Path) -> None:
    settings = run_settings(videos, optimizer={"epochs": 1, "ema": 0.75}, run={"checkpoint_steps": 1, "keep": 9})
    train(settings, tmp_path / "run")
    live = [
        load_file(tmp_path / "run" / "checkpoints" / f"step-000000000{step}" / "model.safetensors")
        for step in (1, 2, 3)
    ]
    found = load_file(tmp_path / "run" / "model.safetensors")
    start = open_model(load_config(settings).model, seed=1024).state_dict()
    for name, value in start.items():
        expected = value.double()
        for weights in live:
            expected = 0.75 * expected + 0.25 * weights[name].double()
        torch.testing.assert_close(found[name].double(), expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(found["visual.proj"], live[-1]["visual.proj"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"precision": "bfloat16"}},
        {"model": {"gradient_checkpointing": True, "drop_path": 0.2}},
        {"loss": {"kind": "info_nce"}, "model": {"text": "tuned"}},
        {"loss": {"kind": "sigmoid"}},
        {"optimizer": {"clip_norm": 0.1, "accumulation": 2}},
        {"model": {"pixels": "clip"}},
    ],
    ids=["bfloat16", "checkpointing", "info_nce", "sigmoid", "clipped", "pixels"],
)
def test_other_settings_run(videos: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    settings = run_settings(videos, **sections)
    result = train(settings, tmp_path / "run")
    lines = log_of(tmp_path / "run")
    assert len(lines) == result.steps == 6
    if "clip_norm" in settings["optimizer"]:
        assert all(line["gradient_norm"] > 0 for line in lines)
    model = load_model(result.weights)
    expected = (0.48145466, 0.4578275, 0.40821073) if "pixels" in settings["model"] else (0.485, 0.456, 0.406)
    assert model.config.pixel_mean == expected


@pytest.mark.slow
def test_accumulation_adds_up_to_the_whole_batch(videos: Path, tmp_path: Path) -> None:
    # beyond Adam's rounding: a key's bias has no gradient but noise, which a small eps blows up to whole steps
    whole, parts = (
        train(run_settings(videos, optimizer={"eps": 1e-4, "accumulation": rounds}), tmp_path / str(rounds))
        for rounds in (1, 2)
    )
    losses = [[line["loss"] for line in log_of(tmp_path / rounds)] for rounds in ("1", "2")]
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-5, rtol=0)
    found, expected = load_file(parts.weights), load_file(whole.weights)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_global_random_state_is_left_alone(videos: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(run_settings(videos, optimizer={"epochs": 1}), tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
def test_training_starts_from_weights(videos: Path, tmp_path: Path) -> None:
    settings = run_settings(videos, optimizer={"epochs": 1})
    first = train(settings, tmp_path / "first")
    settings["model"] = {"weights": str(first.weights), "frames": 4}
    second = train(settings, tmp_path / "second")
    assert log_of(tmp_path / "second")[0]["loss"] != log_of(tmp_path / "first")[0]["loss"]
    assert load_model(second.weights).config == load_model(first.weights).config


def test_a_loss_that_is_no_number_names_the_videos(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xclip_fast.train import run

    def spoiled(kind: str, logits: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        each = run_losses(kind, logits, targets, labels)
        # the blue videos are spoiled
        return torch.where(labels == 2, each * float("nan"), each)

    run_losses = run.losses
    monkeypatch.setattr(run, "losses", spoiled)
    settings = run_settings(videos, optimizer={"batch_size": 11})
    with pytest.raises(InputError) as error:
        train(settings, tmp_path / "run")
    message = str(error.value)
    assert "the loss of step 1 is nan, from" in message
    assert all((f"a clip {number}.mp4" in message) == (number % 4 == 2) for number in range(11))
    assert "\n" not in message
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_it_goes_on_from_the_checkpoint_before(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xclip_fast.train import state

    settings = run_settings(videos, run={"checkpoint_steps": 2})
    whole = train(settings, tmp_path / "whole")
    saved = 0
    save_file = state.save_file

    def full(*arguments: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*arguments)

    monkeypatch.setattr(state, "save_file", full)
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"the checkpoint of step 4 cannot be written.*No space left.*--resume"):
        train(settings, out)
    monkeypatch.undo()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000000002"]
    train(settings, out, resume=True)
    assert (out / "model.safetensors").read_bytes() == whole.weights.read_bytes()
    assert [line["loss"] for line in log_of(out)] == [line["loss"] for line in log_of(tmp_path / "whole")]


@pytest.mark.slow
def test_a_folder_that_holds_a_run_is_not_overwritten(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = run_settings(videos, optimizer={"epochs": 1})
    train(settings, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"holds a run: go on with it \(--resume\), or choose another folder"):
        train(settings, out)
    for key, other in (
        ("optimizer.lr", {"optimizer": {"lr": 2e-3, "epochs": 1}}),
        ("run.seed", {"run": {"seed": 1}, "optimizer": {"epochs": 1}}),
        ("model.frames", {"model": {"frames": 8}, "optimizer": {"epochs": 1}}),
    ):
        with pytest.raises(InputError, match=rf"of another run: {key} differs"):
            train(run_settings(videos, **other), out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # what does not change the result may change
    result = train(run_settings(videos, optimizer={"epochs": 1}, run={"keep": 1}), out, resume=True)
    assert result.steps == 3


def test_other_videos_are_another_run(videos: Path, tmp_path: Path) -> None:
    from xclip_fast.train.prepare import open_videos
    from xclip_fast.train.run import _check_same
    from xclip_fast.train.state import Saved

    settings = load_config(run_settings(videos))
    found = open_videos(settings.data)
    facts = {"settings": settings.model_dump(mode="json"), "data": found.facts()}
    _check_same(Saved(tmp_path, 1, facts), settings, found)
    (tmp_path / "train.txt").write_text("".join((videos / "train.txt").read_text().splitlines(keepends=True)[:-1]))
    fewer = load_config(run_settings(videos, data={"train": str(tmp_path / "train.txt")}))
    changed = {**facts, "settings": fewer.model_dump(mode="json")}
    with pytest.raises(InputError, match=r"data\.videos differs"):
        _check_same(Saved(tmp_path, 1, changed), fewer, open_videos(fewer.data))


def bad_runs(videos: Path) -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "no list": (run_settings(videos, data={"train": "none.txt"}), "none.txt"),
        "no labels": (run_settings(videos, data={"labels": "none.csv"}), "none.csv"),
        "no weights": (
            run_settings(videos, model={"sizes": None, "weights": "./none.safetensors"}),
            "none.safetensors",
        ),
        "no gpu": (run_settings(videos, run={"device": "cuda"}), "device 'cuda' was asked for"),
        "template": (run_settings(videos, data={"template": "a video"}), "template"),
        "accumulation": (run_settings(videos, optimizer={"accumulation": 3}), "batch_size 4 was asked for"),
        "trackers": (run_settings(videos, run={"trackers": ["paper"]}), "paper"),
    }


@pytest.mark.parametrize(
    "name", ["no list", "no labels", "no weights", "no gpu", "template", "accumulation", "trackers"]
)
def test_bad_input_is_one_line_before_work_begins(videos: Path, tmp_path: Path, name: str) -> None:
    if name == "no gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    settings, message = bad_runs(videos)[name]
    with pytest.raises(InputError) as error:
        train(settings, tmp_path / "run")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_weights_of_another_variant_are_refused(videos: Path, tmp_path: Path) -> None:
    from xclip_fast import save_model
    from xclip_fast.config import XCLIPConfig

    save_model(create_model(XCLIPConfig(**{**run_settings(videos)["model"]["sizes"]})), tmp_path / "tiny.safetensors")
    section = load_config(
        run_settings(videos, model={"sizes": None, "weights": str(tmp_path / "tiny.safetensors"), "variant": "B/32"})
    )
    with pytest.raises(InputError, match=r"has image_size 32, and B/32 has 224"):
        open_model(section.model, seed=0)
