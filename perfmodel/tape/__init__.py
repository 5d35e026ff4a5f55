"""A shape-only PyTorch: tensors without data, autograd, and a tape of the ATen calls that a step makes."""
