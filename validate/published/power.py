"""Power of a GPU and its share of the node against what MLPerf's power submissions measured on H100 nodes.

Their steps (8 to 512 GPUs, FP8, fused kernels) are not predicted here. Their power is, at the utilisation that the
measured step times imply: FLOPs and bytes of a sample, as `perfmodel` counts them for the model, over a GPU's share of
the measured step. An evaluation is taken to draw as much, and as long as the FLOPs of its forward passes say; for the
rest of a run a board is taken to idle. Where a row does not say how many samples a run took, its steps are taken to
fill it. Products are in 8 bits, attention in 16.

Fitted are two figures of `perfmodel.prediction.energy`, on one row alone (one node, Llama-2-70B with LoRA, at the
wall): `NODE` to what the node draws idle, `AT_WORK` to what it draws in the run. The row of the same runs behind the
power supplies is neither fitted nor checked; the other eight are checked. There is no row of another GPU.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean

from perfmodel.architectures import Config, from_config, load
from perfmodel.devices import profile
from perfmodel.devices.hardware import Hardware
from perfmodel.prediction import energy
from perfmodel.prediction.predict import Prediction, predict
from perfmodel.resources import DATA, read_rows

FILE = DATA / "published" / "power.csv"
DEVICE = "h100-sxm"
FITTED, SAME_RUNS = (
    "smc-ac-power/1xSMC-H100-SXM-80GB/llama2_70b_lora",
    "smc-dc-power/1xSMC-H100-SXM-80GB/llama2_70b_lora",
)
MEAN_LIMIT, WORST_LIMIT = 0.12, 0.25  # of |relative error| of the rows that no fit saw
GPT3 = {  # Brown et al., arXiv 2005.14165, table 2.1; MLPerf trains it on 2,048 tokens
    "model_type": "gpt2", "n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048, "vocab_size": 51200,
}  # fmt: skip
# method, tokens of a sample: LoRA's are packed to 8,192; half of BERT's 512 are padding, which is taken out (Krell et
# al., arXiv 2107.02027)
WORKLOADS = {
    "llama2_70b_lora": ("lora:r=16,targets=q_proj+k_proj+v_proj+o_proj,adapter_dtype=bf16", 8192),
    "gpt3": ("full", 2048),
    "bert": ("full", 256),
}


# Sequences from one evaluation to the next, and in one (mlcommons/training_results_v4.0, NVIDIA/benchmarks/
# llama2_70b_lora/implementations/nemo/README.md)
EVERY, EVALUATED = 384, 173


@dataclass(frozen=True)
class PowerRow:
    """The mean over the runs of one submission.

    Attributes:
        watts: of a node over its GPUs, in the mean over the runs.
        idle_watts: the same before the runs; None if it was not measured.
        samples: that a run trained on; None where that is not known.
        run_seconds: of a whole run.
    """

    id: str
    benchmark: str
    gpus: int
    batch: int
    step_seconds: float
    samples: int | None
    run_seconds: float
    watts: float
    idle_watts: float | None

    @property
    def error(self) -> float:
        """Predicted over measured power of a GPU's share, minus 1."""
        return share_watts(self, h100()) / self.watts - 1


def power_rows(path: Path = FILE) -> list[PowerRow]:
    """All published rows."""
    return read_rows(path, _row)


def checked() -> list[PowerRow]:
    """The rows of runs that no fit saw."""
    return [row for row in power_rows() if row.id not in (FITTED, SAME_RUNS)]


def mean_error() -> float:
    """Mean |relative error| of the checked rows."""
    return mean(abs(row.error) for row in checked())


def _row(r: dict[str, str]) -> PowerRow:
    return PowerRow(
        id=r["id"],
        benchmark=r["benchmark"],
        gpus=int(r["gpus"]),
        batch=int(r["global_batch"]),
        step_seconds=float(r["step_s"]),
        samples=int(r["samples"]) if r["samples"] else None,
        run_seconds=float(r["run_s"]),
        watts=float(r["node_w"]) / 8,
        idle_watts=float(r["node_idle_w"]) / 8 if r["node_idle_w"] else None,
    )


def h100() -> Hardware:
    """The board of all rows."""
    return profile.load(DEVICE).hardware


@cache
def sample(benchmark: str) -> Prediction:
    """A step of one sample, of which FLOPs and bytes are taken."""
    method, seq = WORKLOADS[benchmark]
    model = (
        Config(GPT3, "arXiv 2005.14165", "gpt3-175b")
        if benchmark == "gpt3"
        else load({"bert": "bert-large"}.get(benchmark, "llama-2-70b"))
    )
    return predict(from_config(model), method, device=DEVICE, batch=1, seq=seq)


def working(row: PowerRow) -> float:
    """Share of a run that steps and evaluations take; a data-parallel replica has one sequence of a step."""
    if row.samples is None:
        return 1.0
    evaluations = row.samples // EVERY - (row.batch // 8 + 2)  # FLOOR(0.125*global_batch_size+2) are skipped
    flops = sample(row.benchmark).flops
    forwards = evaluations * -(-EVALUATED // row.batch) * flops["forward"] / flops["total"]
    return float((row.samples / row.batch + forwards) * row.step_seconds / row.run_seconds)


def share_watts(row: PowerRow, hardware: Hardware) -> float:
    """What a GPU and its share of the node draw in the mean over a run, W."""
    p, samples = sample(row.benchmark), row.batch / row.gpus / row.step_seconds  # a second on each GPU
    assert p.step is not None
    shares, rate = energy.flops_by_kind(p.step), samples * p.flops["total"]
    drawn = energy.draws(
        hardware,
        flops_per_second={"e4m3": shares["gemm"] * rate, "bf16": shares["attention"] * rate},
        bytes_per_second=samples * (p.bytes["forward"] + p.bytes["backward"]),
        working=1.0,
    )
    assert drawn is not None
    return float(drawn.node + drawn.idle + working(row) * (drawn.step - drawn.idle))


def fit() -> tuple[float, float]:
    """`AT_WORK` and `NODE` of the fitted row, shares of the board's limit."""
    row, hardware = next(row for row in power_rows() if row.id == FITTED), h100()
    limit = hardware.board_power
    assert limit is not None
    assert row.idle_watts is not None
    node = row.idle_watts - energy.IDLE * limit
    rest = share_watts(row, hardware) - energy.NODE * limit - working(row) * energy.AT_WORK * limit
    return (row.watts - node - rest) / (working(row) * limit), node / limit
