"""Figures of products by expert that a device's file may have; `grouped` has their price."""

from ..values import immutable


@immutable
class GroupedParameters:
    """How the one kernel of all products by expert differs from a dense product; the defaults: not at all.

    Attributes:
        main_loop: time of its main loop over the dense product's.
        epilogue: the same of filling and draining a tile: a persistent kernel may store one during the next.
        memory: the same of its bytes from and to DRAM and L2.
        overlap_loss: as in `GemmParameters`, between the two times of one expert.
    """

    main_loop: float = 1.0
    epilogue: float = 1.0
    memory: float = 1.0
    overlap_loss: float = 0.3
