"""What a step trains for: one file an objective, found by its name (`perfmodel.setup.OBJECTIVES`)."""

from .parts.base import Objective, Passes, found, known_objectives, without_dropout

__all__ = ["Objective", "Passes", "found", "known_objectives", "without_dropout"]
