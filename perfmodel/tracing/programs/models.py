"""The real models with a method on them, through peft where peft has it."""

from collections.abc import Callable
from typing import Any, TypeVar

from ...architectures import Architecture
from ...architectures.stacks import block_of
from ...errors import UserError
from ...methods import Method
from ...methods.adalora import AdaLora
from ...methods.bitfit import BitFit
from ...methods.dora import Dora
from ...methods.full import Full
from ...methods.ia3 import Ia3
from ...methods.loha import Loha
from ...methods.lokr import Lokr
from ...methods.lora import Lora
from ...methods.lora_alike import Pissa, RsLora
from ...methods.lora_fa import LoraFa
from ...methods.loraplus import LoraPlus
from ...methods.miss import Miss
from ...methods.norm import NormTuning
from ...methods.oft import Oft
from ...methods.p_tuning import PTuning
from ...methods.parts.targeted import ALL_LINEAR, Targeted
from ...methods.parts.virtual import VirtualTokens
from ...methods.prefix_tuning import PrefixTuning
from ...methods.prompt_tuning import PromptTuning
from ...methods.riemannian_lora import RiemannianLora
from ...methods.selected import Selected
from ...methods.top_k import TopK
from ...methods.trainable_tokens import TrainableTokens
from ...methods.vera import Vera
from . import build_model
from .dtypes import TORCH_DTYPES
from .tuners_of_peft import CONFIGS

__all__ = ["apply_method", "build_model"]

TASKS = {"causal": "CAUSAL_LM", "masked": "FEATURE_EXTRACTION", "seq2seq": "SEQ_2_SEQ_LM"}  # peft's, by a model's head
Apply = Callable[..., Any]  # of (model, method, architecture): the model to train
F = TypeVar("F", bound=Apply)
_APPLY: dict[type[Method], Apply] = {}


def has_program(method: Method) -> bool:
    """Whether peft or transformers has a program of a method."""
    return type(method) in _APPLY or type(method) in CONFIGS


def apply_method(model: Any, method: Method, architecture: Architecture) -> Any:
    """The model with the fine-tuning method on it, through peft where peft has it."""
    if not has_program(method):
        raise UserError(f"method {method.name}: neither peft nor transformers has a program of it to trace")
    if type(method) in CONFIGS and isinstance(method, Targeted):
        config, options = CONFIGS[type(method)]
        return _adapt(model, config, method, architecture, **{k: getattr(method, v) for k, v in options.items()})
    return _APPLY[type(method)](model, method, architecture)


def applies(*classes: type[Method]) -> Callable[[F], F]:
    """Register the function that applies methods to a real model."""

    def register(function: F) -> F:
        _APPLY.update(dict.fromkeys(classes, function))
        return function

    return register


@applies(Full)
def _full(model: Any, method: Full, architecture: Architecture) -> Any:
    return model


@applies(Selected)
def _selected(model: Any, method: Selected, architecture: Architecture) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = method.pattern.fullmatch(name) is not None
    return model


@applies(BitFit)
def _bitfit(model: Any, method: BitFit, architecture: Architecture) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias")
    return model


@applies(NormTuning)
def _norm(model: Any, method: NormTuning, architecture: Architecture) -> Any:
    import peft

    norms = list(architecture.traits.norms)
    if not norms:
        raise UserError(f"method {method.name}: {architecture.name} has no norms")
    return peft.get_peft_model(model, peft.LNTuningConfig(target_modules=norms, task_type=_task(architecture)))


@applies(TopK)
def _top_k(model: Any, method: TopK, architecture: Architecture) -> Any:
    if method.inner == "lora":
        return apply_method(model, method.inside, architecture)
    for name, parameter in model.named_parameters():
        block, _ = block_of(architecture.stacks, name)
        parameter.requires_grad = block is not None and method.has(block)
        if parameter.requires_grad and method.trained_dtype:
            parameter.data = parameter.data.to(TORCH_DTYPES[method.trained_dtype])
    if not method.checkpoint_frozen:
        _checkpoint_trained(model)
    return model


def _checkpoint_trained(model: Any) -> None:
    """Let a model checkpoint only blocks that train, as LLaMA-Factory does (model/model_utils/checkpointing.py)."""
    from torch.utils.checkpoint import checkpoint

    def enable(activation_checkpointing_kwargs: dict[str, Any]) -> None:
        def run(function: Any, hidden: Any, *others: Any, **named: Any) -> Any:
            module = function.args[0]  # of `partial(forward, self)`
            if not any(parameter.requires_grad for parameter in module.parameters()):
                return function(hidden, *others, **named)
            hidden.requires_grad_(True)
            return checkpoint(function, hidden, *others, **activation_checkpointing_kwargs, **named)

        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run)

    model.activation_checkpointing_enable = enable


@applies(Lora, LoraPlus, Pissa, RiemannianLora)  # PiSSA's decomposition of the weights comes before the first step
def lora(model: Any, method: Lora, architecture: Architecture, **variant: Any) -> Any:
    """The model with peft's LoRA on it; `variant` are further options of its config, or of `_adapt`."""
    options: dict[str, Any] = {"r": method.r, "lora_alpha": method.alpha, "lora_dropout": method.dropout}
    options["target_parameters"] = list(method.target_parameters) or None
    return _adapt(model, "LoraConfig", method, architecture, **options, **variant)


@applies(RsLora)
def _rslora(model: Any, method: RsLora, architecture: Architecture) -> Any:
    return lora(model, method, architecture, use_rslora=True)


@applies(LoraFa)
def _lora_fa(model: Any, method: LoraFa, architecture: Architecture) -> Any:
    adapted = lora(model, method, architecture)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad = False
    return adapted


