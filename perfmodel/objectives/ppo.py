"""PPO's training step as TRL's trainer runs it, with the local variables of its `train`.

Policy and value model go through the step one after the other and both train, the value model with all its weights
whatever the method. The reference and the reward model lie in memory, and so do the logits that tokens were drawn by.
Generation, scores and advantages are outside of the step. A sample is a prompt and its completion (`Setup.prompt`).

Source: https://arxiv.org/abs/1909.08593; trl/experimental/ppo/ppo_trainer.py (1.10).
"""

from dataclasses import replace

from ..architectures.base import Architecture, Build, Scope
from ..architectures.tasks import Classifier
from ..errors import UserError
from ..methods.full import Full
from ..methods.parts.base import Method
from ..program.dims import Dim
from ..program.dtypes import ITEMSIZE
from ..program.part import Part
from ..setup import Setup
from ..tape.core import emit, record, release, tape
from ..tape.elementary import div, sum_dim
from ..tape.gather import clamp, clamp_between, fill_where, picked
from ..tape.inplace import divide_view
from ..tape.nn import softmax
from ..tape.pointwise import add, binary_bool, cast, mul, neg, power, sub
from ..tape.scores import greater, logsumexp, mean_all, natural_exp, sum_all
from ..tape.shape import narrow, squeeze
from ..tape.split import select
from ..tape.tensor import Parameter, Tensor
from ..tape.transfers import scalar
from .parts.base import Objective, Passes, compares_by_adapters, objective
from .parts.logps import selective_log_softmax
from .reward import with_head

Held = list[tuple[Tensor, Part | None]]


@objective("ppo", title="PPO", source="trl/experimental/ppo/ppo_trainer.py (1.10)")
class Ppo(Objective):
    """Proximal policy optimisation: sequences by their advantage over what a value model expects."""

    compares = "always"
    clips = False
    beside = (
        "generation, scores and advantages are outside of it; a value model as large as the policy trains with all its "
        "weights, a reward model lies in memory, and gradients are not clipped"
    )

    def check(self, method: Method, setup: Setup) -> None:
        super().check(method, setup)
        if setup.reference == "precomputed":
            raise UserError("reference precomputed: ppo compares with it on what was just generated; leave it out")
        if setup.kernels != "torch":
            raise UserError(f"objective ppo with kernels {setup.kernels} is not modelled; leave it out")
        if setup.amp is not None and setup.dtype != "fp32":
            raise UserError(f"objective ppo under autocast with {setup.dtype} weights is not modelled; use dtype fp32")
        for hook in ("update", "periodic", "own_optimizer"):
            if getattr(type(method), hook) is not getattr(Method, hook):
                raise UserError(f"objective ppo with the optimizer step of {method.name} is not modelled; use lora")

    def held_bytes(self, architecture: Architecture, setup: Setup) -> Dim:
        """The logits of all that was generated for the step, in fp32 (`logitss`)."""
        completion = setup.seq - setup.prompt_tokens
        return setup.batch * setup.grad_accum * completion * architecture.vocab * ITEMSIZE["fp32"]

    def loss(self, passes: Passes) -> Tensor:
        samples, prompt = passes.setup.batch, passes.setup.prompt_tokens
        completion, rollouts = passes.setup.seq - prompt, passes.setup.batch * passes.setup.grad_accum

        def micro_batch(length: Dim, dtype: str) -> Tensor:
            return picked(passes.tensor(rollouts, length, dtype=dtype), scalar("i64", (samples,)))

        def of_completion(x: Tensor) -> Tensor:
            return narrow(x, 1, completion)

        def masked_mean(values: Tensor) -> Tensor:
            mask = emit("bitwise_not", (micro_batch(completion, "bool"),), (samples, completion), "bool")
            return div(sum_all(mul(values, mask)), sum_all(mask))

        base = passes.setup.dtype
        mb_advantage, mb_responses = micro_batch(completion, "fp32"), micro_batch(completion, "i64")
        mb_query_responses, mb_logprobs = micro_batch(passes.setup.seq, "i64"), micro_batch(completion, "fp32")
        mb_return, mb_values = micro_batch(completion, "fp32"), micro_batch(completion, base)
        logits, vpred_temp = _forward(passes, mb_query_responses)
        tape().begin("loss", "forward")
        logits = divide_view(logits, of_completion)
        new_logprobs = fill_where(selective_log_softmax(logits, mb_responses), micro_batch(completion, "bool"))
        vpred = fill_where(squeeze(of_completion(vpred_temp), -1), micro_batch(completion, "bool"))
        vpredclipped = clamp_between(vpred, sub(mb_values, 0.2), add(mb_values, 0.2))
        vf_losses1, vf_losses2 = power(sub(vpred, mb_return)), power(sub(vpredclipped, mb_return))
        vf_loss = mul(masked_mean(greater(vf_losses1, vf_losses2)), 0.5)
        vf_clipfrac = masked_mean(cast(binary_bool("gt.Tensor", vf_losses2, vf_losses1), "fp32"))
        logprobs_diff = sub(new_logprobs, mb_logprobs)
        ratio = natural_exp(logprobs_diff)
        pg_losses = mul(neg(mb_advantage), ratio)
        pg_losses2 = mul(neg(mb_advantage), clamp(ratio, low=True, high=True))
        pg_loss = masked_mean(greater(pg_losses, pg_losses2))

        def after() -> None:
            clipped = cast(binary_bool("gt.Tensor", pg_losses2, pg_losses), "fp32")
            pg_clipfrac, entropy = masked_mean(clipped), _entropy(passes, logits)
            approxkl = mul(mean_all(power(logprobs_diff)), 0.5)
            for value in (approxkl, pg_clipfrac, pg_loss, vf_loss, vf_clipfrac):
                _note(passes, value)
            _note(passes, mean_all(entropy))
            _note(passes, mean_all(ratio))

        passes.after = after
        return add(pg_loss, mul(vf_loss, 0.1))


