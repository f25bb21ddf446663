"""Text features on disk: found again by weights and tokens alone, never wrong, bounded, shared by processes."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from configs import LABELS
from torch import Tensor

from xclip_fast import InputError, XCLIPConfig
from xclip_fast.reference import XCLIP
from xclip_fast.text import TextCache, get_tokenizer
from xclip_fast.text.folder import TextFolder, digest

TOKENS = get_tokenizer(514)(["moving left", "moving right", "up"])
KEY = b"\x07" * 32


class Counted(XCLIP):
    """A model that counts the calls of its text tower."""

    calls = 0

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return super().encode_text(tokens)


def made() -> Counted:
    torch.manual_seed(0)
    return Counted(LABELS)


def encodes(model: Counted, folder: Path, tokens: Tensor = TOKENS) -> bool:
    """Whether a new cache had to ask the model; what it gives is always right."""
    model.calls = 0
    features = TextCache(folder=folder).encode(model, tokens)
    asked = model.calls > 0
    with torch.no_grad():
        torch.testing.assert_close(features, model.encode_text(tokens))
    return asked


def test_a_later_run_finds_the_same_bits(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    first = TextCache(folder=folder).encode(made(), TOKENS)
    model = made()
    cache = TextCache(folder=folder)
    assert torch.equal(cache.encode(model, TOKENS), first)
    assert model.calls == 0
    # the first file is kept in memory from then on
    os.unlink(next(folder.iterdir()))
    assert torch.equal(cache.encode(model, TOKENS), first)
    assert model.calls == 0


def test_it_is_off_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    TextCache().encode(made(), TOKENS)
    assert not os.listdir(tmp_path)


def by_weight(model: Counted) -> None:
    model.ln_final.bias.data[3] += 1e-3


def by_heads(model: Counted) -> None:
    model.__init__(XCLIPConfig.from_dict(LABELS.to_dict() | {"text_heads": 4}))  # type: ignore[misc]
    model.load_state_dict(made().state_dict())


def by_activation(model: Counted) -> None:
    model.__init__(XCLIPConfig.from_dict(LABELS.to_dict() | {"activation": "gelu"}))  # type: ignore[misc]
    model.load_state_dict(made().state_dict())


def by_dtype(model: Counted) -> None:
    model.double()


@pytest.mark.parametrize("change", [by_weight, by_heads, by_activation, by_dtype])
def test_another_model_has_its_own_file(change, tmp_path: Path) -> None:
    assert encodes(made(), tmp_path)
    assert not encodes(made(), tmp_path)
    model = made()
    change(model)
    assert encodes(model, tmp_path)
    assert not encodes(model, tmp_path)
    assert len(os.listdir(tmp_path)) == 2


def test_other_tokens_have_their_own_file_and_padding_has_none(tmp_path: Path) -> None:
    assert encodes(made(), tmp_path)
    assert encodes(made(), tmp_path, TOKENS.flip(0))
    assert encodes(made(), tmp_path, TOKENS[:2])
    padded = torch.zeros(3, 77, dtype=torch.int32)
    padded[:, : TOKENS.shape[1]] = TOKENS
    assert not encodes(made(), tmp_path, padded)


def test_what_no_text_depends_on_may_change(tmp_path: Path) -> None:
    assert encodes(made(), tmp_path)
    model = made()
    for parameter in (*model.visual.parameters(), *model.mit.parameters(), model.logit_scale):
        parameter.data.add_(1)
    assert not encodes(model, tmp_path)


def test_autocast_has_its_own_file(tmp_path: Path) -> None:
    plain = TextCache(folder=tmp_path).encode(made(), TOKENS)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert TextCache(folder=tmp_path).encode(made(), TOKENS).dtype == torch.bfloat16
    assert torch.equal(TextCache(folder=tmp_path).encode(made(), TOKENS), plain)
    assert len(os.listdir(tmp_path)) == 2


def test_a_model_that_does_not_say_how_it_computes_is_not_kept(tmp_path: Path) -> None:
    model = made()
    model.config = None  # type: ignore[assignment]
    model.encode_text = lambda tokens: torch.zeros(len(tokens), 64)  # type: ignore[method-assign]
    TextCache(folder=tmp_path).encode(model, TOKENS)
    assert not os.listdir(tmp_path)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def renamed_from_another_key(file: Path) -> None:
    other = file.parent / "other"
    TextFolder(other).get(KEY, lambda: torch.zeros(3, 64))
    os.replace(next(other.iterdir()), file)
    other.rmdir()


def without_checksum(file: Path) -> None:
    from safetensors.torch import save_file

    save_file({"features": torch.zeros(3, 64)}, file)


def huge_header(file: Path) -> None:
    file.write_bytes((2**60).to_bytes(8, "little") + b"{}")


def not_safetensors(file: Path) -> None:
    file.write_bytes(pickle.dumps([1, 2, 3]))


@pytest.mark.parametrize(
    "damage", [cut, emptied, flipped, renamed_from_another_key, without_checksum, huge_header, not_safetensors]
)
def test_a_damaged_file_is_made_again(damage, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert encodes(made(), tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damage(file)
    with caplog.at_level(logging.WARNING, "xclip_fast"):
        assert encodes(made(), tmp_path)
    assert "damaged" in caplog.text
    assert file.read_bytes() == whole
    assert os.listdir(tmp_path) == [file.name]
    assert not encodes(made(), tmp_path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_something_else_in_the_place_of_a_file_stops_nobody(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / f"{KEY.hex()}.safetensors"
    {"folder": place.mkdir, "pipe": lambda: os.mkfifo(place), "loop": lambda: place.symlink_to(place)}[kind]()
    features = torch.randn(2, 3)
    assert TextFolder(tmp_path).get(KEY, lambda: features) is features
    if kind == "folder":
        assert "not kept" in caplog.text
    else:
        assert torch.equal(TextFolder(tmp_path).get(KEY, lambda: torch.zeros(1)), features)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "file/below", "nul\0"):
        with pytest.raises(InputError, match="give another folder") as refused:
            TextCache(folder=tmp_path / name)
        assert "\n" not in str(refused.value)


def test_a_folder_that_goes_away_costs_no_features(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TextCache(folder=tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cache.encode(made(), TOKENS).shape == (3, 64)
    assert "not kept for the next run" in caplog.text


def test_the_least_recently_used_goes_first_and_strangers_stay(tmp_path: Path) -> None:
    stranger = tmp_path / "notes.txt"
    stranger.write_bytes(bytes(5000))
    size = 4 * 256 + 300  # with its header
    folder = TextFolder(tmp_path, max_bytes=2 * size)
    keys = [bytes([number]) * 32 for number in range(3)]

    def file(key: bytes) -> Path:
        return tmp_path / f"{key.hex()}.safetensors"

    for age, key in enumerate(keys[:2]):
        folder.get(key, lambda: torch.zeros(4, 64))
        os.utime(file(key), (1000 + age, 1000 + age))
    folder.get(keys[0], lambda: pytest.fail("it is known"))
    folder.get(keys[2], lambda: torch.zeros(4, 64))
    assert [file(key).exists() for key in keys] == [True, False, True]
    assert stranger.exists()
    folder.get(KEY, lambda: torch.zeros(100, 64))
    assert not file(KEY).exists()
    assert sum(file(key).stat().st_size for key in keys if file(key).exists()) <= 2 * size


def test_what_killed_writers_left_goes_after_an_hour(tmp_path: Path) -> None:
    old, fresh = (tmp_path / f".{digit * 32}.tmp" for digit in "ab")
    old.touch()
    fresh.touch()
    hour_ago = time.time() - 3700
    os.utime(old, (hour_ago, hour_ago))
    TextFolder(tmp_path).get(KEY, lambda: torch.zeros(1, 1))
    assert not old.exists()
    assert fresh.exists()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_keeps_its_folder(copied, tmp_path: Path) -> None:
    twin = copied(TextCache(123, tmp_path, 456))
    assert (twin.max_bytes, twin.folder.path, twin.folder.max_bytes) == (123, tmp_path, 456)


def test_keys_tell_neighbours_types_and_shapes_apart() -> None:
    zeros = torch.zeros(4)
    kinds = [["ab", "c"], ["a", "bc"], ["abc"], [zeros], [zeros.view(2, 2)], [zeros.int()], [zeros, ""], []]
    assert len({digest(parts) for parts in kinds}) == len(kinds)
    assert digest([zeros[::2]]) == digest([torch.zeros(2)])


def test_threads_write_the_same_folder(tmp_path: Path) -> None:
    expected = {bytes([number]) * 32: torch.full((50, 64), float(number)) for number in range(6)}
    folder = TextFolder(tmp_path, max_bytes=40_000)
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for step in range(60):
                key = bytes([(seed + step) % 6]) * 32
                if not torch.equal(folder.get(key, lambda key=key: expected[key]), expected[key]):
                    wrong.append(key)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(entry.stat().st_size for entry in tmp_path.iterdir()) <= 40_000
    assert all(entry.suffix == ".safetensors" for entry in tmp_path.iterdir())


SCRIPT = """
import json, sys, torch
from test_text_folder import TOKENS, made
from xclip_fast.text import TextCache
model = made()
features = [TextCache(folder=sys.argv[1]).encode(model, TOKENS[:rows]) for rows in (1, 2, 3, 1, 2, 3)]
print(json.dumps([model.calls, [one.sum().item() for one in features]]))
"""


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path: Path) -> None:
    folders = os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": folders}) as process:
        # what one writes the other finds, or writes too
        while process.poll() is None:
            for rows in (1, 2, 3):
                encodes(made(), tmp_path, TOKENS[:rows])
            time.sleep(0.05)
        calls, sums = json.loads(process.communicate()[0])
    assert calls <= 3
    with torch.no_grad():
        expected = [made().encode_text(TOKENS[:rows]).sum().item() for rows in (1, 2, 3)]
    assert sums == pytest.approx(2 * expected, rel=1e-4, abs=1e-4)
    assert len(os.listdir(tmp_path)) == 3
    # no random number of a process is in a key
    assert not encodes(made(), tmp_path)