@applies(AdaLora)
def _adalora(model: Any, method: AdaLora, architecture: Architecture) -> Any:
    options: dict[str, Any] = {"init_r": method.r, "lora_alpha": method.alpha, "lora_dropout": method.dropout}
    options |= {"target_r": 1, "total_step": 100}  # decide nothing but which entries are masked, and when
    # without a task type PeftModel passes AdaLoraModel.forward by, and with it the regulariser
    options["task_type"] = TASKS[architecture.traits.head]
    return _adapt(model, "AdaLoraConfig", method, architecture, **options)


@applies(Dora)
def _dora(model: Any, method: Dora, architecture: Architecture) -> Any:
    return lora(model, method, architecture, use_dora=True)


@applies(Loha)
def _loha(model: Any, method: Loha, architecture: Architecture) -> Any:
    return _adapt(model, "LoHaConfig", method, architecture, r=method.r, alpha=method.alpha)


@applies(Lokr)
def _lokr(model: Any, method: Lokr, architecture: Architecture) -> Any:
    options: dict[str, Any] = {"decompose_factor": method.factor, "decompose_both": method.decompose_both}
    return _adapt(model, "LoKrConfig", method, architecture, r=method.r, alpha=method.alpha, **options)


@applies(Miss)
def _miss(model: Any, method: Miss, architecture: Architecture) -> Any:
    return _adapt(model, "MissConfig", method, architecture, r=method.r, miss_dropout=method.dropout)


@applies(Oft)
def _oft(model: Any, method: Oft, architecture: Architecture) -> Any:
    return _adapt(model, "OFTConfig", method, architecture, oft_block_size=method.block_size)


@applies(Ia3)
def _ia3(model: Any, method: Ia3, architecture: Architecture) -> Any:
    return _adapt(model, "IA3Config", method, architecture, feedforward_modules=list(method.feedforward_names))


@applies(Vera)
def _vera(model: Any, method: Vera, architecture: Architecture) -> Any:
    return _adapt(model, "VeraConfig", method, architecture, r=method.r, vera_dropout=method.dropout)


@applies(TrainableTokens)
def _trainable_tokens(model: Any, method: TrainableTokens, architecture: Architecture) -> Any:
    import peft

    words = next(name for name, m in model.named_modules() if m is model.get_input_embeddings()).rpartition(".")[2]
    config = peft.TrainableTokensConfig(token_indices=list(range(method.tokens)), target_modules=[words])
    return peft.get_peft_model(model, config)


@applies(PromptTuning)
def _prompt_tuning(model: Any, method: PromptTuning, architecture: Architecture) -> Any:
    return _prompt(model, "PromptTuningConfig", method)


@applies(PTuning)
def _p_tuning(model: Any, method: PTuning, architecture: Architecture) -> Any:
    return _prompt(model, "PromptEncoderConfig", method, encoder_hidden_size=method.width)


@applies(PrefixTuning)
def _prefix_tuning(model: Any, method: PrefixTuning, architecture: Architecture) -> Any:
    options = {"prefix_projection": method.projection, "encoder_hidden_size": method.width}
    return _prompt(model, "PrefixTuningConfig", method, **options)


def _prompt(model: Any, config_name: str, method: VirtualTokens, **options: Any) -> Any:
    import peft

    if not {"num_attention_heads", "n_head", "num_heads"} & model.config.to_dict().keys():  # which PEFT looks for
        options["num_attention_heads"] = model.config.num_attention_heads
    config = getattr(peft, config_name)(task_type="CAUSAL_LM", num_virtual_tokens=method.tokens, **options)
    return peft.get_peft_model(model, config)


def _task(architecture: Architecture) -> str | None:
    """The task type of peft's configs that makes it train the classifier, too; None for a language model."""
    classifier = architecture.classifier
    return None if classifier is None else "SEQ_CLS" if classifier.of == "sequence" else "TOKEN_CLS"


def _targets(method: Targeted, architecture: Architecture) -> str | list[str]:
    """As peft's config takes them: the word for all layers goes with no choice of blocks, so they are named then."""
    if method.pattern is not None:
        return method.pattern.pattern
    if method.target_names != (ALL_LINEAR,):
        return list(method.target_names)
    return ALL_LINEAR if method.layers_to_transform is None else architecture.linear_names()


def _adapt(
    model: Any, config_name: str, method: Targeted, architecture: Architecture,
    layers: dict[type, type] | None = None, **options: Any,
) -> Any:  # fmt: skip
    """The model with an adapter of peft's; `options` are those of its config that the methods do not share.

    Args:
        layers: peft's layers for modules of classes that it does not know.
    """
    import peft

    config_class = getattr(peft, config_name)
    if architecture.classifier is not None:
        options["task_type"] = _task(architecture)
    options["target_modules"] = _targets(method, architecture)
    known = config_class.__dataclass_fields__
    if "fan_in_fan_out" in known:
        options["fan_in_fan_out"] = architecture.traits.conv1d
    if method.layers_to_transform is not None:
        options["layers_to_transform"] = list(method.layers_to_transform)
    if method.modules_to_save:
        options["modules_to_save"] = list(method.modules_to_save)
    config = config_class(**options)
    if layers:
        config._register_custom_module(layers)
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=method.adapter_dtype != "bf16")
    if method.adapter_dtype is not None:
        shared = [b for name, b in adapted.named_buffers() if "vera_" in name]
        trained = [p for n, p in adapted.named_parameters() if p.requires_grad and ".modules_to_save." not in n]
        for tensor in trained + shared:
            tensor.data = tensor.data.to(TORCH_DTYPES[method.adapter_dtype])
    return adapted
