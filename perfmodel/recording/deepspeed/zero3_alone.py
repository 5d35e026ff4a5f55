"""DeepSpeed's ZeRO-3 on one GPU: what it does with every gradient, and its optimizer step.

With one rank nothing is gathered (`NoGatherHandle`) and nothing is sent, but the rest of the program runs. Weights and
adapters are 16-bit, without autocast; every gradient is copied into a bucket, divided by one, and copied or added into
a flat buffer; the optimizer works on flat fp32 masters, one sub-group after another. Each gradient is taken as a bucket
of its own: small ones share one, with a further copy.

Source: deepspeed 0.19.8, runtime/zero/stage3.py (`__add_grad_to_ipg_bucket`, `partition_grads`, `get_grad_norm_direct`,
`step`) and runtime/comm/coalesced_collectives.py. What its Python costs the host: `perfmodel.devices.engine`.
"""

from collections.abc import Callable
from dataclasses import replace

from ...errors import UserError
from ...methods.parts.base import Method
from ...optimizers import Update
from ...optimizers.parts.ops import in_place, new, read_item
from ...optimizers.parts.update import Parameters, existing, gradient, runs
from ...program.dims import Dim, decide
from ...program.op import Attrs
from ...program.streams import COMMUNICATION, COMPUTE, Run
from ...setup import Setup
from ...tape.core import record, tape
from ...tape.tensor import Parameter, Tensor
from ..step import Step
from .flat import elements_of, flattened, update_of_all

NOTE = (
    "what the Python of DeepSpeed's ZeRO-3 costs was measured on a CPU (data/engines); few steps on GPUs were compared"
)
ENGINE = "deepspeed-zero3"
SUB_GROUP = 10**9  # elements that are updated together (`sub_group_size`)
BESIDE = Run(COMMUNICATION)  # the stream that reduces gradients (`overlap_comm`, on by default)
READY = Run(COMMUNICATION, after=(COMPUTE,))  # it waits for the gradient (`__add_grad_to_ipg_bucket`)
CHECKS = (  # calls on scalars that check and combine norms (`get_grad_norm_direct`, `combine_grad_norm_groups`)
    "stack", "pow.Tensor_Scalar", "sum", "pow.Tensor_Scalar", "abs", "ne.Scalar", "eq.Tensor", "mul.Tensor", "isnan",
    "logical_or", "lift_fresh", "where.self", "stack", "abs", "ne.Scalar", "eq.Tensor", "mul.Tensor", "bitwise_not",
    "lt.Scalar", "bitwise_or.Tensor", "any", "linalg_vector_norm", "full_like", "where.self", "abs", "ne.Scalar",
    "eq.Tensor", "mul.Tensor", "bitwise_not", "lt.Scalar", "bitwise_or.Tensor", "any",
)  # fmt: skip
CLIPPING = ("div.Tensor", "add.Tensor", "div.Tensor", "clamp", "mul.Tensor", "reciprocal", "mul.Tensor")


def check_zero3(setup: Setup, method: Method) -> None:
    """Raise `UserError` where setup or method are not modelled under the engine."""
    if setup.compile != "none" or setup.cuda_graphs:
        raise UserError(f"engine {setup.engine} is modelled in eager mode: leave out --compile and --cuda-graphs")
    if type(method).update is not Method.update or method.periodic():
        raise UserError(f"method {method.name}: its own update is not modelled under engine {setup.engine}")


def one_name(setup: Setup) -> Setup:
    """The setup with ZeRO-3 named both ways: as the engine, and as what several GPUs do.

    Raises:
        UserError: the engine is ZeRO-3, and several GPUs are to do something else.
    """
    if decide(setup.gpus == 1) and setup.offload == "none":
        return setup
    if setup.parallel == "zero3":
        return replace(setup, engine=ENGINE)
    if setup.engine != ENGINE:
        return setup
    if setup.parallel != Setup.parallel:  # what nobody asked for
        raise UserError(
            f"engine: {ENGINE} is zero3 on several GPUs, not parallel {setup.parallel}; leave one of them out"
        )
    return replace(setup, parallel="zero3")


def under_zero(setup: Setup, method: Method) -> tuple[Setup, Method]:
    """What DeepSpeed makes of setup and method: the whole module, adapters too, in one 16-bit dtype; no autocast."""
    return replace(setup, dtype=setup.computes_in, amp=None), method.in_one_dtype(setup.computes_in)


