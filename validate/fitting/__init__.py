"""Fits the price models to measurements that others published: one file a model, one for reading, one for writing.

Every fit leaves out a fixed third of the shapes; errors are |predicted/measured - 1| on those.
"""
