"""gptqmodel's linear layer in training, without the package: its compiled kernels are stand-ins.

Written from gptqmodel 7.7, nn_modules/qlinear/torch.py (`_forward_eager`), of whose `dequantize_weight` torch.compile
makes one kernel, of 3 bits four; peft's own layer runs on it.
"""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@torch.library.custom_op("gptqmodel::dequantize_weight", mutates_args=())
def dequantize_weight(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor
) -> torch.Tensor:
    """Codes less their zeros, by their scales; here all codes are zeros, which changes no call."""
    return scales[g_idx.long()] * 0


@dequantize_weight.register_fake
def _(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor) -> torch.Tensor:
    return scales.new_empty((g_idx.shape[0], scales.shape[1]))


@torch.library.custom_op("gptqmodel::spread", mutates_args=())
def spread_words(words: torch.Tensor, dim: int) -> torch.Tensor:
    """Three words of 32 codes as 36 numbers, along a dim."""
    return words.repeat_interleave(12, dim)


@spread_words.register_fake
def _(words: torch.Tensor, dim: int) -> torch.Tensor:
    return words.new_empty([n * 12 if i == dim else n for i, n in enumerate(words.shape)])


@torch.library.custom_op("gptqmodel::joined", mutates_args=())
def joined(numbers: torch.Tensor) -> torch.Tensor:
    """36 numbers as 32 codes."""
    return numbers.view(numbers.shape[0], -1, 36)[:, :, :32].reshape(numbers.shape[0], -1).clone()


@joined.register_fake
def _(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.new_empty((numbers.shape[0], numbers.shape[1] // 36 * 32))


class GptqLinear(nn.Module):
    """`gptqmodel.nn_modules.qlinear.torch.TorchLinear`, that of Triton in training too."""

    def __init__(self, base: Any, bits: int, group_size: int) -> None:
        super().__init__()
        self.bits = bits
        rows, columns = base.weight.shape
        self.in_features, self.out_features = (rows, columns) if isinstance(base, Conv1D) else (columns, rows)
        groups = -(-self.in_features // group_size)
        shapes = {
            "qweight": (self.in_features * bits // 32, self.out_features),
            "qzeros": (groups, self.out_features * bits // 32), "g_idx": (self.in_features,),
        }  # fmt: skip
        for name, shape in shapes.items():
            made = torch.zeros(shape, dtype=torch.int32, device=base.weight.device)
            self.register_parameter(name, nn.Parameter(made, requires_grad=False))
        self.scales = nn.Parameter(base.weight.new_zeros(groups, self.out_features), requires_grad=False)
        self.bias = base.bias
        self.stands_for = {"qweight": rows * columns, "qzeros": 0, "g_idx": 0, "scales": 0}

    def forward(self, x: Any) -> Any:
        """(…, n_in) → (…, n_out)."""
        shape = (*x.shape[:-1], self.out_features)
        x = x.reshape(-1, x.shape[-1])
        codes, zeros = self.qweight, self.qzeros
        if self.bits == 3:
            codes, zeros = spread_words(codes, 0), joined(spread_words(zeros, 1))
        weights = dequantize_weight(codes, zeros, self.scales, self.g_idx)
        del codes, zeros
        if weights.dtype != x.dtype:
            weights = weights.to(dtype=x.dtype)
        out = torch.matmul(x, weights).reshape(shape)
        del weights
        if self.bias is not None:
            out.add_(self.bias if self.bias.dtype == out.dtype else self.bias.to(out.dtype))
        return out
