"""Kernels of packages that only GPUs have, as operators, and the programs that call them."""
