"""`perfmodel plan`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import UserError
from .given_config import answer_json
from .options import Finite, Lists, methods_of, methods_option, model_of, plan_options, setup_of_counts
from .parted import partitions_asked
from .quantity import BYTES, NUMBER, Quantity

if TYPE_CHECKING:
    from ..partitions import Partitions
    from ..questions.plan.planning import Outcomes, Planner


OF_A_JOB = ("global_batch", "price", "spot", "deadline", "node_power", "grid_co2")  # beside what a `Job` has


@click.command(cls=Lists)
@methods_option
@click.option(
    "--samples", type=click.IntRange(1), help="Samples of the data set; with --lengths FILE as many as there."
)
@click.option("--tokens", type=Quantity(NUMBER, "50M or 1.2B"), help="Tokens of the data set without padding: 50M.")
@click.option("--epochs", type=Finite(0, min_open=True), default=1.0, show_default=True, help="Passes over it.")
@click.option("--max-steps", type=click.IntRange(1), help="Optimizer steps, in the place of --epochs.")
@click.option(
    "--global-batch",
    type=click.IntRange(1),
    help="Samples of an optimizer step: --batch of them at once; without --batch as many as fit.",
)
@click.option("--drop-last", is_flag=True, help="Leave out a last short micro-batch.")
@click.option("--eval-every", type=click.IntRange(1), help="Steps from one evaluation to the next; default none.")
@click.option("--eval-samples", type=click.IntRange(0), default=0, show_default=True, help="Samples of an evaluation.")
@click.option(
    "--save-every",
    type=Finite(0, min_open=True),
    help="Steps from one checkpoint to the next, or a share of all: 0.1; default one at the end.",
)
@click.option("--save-only-model", is_flag=True, help="Checkpoints without the optimizer's states.")
@click.option(
    "--disk",
    type=Quantity(BYTES, "500MB or 2GB"),
    default="1GB",
    show_default=True,
    help="Bytes a second to where checkpoints are written.",
)
@click.option("--startup", type=Finite(0), default=60.0, show_default=True, help="Seconds before the first step.")
@click.option(
    "--deadline", type=Finite(0, min_open=True), help="Hours: say what is cheapest of what surely ends before."
)
@click.option("--price", multiple=True, help="Dollars an hour and GPU: 2.5 for all, h100-sxm=2.5 for one.")
@click.option("--spot", is_flag=True, help="Spot prices in the place of those on demand.")
@click.option(
    "--node-power", type=Finite(0), help="Watts that the node draws for each GPU besides; default a server's."
)
@click.option("--grid-co2", type=Finite(0), help="g of CO2 for a kWh of your grid.")
@click.option("--largest-batch", is_flag=True, help="No job: the largest micro-batch that fits on --device.")
@click.option("--longest-context", is_flag=True, help="No job: the longest samples that fit on --device.")
@click.option("--smallest-gpu", is_flag=True, help="No job: the GPU of least memory that it fits on.")
@click.option(
    "--biggest-model", is_flag=True, help="No job: the bundled model of most parameters that fits on --device."
)
@plan_options
def plan(
    methods: Sequence[str],
    global_batch: int | None,
    price: Sequence[str],
    spot: bool,
    deadline: float | None,
    node_power: float | None,
    grid_co2: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Hours, dollars and energy of a whole job, on one GPU or on each that there is.

    Without --device every GPU of the catalogue is tried: the cheapest, the fastest, and the cheapest before a deadline,
    with what has to be given up to fit.
    """
    from ..questions.plan.inverse import QUESTIONS, answers
    from ..questions.plan.job import Job
    from ..questions.plan.planning import planner_of
    from ..report.plan import show_answers, show_plan

    asked = [name for name in QUESTIONS if options.pop(name)]
    if options["model"] is None and asked != ["biggest_model"]:
        raise click.UsageError("Missing option '--model'.")
    about = {name: options.pop(name) for name in Job.__dataclass_fields__}
    of_job = [name for name in (*about, *OF_A_JOB) if _typed(name)]
    if asked and of_job:
        one, other = (f"--{name.replace('_', '-')}" for name in (asked[0], of_job[0]))
        raise UserError(f"{one} asks about one step, not about a job: leave out {other}")
    if _typed("epochs") and not _typed("max_steps"):
        about["max_steps"] = None  # of a training config
    counts = options.pop("gpus")
    chosen, setup = methods_of(methods, options), setup_of_counts(options, counts)
    if asked and len(counts) > 1:
        raise UserError(f"{asked[0].replace('_', ' ')}: give one number of GPUs, not {len(counts)}")
    if asked:
        model = None if options["model"] is None else model_of(options)
        fitting = answers(asked, model, chosen, setup, options["device"] or None, options["host"])
        if as_json:
            answer_json({"answers": [answer.as_dict() for answer in fitting]})
        else:
            show_answers(fitting)
        return
    job = Job(**about)
    micro = _source("batch") is not ParameterSource.DEFAULT
    planner = planner_of(
        model_of(options), chosen, setup, options["device"] or None, job=job, global_batch=global_batch, micro=micro,
        gpus=counts, price=price, price_kind="spot" if spot else "on demand", deadline=deadline, node_power=node_power,
        grid_co2=grid_co2, host=options["host"],
    )  # fmt: skip
    with partitions_asked(options, planner.question) as kept:
        found = planner.plan(None if kept is None else _outcomes(planner, kept))
    if as_json:
        answer_json(found.as_dict())
    else:
        show_plan(found)


def _source(option: str) -> ParameterSource | None:
    return click.get_current_context().get_parameter_source(option)


def _typed(option: str) -> bool:
    return _source(option) is ParameterSource.COMMANDLINE


def _outcomes(planner: "Planner", kept: "Partitions") -> "Outcomes":
    """What partitions say."""
    from ..questions.plan.apart import outcomes, searches
    from ..report.progress import progress

    with progress() as bar:
        task = bar.add_task("partitions", total=len(searches(planner)))
        return outcomes(planner, kept, lambda _: bar.advance(task))
