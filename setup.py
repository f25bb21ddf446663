"""Build script: maps the top-level folder ``kernels`` into the package as ``xclip_fast.kernels``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["xclip_fast", "xclip_fast.*"]), "xclip_fast.kernels"],
    package_dir={"xclip_fast.kernels": "kernels"},
)
