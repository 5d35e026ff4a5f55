"""Rewrites of a recorded pass forward and back: what a compiler makes of the program that the tape has written down."""
