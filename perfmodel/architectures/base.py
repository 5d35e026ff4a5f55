"""What an architecture is, and the scopes in which its forward pass makes parameters and layers."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

from ..errors import UserError
from ..program.dims import Dim, decide
from ..program.part import Part
from ..program.ranks import Ranks
from ..setup import Setup
from ..tape import nn
from ..tape.checkpoint import checkpoint
from ..tape.core import region, tape
from ..tape.inplace import add_to_output
from ..tape.packages.sequence import TensorParallel
from ..tape.packages.varlen import PackedRows
from ..tape.tensor import Parameter, Tensor
from ..tape.transfers import WHOLE, Cut
from ..values import Compared
from .config import Config
from .linear import base_product
from .rewrites import Rewrites
from .runs import Stage, given_to_block, runs_of_layers
from .stacks import block_path
from .tasks import Classifier
from .traits import Traits

Run = Callable[[Tensor], Tensor]
INSIDE = ("block", "attention", "mlp", "activation")  # modules that run in a block beside its linear layers and norms
WORDS = ("embed_tokens", "embed_in", "wte", "word_embeddings")  # what transformers calls the embedding of the words


@dataclass(frozen=True, eq=False, repr=False)
class Architecture(Compared):
    """Dims of a transformer (all in elements) and its forward pass.

    Attributes:
        layers, vocab: number of identical blocks, rows of the embedding.
        hidden, intermediate: widths of the residual stream and of the MLP.
        heads, kv_heads, head_dim: query heads, key/value heads (GQA), width of one head.
        max_positions, tied: rows of a learned position table, None if rotary; whether the head has the words' weight.
        attention_cap, logit_cap: soft caps of attention scores and of logits, c·tanh(x/c); None where there is none.
        note: what an answer has to say of the config (`Config.note`) and of the model type.
        classifier: the head that is there in the place of a language model's.
    """

    name: str
    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int | None
    tied: bool
    attention_cap: float | None = None
    logit_cap: float | None = None
    note: str = ""
    classifier: Classifier | None = None

    of_megatron: ClassVar[bool] = False  # whether its program is Megatron-Core's, which brings its own optimizer
    recorded: ClassVar[bool] = False  # whether its programs come from elsewhere (`recording.program`)
    layer_path: ClassVar[str]  # where blocks live in the transformers module tree
    traits: ClassVar[Traits]
    registers_late: ClassVar[tuple[str, ...]] = ()  # modules of a block made behind others that run later
    caveat: ClassVar[str] = ""  # what every answer has to say of the model type
    text_path: ClassVar[str] = ""  # where the text model lives in the whole one, of which it is answered alone

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """An architecture with the dims of a config; see `perfmodel.architectures.from_config`."""
        note = "; ".join(filter(None, (cls.caveat, config.note)))
        return cls(name=config.name, model_type=config.text("model_type"), note=note, **cls.dims(config))

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        """All fields but name, model_type and note; a subclass extends what its base reads."""
        raise TypeError(f"{cls.__name__} must define dims")

    def forward(self, model: "Scope", ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        """Record the forward pass of (batch, seq) int64 `ids`; returns the loss, or logits (`Build.labelled`)."""
        raise TypeError(f"{type(self).__name__} must define forward")

    @property
    def stacks(self) -> tuple[tuple[str, int], ...]:
        """Where its rows of blocks live in the module tree, and how many are in each; blocks are counted through."""
        return ((self.layer_path, self.layers),)

    def layer_kind(self, layer: int) -> Hashable:
        """What a block is, where not all are of one kind: those of equal kinds run the same program."""
        return 0

    def window_of(self, layer: int) -> int | None:
        """The sliding window in tokens within which a block attends, None where it attends to all."""
        return None

    def active_share(self, name: str) -> tuple[int, int]:
        """The share of a parameter that a token meets, as a fraction: below 1 where it goes to some experts only."""
        return 1, 1

    def linear_names(self) -> list[str]:
        """Names of the linear layers inside a block, relative to it (`self_attn.q_proj`)."""
        raise TypeError(f"{type(self).__name__} must define linear_names")

    def cuts(self, name: str) -> str:
        """By what tensor parallelism cuts a linear layer (`Cut.by`)."""
        return ""

    def part_of(self, ranks: int) -> Self:
        """The dims of what one of so many tensor-parallel ranks has.

        Raises:
            UserError: it is not modelled, or they do not divide.
        """
        raise UserError(f"tp: how {self.name} is cut is not modelled; use --tp 1")

    def staged(self) -> None:
        """Raise `UserError` where stages of a pipeline are not modelled."""
        raise UserError(f"pp: how {self.name} is cut into stages is not modelled; use --pp 1")

    def first_linear(self) -> str:
        """The name of a block's linear layer that its module makes first."""
        return self.linear_names()[0]

    def stacked_names(self) -> list[str]:
        """Names of a block's weights that are no linear layer's: those of all its experts, and its router's."""
        return []


