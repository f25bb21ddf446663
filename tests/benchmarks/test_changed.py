"""Which test files a diff needs, in a tree of a few files and in this one."""

from __future__ import annotations

from pathlib import Path

import changed
import pytest
from changed import ROOT, Sources, selection

FILES = {
    "tests/conftest.py": "from xclip_fast.b import y",
    "tests/helper.py": "from xclip_fast.a import x",
    "tests/room/conftest.py": "from xclip_fast.c import z",
    "tests/room/test_c.py": "",
    "tests/test_a.py": "import helper",
    "tests/test_b.py": "def test() -> None:\n    from xclip_fast import y",
    "tests/test_names.py": "import xclip_fast\nx = xclip_fast.pack.z()\nDATA = 'numbers.json'",
    "tests/test_process.py": "COMMAND = ['-m', 'xclip_fast.b']",
    "xclip_fast/__init__.py": "from xclip_fast.a import x\nfrom xclip_fast.b import y",
    "xclip_fast/a.py": "def x() -> None:\n    '''Not xclip_fast.c.'''",
    "xclip_fast/b.py": "from xclip_fast.a import x",
    "xclip_fast/c.py": "",
    "xclip_fast/pack/__init__.py": "from xclip_fast.c import z",
    "xclip_fast/numbers.json": "",
    "kernels/k.py": "",
    "csrc/k.cpp": "",
    "docs/page.md": "",
}
ALL = sorted(path for path in FILES if "/test_" in path)


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Sources(tmp_path, list(FILES))


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("tests/test_a.py", ["tests/test_a.py"]),
        ("tests/helper.py", ["tests/test_a.py"]),
        # itself, through another module, by name of a package, and in a process of its own
        ("xclip_fast/a.py", ["tests/test_a.py", "tests/test_b.py", "tests/test_process.py"]),
        ("xclip_fast/b.py", ["tests/test_b.py", "tests/test_process.py"]),
        ("xclip_fast/c.py", ["tests/room/test_c.py", "tests/test_names.py"]),
        ("xclip_fast/pack/__init__.py", ["tests/test_names.py"]),
        ("xclip_fast/numbers.json", ["tests/test_names.py"]),
        ("tests/room/conftest.py", ["tests/room/test_c.py"]),
        ("tests/conftest.py", ALL),
        ("csrc/k.cpp", ALL),
        ("pyproject.toml", ALL),
    ],
)
def test_a_change_runs_what_imports_it(path: str, wanted: list[str], sources: Sources) -> None:
    assert selection(sources, [path]) == (wanted, [])


@pytest.mark.parametrize("path", ["docs/page.md", "kernels/k.py"])
def test_what_no_test_reaches_is_said(path: str, sources: Sources) -> None:
    assert selection(sources, [path, "tests/test_a.py"]) == (["tests/test_a.py"], [path])


def test_what_was_removed_runs_who_still_imports_it(sources: Sources) -> None:
    (sources.root / "xclip_fast/b.py").unlink()
    assert selection(sources, ["xclip_fast/b.py"])[0] == ["tests/test_b.py", "tests/test_process.py"]


def test_in_this_tree() -> None:
    listed = changed._git("ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    found = Sources(ROOT, [path for path in listed if path]).reaching
    assert "tests/ops/test_prompt_attention.py" in found(["kernels/prompt_attention.py"])["kernels/prompt_attention.py"]
    sampling = found(["xclip_fast/video/sampling.py"])["xclip_fast/video/sampling.py"]
    assert "tests/video/test_video_sampling.py" in sampling
    assert "tests/ops/test_layer_norm.py" not in sampling
    texts = found(["xclip_fast/engine/texts.py"])["xclip_fast/engine/texts.py"]
    assert "tests/engine/test_engine_texts.py" in texts
    assert "tests/video/test_video_sampling.py" not in texts
