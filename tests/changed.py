"""Run the tests that a diff needs: ``python tests/changed.py REF [pytest's options]``, or ``make test CHANGED=REF``.

The diff is what stands in the commits since REF and in the working tree. A changed test file is run; a changed module
runs the test files that import it, themselves or through others. A name imported from a package counts for the module
that the package has it from, and modules that are only named in texts, such as ``-m xclip_fast.cli``, count as well.
What all tests stand on runs them all. A changed file that no test reaches is said.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
# a change of these, or of a file in these folders, changes every test
EVERYTHING = ("setup.py", "pyproject.toml", "Makefile", "tests/conftest.py", "csrc/")
_NAMED = re.compile(r"\b(?:xclip_fast|benchmarks)(?:\.\w+)+")
_IMPORTED = re.compile(r"\bfrom ((?:xclip_fast|benchmarks)[\w.]*) import ([\w, ]+)")


@dataclass
class Sources:
    """The Python files of a tree and what they import.

    Attributes:
        root: of the tree.
        files: paths of all its files, relative to the root.
    """

    root: Path
    files: list[str]
    _parsed: dict[str, list[ast.AST]] = field(default_factory=dict)

    @cached_property
    def modules(self) -> dict[str, str]:
        """Paths by the names of their modules; those of tests by their stems, for their folders are on the path."""
        return {_module(path): path for path in self.files if path.endswith(".py") and not _is_test(path)}

    @cached_property
    def tests(self) -> list[str]:
        return [path for path in self.files if _is_test(path)]

    @cached_property
    def _imports(self) -> dict[str, set[str]]:
        """Paths that each path imports."""
        paths = [path for path in self.files if path.endswith(".py")]
        # what a package hands on is found behind its names: who imports one of them does not need the others. and who
        # takes a fixture that is there for all imports what it is of
        alone = {path for path in paths if Path(path).name == "__init__.py" or path in EVERYTHING}
        found = {path: set() if path in alone else self._imports_of(path) for path in paths}
        for path in paths:
            # pytest loads them before the tests beside and below them
            found[path] |= {conftest for conftest in paths if _is_conftest_of(conftest, path)}
        return found

    def reaching(self, changed: Iterable[str]) -> dict[str, set[str]]:
        """Test files that each changed file needs."""
        importers: dict[str, set[str]] = {}
        for path, imports in self._imports.items():
            for other in imports:
                importers.setdefault(other, set()).add(path)
        found = {}
        for path in changed:
            seen, waiting = set(), [path]
            if not path.endswith(".py"):
                # data belong to who names them
                waiting = [module for module in self._imports if Path(path).name in self._texts(module)]
            while waiting:
                one = waiting.pop()
                if one not in seen:
                    seen.add(one)
                    waiting += importers.get(one, ())
            found[path] = {one for one in seen if _is_test(one)}
        return found

    def _nodes(self, path: str) -> list[ast.AST]:
        if path not in self._parsed:
            file = self.root / path
            # what a diff removes imports nothing, and is still imported
            self._parsed[path] = list(ast.walk(ast.parse(file.read_text() if file.exists() else "")))
        return self._parsed[path]

    def _texts(self, path: str) -> str:
        """All strings but docstrings."""
        nodes = self._nodes(path)
        docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        constants = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docs]
        return "\n".join(value for value in constants if isinstance(value, str))

    def _imports_of(self, path: str) -> set[str]:
        found: set[str] = set()
        for node in self._nodes(path):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    # the names used of it are seen below
                    found |= self._homes(alias.name, None if alias.name in ("xclip_fast", "benchmarks") else "*")
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    found |= self._homes(node.module, alias.name)
            elif isinstance(node, ast.Attribute):
                found |= self._named(_dotted(node))
        texts = self._texts(path)
        for name in _NAMED.findall(texts):
            found |= self._named(name)
        for module, names in _IMPORTED.findall(texts):
            for name in re.split(r"[ ,]+", names.strip()):
                found |= self._homes(module, name)
        return found - {path}

    def _named(self, name: str) -> set[str]:
        """The home of a dotted name that begins with a package of ours."""
        parts = name.split(".")
        if parts[0] not in ("xclip_fast", "benchmarks"):
            return set()
        for end in range(len(parts), 0, -1):
            module = ".".join(parts[:end])
            if module in self.modules:
                main = f"{module}.__main__"
                homes = self._homes(module, parts[end] if end < len(parts) else "*" if end > 1 else None)
                return homes | ({self.modules[main]} if main in self.modules else set())
        return set()

    def _homes(self, module: str, name: str | None) -> set[str]:
        """The files behind a name of a module: a submodule, or where a package has it from; "*" are all its names."""
        if name and f"{module}.{name}" in self.modules:
            # a package that is handed on whole
            return self._homes(f"{module}.{name}", "*")
        path = self.modules.get(module)
        if path is None:
            return set()
        found = {path}
        if Path(path).name != "__init__.py":
            return found
        nodes = self._nodes(path)
        defined = any(isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name for node in nodes)
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module and node.module != module:
                for alias in node.names:
                    if defined or name in ("*", alias.asname or alias.name):
                        found |= self._homes(node.module, alias.name)
        return found


def _module(path: str) -> str:
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] == "tests":
        return parts[-1]
    if parts[0] == "kernels":
        parts = ["xclip_fast", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_test(path: str) -> bool:
    return path.startswith("tests/") and Path(path).name.startswith("test_") and path.endswith(".py")


def _is_conftest_of(conftest: str, path: str) -> bool:
    return Path(conftest).name == "conftest.py" and path != conftest and Path(conftest).parent in Path(path).parents


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def selection(sources: Sources, changed: Iterable[str]) -> tuple[list[str], list[str]]:
    """The test files that changed files need, all of them where one changes everything; and files no test reaches."""
    changed = sorted(changed)
    if any(path == one or (one.endswith("/") and path.startswith(one)) for path in changed for one in EVERYTHING):
        return sorted(sources.tests), []
    reached = sources.reaching(changed)
    return sorted(set().union(*reached.values())), [path for path in changed if not reached[path]]


def changed_files(ref: str) -> list[str]:
    """Files that differ from where this branch left the ref, in commits or in the working tree."""
    base = _git("merge-base", ref, "HEAD").strip()
    changed = _git("diff", "--name-only", "--no-renames", "-z", base).split("\0")
    return [path for path in {*changed, *_git("ls-files", "--others", "--exclude-standard", "-z").split("\0")} if path]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def main(arguments: list[str]) -> int:
    """pytest's exit code, or 0 where the diff needs no test."""
    ref, *options = arguments
    changed = changed_files(ref)
    present = _git("ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    sources = Sources(ROOT, sorted({path for path in present if path} | set(changed)))
    tests, unreached = selection(sources, changed)
    tests = [path for path in tests if (ROOT / path).exists()]
    for path in unreached:
        print(f"no test reaches {path}")
    print(f"{len(changed)} files changed since {ref}: {len(tests)} of {len(sources.tests)} test files", flush=True)
    if not tests:
        return 0
    return subprocess.run([sys.executable, "-m", "pytest", *tests, *options], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
