"""A device as one asks it for prices: seconds of a product, of attention, of what only moves memory, of any call.

    >>> import numpy as np
    >>> h100 = Device.load("h100-sxm")
    >>> f"{h100.gemm(4096, 4096, 4096) * 1e6:.0f} us"
    '180 us'
    >>> h100.gemm(np.array([512, 4096]), 4096, 4096).shape
    (2,)

They are the prices that predictions are made of, launch floors included, but that products are those of a benchmark
unless `in_step` is asked for; dims may be integer arrays that broadcast.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np

from ..errors import UserError, as_given, check_kind, nearest, number_array
from ..program.dtypes import FLOATING, ITEMSIZE
from ..program.op import PLAIN, Attrs, Op, Spec
from ..values import immutable
from . import gemm, price, profile
from .profile import DeviceProfile

ATTENTION = {  # kernel -> the call that runs it on a GPU
    "flash": "_scaled_dot_product_flash_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
    "cudnn": "_scaled_dot_product_cudnn_attention",
}
ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"


@immutable
class Device:
    """Prices of one device; `profile` holds its datasheet, fitted parameters and where they come from."""

    profile: DeviceProfile

    __eq__, __hash__ = object.__eq__, object.__hash__

    @classmethod
    def load(cls, name_or_path: str | PathLike[str]) -> "Device":
        """A device by name, alias or the path of its TOML file.

        Raises:
            UserError: no such device, or a broken file.
        """
        return cls(profile_of(name_or_path))

    def gemm(
        self, m: Any, n: Any, k: Any, *, batch: Any = 1, dtype: str = "bf16", layout: str = "tn", in_step: bool = False
    ) -> Any:
        """Seconds of (m, k)·(k, n), or of `batch` of them in one call.

        Args:
            m, n, k, batch: rows and columns of the result, elements summed over, products.
            layout: tn (a linear's forward), nn (its input gradient) or nt (its weight gradient).
            in_step: behind other kernels and on a board that has been at work, as in a training step, where 16-bit
                products take longer than of their like back to back in a short burst.

        Raises:
            UserError: a dim below 1, an unknown dtype or layout, a batch in another layout than tn.
        """
        _one_of("dtype", dtype, FLOATING)
        _one_of("layout", layout, gemm.LAYOUTS)
        if np.any(np.not_equal(batch, 1)) and layout != "tn":
            raise UserError("batched products have one layout: leave layout out")

        def call(m: Any, n: Any, k: Any, b: Any) -> Op:
            if np.all(np.equal(b, 1)):
                return _call("mm", dtype, ((m, k), (k, n)), (m, n), Attrs(layout))
            return _call("bmm", dtype, ((b, m, k), (b, k, n)), (b, m, n))

        return self._over((m, n, k, batch), call, in_step=in_step)

    def attention(
        self, batch: Any, seq: Any, heads: Any, head_dim: Any, *, kv_heads: Any = None, backward: bool = False,
        causal: bool = True, dtype: str = "bf16", kernel: str | None = None,
    ) -> Any:  # fmt: skip
        """Seconds of one fused attention.

        Args:
            batch, seq, heads, head_dim: of the queries; `kv_heads` of keys and values [default: as many].
            backward: the gradients of q, k and v instead of the forward.
            kernel: flash, efficient or cudnn [default: the one that PyTorch prefers there]; a CPU has its own.

        Raises:
            UserError: a dim below 1, an unknown dtype or kernel, key heads that do not divide the heads.
        """
        _one_of("dtype", dtype, FLOATING)
        kernel = kernel or ("flash" if self.profile.cudnn_attention is self.profile.attention else "cudnn")
        _one_of("kernel", kernel, ATTENTION)
        kv_heads = heads if kv_heads is None else kv_heads
        if np.any(_positive(heads) % _positive(kv_heads)):
            raise UserError(f"kv_heads {kv_heads} must divide heads {heads}")
        name = (ON_CPU if self.profile.kind == "cpu" else ATTENTION[kernel]) + "_backward" * backward

        def call(b: Any, s: Any, h: Any, d: Any, kv: Any) -> Op:
            q, k = (b, h, s, d), (b, kv, s, d)
            return _call(name, dtype, (q, q, k, k) if backward else (q, k, k), q, Attrs(causal=causal))

        return self._over((batch, seq, heads, head_dim, kv_heads), call)

    def pointwise(self, bytes_read: Any, bytes_written: Any, *, dtype: str = "bf16") -> Any:
        """Seconds of a pointwise kernel that reads and writes so many distinct bytes.

        Raises:
            UserError: less than a byte, or an unknown dtype.
        """
        _one_of("dtype", dtype, FLOATING)

        def call(read: Any, written: Any) -> Op:
            item = ITEMSIZE[dtype]
            made = _call("add.Tensor", dtype, ((read // item,),), (written // item,))
            made.bytes_read, made.bytes_written = read, written
            return made

        return self._over((bytes_read, bytes_written), call)

    def op(self, op: Op, *, in_step: bool = True) -> Any:
        """Seconds of any call, as the tape or a trace recorded it; 0 for a view. `in_step`: as in `gemm`."""
        seconds = price.durations([op], self.profile, in_step=in_step)[0]
        return seconds if seconds.ndim else float(seconds)

    def _over(self, dims: tuple[Any, ...], call: Callable[..., Op], *, in_step: bool = True) -> Any:
        """Seconds of a call over broadcast dims: a float, or an array of their shape."""
        arrays = np.broadcast_arrays(*(_positive(d) for d in dims))
        shape = arrays[0].shape
        if not shape:
            return self.op(call(*(int(a) for a in arrays)), in_step=in_step)
        flat = [a.reshape(-1) for a in arrays]
        uniform = [int(a[0]) if (a == a[0]).all() else a for a in flat]
        return np.broadcast_to(self.op(call(*uniform), in_step=in_step), flat[0].shape).reshape(shape)


GivenDevice = str | PathLike[str] | DeviceProfile | Device


def profile_of(device: GivenDevice) -> DeviceProfile:
    """The profile of a device by name, path or as it is.

    Raises:
        UserError: no such device, or a broken file.
    """
    check_kind("device", device, (str, PathLike, DeviceProfile, Device), "a name, the path of a TOML, or a Device")
    if isinstance(device, Device):
        return device.profile
    return device if isinstance(device, DeviceProfile) else profile.load(device)


def _call(
    name: str, dtype: str, inputs: Sequence[tuple[Any, ...]], output: tuple[Any, ...], attrs: Attrs = PLAIN
) -> Op:
    read, out = [Spec(dtype, shape) for shape in inputs], Spec(dtype, output)
    return Op(name, tuple(read), (out,), sum(s.nbytes for s in read), out.nbytes, attrs=attrs)


def _positive(dim: Any) -> np.ndarray:
    return number_array("dims", dim, 1, whole=True).astype(np.int64)


def _one_of(what: str, value: str, known: Any) -> None:
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{what} {as_given(value)} is unknown: {nearest(str(value), known)}")
