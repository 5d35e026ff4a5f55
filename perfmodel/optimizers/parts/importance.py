"""PEFT's `RankAllocator` of AdaLoRA: importance scores of all adapter weights, and the ranks that are masked.

Source: peft/tuners/adalora/layer.py, `update_ipt` and `mask_to_budget`.
"""

from ...program.op import OVER_BUS, Attrs, Op, Spec
from ...tape.core import emit, new_tensor, record, tape
from ...tape.elementary import sum_dim
from ...tape.pointwise import cat, mean_last
from ...tape.shape import view
from ...tape.tensor import Parameter, Tensor
from .ops import in_place, new, read_item
from .update import Parameters, Update, existing, gradient

Kept = list[Tensor]


def _adapters(update: Update) -> list[Parameter]:
    return [p for p in update.everything if "lora_" in p.name]


def update_scores(update: Update) -> None:
    """Sensitivity |p·g| of every weight, its moving average, and the moving average of its uncertainty."""
    for run in update.runs(_adapters(update)):
        for p in run:
            _score(update, p)


def _score(update: Update, p: Parameter) -> None:
    update.state(p)
    exp_avg_ipt, exp_avg_unc = update.state(p), update.state(p)
    ipt = update.renew(new("abs", new("mul.Tensor", p, gradient(p))))
    exp_avg_ipt = update.renew(new("add.Tensor", new("mul.Tensor", exp_avg_ipt), new("mul.Tensor", ipt)))
    distance = new("mul.Tensor", new("abs", new("sub.Tensor", ipt, exp_avg_ipt)))
    update.renew(new("add.Tensor", new("mul.Tensor", exp_avg_unc), distance))


def allocate(update: Update) -> None:
    """Rank all triplets of A's row, E's entry and B's column by importance and mask the least important ones."""
    adapters = _adapters(update)
    kept: list[Kept] = []
    for run in update.runs(adapters):
        kept.append(_triplets(run))
        _stand_for(kept[-1], run[0].count)
    scores = []
    for run, entries in zip(update.runs(adapters), kept, strict=True):
        sums = [_combined(*entries[i : i + 3]) for i in range(0, len(entries), 3)]
        scores += [Spec(s.dtype, s.shape, run[0].count) for s in sums]
        _stand_for(sums, run[0].count)
        entries += sums
    update.part()
    _read_threshold(scores)
    for run in update.runs(adapters):
        for p in run:
            if p.name.endswith("lora_E"):
                _mask(p, on_gpu=update.tape.device == "cuda")
    update.part()  # everything that was kept dies here


def _stand_for(tensors: Kept, count: int) -> None:
    for t in tensors:
        t.storage.copies = count


def _triplets(run: Parameters) -> Kept:
    """Of every layer's A, B and E, in order of appearance: the mean score of a rank, (r, 1) each."""
    means = []
    for p in run:
        entry_ipt = new("mul.Tensor", existing(p.shape, p.dtype), existing(p.shape, p.dtype))
        if p.name.endswith("lora_A"):
            means.append(mean_last(entry_ipt))
        elif p.name.endswith("lora_B"):
            mean = emit("mean.dim", (entry_ipt,), (p.shape[1],), p.dtype, attrs=Attrs(dims=(0,)))
            means.append(view(mean, (p.shape[1], 1)))
        else:
            means.append(entry_ipt)
    return means


def _combined(of_a: Tensor, of_b: Tensor, of_e: Tensor) -> Tensor:
    """The score of each triplet, (r,)."""
    ipt_ab = sum_dim(cat((of_a, of_b), 1), 1)
    return new("add.Tensor", view(of_e, (of_e.shape[0],)), ipt_ab)


def _read_threshold(scores: list[Spec]) -> None:
    """The k-th smallest score of all layers, read by the host."""
    total, dtype = sum(s.numel * s.copies for s in scores), scores[0].dtype
    together = new_tensor((total,), dtype)
    nbytes = sum(s.nbytes for s in scores)
    tape().part.ops.append(Op("cat", tuple(scores), (Spec(dtype, (total,)),), nbytes, nbytes))
    threshold, index = new_tensor((), dtype), new_tensor((), "i64")
    record("kthvalue", (together,), (threshold, index))
    read_item(threshold)


def _mask(e: Parameter, *, on_gpu: bool) -> None:
    """Zero the masked entries of E; the mask itself goes to the host as a list."""
    low = new("le.Scalar", e, dtype="bool")
    in_place("masked_fill_.Scalar", e, low)
    del low
    pattern = view(new("bitwise_not", new("le.Scalar", e, dtype="bool"), dtype="bool"), (e.shape[0],))
    if on_gpu:
        record("_to_copy", (pattern,), (existing(pattern.shape, "bool"),), OVER_BUS)
