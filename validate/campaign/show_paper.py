"""What `perfmodel validate paper` prints."""

from pathlib import Path

from perfmodel.report.plain import print_json, show, table
from perfmodel.report.progress import counting

from ..quiet import without_warnings_of_packages
from . import paper
from .paper import PaperRow


def show_paper(
    kind: str | None, output: Path, *, predict_only: str | None, profile: str | None, host: str | None,
    threads: int | None, as_json: bool,
) -> bool:  # fmt: skip
    """Measure and predict, or only predict; returns whether all verdicts that are decided are right."""
    without_warnings_of_packages()
    if predict_only:
        rows = paper.predicted_claim(predict_only, host)
    else:
        with counting("loading", forks=True) as tick:
            rows = paper.measured(
                str(kind), output, device=profile, host=host, threads=threads, progress=tick
            )  # fmt: skip
    if as_json:
        print_json({"rows": [r.as_dict() for r in rows], "answer": paper.claim_answer(rows)})
    else:
        title = "time of LoRA over that of full fine-tuning, forward + backward"
        heads = ("", "measured", "predicted", "paper", "LoRA is", "predicted")
        show(table(heads, map(_row, rows), left=(0, 4, 5), title=title))
        show(f"\n{paper.claim_answer(rows)}", bold=True)
    return all(r.right for r in rows)


def _row(r: PaperRow) -> list[str]:
    ratios = ["" if ratio is None else f"{ratio:.2f}" for ratio in r.ratios().values()]
    return [r.cell.place, *ratios, paper.verdict_of_ratio(r.measured), paper.verdict_of_ratio(r.predicted)]
