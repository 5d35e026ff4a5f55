"""What PEFT's prompt learning shares: virtual tokens before those of the text, which no base weight knows.

Source: peft/peft_model.py (`PeftModelForCausalLM.forward`, `get_prompt`).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from ...errors import UserError
from ...tape.core import emit, tape
from ...tape.pointwise import cast, cat
from ...tape.prefix import repeat_batch
from ...tape.shape import narrow
from ...tape.tensor import Parameter, Storage, Tensor
from ...tape.transfers import from_host
from .base import Method, Scope, option
from .checks import positive

V = TypeVar("V", bound="VirtualTokens")


@dataclass(frozen=True)
class VirtualTokens(Method):
    """`tokens` trained positions before the text's: `--seq` counts the text alone."""

    tokens: Any = option(20, "virtual tokens before each sample; --seq counts the text alone", positive)

    encoder_dtype: str = "fp32"  # no option: PEFT's, beside any base

    aliases: ClassVar[dict[str, str]] = {"num_virtual_tokens": "tokens"}

    def in_one_dtype(self: V, dtype: str) -> V:
        return replace(self, encoder_dtype=dtype)

    def sizes(self) -> tuple[str, ...]:
        return ("tokens",)

    def check(self) -> None:
        assert self.architecture is not None
        if self.architecture.traits.head == "masked":
            raise UserError(
                f"method {self.name}: PEFT has no prompt learning for masked language models such as "
                f"{self.architecture.name}; use lora or ia3"
            )
        if self.architecture.traits.head == "seq2seq":
            raise UserError(
                f"method {self.name}: prompts of encoder-decoder models ({self.architecture.name}) are not modelled; "
                "use lora or ia3"
            )
        if self.architecture.classifier is not None:
            raise UserError(
                f"method {self.name}: prompts of classifiers ({self.architecture.name}) are not modelled; use lora"
            )

    def inputs(self, model: Scope, attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        ones = from_host("ones", (attention.shape[0], self.tokens), "fp32")
        return cat((ones, attention), 1), labels  # fp32 ones before int64: all of the mask becomes fp32

    def indices(self, batch: Any) -> Tensor:
        """The numbers of the virtual tokens, (batch, tokens): one row, expanded, moved to the device in every step."""
        made = Tensor((batch, self.tokens), "i64", (0, 1), batch * self.tokens, Storage(0, None))
        return made if tape().device == "cpu" else emit("_to_copy", (made,), made.shape, "i64")

    def weight(self, model: Scope, name: str, *shape: Any) -> Parameter:
        """A parameter of the prompt encoder; its embedding is an `nn.Embedding` like the model's own."""
        made = model.parameter(f"prompt_encoder.{name}", shape, "adapter", dtype=self.encoder_dtype, trainable=True)
        made.embeds = name == "embedding.weight"
        return made


@dataclass(frozen=True)
class SoftPrompt(VirtualTokens):
    """Virtual tokens as embeddings: the sequence of every block grows by them."""

    def inputs(self, model: Scope, attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        attention, _ = super().inputs(model, attention, labels)
        ignored = from_host("full", (labels.shape[0], self.tokens), "i64")
        return attention, cat((ignored, labels), 1)

    def embedded(self, model: Scope, x: Tensor) -> Tensor:
        x = super().embedded(model, x)
        batch = x.shape[0]
        with tape().belonging_to("adapter"):
            prompts = repeat_batch(self.encode(model, narrow(self.indices(batch), 0, 1)), batch)
            prompts = cast(prompts, x.dtype)
            x = cat((prompts, x), 1)
        model.build.held += [(prompts, None), (x, None)]  # local variables of `PeftModelForCausalLM.forward`
        return x

    def encode(self, model: Scope, indices: Tensor) -> Tensor:
        """The prompt (1, tokens, hidden) in fp32 from the numbers of its tokens (1, tokens)."""
        raise TypeError(f"{type(self).__name__} must define encode")
