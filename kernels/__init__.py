"""Triton kernels, installed as ``classfair.kernels``."""
