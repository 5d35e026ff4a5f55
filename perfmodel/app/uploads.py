"""A training config that was dropped on the page: parsed from its text, never stored, never followed to other files."""

from dataclasses import replace
from typing import Any

from ..architectures import from_config, load
from ..errors import UserError
from ..imports import Imported, read_alone
from ..imports.fallbacks import fallbacks
from .choices import NOT_HERE, Choices, bundled_model, with_fields

ENDINGS = (".yaml", ".yml", ".json")


def of_file(name: str, text: str, before: Choices) -> tuple[Choices, list[str]]:
    """The choices with what a file says in them, and what a reader should know of it.

    Args:
        before: what is chosen where the file says nothing.

    Raises:
        UserError: no training config, or one that only the command line can answer.
    """
    if not name.lower().endswith(ENDINGS):
        raise UserError(f"{name[:80]}: a training config ends in {', '.join(ENDINGS)}")
    found = read_alone(name, text)
    if found.why_traced:
        raise UserError(f"{found.why_traced} (on the command line)")
    model = bundled_model(found.model) if found.model else before.model
    setup, method, said = _on_its_model(found, model)
    methods = before.methods if method is None else ("full", method) if method != "full" else ("full", "lora")
    usual = before.setup if not setup else replace(before.setup, **_unset(before))
    known = {name: value for name, value in setup.items() if value is not None and name not in NOT_HERE}
    made = replace(before, model=model, methods=methods, setup=with_fields(usual, known))
    epochs = found.job.get("epochs")
    made = made if epochs is None else replace(made, epochs=float(epochs))
    read = f"{name} ({found.tool}) was read in memory and is stored nowhere"
    return made, list(filter(None, (read, said.first_line, *found.notes)))


def _unset(before: Choices) -> dict[str, Any]:
    """Fields of a setup that a file need not name, as they are at first: what was chosen before is not the file's."""
    usual = Choices().setup
    return {name: getattr(usual, name) for name in ("packing", "padded", "group_by_length", "objective", "lengths")}


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
