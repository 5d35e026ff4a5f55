"""Layers and sequences that ranks share, as the real programs cut them."""
