"""Will LoRA make my training step faster, by how much, why, and what should I run instead?

>>> from perfmodel import predict
>>> p = predict("llama-3.2-3b", "lora:r=32,targets=q_proj+v_proj", device="l40s", batch=4, seq=210)
>>> p.trainable_params
9175040

The functions here are the package's face: each says what it takes and imports what it needs when it is called.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .shown import Shown

if TYPE_CHECKING:
    from os import PathLike

    from .architectures import Config
    from .devices.device import Device
    from .devices.host import Host
    from .errors import UserError
    from .methods import Method
    from .network.node import Node
    from .prediction.predict import Model, Prediction
    from .questions.advice import Advice
    from .questions.comparison import Comparison
    from .questions.explanation import Explanation
    from .questions.plan.job import Job
    from .questions.plan.planning import Plan
    from .questions.speedup import SpeedUp
    from .questions.sweeps import Sweep
    from .recording.program import RecordedModel
    from .setup import Setup

__all__ = [
    "Advice", "Comparison", "Device", "Explanation", "Job", "Node", "Plan", "Prediction", "Setup", "SpeedUp", "Sweep",
    "UserError", "advise", "compare", "explain", "plan", "predict", "predict_module", "sweep", "traced",
]  # fmt: skip


def predict(
    model: "Model",
    method: "str | Method" = "full",
    setup: "Setup | None" = None,
    device: "str | PathLike[str] | Device" = "l40s",
    *,
    host: "str | PathLike[str] | Host" = "default",
    **options: Any,
) -> "Prediction":
    """Predict one training step.

    Args:
        model: bundled name, path to a config.json (or its folder), hub id, `Config` or `Architecture`; or what
            `traced` makes of these.
        method: `name[:key=value,…]` or a `Method`; of a `traced` model also the path of an adapter_config.json.
        setup: a `Setup`; keyword options such as `batch=4, seq=210` make or change one. `batch`, `seq` (and a method's
            rank) may be integer arrays or lists that broadcast together: then every figure is an array over the grid.
            Without a setup, what no option names is the usual: weights in bf16, or in fp16 on a GPU without units for
            bf16; SDPA, or eager attention where a model's program lacks it.
        device: slug, path of a TOML, or a `Device`.
        host: slug, path of a TOML, or a `Host`.

    Raises:
        UserError: anything that cannot be satisfied, in one line.

    >>> round(predict("llama-3.2-3b", "lora:r=32", device="l40s", batch=4, seq=210).flops["total"] / 1e12)
    11
    """
    from .prediction.predict import predict as answer

    return answer(model, method, setup, device, host=host, **options)


def compare(
    model: "Model",
    methods: "str | Method | Sequence[str | Method]" = ("full", "lora"),
    setup: "Setup | None" = None,
    device: "str | PathLike[str] | Device" = "l40s",
    *,
    host: "str | PathLike[str] | Host" = "default",
    **options: Any,
) -> "Comparison":
    """Predict several methods in one setup, and how much faster each is than the first, and why.

    Arguments and errors are those of `predict`; `methods` are two at least. A method that is not modelled in the setup
    is in `Comparison.refused` with the reason, unless it is the first, or none but the first is left.

    >>> compare("tinyllama-1.1b", ["full", "lora:r=8"], device="a100", batch=4, seq=512).speedups[0].verdict
    'faster'
    """
    from .questions.comparison import compare as answer

    return answer(model, methods, setup, device, host=host, **options)


def explain(
    model: "Model",
    a: "str | Method" = "full",
    b: "str | Method" = "lora",
    setup: "Setup | None" = None,
    device: "str | PathLike[str] | Device" = "l40s",
    *,
    host: "str | PathLike[str] | Host" = "default",
    axes: str | Sequence[str] = ("batch", "seq"),
    **options: Any,
) -> "Explanation":
    """Explain the step time of `b` against that of `a`.

    Args:
        axes: along which to look for a change of the verdict: batch, seq, size (rank, k), targets (one prediction
            per target); empty to skip the search.

    Other arguments and errors are those of `predict`; the setup must be a single one.

    >>> e = explain("llama-3.2-3b", "full", "lora:r=32,targets=q_proj+v_proj", device="l40s", batch=4, seq=210, axes=())
    >>> e.waterfall[0].name
    'optimizer'
    """
    from .questions.explanation import explain as answer

    return answer(model, a, b, setup, device, host=host, axes=axes, **options)


def advise(
    model: "Model",
    method: "str | Method" = "lora",
    setup: "Setup | None" = None,
    device: "str | PathLike[str] | Device" = "l40s",
    *,
    methods: "str | Method | Sequence[str | Method]" = (),
    memory_bytes: float | None = None,
    min_trainable: float | None = None,
    host: "str | PathLike[str] | Host" = "default",
    **options: Any,
) -> "Advice":
    """Search for the fastest way to train that fits.

    Args:
        method: where you are; its own knobs are always searched.
        methods: further methods to consider, besides `method`.
        memory_bytes: limit, B; the device's memory if None.
        min_trainable: parameters that have to train at least; then every method of the catalogue is considered, sized
            to reach them.

    Raises:
        UserError: what `predict` refuses for the start, arrays in the setup, a limit that is not positive.
    """
    from .questions.advice import advise as answer

    return answer(
        model, method, setup, device, methods=methods, memory_bytes=memory_bytes, min_trainable=min_trainable,
        host=host, **options,
    )  # fmt: skip


def sweep(
    model: "Model",
    methods: "str | Method | Sequence[str | Method]" = ("full", "lora"),
    setup: "Setup | None" = None,
    device: "str | PathLike[str] | Device | Sequence[str | PathLike[str] | Device]" = "l40s",
    *,
    batch: Any = None,
    seq: Any = None,
    rank: Any = (),
    k: Any = (),
    gpus: Any = None,
    host: "str | PathLike[str] | Host" = "default",
    **options: Any,
) -> "Sweep":
    """Plan a sweep: every device, number of GPUs, method, rank, batch and sequence length with every other.

    Args:
        methods: the baseline first.
        device: one or several.
        batch, seq, rank, k, gpus: an int, or several (any sequence or array). Batch, seq and gpus that are not
            given are the setup's. Ranks are for methods that have `r`, `k` for those that train the last K blocks; the
            others ignore them. Of several numbers of GPUs those that the setup or a node does not allow are left out
            (`Sweep.refused`).

    Raises:
        UserError: an axis that no method has, values out of range, and what `predict` refuses.

    >>> grid = sweep("llama-3.2-1b", ["full", "lora"], device="l40s", batch=[1, 2, 4], seq=range(128, 1025, 128))
    >>> len(grid)
    48
    """
    from .questions.sweeps import sweep as answer

    axes = {"batch": batch, "seq": seq, "rank": rank, "k": k, "gpus": gpus}
    return answer(model, methods, setup, device, **axes, host=host, **options)


def plan(
    model: "Model",
    methods: "str | Method | Sequence[str | Method]" = ("full", "lora"),
    setup: "Setup | None" = None,
    device: "str | PathLike[str] | Device | Sequence[str | PathLike[str] | Device] | None" = None,
    *,
    job: "Job | None" = None,
    global_batch: int | None = None,
    gpus: int | Sequence[int] | None = None,
    price: str | float | Sequence[str | float] | Mapping[str, float] = (),
    price_kind: str = "on demand",
    deadline: float | None = None,
    node_power: float | None = None,
    grid_co2: float | None = None,
    host: "str | PathLike[str] | Host" = "default",
    **options: Any,
) -> "Plan":
    """Plan a whole job: its hours, dollars and energy on a GPU, on several, or on every GPU that it fits on.

    Where the setup does not fit, checkpointing and smaller micro-batches with more accumulation are tried, and QLoRA in
    the place of LoRA; each run says what was given up. Nothing is proposed that does not fit.

    Args:
        methods: one or several; what each costs against the first is said.
        device: one or several; None: every GPU of the catalogue, and own ones.
        job: the data set, passes over it, evaluations, checkpoints; or its fields as options: `samples=50_000`,
            `tokens=2e8`, `epochs=3`, `eval_every=200`, ….
        global_batch: samples of an optimizer step: micro-batches of `batch` are accumulated to as many; where no batch
            is given, one takes them all if that fits.
        gpus: of the job; of several numbers each is tried, and what does not go is in `Plan.left_out`.
        price: dollars an hour and GPU, `2.5` for all or `["h100-sxm=2.5"]` for one, or a mapping from slugs.
            Others are those of data/prices/ and of prices/ in $PERFMODEL_HOME.
        price_kind: on demand, spot or reserved.
        deadline: hours; `in_time()` is the cheapest of what surely ends before.
        node_power: W that the node draws for each GPU besides; None: a server's.
        grid_co2: g of CO2 for a kWh.

    Other arguments are those of `predict`.

    Raises:
        UserError: a data set of unknown size, a figure out of range, arrays in the setup, and what `predict` refuses
            for all of the devices and methods.

    >>> p = plan("llama-3.2-1b", "lora", device=["l40s", "a100"], batch=8, seq=1024, samples=10_000, epochs=2)
    >>> [(run.device, run.work.steps, run.given_up) for run in p.fastest()]
    [('a100-80gb-sxm', 2500, ())]
    """
    from .questions.plan.planning import planner_of

    return planner_of(
        model, methods, setup, device, job=job, global_batch=global_batch, gpus=gpus, price=price,
        price_kind=price_kind, deadline=deadline, node_power=node_power, grid_co2=grid_co2, host=host, **options,
    ).plan()  # fmt: skip


def traced(model: "str | PathLike[str] | Config") -> "RecordedModel":
    """A model whose steps come from traces of its real program: any model of transformers, any tuner of peft.

    It goes where any function here takes a `model`, and beside it a method may also be the path of an
    adapter_config.json:

        from perfmodel import compare, traced

        compare(traced("google/gemma-3-4b-it"), ["full", "lora:r=16", "mine/adapter_config.json"], device="h100-sxm")

    A program is traced once, which takes seconds and the validate extra, at a few sizes of which all others follow; it
    is kept in $PERFMODEL_HOME/programs, so that the next question, of any batch, length, optimizer or device, needs
    neither. Where the sizes do not follow from each other, each is traced when it is asked for.

    Args:
        model: bundled name, path to a config.json (or its folder), hub id, or `Config`.

    Raises:
        UserError: a model that cannot be built; later, a method or setup that cannot be traced.
    """
    from .tracing.recorded import traced as answer

    return answer(model)


def predict_module(
    module: Any,
    inputs: Mapping[str, Any] | Sequence[Any] | Any,
    *,
    loss: Callable[[Any], Any] | None = None,
    setup: "Setup | None" = None,
    device: "str | PathLike[str] | Device" = "l40s",
    host: "str | PathLike[str] | Host" = "default",
    name: str = "",
) -> "Prediction":
    """Predict one training step of your own `nn.Module`, from a trace of its real forward and backward.

        import torch
        from perfmodel import predict_module

        with torch.device("meta"):                      # or a module with weights: it is copied without them
            model = torch.nn.Sequential(torch.nn.Linear(4096, 16384), torch.nn.GELU(), torch.nn.Linear(16384, 4096))
        x = torch.empty(8, 512, 4096, device="meta")
        p = predict_module(model.bfloat16(), x.bfloat16(), loss=lambda y: y.float().pow(2).mean(), device="h100-sxm")
        p.time.phases["total"], p.memory.peak, p.flops["total"]

    A transformers or peft model works the same way: `predict_module(model, {"input_ids": ids, "labels": ids})`. What
    trains is what has `requires_grad`. Nothing is computed and the module stays as it is. Of a module with many blocks
    alike, in a `ModuleList` or `Sequential`, a few are traced and the rest is extrapolated, which is checked call by
    call; a note in the prediction says of how many.

    Args:
        module: an `nn.Module`, on any device, "meta" included.
        inputs: example arguments of its forward: a mapping of names, a sequence, or one tensor. Only shapes and dtypes
            count, so meta tensors will do.
        loss: makes the scalar loss of the module's output; default: the output's `.loss`, or the output itself.
        setup: optimizer, gradient accumulation, checkpoints (of transformers models) and clipping of the step; batch,
            seq and dtype only label it. Default: AdamW, batch and seq read off the first input.
        device, host: as `perfmodel.predict` takes them.
        name: how the prediction calls the module; default: its class.

    Raises:
        UserError: no scalar loss, nothing trains, or the program needs data that a fake tensor does not have.
    """
    from .program.installed import needed

    with needed("predict_module"):
        from .tracing.modules import predict_module as answer
    found: Prediction = answer(module, inputs, loss=loss, setup=setup, device=device, host=host, name=name)
    return found


def _draw(result: Any) -> str:
    from .report import notebook

    return notebook.html(result)


Shown.draw = staticmethod(_draw)

_TYPES = {  # name -> its module, imported on first use
    "Advice": "questions.advice", "Comparison": "questions.comparison", "Device": "devices.device",
    "Explanation": "questions.explanation", "Job": "questions.plan.job", "Node": "network.node",
    "Plan": "questions.plan.planning", "Prediction": "prediction.predict", "Setup": "setup",
    "SpeedUp": "questions.speedup", "Sweep": "questions.sweeps", "UserError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _TYPES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(f".{_TYPES[name]}", __name__), name)
    return found
