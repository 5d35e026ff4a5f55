"""A training config that was dropped on the page: parsed from its text, never stored, never followed to other files."""

from dataclasses import replace
from typing import Any

from ..architectures import from_config, load
from ..errors import UserError
from ..imports import Imported, read_alone, values_alone
from ..imports.accelerate import Launch, is_launch, launch_of
from ..imports.fallbacks import fallbacks
from ..imports.micro_batches import KEYS
from ..setup import Setup
from .choices import NOT_HERE, Choices, bundled_model, setup_fields, with_fields

READ = "{} ({}) was read in memory and is stored nowhere"
ENDINGS = (".yaml", ".yml", ".json")
OF_A_FORM = ("parallel", "tp", "cp", "cp_rotate", "reshard", "shard_group", "offload")  # that files name
OF_A_PIPELINE = ("pp", "pp_schedule")  # that they do not
# Fields of a setup that are the visitor's own, the first two where a file names none; all else is as in a fresh form
STAYS = ("batch", "seq", "gpus", "nodes", "node")


def of_file(name: str, text: str, before: Choices) -> tuple[Choices, list[str]]:
    """The choices with what a file says in them, and what a reader should know of it.

    Args:
        before: what is chosen where the file says nothing.

    Raises:
        UserError: no training config, or one that only the command line can answer.
    """
    if not name.lower().endswith(ENDINGS):
        raise UserError(f"{name[:80]}: a training config ends in {', '.join(ENDINGS)}")
    path, values = values_alone(name, text)
    if is_launch(values):
        return _of_launch(launch_of(path, values, alone=True), path.name, before)
    found = read_alone(name, text)
    if found.why_traced:
        raise UserError(f"{found.why_traced} (on the command line)")
    model = bundled_model(found.model) if found.model else before.model
    setup, method, said = _on_its_model(_on_its_gpus(found, before.setup), model)
    methods = before.methods if method is None else ("full", method) if method != "full" else ("full", "lora")
    start = before.setup if not setup else Setup(**{name: getattr(before.setup, name) for name in STAYS})
    known = {name: value for name, value in setup.items() if value is not None and name not in NOT_HERE}
    made = replace(before, model=model, methods=methods, setup=with_fields(start, known))
    epochs = found.job.get("epochs")
    made = made if epochs is None else replace(made, epochs=float(epochs))
    return made, list(filter(None, (READ.format(name, found.tool), said.first_line, *found.notes)))


def _of_launch(launch: Launch, name: str, before: Choices) -> tuple[Choices, list[str]]:
    """The choices on a launcher's GPUs, which do what its file says."""
    first = {field: getattr(Choices().setup, field) for field in ("ddp", *OF_A_FORM, *OF_A_PIPELINE)}
    setup = replace(before.setup, **first)
    gpus = launch.gpus or int(setup.gpus)
    its = (*OF_A_FORM, *(KEYS if launch.form.samples else [name for name in KEYS if name in launch.form.setup]))
    chosen = {field: getattr(setup, field) for field in setup_fields() if field not in its}
    found = launch.of(Imported(launch.tool, None, None, chosen, [], []), several=gpus > 1, gpus=(gpus,))
    made = replace(before, setup=replace(setup, **found.setup | {"gpus": gpus, "nodes": launch.nodes}))
    return made, list(filter(None, (f"{READ.format(name, launch.tool)}: {launch.in_words}", found.first_line)))


def _on_its_gpus(found: Imported, before: Setup) -> Imported:
    """What a file says of as many GPUs as are chosen, which do what is chosen where it names no form."""
    gpus = int(before.gpus)
    if gpus == 1 or not found.setup:
        return found
    form, kept = found.asks(), {}
    if form.parallel is None and form.tp == 1:
        form = replace(form, **{name: getattr(before, name) for name in OF_A_FORM})
        kept = {name: getattr(before, name) for name in OF_A_PIPELINE}
    said = found.on_several(form).over((gpus,))
    return replace(said, setup=said.setup | kept | {"gpus": gpus})


def _on_its_model(found: Imported, model: str) -> tuple[dict[str, Any], str | None, Imported]:
    """Setup and method in the form that they have on the model, and how that differs from the file's."""
    setup, method, taken = dict(found.setup), found.method, []
    for fallback in fallbacks(found, from_config(load(model))):
        if fallback.option == "method":
            method = fallback.value
        elif fallback.option != "model":
            setup[fallback.option] = fallback.value
        taken.append((fallback.option, fallback.said))
    return setup, method, found.replaced(taken)
