"""AdamW on fp32 copies of 16-bit weights, their masters: what apex's amp O2 and Megatron do, in torch's own calls.

The gradients are copied to those of the masters, the fused AdamW updates the masters, and the weights are copied back.
Source: apex/amp/_process_optimizer.py (`post_backward_with_master_weights`, `_master_params_to_model_params`), whose
`multi_tensor_scale` reads and writes what `_foreach_copy_` does. Clipping is that of the 16-bit gradients.
"""

from .adamw import fused
from .parts.lists import ListRecorder, specs_of
from .parts.update import Parameters, Update, copy_in, optimizer


@optimizer("adamw-masters")
def masters(update: Update, parameters: Parameters, decay: bool) -> None:
    """Four fp32 tensors a weight: the master, its gradient, two moments; a weight in fp32 is its own master."""
    weights = [p for p in parameters if p.dtype != "fp32"]
    copies = [copy_in(p, "fp32") for p in weights]
    for copy in copies:
        update.state(copy), update.state(copy)
    op, old, new = ListRecorder(update.part()), specs_of(weights), specs_of(copies)
    if weights:
        op("_foreach_copy_", new + old, new)
    fused(update, [*copies, *(p for p in parameters if p.dtype == "fp32")], decay)
    if weights:
        ListRecorder(update.part())("_foreach_copy_", old + new, old)
