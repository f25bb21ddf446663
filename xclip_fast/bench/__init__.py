"""Measuring and checking: what runs behind ``xclip-fast bench``, ``verify`` and ``profile``, and behind benchmarks/.

Nothing here is imported by the model; the parts import their optional libraries when they are used.
"""
