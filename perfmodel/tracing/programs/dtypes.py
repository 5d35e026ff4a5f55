"""The names of PyTorch's dtypes on the tape."""

import torch

DTYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.complex64: "c64", torch.int64: "i64",
    torch.int32: "i32", torch.uint32: "u32", torch.uint8: "u8", torch.int8: "i8", torch.bool: "bool",
    torch.float64: "fp64", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2",
}  # fmt: skip
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
