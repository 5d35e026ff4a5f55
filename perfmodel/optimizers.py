"""What clipping and the optimizer launch for a list of parameters.

Lists are grouped by dtype as `torch.optim` groups them. A `Spec` with copies stands for the like parameters of
identical layers, so the lists stay short. Sources: torch/optim/adamw.py, adam.py, sgd.py, nn/utils/clip_grad.py.
"""

from collections.abc import Callable, Sequence

from .tape.core import Op, Parameter, Part, Spec
from .tape.dims import Dim

STATES = {"adamw": 2, "sgd": 0, "sgd-momentum": 1}  # tensors of the parameter's dtype kept between steps

Specs = list[Spec]


def resolve(optimizer: str, device: str) -> str:
    """The form that PyTorch picks: foreach on CUDA, the loop on the CPU."""
    if optimizer == "adamw":
        return "adamw-foreach" if device == "cuda" else "adamw-loop"
    return optimizer


def family(optimizer: str) -> str:
    """adamw, sgd or sgd-momentum."""
    return "adamw" if optimizer.startswith("adamw") else optimizer


def trainable(parameters: Sequence[Parameter]) -> Specs:
    """The parameters that receive a gradient, and so are clipped and updated."""
    return [Spec(p.dtype, p.shape, p.count) for p in parameters if p.used]


def by_dtype(specs: Specs) -> list[Specs]:
    """Groups of one dtype, in order of first appearance."""
    groups: dict[str, Specs] = {}
    for s in specs:
        groups.setdefault(s.dtype, []).append(s)
    return list(groups.values())


def state_bytes(specs: Specs, optimizer: str) -> Dim:
    """Bytes of optimizer state, the fp32 step counters of AdamW (on the host unless fused) included."""
    states = STATES[family(optimizer)]
    counters = 4 * sum(s.copies for s in specs) if states == 2 else 0
    return states * sum(s.nbytes for s in specs) + counters


