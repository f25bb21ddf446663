"""Triton kernels and their launchers, installed as ``xclip_fast.kernels``."""
