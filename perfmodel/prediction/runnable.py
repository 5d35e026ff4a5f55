"""What a device runs at all: kernels that are not written for it are refused, before anything is priced."""

from ..devices.profile import DeviceProfile
from ..errors import UserError
from ..methods.parts.base import Method
from ..setup import Setup

AMPERE, TURING, VOLTA = (8, 0), (7, 5), (7, 0)
# Of the flash-attn package ("Ampere, Ada, or Hopper GPUs", https://github.com/Dao-AILab/flash-attention), of Triton
# (torch/_dynamo/device_interface.py, `is_triton_capable`), of LLM.int8()
# (https://huggingface.co/docs/bitsandbytes/installation), and of code by Inductor with bf16
# (torch/_inductor/compile_fx.py, `_check_triton_bf16_support`)
WITHOUT_FLASH = "flash-attn is not written for {}, of compute capability {}: use --attention sdpa"
WITHOUT_TRITON = "Triton, in which that is written, does not compile for {}, of compute capability {}"
WITHOUT_INT8 = "bitsandbytes has no 8-bit products for {}, of compute capability {}: use qlora"
WITHOUT_BF16 = "torch.compile leaves bf16 to eager code on {}, of compute capability {}: use --dtype fp16"


def check_runs(setup: Setup, method: Method, on: DeviceProfile) -> None:
    """Raise `UserError` where a device cannot run what a setup and a method ask for."""
    _check_eight_bits(setup, on)
    if setup.offload != "none" and on.kind == "cpu":
        raise UserError(f"offload {setup.offload}: {on.slug} is a CPU, whose memory is the host's; leave offload out")
    if on.kind != "cuda" or not on.compute_capability:
        return
    major, minor = on.compute_capability.split(".")
    has, names = (int(major), int(minor)), (on.slug, on.compute_capability)
    if has >= AMPERE:
        return
    if setup.attention == "flash2":
        raise UserError(WITHOUT_FLASH.format(*names))
    if setup.compile != "none" and setup.computes_in == "bf16":
        raise UserError(WITHOUT_BF16.format(*names))
    if has < TURING and method.name == "lora_8bit":
        raise UserError(WITHOUT_INT8.format(*names))
    if has < VOLTA and (asked := _by_triton(setup, method)):
        raise UserError(f"{asked}: {WITHOUT_TRITON.format(*names)}")


def _by_triton(setup: Setup, method: Method) -> str:
    """What is asked for that runs kernels of Triton's, empty if nothing is."""
    if setup.compile != "none":
        return f"compile {setup.compile}"
    if setup.kernels != "torch":
        return f"kernels {setup.kernels}"
    implementation = getattr(method, "implementation", "peft")
    return "" if implementation == "peft" else f"implementation {implementation}"


def _check_eight_bits(setup: Setup, on: DeviceProfile) -> None:
    """Refuse products of 8 bits on a device that has no use for them, as far as its file knows."""
    if setup.fp8 != "none" and on.hardware.fp8_flops is None:
        raise UserError(f"fp8 {setup.fp8}: the file of {on.slug} has no float8 peak (fp8_flops); leave fp8 out")
    if setup.int8 != "none" and (on.hardware.int8_flops or 0) <= (on.hardware.bf16_flops or 0):
        raise UserError(f"int8 {setup.int8}: the file of {on.slug} has no int8 peak beyond bf16's; leave int8 out")
