"""A prediction for any `torch.nn.Module`; torch is imported when it is asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .devices.host import Host
from .devices.profile import DeviceProfile
from .errors import UserError
from .predict import Prediction
from .setup import Setup


def predict_module(
    module: Any,
    inputs: Mapping[str, Any] | Sequence[Any] | Any,
    *,
    loss: Callable[[Any], Any] | None = None,
    setup: Setup | None = None,
    device: str | DeviceProfile = "l40s",
    host: str | Host = "default",
    name: str = "",
) -> Prediction:
    """Predict one training step of your own `nn.Module`, from a trace of its real forward and backward.

        import torch
        from perfmodel import predict_module

        with torch.device("meta"):                      # or a module with weights: it is copied without them
            model = torch.nn.Sequential(torch.nn.Linear(4096, 16384), torch.nn.GELU(), torch.nn.Linear(16384, 4096))
        x = torch.empty(8, 512, 4096, device="meta")
        p = predict_module(model.bfloat16(), x.bfloat16(), loss=lambda y: y.float().pow(2).mean(), device="h100-sxm")
        p.time.phases["total"], p.memory.peak, p.flops["total"]

    A transformers or peft model works the same way: `predict_module(model, {"input_ids": ids, "labels": ids})`. What
    trains is what has `requires_grad`. Nothing is computed and the module stays as it is. Of a module with many blocks
    alike, in a `ModuleList` or `Sequential`, a few are traced and the rest is extrapolated, which is checked call by
    call; a note in the prediction says of how many.

    Args:
        module: an `nn.Module`, on any device, "meta" included.
        inputs: example arguments of its forward: a mapping of names, a sequence, or one tensor. Only shapes and dtypes
            count, so meta tensors will do.
        loss: makes the scalar loss of the module's output; default: the output's `.loss`, or the output itself.
        setup: optimizer, gradient accumulation, checkpoints (of transformers models) and clipping of the step; batch,
            seq and dtype only label it. Default: AdamW, batch and seq read off the first input.
        device, host: as `perfmodel.predict` takes them.
        name: how the prediction calls the module; default: its class.

    Raises:
        UserError: no scalar loss, nothing trains, or the program needs data that a fake tensor does not have.
    """
    try:
        from validate.tracing.modules import predict
    except ImportError as error:
        raise UserError(
            f"predict_module needs the validate extra ({error.name} is missing): pip install 'perfmodel[validate]'"
        ) from None
    found: Prediction = predict(module, inputs, loss=loss, setup=setup, device=device, host=host, name=name)
    return found
