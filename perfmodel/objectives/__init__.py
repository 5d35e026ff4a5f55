"""What a step trains for: one file an objective, found by its name (`perfmodel.setup.OBJECTIVES`)."""

from .parts.base import Objective, Passes, found, known_objectives, with_modules_off, without_dropout

__all__ = ["Objective", "Passes", "found", "known_objectives", "with_modules_off", "without_dropout"]
