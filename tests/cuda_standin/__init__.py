"""A GPU that is not there: what `validate` does on CUDA runs over it in the tests, line by line.

    with standin(profile.load("a100-80gb-sxm"), "NVIDIA A100-SXM4-80GB") as gpu:
        ...  # torch.cuda.is_available() is true; device="cuda" works

Tensors on it are fake (shape, strides, dtype, no data), so that large products cost nothing. Every ATen call on them is
priced by a device profile and advances two clocks, the host's and the device's; events, `torch.cuda.synchronize` and
the measuring clocks read those. Its memory is counted, has an end and raises `torch.OutOfMemoryError` there. The
profiler is the real one; what it exports gets the runtime calls, kernels, fills and copies that a GPU would add.

`gpu` holds the device, `tensors` makes PyTorch use it, `runtime` stands for `torch.cuda`, `kineto` writes traces.
"""

from .gpu import Gpu
from .patches import standin

__all__ = ["Gpu", "standin"]
