"""Supervised fine-tuning: the loss that the model computes itself."""

from ..architectures.base import Architecture
from ..errors import UserError
from ..tape.core import release, tape
from ..tape.tensor import Tensor
from .parts.base import Objective, Passes, objective


@objective("sft", title="SFT", source="transformers/loss/loss_utils.py", quiet=False)
class Sft(Objective):
    """Cross entropy of the labels, under autocast where there is any."""

    labelled = True

    def on(self, architecture: Architecture) -> Architecture:
        if architecture.classifier is not None and architecture.classifier.labels == 1:
            raise UserError(
                f"{architecture.name}: a classifier of one label has the loss of a regression, which is not supported; "
                "a reward model trains with --objective reward"
            )
        return architecture

    def loss(self, passes: Passes) -> Tensor:
        model, method = passes.model, passes.method
        classifier = model.build.architecture.classifier
        of_sequences = classifier is not None and classifier.of == "sequence"
        ids, attention = passes.tensor(), passes.tensor()
        labels = passes.tensor(passes.setup.batch) if of_sequences else passes.tensor()

        def run() -> tuple[Tensor]:
            with tape().autocasting():
                with tape().belonging_to("adapter"):
                    extended = method.inputs(model, attention, labels)
                loss = model.build.architecture.forward(model, ids, *extended)
                del extended
                with tape().belonging_to("adapter"):
                    loss = method.loss(loss, list(model.build.parameters.values()))
            release(model.build.held)
            return (loss,)

        return passes.called(run)[0]