def _forward(passes: Passes, query_responses: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the policy, (samples, seq, vocab), and values, (samples, seq, 1); in fp32 under autocast.

    All hidden states are asked for: those of the value model live until the policy has run, the policy's until the
    next micro-batch has its own.
    """
    attention_mask = emit("ne.Scalar", (query_responses,), query_responses.shape, "bool")
    position_ids = emit("cumsum", (attention_mask,), attention_mask.shape, "i64")
    position_ids = sub(position_ids, cast(attention_mask, "i64"))
    input_ids = fill_where(query_responses, emit("bitwise_not", (attention_mask,), attention_mask.shape, "bool"))
    policy, setup = passes.model.build, passes.setup
    headed = with_head("ppo", policy.architecture, Classifier("value", 1, padded=True, dropout=None))
    if not headed.traits.packs:
        raise UserError(f"objective ppo: {headed.name} with positions that come with the tokens is not modelled")
    critic = Build(headed, Full(), replace(setup, checkpoint="none"), passes.critic, labelled=False)

    def run() -> tuple[Tensor, Tensor]:
        with tape().autocasting():
            outputs = []
            for build in (critic, policy):
                build.given_positions, build.collects = position_ids, True
                model = passes.model if build is policy else Scope(build)
                outputs.append(build.architecture.forward(model, input_ids, attention_mask, input_ids))
            values, logits = outputs
            del outputs
            release(critic.held)
        return (cast(logits, "fp32"), cast(values, "fp32")) if setup.amp else (logits, values)

    logits, values = passes.called(run)[:2]
    _hold(policy, "output", [*policy.held, (logits, None)])
    policy.held.clear()
    passes.frozen.update(passes.frozen or _resident(passes))
    return logits, values


def _hold(build: Build, name: str, held: Held) -> None:
    """A variable of the loop over micro-batches: what the last one left in it dies here."""
    before: Held = [build.kept.pop(key) for key in list(build.kept) if key[0] == name]
    release(before)
    for i, (tensor, part) in enumerate(held):
        build.kept[name, i] = tensor.alias(), part or Part(name, "forward")


def _resident(passes: Passes) -> dict[str, Parameter]:
    """Weights of the models that lie there: the reward model, and the reference if it is one of its own."""
    lie = {f"reward model {name}": p for name, p in passes.critic.items()}
    if not compares_by_adapters(passes.method, passes.setup):
        own = {name: p for name, p in passes.model.build.parameters.items() if p.kind != "adapter"}
        lie |= {f"reference model {name}": p for name, p in own.items()}
    for name, p in lie.items():
        made = Parameter(name, p.shape, p.dtype, kind=p.kind, trainable=False)
        made.count, made.part, lie[name] = p.count, p.part, made
    return lie


def _entropy(passes: Passes, logits: Tensor) -> Tensor:
    """Entropies of the completions' tokens, (samples, tokens); the probabilities stay until the next micro-batch."""
    prob_dist = softmax(logits)
    if passes.setup.grad_accum > 1:
        _hold(passes.model.build, "prob_dist", [(prob_dist, None)])
    return sub(logsumexp(logits), sum_dim(mul(prob_dist, logits), -1))


def _note(passes: Passes, value: Tensor) -> None:
    """`stats[epoch, minibatch, micro_batch] = value`."""
    place = passes.tensor(1, 1, passes.setup.grad_accum, dtype="fp32")
    for _ in range(3):
        place = select(place, 0)
    record("copy_", (place, value), (place,))
