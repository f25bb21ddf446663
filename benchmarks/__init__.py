"""Measurements of the library: run ``python -m benchmarks``."""
