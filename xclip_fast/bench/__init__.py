"""Measuring and checking: what ``xclip-fast bench``, ``verify``, ``profile`` and benchmarks/ run.

Nothing here is imported by the model; the parts import their optional libraries when they are used.
"""