def bucket(step: Step) -> Dim:
    """Elements of the bucket: transformers' `"reduce_bucket_size": "auto"` is the hidden size squared."""
    return step.architecture.hidden**2


def flat_bytes(step: Step) -> Dim:
    """Bytes of the flat buffer of all gradients, and of the bucket."""
    return buffer_bytes(flattened(step.parameters), bucket(step))


def buffer_bytes(trained: Parameters, elements: Dim) -> Dim:
    """Bytes of the gradients of what trains, and of a bucket of so many elements."""
    return sum(p.nbytes * p.count for p in trained) + existing((elements,), trained[0].dtype).nbytes


def hook(step: Step, *, first: bool) -> Callable[[Parameter, Tensor], None]:
    """What runs as soon as a parameter's gradient is complete; the first micro-batch's starts the sum."""

    def reduce(p: Parameter, grad: Tensor) -> None:
        tape().part.host.gradients += 1
        with tape().belonging_to("accumulation"):
            fits = decide(p.numel <= bucket(step))
            if fits:
                in_bucket = existing(p.shape, grad.dtype)
                record("copy_", (in_bucket, grad), (in_bucket,), runs=READY)
                grad = in_bucket
            record("div_.Tensor", (grad,), (grad,), runs=BESIDE if fits else READY)
            total = existing(p.shape, grad.dtype)
            record("copy_" if first else "add_.Tensor", (total, grad), (total,), runs=BESIDE)

    return reduce


def end_of_backward() -> None:
    """The host waits for the stream that reduces gradients (`independent_gradient_partition_epilogue`)."""
    record("deepspeed::synchronize", (), (), Attrs(host=True, sync=True), runs=BESIDE)


def record_zero_update(step: Step, optimizer: str) -> Update:
    """Record the optimizer step; returns it with what is kept between steps, masters included."""
    return recorded_update(step.parameters, optimizer, clips=step.setup.clip_grad)


def recorded_update(
    parameters: Parameters, optimizer: str, *, clips: bool, between: Callable[[], None] = lambda: None
) -> Update:
    """As `record_zero_update`; `between` records what ranks do once each has the norm of its gradients."""
    update = update_of_all(parameters, optimizer)
    _norm(update.parameters)
    between()
    left = elements_of(update.parameters)
    dtype = update.parameters[0].dtype
    while decide(left > SUB_GROUP):
        _sub_group(update, SUB_GROUP, dtype, clips=clips)
        left = left - SUB_GROUP
    _sub_group(update, left, dtype, clips=clips)
    return update


def _norm(parameters: Parameters) -> None:
    """The norm of each gradient in fp64, then of all; the host reads whether it is finite, clipping or not."""
    for count, run in runs(parameters):
        part = tape().begin("clip", "optimizer")
        part.repeat, part.host.gradients = count, len(run)
        for p in run:
            record("linalg_vector_norm", (new("_to_copy", gradient(p), dtype="fp64"),), (existing((), "fp64"),))
    _checked()


def norms_together(parameters: Parameters, *, between: Callable[[], None]) -> None:
    """The norm of all from those of each, which backward has taken; as `_norm`."""
    for count, run in runs(parameters):
        part = tape().begin("clip", "optimizer")
        part.repeat, part.host.gradients = count, len(run)
        for _ in run:
            in_place("add_.Tensor", in_place("pow.Tensor_Scalar", existing((), "fp64")))
    tape().begin("clip", "optimizer")
    read_item(existing((), "fp64"))
    between()
    _checked()


def _checked() -> None:
    tape().begin("clip", "optimizer")
    norm = existing((), "fp64")
    for name in CHECKS:
        in_place(name, norm)
    read_item(norm)


def _sub_group(update: Update, elements: Dim, dtype: str, *, clips: bool) -> None:
    """`_prepare_sub_group` … `_release_sub_group`: gradients to fp32, scaled, the optimizer, masters to weights."""
    update.part()
    flat = Parameter("flat", (elements,), "fp32", kind="weight", trainable=True)
    flat.used = True
    master = update.state(flat)
    together = new("cat", existing((elements,), dtype))
    flat.grad = new("_to_copy", together, dtype="fp32")
    del together
    for name in CLIPPING if clips else ():
        in_place(name, existing((), "fp64"))
    in_place("mul_.Tensor", flat.grad)
    update.group([flat])
    update.part()
    in_place("copy_", existing((elements,), dtype), master)
    flat.grad = None
