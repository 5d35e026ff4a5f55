"""The head that a config's `architectures` names: a language model, or a classifier of sequences or tokens."""

from typing import Any, NamedTuple

from ..errors import UserError
from .config import Config
from .traits import Traits

LANGUAGE = {  # ends of class names of transformers; that of Gemma 3 is among its `AutoModelForCausalLM`, too
    "causal": ("ForCausalLM", "LMHeadModel", "Gemma3ForConditionalGeneration"),
    "masked": ("ForMaskedLM",),
    "seq2seq": ("ForConditionalGeneration",),
}
CLASSIFIERS = {"ForSequenceClassification": "sequence", "ForTokenClassification": "token"}


class Classifier(NamedTuple):
    """A head that tells classes apart.

    Attributes:
        of: "sequence" or "token"; "value": a sequence's, whose outputs are taken after every token.
        labels: classes; one of a reward model.
        padded: whether the config has a padding token, so that the last token has to be searched for.
        dropout: in front of it, where the config says so.
    """

    of: str
    labels: int
    padded: bool
    dropout: float | None


def classifier_of(config: Config, traits: Traits) -> Classifier | None:
    """The classifier that a config names; None for the language model that its type was pretrained as.

    Raises:
        UserError: `architectures` names a head that the tape does not have for this model type, or a classifier with a
            loss other than cross entropy.
    """
    named = config.values.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if name is None or (isinstance(name, str) and name.endswith(LANGUAGE[traits.head])):
        return None
    of = next((of for end, of in CLASSIFIERS.items() if str(name).endswith(end)), None)
    if of not in traits.heads:
        have = [*LANGUAGE[traits.head][:1], *(end for end, of in CLASSIFIERS.items() if of in traits.heads)]
        way = "add --traced, or name another" if of else "name another"
        raise UserError(
            f"{config.origin}: architectures names {name!r}, a head that is not mirrored for "
            f"{config.text('model_type')} (there are …{', …'.join(have)}): {way}"
        )
    assert of is not None
    labels = _labels(config)
    if config.values.get("problem_type") not in (None, "single_label_classification"):
        raise UserError(
            f"{config.origin}: architectures names {name!r} with a loss other than cross entropy (problem_type), which "
            "is not supported"
        )
    dropout = (
        config.fraction("classifier_dropout", 0.0) if config.values.get("classifier_dropout") is not None else None
    )
    return Classifier(of, labels, config.values.get("pad_token_id") is not None, dropout)


def _labels(config: Config) -> int:
    names: Any = config.values.get("id2label")
    return len(names) if isinstance(names, dict) else config.count("num_labels", default=2)
