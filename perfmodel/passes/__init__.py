"""Rewrites of a recorded pass forward and back: what a compiler makes of the program that the tape has written down."""

NOTE = "torch.compile: one graph without breaks is assumed"
AT_BUCKETS = f"{NOTE}, cut where DDP's buckets end"
BETWEEN_HOOKS = "torch.compile: each block is a graph of its own between FSDP2's hooks"
OF_SDPA = (
    "compiled code cannot see that nothing is padded: sdpa gets an explicit mask, not the flash kernel, "
    "unless no attention mask is handed in and use_cache stays on"
)
