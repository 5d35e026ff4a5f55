"""Where torchao's linear layers are modelled, in 8-bit floats or integers or with fake quantisation: in eager steps of
one GPU, on models and methods whose layers are `nn.Linear` (accelerate/utils/ao.py, `convert_model_to_fp8_ao`;
torchtune/training/quantization.py, `Int8MixedPrecisionTrainingQuantizer`: neither the head nor adapters)."""

from ..architectures.base import Architecture
from ..errors import UserError
from ..methods.parts.base import Method
from ..setup import Setup

LORA = ("lora", "rslora", "loraplus")
TRAINED = {  # methods by option; torchao's int8 layer forms no gradient of a bias whose weight is frozen
    "fp8": ("full", "top_k", "selected", "bitfit", "norm", *LORA), "int8": ("full", "top_k", *LORA), "qat": ("full",),
}  # fmt: skip
NOT_MEASURED = "no {} were measured: they are priced as 16-bit ones that sum over half as much"
NOTES = {
    "fp8": "float8 in eager mode: scaling and casting are kernels of their own, which torch.compile would fuse; "
    + NOT_MEASURED.format("float8 products"),
    "int8": NOT_MEASURED.format("products of torchao's Triton kernel (scaled_int8_mm)"),
}


def product_notes(setup: Setup) -> list[str]:
    """What a reader should know about such products."""
    return [note for option, note in NOTES.items() if getattr(setup, option) != "none"]


def check_converted(architecture: Architecture, method: Method, setup: Setup) -> None:
    """Raise `UserError` where the setup's 8-bit products or its fake quantisation are not modelled."""
    asked = [option for option in TRAINED if getattr(setup, option) != "none"]
    if not asked:
        return
    option = asked[0]
    what = f"{option} {getattr(setup, option)}"
    if len(asked) > 1:
        other = f"{asked[1]} {getattr(setup, asked[1])}"
        raise UserError(f"{what} with {other} is not modelled; leave one of them out")
    if setup.compile != "none" or setup.engine != "torch":
        other = f"compile {setup.compile}" if setup.compile != "none" else f"engine {setup.engine}"
        raise UserError(f"{what} with {other} is not modelled; leave one of them out")
    traits = architecture.traits
    if traits.conv1d or traits.head != "causal" or architecture.classifier is not None:
        is_what = "has Conv1D layers, which torchao leaves as they are" if traits.conv1d else "is no causal model"
        raise UserError(f"{what}: {architecture.name} {is_what}; leave {option} out")
    if option == "int8" and setup.amp is not None:
        raise UserError(f"{what} with amp {setup.amp}: torchao's layer knows no autocast; leave amp out")
    if method.name not in TRAINED[option] or getattr(method, "implementation", "peft") != "peft":
        instead = f"one of {', '.join(TRAINED[option])}" if len(TRAINED[option]) > 1 else TRAINED[option][0]
        raise UserError(f"{what} with method {method.spec()} is not modelled; use {instead}")
    if option in NOTES:
        _check_products(architecture, method, what)


def _check_products(architecture: Architecture, method: Method, what: str) -> None:
    if architecture.traits.by_matmul:
        raise UserError(
            f"{what}: {architecture.name} adds to results of its layers in place, which autograd forbids of torchao's; "
            "leave it out"
        )
    if "lm_head" in getattr(method, "targets", ()):
        raise UserError(f"{what}: an adapted output head is not modelled; leave lm_head out of targets")
