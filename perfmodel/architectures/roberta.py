"""RoBERTa: BERT with positions counted from the tokens that are no padding, and an LM head of other names.

Source: transformers/models/roberta/modeling_roberta.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import UserError
from ..tape.core import emit
from ..tape.pointwise import add, cast, dropout, mul, tanh
from ..tape.shape import expand
from ..tape.tensor import Tensor
from . import masks
from .base import Scope
from .bert import Bert
from .config import Config
from .registered import architecture
from .traits import Targets, Traits


@architecture("roberta")
@dataclass(frozen=True)
class Roberta(Bert):
    """Dims of a RoBERTa; of its position table the first `offset` rows are no token's."""

    offset: int = 2

    layer_path: ClassVar[str] = "roberta.encoder.layer"
    root: ClassVar[str] = "roberta.embeddings"
    lm_head: ClassVar[tuple[str, ...]] = ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder")
    traits: ClassVar[Traits] = replace(
        Bert.traits,
        norms=("LayerNorm", "layer_norm"),
        targets=replace(
            Bert.traits.targets, adalora=("query", "key", "value", "dense"), vblora=Bert.traits.targets.lora
        ),
    )

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        dims, offset = super().dims(config), config.count("pad_token_id", default=1, least=0) + 1
        if dims["max_positions"] <= offset:
            raise UserError(f"{config.origin}: max_position_embeddings must exceed pad_token_id + 1, {offset}")
        return {**dims, "max_positions": dims["max_positions"] - offset, "offset": offset}

    @property
    def table(self) -> int:
        return super().table + self.offset

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        batch, _ = ids.shape
        mask = cast(emit("ne.Scalar", (ids,), ids.shape, "bool"), "i32")
        counted = cast(emit("cumsum", (mask,), mask.shape, "i64"), "i32")
        position_ids = add(cast(mul(add(counted, 0), mask), "i64"), self.offset - 1)
        table = expand(masks.model_buffer((1, self.table)), (batch, self.table))
        return position_ids, emit("gather", (table, position_ids), ids.shape, "i64")

    def classes_of_sequence(self, model: Scope, first: Tensor, p: float, labels: int) -> Tensor:
        x = tanh(model.linear("classifier.dense", dropout(first, p), self.hidden, bias=True))
        return model.linear("classifier.out_proj", dropout(x, p), labels, bias=True)


@architecture("xlm-roberta")
@dataclass(frozen=True)
class XlmRoberta(Roberta):
    """XLM-R: the same program (models/xlm_roberta); PEFT has fewer defaults for it."""

    traits: ClassVar[Traits] = replace(
        Roberta.traits, targets=Targets(lora=Bert.traits.targets.lora, fourierft=Bert.traits.targets.lora)
    )
