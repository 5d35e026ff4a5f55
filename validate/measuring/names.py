"""How one ATen call is called by the dispatcher, by the profiler, and on the tape."""

import re

# What a profiler lists among operators and is none: nodes of autograd (`AddmmBackward0`, `autograd::engine::…`,
# `torch::autograd::…`), annotations (`Optimizer.step#AdamW.step`, `CompiledFunction`), what DDP's reducer does.
_OPERATOR = re.compile(r"(?!autograd::|torch::)\w+::\w+(\.\w+)?")
_GENERATED = re.compile(r"triton_([a-z]+)_")  # torch/_inductor/codegen/triton.py, `get_kernel_name`
_KINDS = {"poi": "pointwise", "red": "reduction", "per": "reduction"}


def unified(name: str) -> str:
    """A dispatched call's name for comparison: `add_.Tensor` as `add.Tensor`.

    The engine adds gradients in place where nobody else holds them, which the tape does not see.
    """
    return "add.Tensor" if name == "add_.Tensor" else name


def short(name: str) -> str:
    """A call's name without namespace, overload and mark of being in place, which the profiler writes differently.

    What Inductor generates is one: the tape tells apart along what its kernels sum, a profile how they do it.
    """
    if name.startswith("inductor::"):
        return "inductor"
    return name.removeprefix("aten::").partition(".")[0].rstrip("_")


def is_operator(name: str) -> bool:
    """Whether a profiled name is that of an ATen call or of a package's operator (`bitsandbytes::dequantize_4bit`)."""
    return _OPERATOR.fullmatch(name) is not None


def is_collective(name: str) -> bool:
    """Whether an operator is one of torch.distributed: it hands tensors to NCCL, or to ATen calls."""
    return name.startswith(("c10d::", "_c10d_functional::"))


def plain_collective(name: str) -> str:
    """A collective's name whatever its form: `c10d::_allgather_base_` is allgather."""
    base = name.partition("::")[2].partition(".")[0].strip("_").replace("_base", "").replace("_into_tensor", "")
    return base.replace("_tensor", "").replace("_coalesced", "").replace("_", "")


def generated(kernel: str) -> str:
    """The call that a kernel written by Inductor stands for, by its name; empty for any other kernel."""
    found = _GENERATED.match(kernel)
    return f"inductor::{_KINDS.get(found[1], found[1])}" if found else ""


def adds_parts(kernel: str) -> bool:
    """Whether a kernel adds up what cuBLAS computed of a product in parts of its inner dim."""
    return "splitKreduce" in kernel
