"""The forms of norms over the last dim: each a function of (what makes its weight or bias, x, setup)."""

from collections.abc import Callable

from ..setup import Setup
from ..tape import nn
from ..tape.core import region
from ..tape.packages import liger
from ..tape.pointwise import add, cast, mean_last, mul, power, rsqrt, sub
from ..tape.tensor import Parameter, Tensor

Norm = Callable[[Callable[[str], Parameter], Tensor, Setup], Tensor]


@region
def rms_norm(parameter: Callable[[str], Parameter], x: Tensor, setup: Setup) -> Tensor:
    """Llama's RMSNorm: statistics and scaling in fp32, the weight applied in x's dtype."""
    weight = parameter("weight")
    if setup.uses("liger"):
        return liger.rms_norm(x, weight)
    dtype = x.dtype
    x = cast(x, "fp32")
    variance = mean_last(power(x))
    x = mul(x, rsqrt(add(variance, 1e-6)))
    return mul(weight, cast(x, dtype))


@region
def t5_norm(parameter: Callable[[str], Parameter], x: Tensor, setup: Setup) -> Tensor:
    """T5's RMSNorm: x itself is scaled by statistics in fp32, the weight applied in its own dtype, if it has 16 bit."""
    weight = parameter("weight")
    variance = mean_last(power(cast(x, "fp32")))
    x = mul(x, rsqrt(add(variance, 1e-6)))
    if weight.dtype != "fp32":
        x = cast(x, weight.dtype)
    return mul(weight, x)


@region
def wide_rms_norm(parameter: Callable[[str], Parameter], x: Tensor, setup: Setup) -> Tensor:
    """OLMo 2's and gpt-oss's RMSNorm: the weight applied in fp32 too."""
    weight = parameter("weight")
    dtype = x.dtype
    x = cast(x, "fp32")
    variance = mean_last(power(x))
    x = mul(x, rsqrt(add(variance, 1e-6)))
    return cast(mul(weight, x), dtype)


@region
def offset_rms_norm(parameter: Callable[[str], Parameter], x: Tensor, setup: Setup) -> Tensor:
    """Gemma's RMSNorm: the weight is an offset from 1, and all of it is computed in fp32; in Liger's form Gemma 2's."""
    weight = parameter("weight")
    if setup.uses("liger"):
        return liger.rms_norm(x, weight, in_place=False)
    wide = cast(x, "fp32")
    out = mul(wide, rsqrt(add(mean_last(power(wide)), 1e-6)))
    del wide
    return cast(mul(out, add(cast(weight, "fp32"), 1.0)), x.dtype)


@region
def centred_norm(parameter: Callable[[str], Parameter], x: Tensor, setup: Setup) -> Tensor:
    """Cohere's LayerNorm: written out in fp32, without a bias."""
    weight = parameter("weight")
    dtype = x.dtype
    x = cast(x, "fp32")
    mean = mean_last(x)
    variance = mean_last(power(sub(x, mean)))
    x = mul(sub(x, mean), rsqrt(add(variance, 1e-5)))
    x = mul(cast(weight, "fp32"), x)
    return cast(x, dtype)


def layer_norm(parameter: Callable[[str], Parameter], x: Tensor, setup: Setup) -> Tensor:
    """`nn.LayerNorm`."""
    return nn.layer_norm(x, parameter("weight"), parameter("bias"))


def layer_norm_without_bias(parameter: Callable[[str], Parameter], x: Tensor, setup: Setup) -> Tensor:
    """`nn.LayerNorm(bias=False)`."""
    return nn.layer_norm(x, parameter("weight"), None)
