"""``python -m benchmarks.gpu.kit``: what a GPU's first minutes would go to, made without one and packed into one file.

The windows are rehearsed on the stand-in driver, so Triton compiles for sm_90 every kernel and every C stub that they
launch, those of torch.compile too, under the keys that the same code asks for on a GPU. They are packed with the
extension and a manifest. On the other machine ``prepare`` unpacks them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from lzma import LZMAError
from pathlib import Path
from typing import Any

from benchmarks.gpu.prepare import ROOT, other_sources, run

KIT = ROOT / "build" / "gpu-kit.tar.xz"
CACHE = ROOT / "build" / "triton"  # where kernels are unpacked, unless TRITON_CACHE_DIR names another folder
EXTENSION = ("xclip_fast/_native.so", "xclip_fast/_native.so.sources")
WINDOWS = ("check", "figures")
MANIFEST = "manifest.json"
MOST_BYTES = 40 << 20
GROUP = "__grp__"  # how Triton names its list of the files of a kernel, with the folder they are in
LAUNCHED = (".cubin", ".json")  # of a kernel, what a launch reads; the rest is for people
TARGET = "9.0"
VERSIONS = ("triton", "libtriton", "ptxas")  # what the keys of Triton's cache depend on


def versions() -> dict[str, str]:
    """What decides whether kernels that were compiled elsewhere are found: no GPU and no import of Triton is needed."""
    spec = find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return dict.fromkeys(VERSIONS, "missing")
    home = Path(next(iter(spec.submodule_search_locations)))
    said = re.search(r"__version__ = '(.*)'", (home / "__init__.py").read_text(encoding="utf-8"))
    library = hashlib.sha256((home / "_C" / "libtriton.so").read_bytes()).hexdigest()
    assembler = run([str(home / "backends" / "nvidia" / "bin" / "ptxas"), "--version"], 20)["output"]
    return {
        "triton": said[1] if said else "unknown",
        "libtriton": library[:16],
        "ptxas": " ".join(re.findall(r"V[\d.]+", assembler)),
    }


def prepare(path: Path, *, carry: bool = True) -> dict[str, Any]:
    """Make this checkout ready: kernels unpacked, package importable, extension there. Nothing is compiled.

    Args:
        path: the kit; there need be none.
        carry: put the kit's extension in the place of one of other sources; where there is none it is put anyway.

    Returns:
        "cache" (Triton's folder), "facts" of the run, "said" (lines for people), "unpacked" (kernels), "seconds".
    """
    start, said, unpacked = time.monotonic(), [], 0
    here, cache = versions(), Path(os.environ.get("TRITON_CACHE_DIR") or CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    try:
        files = _read(path)
        manifest = json.loads(files.pop(MANIFEST))
        differing = [
            f"{name} {manifest['versions'].get(name)} there, {here[name]} here"
            for name in VERSIONS
            if manifest["versions"].get(name) != here[name]
        ]
        if not differing:
            unpacked = _unpack(files, cache)
        said.append(f"kit of {manifest['commit']}: {unpacked} kernels unpacked")
        said += [f"the kit is of another machine ({'; '.join(differing)}): kernels are compiled here"] * bool(differing)
        _carry(files, replace=carry)
    except FileNotFoundError:
        said.append(f"no kit at {path}: every kernel is compiled here")
    except (OSError, tarfile.TarError, LZMAError, EOFError, ValueError, KeyError) as error:
        said.append(f"{path} is no kit ({type(error).__name__}: {error}): every kernel is compiled here")
    name, capability = gpu()
    if capability not in (None, TARGET):
        said.append(f"the kit is for compute capability {TARGET}, {name} has {capability}: kernels are compiled here")
    # whether it loads, and for which GPU, the lanes find out
    lacking = other_sources()
    said.append(f"no extension: {lacking}: Triton embeds the patches" if lacking else "the extension is there")
    link = ROOT / "xclip_fast" / "kernels"
    if not link.exists() and not _is_installed():
        # the folder as a part of the package: what an install maps, without an installer
        link.symlink_to(Path("..") / "kernels", target_is_directory=True)
    facts = {"commit": _commit(), "python": sys.version.split()[0], "gpu": name} | here
    seconds = round(time.monotonic() - start, 1)
    return {"cache": str(cache), "facts": facts, "said": said, "unpacked": unpacked, "seconds": seconds}


def entries(cache: Path) -> set[str]:
    """The keys in one of Triton's cache folders."""
    return {path.name for path in cache.iterdir()} if cache.exists() else set()


def pack(
    records: Sequence[Path], path: Path, cache: Path, checkout: Path = ROOT, commit: str | None = None
) -> dict[str, Any]:
    """Pack a filled cache, and the extension where there is one; returns the manifest.

    Args:
        records: of the rehearsed windows, which say what each kernel is for.
        path: of the kit, replaced in one step.
        cache: Triton's folder.
        checkout: where the extension was built.
        commit: of the code; that of the moment without.

    Raises:
        ValueError: the kit is larger than ``MOST_BYTES``.
    """
    wanted: dict[str, dict[str, Any]] = {}
    for record in records:
        content = json.loads(record.read_text(encoding="utf-8"))
        for case, found in content["cases"].items():
            for kernel in found.get("kernels", []):
                entry = wanted.setdefault(_key(kernel["hash"]), {"kernel": kernel["kernel"], "for": []})
                if case not in entry["for"]:
                    entry["for"].append(case)
    packed = {}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for key in sorted(entries(cache)):
            files = _launched(cache / key)
            # a folder with a lock alone belongs to a kernel that could not be compiled
            if files:
                # what has no case is asked for by torch.compile, in processes of its own
                packed[key] = wanted.get(key, {"kernel": sorted(files)[0].split(".")[0], "for": ["torch.compile"]})
            for name, data in files.items():
                _add(archive, f"triton/{key}/{name}", data)
        carried = [name for name in EXTENSION if (checkout / name).exists()]
        for name in carried:
            _add(archive, name, (checkout / name).read_bytes())
        manifest = {
            "versions": versions(),
            "commit": commit or _commit(),
            "target": TARGET,
            "extension": carried,
            "entries": packed,
        }
        _add(archive, MANIFEST, json.dumps(manifest, indent=1).encode())
    if buffer.tell() > MOST_BYTES:
        raise ValueError(f"the kit has {buffer.tell() >> 20} MiB, more than {MOST_BYTES >> 20}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(buffer.getvalue())
    unfinished.replace(path)
    return manifest


def _launched(folder: Path) -> dict[str, bytes]:
    """The files of an entry that a launch reads. The lists name no folder yet: that is of the machine that unpacks."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(GROUP):
            children = json.loads(path.read_text(encoding="utf-8"))["child_paths"]
            kept = {name: name for name in children if name.endswith(LAUNCHED)}
            found[path.name] = json.dumps({"child_paths": kept}).encode()
        elif path.name.endswith((*LAUNCHED, ".so")):
            found[path.name] = path.read_bytes()
    return found


def _read(path: Path) -> dict[str, bytes]:
    """The files of a kit by name, in one pass: whoever seeks in it unpacks it from the start again."""
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            data = archive.extractfile(member)
            if data is not None:
                found[member.name] = data.read()
    return found


def _unpack(files: dict[str, bytes], cache: Path) -> int:
    """Put the entries that are not there yet into Triton's folder, and the folder into their lists."""
    before, new = entries(cache), set()
    for name, data in files.items():
        parts = Path(name).parts
        if parts[0] != "triton" or len(parts) != 3 or parts[1] in before:
            continue
        folder = cache / parts[1]
        folder.mkdir(parents=True, exist_ok=True)
        if parts[2].startswith(GROUP):
            children = json.loads(data)["child_paths"]
            data = json.dumps({"child_paths": {child: str(folder / child) for child in children}}).encode()
        (folder / parts[2]).write_bytes(data)
        new.add(parts[1])
    return len(new)


def _carry(files: dict[str, bytes], *, replace: bool) -> None:
    """The packed extension, where this checkout has none, or, to be replaced, one of other sources."""
    library, sources = (ROOT / name for name in EXTENSION)
    packed = files.get(EXTENSION[1])
    same = sources.exists() and sources.read_bytes() == packed
    if packed is not None and (not library.exists() or (replace and not same)):
        for name in EXTENSION:
            (ROOT / name).write_bytes(files[name])


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _key(hexadecimal: str) -> str:
    """The name of a kernel's folder."""
    return base64.b32encode(bytes.fromhex(hexadecimal)).decode().rstrip("=")


def _is_installed() -> bool:
    try:
        version("xclip_fast")
    except PackageNotFoundError:
        return False
    return True


def gpu() -> tuple[str | None, str | None]:
    """Name and compute capability of the GPU; nothing is imported for it."""
    asked = run(["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"], 20)
    lines = asked["output"].strip().splitlines() if asked["code"] == 0 else []
    name, _, capability = lines[0].partition(",") if lines else ("", "", "")
    return name.strip() or None, capability.strip() or None


def _commit() -> str:
    if found := os.environ.get("COMMIT"):
        return found
    asked = run(["git", "rev-parse", "--short", "HEAD"], 20)
    return asked["output"].strip() if asked["code"] == 0 else "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse both windows with this Python and pack what they launch; 0 when a kit was written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kit", description=__doc__)
    parser.add_argument("--out", type=Path, default=KIT, help="the file to write")
    parser.add_argument("--tiny", action="store_true", help="of windows of the smallest shapes")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of each rehearsal")
    options = parser.parse_args(arguments)
    folder = ROOT / "build" / "gpu-kit"
    # nothing of an older kit, nor of older sources
    shutil.rmtree(folder, ignore_errors=True)
    options.out.unlink(missing_ok=True)
    checkout, cache = folder / "checkout", folder / "triton"
    _copy(checkout)
    settings = os.environ | {"TRITON_CACHE_DIR": str(cache), "COMMIT": _commit()}
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]
    built = run(build, 600, {"XCLIP_FAST_BUILD_EXT": "1", "TORCH_CUDA_ARCH_LIST": f"{TARGET}a"}, cwd=checkout)
    if built["code"] != 0:
        print(f"without the extension: {built['output'][-500:]}", flush=True)
    for window in WINDOWS:
        command = [sys.executable, "-m", "benchmarks.gpu", "--window", window, "--dry-run", "--out", str(folder)]
        command += ["--tiny"] if options.tiny else []
        # this machine may have two cores for what has sixteen on a GPU's
        done = subprocess.run([*command, "--seconds", str(options.seconds)], cwd=checkout, env=settings)
        if done.returncode not in (0, 1):
            return done.returncode
    manifest = pack([folder / f"{window}.json" for window in WINDOWS], options.out, cache, checkout, settings["COMMIT"])
    size = options.out.stat().st_size / 2**20
    how = "with" if manifest["extension"] else "WITHOUT"
    print(f"{options.out}: {len(manifest['entries'])} entries, {size:.1f} MiB, {how} the extension")
    return 0


def _copy(folder: Path) -> None:
    """What travels to another machine: the files that git has or would have."""
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], 60, said=None)["output"]
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    # its own kernels, whatever an installed package maps
    (folder / "xclip_fast" / "kernels").symlink_to(Path("..") / "kernels", target_is_directory=True)


if __name__ == "__main__":
    sys.exit(main())
