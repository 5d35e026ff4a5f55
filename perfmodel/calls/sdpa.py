"""Which kernel `F.scaled_dot_product_attention` runs on a CUDA card.

The first of cuDNN's kernel (where PyTorch prefers it: `program.software`), FlashAttention-2 and the memory-efficient
kernel that takes the call, else the written-out "math" path. What each takes, in training:

    cuDNN      16 bit, heads up to `cudnn_head_size` in multiples of 8, masks that need no gradient
    flash      16 bit, Ampere and newer, no mask, heads of one size up to 256
    efficient  everything, but no grouped heads

Source: ATen/native/transformers/cuda/sdp_utils.cpp (`check_prefer_cudnn_attention`, `check_cudnn_tensor_shapes`,
`check_attn_mask_shape`, `can_use_flash_attention`, `can_use_mem_efficient_attention`).
"""

from typing import Literal

Kernel = Literal["cudnn", "flash", "efficient", "math"]

FLASH_HEAD = 256


def cudnn_head_size(capability: str, keys: int, values: int) -> int:
    """The largest head that cuDNN's kernel takes: 256 on Hopper; on Blackwell 128, and DeepSeek's 192 beside 128."""
    if capability == "9.0":
        return 256
    return 192 if capability.startswith("10.") and (keys, values) == (192, 128) else 128


def choose(
    capability: str, keys: int, values: int, *, cudnn_first: bool, half: bool, grouped: bool, masked: bool,
    mask_trained: bool = False,
) -> Kernel:  # fmt: skip
    """The kernel of a call.

    Args:
        capability: compute capability of the card, "9.0".
        keys, values: head size of queries and keys, and of values.
        cudnn_first: whether PyTorch prefers cuDNN's kernel there; if not, it is not reached.
        half: whether the operands have 16 bits.
        grouped: whether there are fewer heads of keys and values than of queries.
        masked: whether a mask is handed in.
        mask_trained: whether that mask gets a gradient.
    """
    largest = max(keys, values)
    whole = half and keys % 8 == 0 and values % 8 == 0
    fits_cudnn = whole and largest <= cudnn_head_size(capability, keys, values) and not mask_trained
    if cudnn_first and fits_cudnn:
        return "cudnn"
    if whole and not masked and keys == values and largest <= FLASH_HEAD and int(capability.split(".")[0]) >= 8:
        return "flash"
    return "math" if grouped else "efficient"
