"""What a decoder's last hidden states go through until there is a loss.

Source: transformers/modeling_layers.py (`GenericForSequenceClassification`, `GenericForTokenClassification`),
loss/loss_utils.py.
"""

from collections.abc import Callable

from ..errors import UserError
from ..program.dims import decide, product, same
from ..tape.attention import soft_capped
from ..tape.core import emit, tape
from ..tape.gather import picked
from ..tape.nn import causal_lm_loss, cross_entropy
from ..tape.packages.converted import fake_quantised
from ..tape.pointwise import cast, dropout, fill, mul
from ..tape.shape import narrow, view
from ..tape.split import select
from ..tape.tensor import Tensor
from ..tape.transfers import gathered_over
from .base import Scope

OUTPUT = "output"  # of the last stage of a pipeline, which its schedule holds on to (`recording.pipeline`)


def decoder_loss(
    model: Scope, hidden: Tensor, ids: Tensor, labels: Tensor, words: str, *, bias: bool = False,
    scaled: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Tensor:  # fmt: skip
    """The loss of a causal model with the head that its config names, from (batch, seq, hidden).

    Without labels (`Build.labelled`) the logits: (batch, seq, vocab), or (batch, n) of a classifier of sequences.

    Args:
        words: path of the embedding that a language model's head may share.
        bias: whether the language model's head has one.
        scaled: what becomes of its logits before the loss.
    """
    architecture = model.build.architecture
    classifier = architecture.classifier
    if classifier is None:
        kept = model.build.logits_to_keep
        hidden = hidden if kept is None or same(kept, hidden.shape[1]) else narrow(hidden, 1, kept)
        logits = beside_loss(model, scaled(lm_head(model, hidden, words, architecture.vocab, bias=bias)))
        if model.build.stage is not None:
            model.build.keep(OUTPUT, logits)
        return causal_lm_loss(logits, labels) if model.build.labelled else logits
    if classifier.of == "token":
        hidden = dropout(hidden, 0.1 if classifier.dropout is None else classifier.dropout)
        name, upcast = architecture.traits.token_head
        logits = beside_loss(model, model.linear(name, hidden, classifier.labels, bias=True))
        flat = view(logits, (product(logits.shape[:-1]), classifier.labels))
        return cross_entropy(cast(flat, "fp32") if upcast else flat, view(labels, (labels.numel,)))
    logits = model.linear("score", hidden, classifier.labels)
    if classifier.of == "value":
        return logits
    pooled = beside_loss(model, _last(logits, ids, padded=classifier.padded, name=architecture.name))
    return cross_entropy(pooled, labels) if model.build.labelled else pooled


def beside_loss(model: Scope, output: Tensor) -> Tensor:
    """What the forward pass returns beside its loss: hooks of several GPUs see it (`Wrapping.end`)."""
    if tape().wrapping is not None and model.build.labelled:
        model.build.outputs.append(output)
    return output


def _last(logits: Tensor, ids: Tensor, *, padded: bool, name: str) -> Tensor:
    """The logits of each sample's last token that is no padding: (batch, seq, n) → (batch, n)."""
    batch, seq = ids.shape
    if not padded:
        if decide(batch > 1):
            raise UserError(f"{name}: to classify sequences in batches its config needs a pad_token_id; use --batch 1")
        return picked(select(logits, 1), fill("arange", (batch,), "i64"))
    real = cast(emit("ne.Scalar", (ids,), ids.shape, "bool"), "i32")
    last = emit("argmax", (mul(fill("arange", (seq,), "i32"), real),), (batch,), "i64")
    return picked(logits, fill("arange", (batch,), "i64"), last)


def lm_head(model: Scope, hidden: Tensor, embedding: str, vocab: int, *, bias: bool = False) -> Tensor:
    """Logits of a causal model: through the embedding's weight where it is tied, else an own linear layer.

    Tensor-parallel ranks make some of the columns each and gather all (transformers' "colwise_gather_output").
    """
    setup = model.build.setup

    def run(hidden: Tensor) -> Tensor:
        shared = model.build.shared
        hidden = hidden if shared is None else shared.gathered(hidden)
        if not model.build.architecture.tied:
            logits = model.linear("lm_head", hidden, vocab // setup.tp, bias=bias)
            return logits if shared is None else gathered_over(logits, shared.ranks)
        own = model.parameter("lm_head.bias", (vocab,), "bias") if bias else None
        weight = model.tied_weight(embedding)
        if group := setup.qat_group:
            return fake_quantised(hidden, weight, own, group)
        if shared is not None:
            hidden = shared.cut("columns").given(hidden)
            return gathered_over(model.build.method.head(model, hidden, weight, own), shared.ranks)
        return model.build.method.head(model, hidden, weight, own)

    logits = model.wrapped("lm_head", run, hidden)
    return soft_capped(logits) if model.build.architecture.logit_cap else logits
