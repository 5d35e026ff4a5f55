"""Element types by their short names, their sizes in bytes, and type promotion."""

ITEMSIZE = {
    "fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "e4m3": 1, "e5m2": 1, "c64": 8, "i64": 8, "i32": 4, "u32": 4,
    "u8": 1, "i8": 1, "bool": 1,
}  # fmt: skip
FLOATING = ("bf16", "fp16", "fp32")  # that weights, activations and gradients may be in
FLOAT8 = ("e4m3", "e5m2")  # floats of 8 bits, by the bits of exponent and mantissa


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
