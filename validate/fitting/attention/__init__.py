"""Attention: kernels as papers and as serving frameworks measured them, and the fits to both."""
