"""Training of the demo's models: the same seed, the same bits; weights that load; every model learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xclip_fast.demo.models import MODELS, load_trained, weights_path
from xclip_fast.demo.train import main, save, train
from xclip_fast.errors import InputError


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xclip_fast.demo.train.CLIPS_PER_PAIR", 1)


def bits(seed: int) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, model in train(seed=seed, steps=2).items()
        for key, value in model.state_dict().items()
    }


@pytest.mark.slow
def test_same_seed_same_bits() -> None:
    first, again, other = bits(0), bits(0), bits(1)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not any(torch.equal(value, other[key]) for key, value in first.items() if key.endswith("in_proj_weight"))


@pytest.mark.slow
def test_a_model_learns_the_same_alone() -> None:
    together, alone = train(steps=2)["average"], train(["average"], steps=2)["average"]
    assert all(torch.equal(value, alone.state_dict()[key]) for key, value in together.state_dict().items())


def test_state_of_torch_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(["average"], steps=1)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_progress_reports_every_step() -> None:
    seen: list[tuple[int, dict[str, float]]] = []
    train(["average", "xclip"], steps=3, progress=lambda step, losses: seen.append((step, losses)))
    assert [step for step, _ in seen] == [1, 2, 3]
    assert all(set(losses) == {"average", "xclip"} and min(losses.values()) > 0 for _, losses in seen)


@pytest.mark.slow
def test_command_writes_weights_that_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        main(["--steps", "2", "--threads", "1", "--clips", "1", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    expected = train(steps=2)
    for name in MODELS:
        state = load_trained(name, tmp_path).state_dict()
        wanted = expected[name].state_dict()
        assert all(torch.equal(value, wanted[key].half().float()) for key, value in state.items())
    assert capsys.readouterr().out.count("validation top-1") == len(MODELS)


@pytest.mark.slow
def test_weights_in_a_missing_folder_are_an_input_error(tmp_path: Path) -> None:
    for name, model in train(steps=1).items():
        with pytest.raises(InputError, match="cannot write"):
            save({name: model}, tmp_path / "missing")
        assert not weights_path(name, tmp_path / "missing").exists()


def test_command_wants_its_folder_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "missing")])
    assert ended.value.code == 2
    assert "is no folder: make it first" in capsys.readouterr().err
