"""Build script: maps the folder ``kernels`` into the package, and compiles ``csrc`` where that can be done.

``XCLIP_FAST_BUILD_EXT`` is "auto" (the C++ part where a compiler and torch are, the CUDA part where nvcc is too; on
failure a pure package and one line that says why), "1" (the same, but a failure is an error) or "0" (never).
Pip's isolated build environment has no torch: ``make ext``, or ``pip install --no-build-isolation .``, compiles.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.errors import CompileError

MODE = os.environ.get("XCLIP_FAST_BUILD_EXT", "auto")
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;8.6;9.0a;10.0+PTX")
# one binary for torch 2.11 and newer: only the stable C functions of torch are called
STABLE = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CPU = ["-std=c++20", "-O3", "-g0", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wextra"]


def find_nvcc() -> str | None:
    """The compiler of CUDA_HOME, of PATH, of the usual place, or of NVIDIA's packages for Python."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    packaged = [str(path) for entry in sys.path if entry for path in sorted(Path(entry).glob("nvidia/cu*"))]
    candidates = [f"{home}/bin/nvcc" for home in homes if home] + [shutil.which("nvcc") or ""]
    candidates += [f"{home}/bin/nvcc" for home in ["/usr/local/cuda", *packaged]]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def compile_cuda(nvcc: str, folder: Path) -> tuple[str, str]:
    """Compile the CUDA source for every architecture: the object, and NVIDIA's static runtime to link with it."""
    flags = []
    for name in re.split(r"[;\s]+", ARCHITECTURES.strip()):
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    folder.mkdir(parents=True, exist_ok=True)
    output = str(folder / "patch_rows_cuda.o")
    source = "csrc/patch_rows_cuda.cu"
    subprocess.run([nvcc, "-std=c++20", "-O3", "-Xcompiler=-fPIC", *flags, "-c", source, "-o", output], check=True)
    trial = subprocess.run([nvcc, "--dryrun", "-E", source], capture_output=True, text=True).stderr
    homes = [Path(line.split("=", 1)[1]) for line in trial.splitlines() if line.startswith("#$ TOP=")]
    homes += [path for entry in sys.path if entry for path in Path(entry).glob("nvidia/cu*")]
    for home in homes:
        for runtime in (home / sub / "libcudart_static.a" for sub in ("lib64", "lib", "targets/x86_64-linux/lib")):
            if runtime.exists():
                return output, str(runtime)
    raise CompileError("libcudart_static.a is not where nvcc is")


def record_sources(library: Path) -> None:
    """Beside a library, what it was built of as ``sha256sum`` writes it: where it is carried to, it may be stale."""
    sources = [*sorted(Path("csrc").iterdir()), Path("setup.py")]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.as_posix()}\n" for path in sources]
    library.with_name(f"{library.name}.sources").write_text("".join(lines))


def extension_arguments() -> dict[str, object]:
    """What ``setup`` needs to compile the extension; raises ImportError or CompileError where it cannot be."""
    compilers = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers if name):
        raise CompileError("there is no C++ compiler")
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    nvcc = find_nvcc()

    class Build(BuildExtension):
        native_is_new = False

        def get_ext_filename(self, name: str) -> str:
            filename = super().get_ext_filename(name)
            # the operators need no Python, so their library fits every version of it
            return str(Path(filename).with_name("_native.so")) if name.endswith("_native") else filename

        def build_extensions(self) -> None:
            objects: tuple[str, ...] = ()
            if nvcc:
                try:
                    objects = compile_cuda(nvcc, Path(self.build_temp))
                except (CompileError, OSError, subprocess.CalledProcessError) as error:
                    if MODE == "1":
                        sys.exit(f"xclip_fast: the CUDA part of the extension cannot be built: {error}")
                    print(f"xclip_fast: an extension without CUDA: {error}", file=sys.stderr)
            native.extra_objects += objects
            native.define_macros += [("XCLIP_FAST_CUDA", "1")] * bool(objects)
            for ext in self.extensions:
                built_for = ARCHITECTURES.replace(";", " ") if objects else ""
                ext.define_macros += [("XCLIP_FAST_ARCHITECTURES", f'"{built_for}"')]
            try:
                super().build_extensions()
            except (OSError, subprocess.CalledProcessError) as error:
                if MODE == "1":
                    sys.exit(f"xclip_fast: the extension cannot be built: {error}")
                print(f"xclip_fast: a package without compiled extension: {error}", file=sys.stderr)

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            if self.native_is_new:
                record_sources(Path("xclip_fast", "_native.so"))

        def build_extension(self, ext: Extension) -> None:
            try:
                super().build_extension(ext)
                self.native_is_new |= ext is native
            except RuntimeError as error:
                # what setuptools takes for a failure of an optional extension
                raise CompileError(str(error)) from error

    common = {
        "depends": [str(path) for path in sorted(Path("csrc").glob("*"))],
        "optional": MODE == "auto",
    }
    native = Extension(
        "xclip_fast._native",
        [
            "csrc/bindings.cpp",
            *(f"csrc/{part}_cpu.cpp" for part in ("frame_attention", "int8_rows", "linear", "patch_embed")),
        ],
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch_cpu", "dl", "rt", "pthread"],
        extra_compile_args=[*CPU, STABLE],
        **common,
    )
    host = Extension(
        "xclip_fast._buildinfo",
        ["csrc/buildinfo.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=CPU,
        **common,
    )
    build = Build.with_options(use_ninja=bool(shutil.which("ninja")))
    return {"ext_modules": [native, host], "cmdclass": {"build_ext": build}}


def extension() -> dict[str, object]:
    if MODE not in ("auto", "0", "1"):
        sys.exit(f"XCLIP_FAST_BUILD_EXT must be auto, 0 or 1, found {MODE!r}")
    # reading the metadata of the package needs no torch
    if MODE == "0" or not {"build_ext", "bdist_wheel", "editable_wheel", "build", "develop"} & set(sys.argv):
        return {}
    try:
        return extension_arguments()
    except (ImportError, CompileError) as error:
        if MODE == "1":
            sys.exit(f"xclip_fast: the extension cannot be built: {error}")
        print(f"xclip_fast: a package without compiled extension: {error}", file=sys.stderr)
        return {}


setup(
    packages=[*find_packages(include=["xclip_fast", "xclip_fast.*"]), "xclip_fast.kernels"],
    package_dir={"xclip_fast.kernels": "kernels"},
    **extension(),
)
