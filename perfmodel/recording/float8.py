"""Where linear layers in 8-bit floats are modelled: in eager steps of one GPU, on models and methods whose layers are
`nn.Linear`, as accelerate hands them to torchao (accelerate/utils/ao.py, `convert_model_to_fp8_ao`)."""

from ..architectures.base import Architecture
from ..errors import UserError
from ..methods.parts.base import Method
from ..setup import Setup

METHODS = ("full", "top_k", "selected", "bitfit", "norm", "lora", "rslora", "loraplus")
NOTE = "no float8 products were measured: they are priced as 16-bit ones that sum over half as much"


def check_float8(architecture: Architecture, method: Method, setup: Setup) -> None:
    """Raise `UserError` where the setup's float8 products are not modelled."""
    what = f"fp8 {setup.fp8}"
    if setup.compile != "none" or setup.engine != "torch":
        other = f"compile {setup.compile}" if setup.compile != "none" else f"engine {setup.engine}"
        raise UserError(f"{what} with {other} is not modelled; leave one of them out")
    traits = architecture.traits
    if traits.conv1d or traits.head != "causal" or architecture.classifier is not None:
        is_what = "has Conv1D layers, which torchao leaves as they are" if traits.conv1d else "is no causal model"
        raise UserError(f"{what}: {architecture.name} {is_what}; leave fp8 out")
    if traits.by_matmul:
        raise UserError(
            f"{what}: {architecture.name} adds to results of its layers in place, which autograd forbids of torchao's; "
            "leave it out"
        )
    if method.name not in METHODS or getattr(method, "implementation", "peft") != "peft":
        raise UserError(f"{what} with method {method.spec()} is not modelled; use one of {', '.join(METHODS)}")
    if "lm_head" in getattr(method, "targets", ()):
        raise UserError(f"{what}: an adapted output head is not modelled; leave lm_head out of targets")
