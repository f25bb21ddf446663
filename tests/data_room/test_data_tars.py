"""Tar shards: the layout of webdataset, hostile archives, and members decoded where they lie."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tar_files import add, write_tar

from xclip_fast import InputError
from xclip_fast.data import read_dataset
from xclip_fast.video import load_video, probe, read_frames
from xclip_fast.video.pool import Member, decode_files

NAMES = "id,name\n0,moving right\n1,standing still\n"


def refused(path: object, **options: object) -> str:
    with pytest.raises(InputError) as error:
        read_dataset(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    (tmp_path / "labels.csv").write_text(NAMES)
    return tmp_path / "labels.csv"


def test_labels_of_each_kind(tmp_path: Path, labels: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "000.mp4": b"0",
            "000.cls": b"1\n",
            "./deep/001.MKV": b"1",
            "./deep/001.txt": b"Moving_Right",
            "002.json": b'{"label": "standing still", "fps": 25}',
            "002.webm": b"2",
            "003.clip.avi": b"3",
            "003.json": b'{"label": 0}',
            "003.jpg": b"a picture",
            "004.txt": b"standing still",
            "004.cls": b"0",
            "004.mov": b"4",
            "004.pkl": b"cos\nsystem\n(S'touch unpickled'\ntR.",
            "__index__": b"notes",
            "readme": b"no key",
        },
    )
    dataset = read_dataset(shard, labels=labels)
    members = [sample.source for sample in dataset.samples]
    assert all(isinstance(member, Member) for member in members)
    assert [member.name for member in members] == ["000.mp4", "deep/001.MKV", "002.webm", "003.clip.avi", "004.mov"]
    assert [sample.label for sample in dataset.samples] == [1, 0, 1, 0, 0]
    content = shard.read_bytes()
    assert [content[one.offset : one.offset + one.size] for one in members] == [b"0", b"1", b"2", b"3", b"4"]
    assert not Path("unpickled").exists()


def test_several_shards(tmp_path: Path) -> None:
    shards = [
        write_tar(tmp_path / "shards" / name, {"0.mp4": b"0", "0.txt": label})
        for name, label in (("s-01.tar", b"run"), ("s-02.tar", b"jump"), ("s-00.tar", b"swim"))
        if (tmp_path / "shards").mkdir(exist_ok=True) is None
    ]
    (tmp_path / "shards" / "sizes.json").write_text("{}")
    expected = read_dataset(sorted(map(str, shards)))
    # names in the archives are the classes, sorted
    assert expected.classes == ("jump", "run", "swim")
    assert [str(one.source) for one in expected.samples] == [f"{shard}::0.mp4" for shard in sorted(shards)]
    assert [one.label for one in expected.samples] == [2, 1, 0]
    assert read_dataset(str(tmp_path / "shards" / "s-{00..02}.tar")) == expected
    assert read_dataset(tmp_path / "shards") == expected
    assert "s-03.tar: cannot be read (No such file)" in refused(str(tmp_path / "shards" / "s-{00..03}.tar"))
    assert "given twice" in refused([shards[0], f"{tmp_path}/shards/../shards/s-01.tar"])
    assert "braces" in refused("s-{00..02.tar")
    assert "more than 100,000 archives" in refused("s-{0..999999999}.tar")
    # a name with braces that is there is no pattern
    os.rename(shards[0], tmp_path / "s-{1,2}.tar")
    assert len(read_dataset(tmp_path / "s-{1,2}.tar").samples) == 1


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"0.mp4": b"0"}, "no label of '0.mp4'"),
        ({"0.cls": b"0"}, "0 videos of the key '0' ('0.cls')"),
        ({"0.mp4": b"0", "0.webm": b"0", "0.cls": b"0"}, "2 videos of the key '0'"),
        ({"0.a.mp4": b"0", "0.b.mp4": b"0", "0.cls": b"0"}, "a key is a name up to its first dot"),
        ({"0.jpg": b"0"}, "no video in it"),
        ({}, "no video in it"),
        ({"0.mp4": b"0", "0.cls": b"one"}, "0.cls: no label"),
        ({"0.mp4": b"0", "0.cls": b"-1"}, "0.cls: no label"),
        ({"0.mp4": b"0", "0.cls": b""}, "0.cls: no label"),
        ({"0.mp4": b"0", "0.cls": b"2"}, "label 2 is not in the label list"),
        ({"0.mp4": b"0", "0.txt": b" \n"}, "0.txt: no label"),
        ({"0.mp4": b"0", "0.txt": b"\xff"}, "0.txt: cannot be read"),
        ({"0.mp4": b"0", "0.txt": b"swim"}, "the class 'swim' is not in the label list"),
        ({"0.mp4": b"0", "0.txt": b"x" * 70000}, "70,000 bytes for a label"),
        ({"0.mp4": b"0", "0.json": b"[1]"}, "must hold a JSON object"),
        ({"0.mp4": b"0", "0.json": b'{"label": true}'}, "no label"),
        ({"0.mp4": b"0", "0.json": b'{"label": -1}'}, "label -1 is not in the label list"),
        ({"0.mp4": b"0", "0.json": b'{"label": 1.5}'}, "no label"),
        ({"0.mp4": b"0", "0.json": b'{"label": 1, "label": 2}'}, "a key occurs twice"),
        ({"0.mp4": b"0", "0.json": b'{"class": 1}'}, "no label"),
        ({"0.mp4": b"0", "0.json": b"[" * 60000}, "is not valid JSON"),
    ],
)
def test_wrong_shards(tmp_path: Path, labels: Path, files: dict[str, bytes], words: str) -> None:
    assert words in refused(write_tar(tmp_path / "a.tar", files), labels=labels)


LINK, HARD, CHAR, BLOCK, FIFO = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("/etc/passwd.mp4", {}, "::/etc/passwd.mp4: a name that leads out of the archive"),
        ("//host/a.mp4", {}, "leads out"),
        ("../a.mp4", {}, "::../a.mp4: a name that leads out"),
        ("a/../../b.mp4", {}, "leads out"),
        ("a/..", {"type": tarfile.DIRTYPE}, "leads out"),
        ("..\\a.mp4", {}, "leads out"),
        ("C:/a.mp4", {}, "leads out"),
        ("/tmp", {"type": tarfile.DIRTYPE}, "leads out"),
        ("link.mp4", {"type": LINK, "linkname": "/etc/passwd"}, "::link.mp4: a link to '/etc/passwd'"),
        ("inside.mp4", {"type": LINK, "linkname": "000.mp4"}, "a link"),
        ("hard.mp4", {"type": HARD, "linkname": "000.mp4"}, "a link"),
        ("link.pkl", {"type": LINK, "linkname": "000.mp4"}, "a link"),
        ("char.mp4", {"type": CHAR, "devmajor": 1, "devminor": 3}, "::char.mp4: no regular file"),
        ("block.mp4", {"type": BLOCK}, "no regular file"),
        ("pipe.mp4", {"type": FIFO}, "no regular file"),
        ("sparse.mp4", {"type": tarfile.GNUTYPE_SPARSE}, "no regular file"),
        ("odd.mp4", {"type": b"Z"}, "no regular file"),
        ("000.mp4", {}, "::000.mp4: there twice"),
        ("./000.mp4", {}, "there twice"),
        ("new\nline/../a.mp4", {}, r"'new\nline/../a.mp4'"),
    ],
)
def test_hostile_members_are_refused_by_name(
    tmp_path: Path, labels: Path, name: str, fields: dict[str, object], words: str
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "000.mp4", b"video")
        add(tar, "000.cls", b"0")
        add(tar, name, **fields)
    assert words in refused(tmp_path / "a.tar", labels=labels, empty_classes=True)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, raw_size: bytes | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    if raw_size is not None:
        block[124:136] = raw_size
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:512]) + 8 * 32)
    return bytes(block)


GOOD = header("000.mp4", 0) + header("000.txt", 3) + b"run".ljust(512, b"\0")
END = bytes(1024)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no readable tar archive (empty file"),
        (b"not a tar" * 200, "no readable tar archive"),
        (GOOD + b"garbage".ljust(512, b"x") + header("001.mp4", 0) + END, "a damaged header at byte 1,536"),
        (GOOD + header("001.mp4", 0)[:300], "no readable tar archive"),
        (GOOD + header("001.mp4", 10**6) + bytes(512), "cut short in '001.mp4'"),
        (GOOD + header("001.mp4", 10**15) + END, "cut short in '001.mp4'"),
        (GOOD + header("001.mp4", 0, raw_size=b"\xff" * 11 + b"\0") + END, "no readable tar archive"),
        (GOOD + header("001.mp4", 0, raw_size=b"\xff" * 10 + b"\xfa\0") + END, "no readable tar archive"),
        (GOOD + header("x", 1 << 30, tarfile.XHDTYPE) + END, "a header of more than 65,536 bytes"),
        (GOOD + header("x", 1 << 30, tarfile.GNUTYPE_LONGNAME) + END, "a header of more than 65,536 bytes"),
        (GOOD + header("x", 512, tarfile.XHDTYPE) + b"1" * 512 + header("001.mp4", 0) + END, "001.mp4"),
        (GOOD + (header("x", 512, tarfile.GNUTYPE_LONGNAME) + b"y" * 512) * 3000 + END, "no readable tar archive"),
        (b"\x1f\x8b\x08" + bytes(600), "no readable tar archive"),
    ],
)
def test_damaged_and_hostile_archives(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    assert words in refused(tmp_path / "a.tar")


def test_what_is_no_archive(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "a.tgz", "a.tar.zst"):
        assert "a compressed archive" in refused(tmp_path / name)
    assert "No such file" in refused("pipe:cat /etc/passwd > a.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    assert "not a regular file" in refused(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    assert "not a regular file" in refused(tmp_path / "folder.tar")


def test_long_names_in_each_format(tmp_path: Path) -> None:
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        key = "folder/" * (12 if form == tarfile.USTAR_FORMAT else 40) + "ä" * 20
        shard = write_tar(tmp_path / f"{number}.tar", {f"{key}.mp4": b"video", f"{key}.txt": b"run"}, format=form)
        (sample,) = read_dataset(shard).samples
        assert isinstance(sample.source, Member)
        assert sample.source.name == f"{key}.mp4"
        assert shard.read_bytes()[sample.source.offset :].startswith(b"video")


@pytest.mark.slow
def test_members_decode_as_files_do(tmp_path: Path, grey_clip: Callable[[int], Path]) -> None:
    clip = grey_clip(90)
    write_tar(tmp_path / "a.tar", {"x.txt": b"12345", "a.mp4": clip, "b.mp4": b"no video", "c.mp4": b"", "d.mp4": clip})
    (tmp_path / "list").write_text("a.mp4 0\nb.mp4 0\nc.mp4 0\nd.mp4 0\n")
    (tmp_path / "labels.csv").write_text("id,name\n0,grey\n")
    dataset = read_dataset(tmp_path / "list", labels=tmp_path / "labels.csv", root=tmp_path / "a.tar")
    sources = [sample.source for sample in dataset.samples]
    whole = load_video(clip, frames=4, size=32)
    assert probe(sources[0]) == probe(clip)
    assert (read_frames(sources[0]) == read_frames(clip)).all()
    before = set(os.listdir("/proc/self/fd"))
    for workers in (0, 2):
        with closing(decode_files(sources, frames=4, size=32, workers=workers)) as run:
            found = [one.clone() if isinstance(one, torch.Tensor) else str(one) for one in run]
        assert torch.equal(found[0], whole)
        assert torch.equal(found[3], whole)
        assert found[1] == (
            f"{tmp_path}/a.tar::b.mp4: not a video, found a text file; give a file in mp4, mov, mkv, webm, avi, mpg or "
            "ts format"
        )
        assert "a.tar::c.mp4: an empty file" in found[2]
    assert set(os.listdir("/proc/self/fd")) == before


def test_an_archive_that_changed_is_noticed(tmp_path: Path, grey_clip: Callable[[int], Path]) -> None:
    shard = write_tar(tmp_path / "a.tar", {"a.mp4": grey_clip(90), "a.txt": b"grey"})
    (sample,) = read_dataset(shard).samples
    write_tar(shard, {"notes": b"1" * 700, "a.mp4": grey_clip(90), "a.txt": b"grey"})
    with pytest.raises(InputError, match=r"a\.tar::a\.mp4: cannot be read \(the archive changed"):
        load_video(sample.source)
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(InputError, match="the archive changed"):
        load_video(sample.source)
    shard.unlink()
    with pytest.raises(InputError, match=r"a\.tar::a\.mp4: cannot be read \(No such file or directory\)"):
        load_video(sample.source)


@pytest.mark.parametrize("backend", ["torchcodec", "decord"])
def test_members_in_other_decoders(tmp_path: Path, grey_clip: Callable[[int], Path], backend: str) -> None:
    from xclip_fast.video import available_backends

    if available_backends()[backend] is not None:
        pytest.skip(f"no {backend} here")
    shard = write_tar(tmp_path / "a.tar", {"a.mp4": grey_clip(90), "a.txt": b"grey"})
    (sample,) = read_dataset(shard).samples
    found = load_video(sample.source, frames=4, size=32, backend=backend)
    assert torch.equal(found, load_video(grey_clip(90), frames=4, size=32, backend=backend))


def test_json_labels_are_read_strictly(tmp_path: Path) -> None:
    buffer = io.StringIO()
    json.dump({"label": float("nan")}, buffer)
    shard = write_tar(tmp_path / "a.tar", {"0.mp4": b"0", "0.json": buffer.getvalue().encode()})
    assert "NaN is no number" in refused(shard)
