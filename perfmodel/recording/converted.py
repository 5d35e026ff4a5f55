"""Where torchao's linear layers are modelled, in 8-bit floats or with fake quantisation: in eager steps of one GPU, on
models and methods whose layers are `nn.Linear` (accelerate/utils/ao.py, `convert_model_to_fp8_ao`)."""

from ..architectures.base import Architecture
from ..errors import UserError
from ..methods.parts.base import Method
from ..setup import Setup

METHODS = ("full", "top_k", "selected", "bitfit", "norm", "lora", "rslora", "loraplus")
NOTE = (
    "float8 in eager mode: scaling and casting are kernels of their own, which torch.compile would fuse; no float8 "
    "products were measured: they are priced as 16-bit ones that sum over half as much"
)


def check_converted(architecture: Architecture, method: Method, setup: Setup) -> None:
    """Raise `UserError` where the setup's float8 products or its fake quantisation are not modelled."""
    if setup.fp8 != "none" and setup.qat != "none":
        raise UserError(f"fp8 {setup.fp8} with qat {setup.qat} is not modelled; leave one of them out")
    option = "fp8" if setup.fp8 != "none" else "qat"
    what = f"{option} {getattr(setup, option)}"
    if setup.compile != "none" or setup.engine != "torch":
        other = f"compile {setup.compile}" if setup.compile != "none" else f"engine {setup.engine}"
        raise UserError(f"{what} with {other} is not modelled; leave one of them out")
    traits = architecture.traits
    if traits.conv1d or traits.head != "causal" or architecture.classifier is not None:
        is_what = "has Conv1D layers, which torchao leaves as they are" if traits.conv1d else "is no causal model"
        raise UserError(f"{what}: {architecture.name} {is_what}; leave {option} out")
    if option == "fp8":
        _check_float8(architecture, method, what)
    elif method.name != "full":
        raise UserError(f"{what} with method {method.spec()} is not modelled; use full")


def _check_float8(architecture: Architecture, method: Method, what: str) -> None:
    if architecture.traits.by_matmul:
        raise UserError(
            f"{what}: {architecture.name} adds to results of its layers in place, which autograd forbids of torchao's; "
            "leave it out"
        )
    if method.name not in METHODS or getattr(method, "implementation", "peft") != "peft":
        raise UserError(f"{what} with method {method.spec()} is not modelled; use one of {', '.join(METHODS)}")
    if "lm_head" in getattr(method, "targets", ()):
        raise UserError(f"{what}: an adapted output head is not modelled; leave lm_head out of targets")