class _Recorder:
    """Appends ops on lists of tensors to a part."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __call__(
        self, name: str, inputs: Specs, outputs: Specs, *, device: str = "device", distinct: Specs | None = None
    ) -> None:
        """Record a call; `distinct` names the inputs where one tensor is passed twice."""
        read, written = sum(s.nbytes for s in distinct or inputs), sum(s.nbytes for s in outputs)
        self.part.ops.append(Op(name, tuple(inputs), tuple(outputs), read, written, attrs=(device,)))

    def temporary(self, specs: Specs) -> Dim:
        """Allocate a list of new tensors; free what is returned."""
        nbytes = sum(s.nbytes for s in specs)
        self.part.allocate(nbytes)
        return nbytes


def clip_grad_norm(part: Part, grads: Specs) -> None:
    """`clip_grad_norm_`: per-tensor norms, their norm, and a scaling of every gradient; lists on CUDA and CPU alike."""
    op = _Recorder(part)
    dtype = _common([s.dtype for s in grads])
    scalar = Spec(dtype, ())
    count = sum(s.copies for s in grads)
    groups = by_dtype(grads)
    for group in groups:
        norms = [Spec(s.dtype, (), s.copies) for s in group]
        op("_foreach_norm.Scalar", group, norms)
    norms = [Spec(s.dtype, (), s.copies) for s in grads]
    op("stack", norms, [Spec(dtype, (count,))])
    op("linalg_vector_norm", [Spec(dtype, (count,))], [scalar])
    for name in ("add.Tensor", "reciprocal", "mul.Tensor", "clamp"):
        op(name, [scalar], [scalar])
    for group in groups:
        op("_foreach_mul_.Tensor", [*group, scalar], group)


def _common(dtypes: list[str]) -> str:
    return dtypes[0] if len(set(dtypes)) == 1 else "fp32"


def each(op: _Recorder, specs: Specs, record: Callable[[Spec], None]) -> None:
    """Record ops for one tensor after another, as often as it has copies."""
    for s in specs:
        one = _one(s)
        start = len(op.part.ops)
        record(one)
        op.part.ops.extend(op.part.ops[start:] * (s.copies - 1))


def _one(s: Spec) -> Spec:
    return s._replace(copies=1)


def _counters(group: Specs) -> Specs:
    return [Spec("fp32", (), s.copies) for s in group]


def adamw_foreach(part: Part, group: Specs) -> None:
    """`_multi_tensor_adamw` on one dtype group: ten passes over lists, the bias corrections on the host."""
    op = _Recorder(part)
    counters = _counters(group)
    params = grads = moments = group
    op("_foreach_add_.Tensor", [*counters, Spec("fp32", ())], counters, device="host")
    op("_foreach_mul_.Scalar", params, params)
    op("_foreach_lerp_.Scalar", moments + grads, moments)
    op("_foreach_mul_.Scalar", moments, moments)
    op("_foreach_addcmul_.Scalar", moments + grads + grads, moments, distinct=moments + grads)
    each(op, counters, lambda one: op("_local_scalar_dense", [one], [], device="host"))
    each(op, counters, lambda one: op("_local_scalar_dense", [one], [], device="host"))
    denominator = op.temporary(group)
    op("_foreach_sqrt", moments, group)
    op("_foreach_div_.ScalarList", group, group)
    op("_foreach_add_.Scalar", group, group)
    op("_foreach_addcdiv_.ScalarList", params + moments + group, params)
    part.free(denominator)


def adamw_loop(part: Part, group: Specs) -> None:
    """`_single_tensor_adamw`: the same passes, one tensor after another."""
    op = _Recorder(part)

    def one_tensor(p: Spec) -> None:
        counter = Spec("fp32", ())
        op("add_.Tensor", [counter], [counter], device="host")
        op("mul_.Tensor", [p], [p])
        op("lerp_.Scalar", [p, p], [p])
        op("mul_.Tensor", [p], [p])
        op("addcmul_", [p, p, p], [p], distinct=[p, p])
        op("_local_scalar_dense", [counter], [], device="host")
        op("sqrt", [p], [p])
        op("div.Tensor", [p], [p])
        op("add_.Tensor", [p], [p])
        op("addcdiv_", [p, p, p], [p])

    each(op, group, one_tensor)
    _loop_temporaries(part, group)


def _loop_temporaries(part: Part, group: Specs) -> None:
    """`denom = sqrt(v) / c`: both results of one parameter, and still the last one's, which `denom` names till then."""
    last: Dim = 0
    for s in group:
        nbytes = _one(s).nbytes
        part.allocate(2 * nbytes)
        part.free(nbytes + last)
        last = nbytes
    part.free(last)


def adamw_fused(part: Part, group: Specs) -> None:
    """`_fused_adamw_`: one pass over all lists; the step counters live on the device.

    Its schema names the gradients as written (they are, when it unscales them), so they count as outputs.
    """
    op = _Recorder(part)
    counters = _counters(group)
    op("_foreach_add_.Scalar", counters, counters)
    op("_fused_adamw_", group * 4 + counters, group * 4)


def sgd(part: Part, group: Specs, *, momentum: bool) -> None:
    """`_multi_tensor_sgd` without weight decay."""
    op = _Recorder(part)
    if momentum:
        op("_foreach_mul_.Scalar", group, group)
        op("_foreach_add_.List", group * 2, group)
    op("_foreach_add_.List", group * 2, group)


def record_step(part: Part, specs: Specs, optimizer: str) -> None:
    """Record one optimizer step for the trainable parameters; `optimizer` as `resolve` returns it."""
    for group in by_dtype(specs):
        if optimizer == "adamw-foreach":
            adamw_foreach(part, group)
        elif optimizer == "adamw-loop":
            adamw_loop(part, group)
        elif optimizer == "adamw-fused":
            adamw_fused(part, group)
        else:
            sgd(part, group, momentum=optimizer == "sgd-momentum")


__all__ = ["STATES", "clip_grad_norm", "family", "record_step", "resolve", "state_bytes", "trainable"]
