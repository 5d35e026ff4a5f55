"""Element types by their short names, their sizes in bytes, and type promotion."""

ITEMSIZE = {"c64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "i64": 8, "i32": 4, "bool": 1}  # c64: two fp32 numbers
FLOATING = ("fp32", "bf16", "fp16")


def promote(a: str, b: str) -> str:
    """The dtype of an op on two tensors with dims (bf16 with fp16 gives fp32, as in PyTorch)."""
    if a == b:
        return a
    if a in FLOATING and b in FLOATING:
        return "fp32"
    for dtype in (*FLOATING, "i64", "bool"):
        if dtype in (a, b):
            return dtype
    raise ValueError(f"no common dtype for {a} and {b}")
