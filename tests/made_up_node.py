"""The file of a network between two processes on a CPU, as `perfmodel calibrate --network --device cpu` writes one."""

from pathlib import Path

START, WIRE = 2e-4, 2e9  # s of a collective, B/s of all bytes that pass
_LINE = f"{{ start = {START}, step = 0.0001e-4, share = 1.0 }}"
_BLOCK = """
[fitted.KIND]
[fitted.KIND.parameters]
ll = LINE
ll128 = LINE
simple = LINE
own_part = 0.5
through = [1.0]
[fitted.KIND.residuals]
mean = 0.1
""".replace("LINE", _LINE)
_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv")


def cpu_node(path: Path) -> str:
    """Write it to `path`; returns the path as `--node` takes it."""
    head = 'name = "2 x mine"\ngpu = "mine"\ngpus = 2\nlink = "none"\nchannels = 1\n'
    tiers = f"[[tiers]]\ngpus = 2\nbandwidth = {WIRE}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + tiers + "".join(_BLOCK.replace("KIND", kind) for kind in _KINDS))
    return str(path)
