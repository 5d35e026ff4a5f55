"""Fused kernels of other packages, recorded as they are called."""
