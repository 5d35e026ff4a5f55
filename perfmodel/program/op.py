"""What a step is made of: an op, and the tensors it sees. No tensor, no tape."""

from copy import copy
from typing import Any, NamedTuple

from .dims import Dim, Shape, product
from .dtypes import ITEMSIZE
from .lengths import Documents
from .ranks import Ranks
from .routing import Routing
from .streams import MAIN, Run


class Attrs(NamedTuple):
    """What decides the price of a call besides its shapes.

    Attributes:
        layout: of a matrix product, as BLAS names it: tn (forward), nn (input gradient), nt (weight gradient).
        copied: operands of a product that cuBLAS cannot read as they lie.
        causal: whether attention is masked causally.
        window: how many keys a query sees at most, where a fused kernel skips the others.
        strided: whether operands are broadcast, permuted or sliced.
        transposed: whether a convolution is the gradient of one, its filters (c, c_out, …).
        dims: what a sum or a transform runs over, counted from the front; None: everything.
        scaled, half: whether a Fourier transform normalises, and gives half the spectrum.
        accumulate: whether values with the same index are added.
        loops: of a kernel that a compiler wrote: results, and elements summed for each.
        exponential: whether such a kernel sums exponentials.
        host: whether it works on host tensors, and the device has nothing to do.
        bus: whether it copies between host and device.
        pinned: of such a copy, whether the host's memory is page-locked: then the host does not wait for it.
        cores: whether the host's cores do it, on tensors in the host's memory, and the host waits for them.
        sync: whether the host waits for the device.
        routing: how many rows each expert of a grouped product gets; without `sync` one kernel serves them all.
        documents: of attention of documents behind one another: how long they are.
        later: whether only further micro-batches do it: they add gradients to those that are there.
        padded: of a matrix product, whether a compiler pads its sides where that pays.
        ranks: of a collective, who takes part.
    """

    layout: str = ""
    copied: tuple[int, ...] = ()
    causal: bool = False
    window: int | None = None
    strided: bool = False
    transposed: bool = False
    dims: tuple[int, ...] | None = None
    scaled: bool = False
    half: bool = False
    accumulate: bool = False
    loops: tuple[Dim, Dim] | None = None
    exponential: bool = False
    host: bool = False
    bus: bool = False
    pinned: bool = False
    cores: bool = False
    sync: bool = False
    routing: Routing | None = None
    documents: Documents | None = None
    later: bool = False
    padded: bool = False
    ranks: Ranks | None = None


PLAIN = Attrs()
STRIDED, ON_HOST, OVER_BUS = Attrs(strided=True), Attrs(host=True), Attrs(bus=True)
PINNED, ON_CORES = Attrs(bus=True, pinned=True), Attrs(cores=True)


class Spec(NamedTuple):
    """What an op sees of a tensor. In lists of parameters, `copies` > 1 stands for the like of identical layers."""

    dtype: str
    shape: Shape
    copies: int = 1

    @property
    def numel(self) -> Dim:
        """Elements of one copy."""
        return product(self.shape)

    @property
    def nbytes(self) -> Dim:
        """Bytes of all copies."""
        return self.numel * ITEMSIZE[self.dtype] * self.copies


class Use(NamedTuple):
    """How an op uses a block of memory: which one, and through which view."""

    storage: int
    nbytes: Dim
    shape: Shape
    strides: Shape


class Op:
    """One ATen call: the narrow waist between what produces ops (tape, trace) and what counts and prices them.

    `bytes_read` counts each distinct input once, `bytes_written` each output once. `view` calls move no data.
    `owner` is what asked for the op: the "base" model, its "attention", an "adapter", the "dequantisation" of weights
    or the "accumulation" of gradients; backward follows its forward.
    `recompute` marks what a checkpoint runs again.
    `reads` and `writes` say which memory the op uses, where the tape follows the flow of data (`Tape.flow`).
    `launched` says whether the device has something to do, `runs` on which stream.
    `launches` keeps how many kernels a call on lists launches, once that is counted (`costs.kernels`).
    """

    __slots__ = (
        "attrs", "bytes_read", "bytes_written", "inputs", "launched", "launches", "name", "outputs", "owner", "reads",
        "recompute", "runs", "view", "writes",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        inputs: tuple[Spec, ...],
        outputs: tuple[Spec, ...],
        bytes_read: Dim,
        bytes_written: Dim,
        *,
        view: bool = False,
        attrs: Attrs = PLAIN,
        owner: str = "base",
        recompute: bool = False,
        runs: Run = MAIN,
    ) -> None:
        self.name = name
        self.inputs = inputs
        self.outputs = outputs
        self.bytes_read = bytes_read
        self.bytes_written = bytes_written
        self.view = view
        self.launched = not (view or attrs.host or attrs.cores)
        self.attrs = attrs
        self.owner = owner
        self.recompute = recompute
        self.runs = runs
        self.launches: Dim | None = None
        self.reads: tuple[Use, ...] = ()
        self.writes: tuple[Use, ...] = ()

    @property
    def call(self) -> Any:
        """What decides its price; cannot be hashed where dims are arrays."""
        return self.name, self.inputs, self.outputs, self.bytes_read, self.bytes_written, self.attrs

    def settled(self) -> "Op":
        """This op in a micro-batch that does it: not as one of `Attrs.later`."""
        if not self.attrs.later:
            return self
        op = copy(self)
        op.attrs = self.attrs._replace(later=False)
        return op

    def __repr__(self) -> str:
        def text(specs: tuple[Spec, ...]) -> str:
            return " ".join(f"{s.dtype}{list(s.shape)}{f'x{s.copies}' if s.copies > 1 else ''}" for s in specs)

        return f"{self.name}({text(self.inputs)}) -> {text(self.outputs)}"
