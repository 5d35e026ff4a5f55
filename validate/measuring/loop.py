"""The training loop that is measured: forward, loss, backward, clip, optimizer, zero_grad, on a real model."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from perfmodel import methods, optimizers
from perfmodel.architectures import from_config
from perfmodel.errors import UserError
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models, references, updates
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES

from ..oracle.parallel import not_reducing
from .cells import Cell
from .team import Team, bucket_bytes, wrap_for_team

# Fields of a setup that the loop runs, and two that only a prediction asks for; all others stay as they are by default
RUN = {
    "batch", "seq", "dtype", "amp", "optimizer", "grad_accum", "checkpoint", "attention", "clip_grad", "compile",
    "experts", "gpus", "nodes", "node", "parallel", "ddp", "reshard", "fsdp_units", "reduce_dtype", "shard_group",
    "routing", "stack",
}  # fmt: skip
Around = Callable[[str], AbstractContextManager[Any]]  # what surrounds the work of a phase


def check_cell(cell: Cell) -> None:
    """Raise `UserError` where another program than a cell's would be measured, or none."""
    method, usual = methods.parse(cell.method), Setup().as_dict()
    references.check_program(method)
    if (kernels := getattr(method, "implementation", "peft")) != "peft":
        raise UserError(f"method {cell.method}: kernels of {kernels} are not measured; leave implementation out")
    for name, value in cell.setup.as_dict().items():
        if name not in RUN and value != usual[name]:
            raise UserError(f"{name} {value} of {cell.config.name}: not measured, only predicted; leave it out")


class TrainingLoop:
    """A cell's model with random weights, its optimizer and one dense batch of random tokens, on a device.

    With a team, the share of it that this process trains.
    """

    def __init__(self, cell: Cell, device: str, team: Team | None = None) -> None:
        self.setup, self.device = team.setup(cell.setup) if team else cell.setup, device
        architecture = from_config(cell.config)
        method = methods.parse(cell.method).bind(architecture)
        torch.manual_seed(0)
        base = models.build_model(cell.config, cell.setup, device=device)
        self.model: Any = references.apply_any(base, method, architecture, cell.setup)
        self.model.train()
        if self.setup.checkpoint != "none":
            options = {"use_reentrant": self.setup.checkpoint == "block-reentrant"}
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        if self.setup.compile != "none":
            self.model.compile(mode="reduce-overhead" if self.setup.compile == "reduce-overhead" else "default")
        if team:
            self.model = wrap_for_team(self.model, self.setup, architecture, device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        form = optimizers.picked_form(self.setup.optimizer, device)
        self.update = references.make_update(self.model, form, method)
        shape = (int(self.setup.batch), int(self.setup.seq))
        self.ids = torch.randint(architecture.vocab, shape, device=device)
        self.attention = torch.ones_like(self.ids)
        self.labels = self.ids
        if (head := architecture.classifier) is not None:  # a class a sample, or one a token
            of = shape[:1] if head.of == "sequence" else shape
            self.labels = torch.randint(head.labels, of, device=device)

    def step(self, around: Around = lambda phase: nullcontext()) -> None:
        """One optimizer step; gradients are freed at its end, as `zero_grad` does by default."""
        for _ in range(self.setup.grad_accum - 1):
            with not_reducing(self.model, self.setup):
                self._micro_batch(around)
        self._micro_batch(around)
        with around("optimizer"):
            if self.setup.clip_grad:
                torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.update.step()
            self.update.zero_grad()

    def _micro_batch(self, around: Around) -> None:
        setup = self.setup
        casts_itself = setup.replicas > 1 and setup.parallel == "fsdp2"  # what it gathers, in place of autocast
        amp = torch.autocast(self.device, TORCH_DTYPES[setup.amp]) if setup.amp and not casts_itself else nullcontext()
        with around("forward"):
            with amp:
                loss = self.model(input_ids=self.ids, attention_mask=self.attention, labels=self.labels).loss
            if setup.grad_accum > 1:
                loss = loss / setup.grad_accum
        with around("backward"):
            loss.backward()

    def held(self) -> Iterator[torch.Tensor]:
        """Tensors that live between two steps: parameters, buffers, optimizer state, the batch."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from updates.held(self.update)
        yield from (self.ids, self.attention, self.labels)

    def held_bytes(self) -> int:
        """Bytes of the distinct blocks of memory behind `held` that lie on the device, and of DDP's buckets."""
        local = (t.to_local() if isinstance(t, DTensor) else t for t in self.held())
        blocks = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local if self._here(t)}
        return sum(blocks.values()) + bucket_bytes(self.model)

    def _here(self, t: torch.Tensor) -> bool:
        return t.device.type == self.device