@dataclass(eq=False, repr=False)
class Build:
    """One recording of a model: architecture, method, setup and all parameters made so far.

    Without labels (`labelled`) the forward pass returns logits, of `logits_to_keep` tokens if given. `past`: keys and
    values put before a block's; `held`: what Python holds until the forward pass returns, hidden states too if it
    `collects`; `kept`: what modules keep until their next one, with its part; `outputs`: see `heads.beside_loss`;
    `packed`: rows of documents or padded ones, for flash-attn, whose caller asks `positions` (1, seq) for such;
    `given_positions` (batch, seq) come with the ids; `stage`, `received`: a pipeline's; `after`: runs behind backward.
    """

    architecture: Architecture
    method: Rewrites
    setup: Setup
    parameters: dict[str, Parameter]
    labelled: bool = True
    logits_to_keep: Dim | None = None
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    held: list[tuple[Tensor, Part | None]] = field(default_factory=list)
    kept: dict[Any, tuple[Tensor, Part]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    packed: PackedRows | None = None
    positions: Tensor | None = None
    given_positions: Tensor | None = None
    collects: bool = False
    stage: Stage | None = None
    received: Tensor | None = None
    after: Callable[[], None] | None = None

    @property
    def shared(self) -> TensorParallel | None:
        """How tensor-parallel ranks share what is there, None where each has all."""
        s, tied = self.setup, self.architecture.tied
        redistributes = tied or (s.parallel != "fsdp2" and decide(s.replicas > 1))
        return TensorParallel(Ranks(s.tp), s.sequence_parallel, redistributes) if s.tp > 1 else None

    @property
    def ends(self) -> bool:
        """Whether what is recorded has the head."""
        return self.stage is None or self.stage.last

    def keep(self, key: Any, value: Tensor) -> None:
        """`self.key = value` of a module."""
        self.kept[key] = value, tape().part


class Linear(NamedTuple):
    """A linear layer as a method sees it. Weight (n_out, n_in), or (n_in, n_out) for GPT-2's Conv1D.

    `by_matmul`: it multiplies by the transposed weight in Python (Falcon's), without a bias.
    """

    scope: "Scope"
    name: str
    n_in: int
    n_out: int
    has_bias: bool
    conv1d: bool = False
    by_matmul: bool = False

    @property
    def cut(self) -> Cut:
        """How tensor-parallel ranks share it."""
        build = self.scope.build
        return WHOLE if build.shared is None else build.shared.cut(build.architecture.cuts(self.name))

    def __call__(self, x: Tensor) -> Tensor:
        """The base layer: y = x·Wᵀ (+ b)."""
        return self.cut.made(self.product(self.cut.given(x), self.cut))

    def product(self, x: Tensor, cut: Cut) -> Tensor:
        """What a rank makes by itself."""
        shape = (self.n_in, self.n_out) if self.conv1d else (self.n_out, self.n_in)
        weight = cut.counted(self.scope.parameter(f"{self.name}.weight", shape, "weight"))
        bias = cut.counted(self.scope.parameter(f"{self.name}.bias", (self.n_out,), "bias")) if self.has_bias else None
        with tape().belonging_to("base"):
            build, layer = self.scope.build, self.scope.layer
            first = layer == 0 and self.name == build.architecture.first_linear()
            return base_product(
                x, weight, bias, build.setup, conv1d=self.conv1d, by_matmul=self.by_matmul, inside=layer is not None,
                first=first,
            )  # fmt: skip

    def add_to(self, result: Tensor, other: Tensor) -> Tensor:
        """`result += other` on this layer's output: a view of a matrix where the product has a bias."""
        return add_to_output(result, other, viewed=self.has_bias)

    def adapter(self, name: str, shape: tuple[Any, ...], dtype: str, *, trainable: bool = True) -> Parameter:
        """A parameter that the method adds to this layer; where that is cut, so is what has its cut dim."""
        made = self.scope.parameter(f"{self.name}.{name}", shape, "adapter", dtype=dtype, trainable=trainable)
        cut, wrapping = self.cut, tape().wrapping
        if cut.by and (shape[0] is self.n_out if cut.by == "columns" else shape[-1] is self.n_in):
            made.elements = made.numel * cut.ranks.size
        if wrapping is not None:
            wrapping.weight(made)
        return made


class Scope:
    """Makes parameters under a path: the whole model, or one run of identical layers starting at `layer`."""

    def __init__(self, build: Build, path: str = "", layer: int | None = None) -> None:
        self.build, self.path, self.layer = build, path, layer
        self.made: dict[str, Parameter] = {}
        self.cached: list[Tensor] = []  # what a module holds until its forward pass returns
        self.part: Part = tape().part

    @property
    def index(self) -> int:
        """The number of the block."""
        assert self.layer is not None, "this scope is the whole model"
        return self.layer

    @property
    def dtype(self) -> str:
        """The dtype of the base weights."""
        return self.build.setup.dtype

    def parameter(
        self, name: str, shape: tuple[Any, ...], kind: str, *, dtype: str | None = None, kept: str | None = None,
        trainable: bool | None = None,
    ) -> Parameter:  # fmt: skip
        """The parameter of that name, made on first use; `kept` is the dtype of one that no setup rounds."""
        tape().part.host.weights += kind != "scale"  # statistics of a packed weight are no parameters of their own
        if name not in self.made:
            method = self.build.method
            trainable = method.trains(name, kind, self.layer) if trainable is None else trainable
            of_base = method.dtype_of_trained if trainable else method.base_dtype
            made = self._make(self.path + name, shape, dtype or of_base(kept or self.dtype), kind, trainable)
            if kind != "adapter" and method.copies(name, kind):
                made = self._make(f"{made.name} (trained copy)", shape, made.dtype, "adapter", True)
                made.embeds = kind == "embedding"
            self.made[name] = made
        return self.made[name]

    def _make(self, path: str, shape: tuple[Any, ...], dtype: str, kind: str, trainable: bool) -> Parameter:
        parameters = self.build.parameters
        if path not in parameters:  # a further micro-batch finds the first one's
            parameters[path] = Parameter(path, shape, dtype, kind=kind, trainable=trainable)
        parameters[path].part = self.part
        return parameters[path]

    def linear(self, name: str, x: Tensor, n_out: int, *, bias: bool = False) -> Tensor:
        """A linear layer, as the method rewrites it; what it runs besides the base layer is the adapter's."""
        tape().part.host.modules += 1
        with tape().belonging_to("adapter"):
            return self.build.method.linear(self.linear_layer(name, x.shape[-1], n_out, bias=bias), x)

    def linear_layer(self, name: str, n_in: int, n_out: int, *, bias: bool = False) -> Linear:
        """A linear layer as a method sees it, not run yet."""
        traits, inside = self.build.architecture.traits, self.layer is not None
        return Linear(self, name, n_in, n_out, bias, inside and traits.conv1d, inside and traits.by_matmul)

    def tied_weight(self, embedding: str) -> Parameter:
        """The weight of a head that shares the embedding's: PEFT's copies of either module share nothing any more."""
        weight = self.parameter(f"{embedding}.weight", (), "embedding")
        if self.build.method.copies("lm_head.weight", "weight"):
            return self._make("lm_head.weight (trained copy)", weight.shape, weight.dtype, "adapter", True)
        return self.build.parameters[f"{embedding}.weight"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        """A norm over the last dim, in the architecture's form."""
        tape().part.host.modules += 1
        shares = self.build.shared

        def parameter(which: str) -> Parameter:
            made = self.parameter(f"{name}.{which}", (x.shape[-1],), "norm")
            return made if shares is None else shares.repeated(made)

        out = self.wrapped(name, lambda x: self.build.architecture.traits.norm(parameter, x, self.build.setup), x)
        return out if shares is None or self.layer is None else shares.gathered(out)

    def embedding(self, name: str, rows: int, width: int, ids: Tensor, then: Run | None = None) -> Tensor:
        """`nn.Embedding`, and what its module does then; that of the words as the fine-tuning method rewrites it.

        With checkpointing transformers makes that a leaf that needs a gradient (`enable_input_require_grads`), so
        backward then reaches the first block whatever the method trains.
        """
        tape().part.host.modules += 1
        method, words = self.build.method, name.endswith((*WORDS, "shared"))  # T5's
        shares, size = self.build.shared, (rows, width)

        def run(ids: Tensor) -> Tensor:
            weight = self.parameter(f"{name}.weight", size if shares is None else shares.rows(*size), "embedding")
            if shares is not None:
                x = shares.words(weight, ids)
            else:
                x = method.words(self, weight, ids) if name.endswith(WORDS) else nn.embedding(weight, ids)
            x = x if then is None else then(x)
            if words and self.build.setup.checkpoint != "none" and method.checkpoints(0) and not x.requires_grad:
                x.requires_grad = True
            return x

        made = run if then is None else region(run)  # a class of the model's own
        return self.wrapped(name, made, ids) if words else made(ids)

    def wrapped(self, name: str, run: Run, x: Tensor) -> Tensor:
        """A module between the hooks of a program of several GPUs; those in a block have none of their own."""
        wrapping = tape().wrapping if self.layer is None else None
        return run(x) if wrapping is None else wrapping.module(f"{self.path}{name}.", run, x)

    def stacked(self, name: str, shape: tuple[Any, ...], *, flipped: bool = False, kept: str | None = None) -> Tensor:
        """A weight that is no linear layer's (of all experts, or a router) as the fine-tuning method rewrites it.

        It is (…, out, in), or (…, in, out) if `flipped`; `kept` as for `parameter`.
        """
        method = self.build.method
        with tape().belonging_to("adapter"):
            return method.stacked(self, name, method.stacked_weight(self, name, shape, kept), flipped=flipped)

    def sublayer(self, name: str, x: Tensor, residual: Tensor, norm: str | None = None) -> Tensor:
        """The output of "attention" or "mlp" as the fine-tuning method rewrites it, before it joins the residual."""
        with tape().belonging_to("adapter"):
            return self.build.method.sublayer(self, name, x, residual, norm)

    def layers(self, block: Callable[..., Any], x: Tensor, *given: Any, among: range | None = None) -> Tensor:
        """Run all blocks, or those among some: `block(scope, x, *shared)`, each run of identical layers recorded once.

        A block returns its output, or that and what takes the place of `shared` behind it. Layers are identical when
        they are of one kind, the method treats them alike and autograd does: the lowest layer that needs a gradient
        differs from those above it, whose input needs one too. Kinds that alternate are patterns (`runs_of_layers`).
        """
        current, shared = tape(), list(given)
        of_stage = self.build.stage.blocks if self.build.stage is not None else None
        for first, period, times in runs_of_layers(
            self.build.architecture, self.build.method, of_stage, ends_apart=current.wrapping is not None,
            alone=current.alone,
        ):  # fmt: skip
            end = first + period * times
            while first < end and (among is None or first in among):
                part = current.begin("blocks", "forward")
                needed_grad = x.requires_grad
                current.enter(part, x)
                for layer in range(first, first + period):
                    x, *shared = self._layer(layer, block, x, shared)
                    if self.build.collects:  # the last one's stands for the first one's input, which is as large
                        self.build.held.append((x, part))
                count = (end - first) // period if x.requires_grad == needed_grad else 1
                part.repeat = count
                current.leave(part, x, period)
                for p in self.build.parameters.values():
                    if p.part is part:
                        p.count = count
                first += period * count
        return x

    def _layer(self, layer: int, block: Callable[..., Any], x: Tensor, shared: Sequence[Any]) -> tuple[Any, ...]:
        """One block, checkpointed if the setup says so."""
        scope = Scope(self.build, f"{block_path(self.build.architecture.stacks, layer)}.", layer)
        how = self.build.setup.checkpoint if self.build.method.checkpoints(layer) else "none"
        given = [given_to_block(value) for value in shared]

        def run(x: Tensor) -> Any:
            tape().part.host.modules += len(INSIDE)
            return block(scope, x, *given)

        def checkpointed(x: Tensor) -> Any:
            return run(x) if how == "none" else checkpoint(run, x, reentrant=how == "block-reentrant")

        x.requires_grad |= how != "none"  # of the lowest one where blocks below are not; of others it is so already
        tape().enter_block(layer, whole=how != "none")
        out = checkpointed(x) if (around := tape().wrapping) is None else around.block(scope.path, checkpointed, x)
        tape().enter_block(None)
        return out if isinstance(out, tuple) else (out, *shared)

    def begin(self, name: str) -> None:
        """Start another part of the forward pass (embeddings, head)."""
        self.part = tape().begin(name, "forward")
