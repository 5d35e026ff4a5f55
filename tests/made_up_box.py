"""A CPU that is made up: what its kernels take by parameters that a fit has to find."""

from perfmodel.devices import cpu
from perfmodel.devices.cpu_work import KINDS, REGIMES, STATE
from perfmodel.devices.hardware import Hardware
from validate.fitting import cpu as fit
from validate.fitting.cpu_ops import passes
from validate.microbench import designs

BOX = Hardware(2, 3e9, 64e9, 20e9, 2 << 20, 200e9, None, None, 100e9)
DISPATCH = 2e-6
GEMM = cpu.CpuGemmParameters(
    4e-6,
    dict(zip(REGIMES, (0.9, 0.8, 0.7, 0.6, 0.3, 0.7, 0.4, 0.2, 0.2, 0.2, 0.1), strict=True)),
    *(
        {name: values[fit._terms(name, REGIMES)[1]] for name in REGIMES}
        for values in (
            {"tn": 1.0, "nn": 2.0, "nt": 3.0, "nn_few": 1.0, "nt_aliased": 9.0},
            {"tn": 2.0, "nn": 1.0, "nt": 3.0, "nn_few": 2.0, "nt_aliased": 3.0},
            {"tn": 0.5, "nn": 1.0, "nt": 1.0, "nn_few": 1.0, "nt_aliased": 1.0},
        )
    ),
)
ATTENTION = {
    "fp32": cpu.CpuAttentionParameters(20e-6, 6e-6, 10.0, 0.6, 1.5, 40e-6, 12e-6, 20.0, 0.5, 1.3),
    "bf16": cpu.CpuAttentionParameters(20e-6, 8e-6, 6.0, 0.8, 1.4, 40e-6, 50e-6, 8.0, 0.4, 1.3),
}
STREAM = cpu.CpuStreamParameters(
    0.9, 2.5, 0.5,
    {kind: (1 + i) * 1e-6 for i, kind in enumerate(KINDS)},
    {kind: 0.0 if kind == "stream" else 0.5 + 0.2 * i for i, kind in enumerate(KINDS)},
    {kind: 1.0 + 0.2 * i for i, kind in enumerate(KINDS)},
    1.5, 9e6, 4.0,
)  # fmt: skip
ENVIRONMENT = {
    "kind": "environment", "id": "e", "device": "cpu", "software": {"torch": "2"},
    "host": {"cpu": "A box", "threads": 2, "clock_hz": 3e9, "memory_bytes": 64e9, "caches": {"L2": 1 << 20}},
}  # fmt: skip


def seconds_of(case: designs.MicroCase) -> float:
    """What a case takes on the made-up box."""
    s = dict(case.sizes)
    if case.block == "gemm":
        return float(
            cpu.cpu_gemm_time(
                s["m"], s["n"], s["k"], hardware=BOX, parameters=GEMM, dtype=case.dtype, layout=case.layout
            )
        )  # fmt: skip
    if case.block == "attention":
        sizes = (s["batch"], s["seq"], s["seq"], s["heads"], s["head_dim"])
        return float(
            cpu.cpu_attention_time(
                *sizes, hardware=BOX, parameters=ATTENTION[case.dtype], dtype=case.dtype, causal=True,
                backward=case.backward,
            )
        )  # fmt: skip
    if case.block == "pointwise":
        half = case.dtype != "fp32" or case.op == "cast"
        back = case.op in STATE
        rows = passes(case.op, case.dtype, s["rows"], s["columns"])
        return float(
            sum(
                cpu.stream_time(*a, hardware=BOX, parameters=STREAM, kind=kind, half=half, back=back)
                for kind, a in rows
            )
        )
    return 0.0
