"""`torch.compile` of the model: forward and backward become two programs of fused kernels.

What transformers' `torch_compile` compiles is the model: its forward and the backward that follows from it. Clipping
and the optimizer stay eager, and so does the sum of gradients over micro-batches. One graph without breaks is assumed;
on several GPUs there are as many as `regions` says.

The pass goes the way of the compiler: the recorded calls become a graph (`graph`, `lowering`), AOTAutograd decides what
is saved (`partition`), Inductor what shares a kernel (`fusion`). Each kernel reads each tensor in memory once and
writes what others need; what only it needs is never there. FLOPs stay what they were: products and attention are never
run again, nor left out. Products whose sides stand in the way of wide loads are priced padded where that pays, but the
copies count as no kernels. Not modelled: kernels that autotuning would choose for products, fusion of attention written
out, and the second order of loops that lets row and column sums share a kernel.
"""

from collections.abc import Sequence
from typing import Any

from ..program.dims import summed
from ..program.part import Part
from ..setup import Setup
from ..tape.tensor import Flow, Parameter
from .emission import CompiledProgram, Emission
from .fusion import fused_kernels
from .graph import Graph, Numbering
from .lowering import lowered
from .partition import partitioned
from .regions import RegionalEmission, compiled_regions

Programs = dict[Any, CompiledProgram]  # by what decides them


def compiled_parts(
    setup: Setup, parameters: Sequence[Parameter], parts: list[Part], flow: Flow, known: Programs, *, alike: bool
) -> tuple[list[Part], list[Part]]:
    """The parts of a micro-batch as `torch.compile` runs them; if further ones are alike (`Tape.alike`), theirs too.

    Args:
        parameters: of the model, as the parts use them.
        known: what was compiled before and receives what is compiled here: a program that only adds its gradients to
            others, or that another optimizer follows, is the same.

    Raises:
        MixedStructure: the points of a grid do not compile to one program.
    """
    graph = lowered(parameters, parts, flow)
    numbering = Numbering(graph)
    outside = graph.outside
    signature = numbering.signature(outside)
    program = known.get(signature)
    if program is None:
        if graph.apart:
            forward, backward = compiled_regions(graph)
        else:
            halves = partitioned(graph)
            ahead = {v for v in outside if v.maker and not v.maker.backward}
            forward = fused_kernels(halves.forward, halves.saved | ahead)
            backward = fused_kernels(halves.backward, {v for v in outside if v.maker and v.maker.backward})
        program = known[signature] = CompiledProgram(forward, backward, list(numbering.number))
    captured = setup.compile == "reduce-overhead"

    def emitted(g: Graph) -> list[Part]:
        if g.apart:
            hooks = [prim.hook for prim in graph.prims if prim.hook is not None]
            return RegionalEmission(numbering.renamed(g, program.values), program, hooks, captured=captured).run()
        return Emission(numbering.renamed(g, program.values), program, captured=captured).run()

    if not alike:
        return emitted(graph), []
    further = graph.later()
    later = emitted(further)
    # They replace those of the pass before, one a layer of what modules and the graph keep
    replaced = [value for value in further.results if not value.free]
    later[-1].free(summed([value.nbytes * further.copies(value) for value in replaced]))
    return emitted(graph), later


__all__ = ["compiled_parts"]
