"""Losses of TRL's trainers in plain torch, and the steps that they make, against the tape.

Written from what TRL 1.8 computes and logs on one GPU; real tensors, for what flags pick has no size on fake ones.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from perfmodel.setup import PAIRS, Setup
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES

BETA = 0.1


@dataclass
class Run:
    """One micro-batch: the model, its reference (None: the model without adapters), and the sizes.

    `inner` is the model without what several GPUs wrap it in, `gather` what puts a tensor of each together.
    """

    model: Any
    reference: Any
    setup: Setup
    inner: Any = None
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    def __post_init__(self) -> None:
        """What a data loader brings: made before anything is recorded."""
        self.inner = self.inner or self.model
        samples = self.setup.batch
        sequences = self.setup.sequences
        self.ids = torch.arange(sequences * self.setup.seq).view(sequences, self.setup.seq) % 100
        self.ones = torch.ones_like(self.ids)
        prompt = self.setup.prompt_tokens
        self.prompts, self.completions = self.ids[:, :prompt].clone(), self.ids[:, prompt:].clone()
        self.prompt_ones, self.completion_ones = torch.ones_like(self.prompts), torch.ones_like(self.completions)
        self.block_advantages = torch.ones(self.completions.shape)
        self.advantages, self.tokens = torch.ones(samples), torch.tensor(self.completions.numel())
        if self.setup.objective in PAIRS:
            self.chosen, self.rejected = ((half, torch.ones_like(half), half.clone()) for half in self.ids.chunk(2))
        self.nothing = torch.zeros(0)
        self.table = torch.zeros(samples)  # log-probabilities that were made before
        self.after: Callable[[], None] = lambda: None
        if self.setup.objective == "ppo":
            self._rolled_out(samples * self.setup.grad_accum, self.completions.shape[1])

    def _rolled_out(self, count: int, length: int) -> None:
        """What PPO generates and scores before its steps, and what its loop keeps in variables."""
        each = torch.zeros(count, length)
        self.rollouts = {
            "all_tokens": torch.zeros(count, self.setup.seq, dtype=torch.long), "tokens": each.long(), "logps": each,
            "advantages": each.clone(), "returns": each.clone(), "outside": each.bool(),
            "values": each.to(TORCH_DTYPES[self.setup.dtype]),
        }  # fmt: skip
        self.drawn_by = torch.zeros(count, length, self.inner.config.vocab_size)
        self.statistics = torch.zeros(1, 1, self.setup.grad_accum)
        self.variables: dict[str, Any] = {}

    @contextmanager
    def without_gradient(self) -> Any:
        """The model that the reference is, without graph or checkpoints."""
        checkpoints = self.inner.is_gradient_checkpointing
        if checkpoints:
            self.inner.gradient_checkpointing_disable()
        own = self.model if self.setup.parallel == "fsdp1" else self.inner  # what `Trainer.model` is
        with torch.no_grad(), self.inner.disable_adapter() if self.reference is None else nullcontext():
            yield own if self.reference is None else self.reference
        if checkpoints:
            reentrant = self.setup.checkpoint == "block-reentrant"
            self.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


Loss = Callable[[Run], torch.Tensor]


def picked_log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    places = tokens.unsqueeze(-1)
    if logits.dtype == torch.float32:
        own = logits.gather(-1, places)
        whole = torch.stack([torch.logsumexp(row, -1) for row in logits])
        return (own - whole.unsqueeze(-1)).squeeze(-1)
    each = []
    for row, place in zip(logits, places, strict=True):
        every = F.log_softmax(row, -1)
        each.append(every.gather(-1, place))
    return torch.stack(each).squeeze(-1)


def of_sequences(logits: torch.Tensor, ids: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    each = picked_log_probabilities(logits, ids[:, 1:])
    each[completions[:, 1:] == 0] = 0.0
    return each.sum(1)


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    entropies = []
    for chunk in flat.split(128, dim=0):
        logs = F.log_softmax(chunk, -1)
        entropy = -(torch.exp(logs) * logs).sum(-1)
        entropies.append(entropy)
    return torch.cat(entropies).reshape(logits.shape[:-1])


def log_entropy(run: Run, logits: torch.Tensor, mask: torch.Tensor) -> None:
    each = entropy_of(logits)
    part, whole = (run.gather(x).sum() for x in ((each * mask).sum(), mask.sum()))
    assert not whole > 0 or (part / whole).item() is not None


def dpo(run: Run) -> torch.Tensor:
    ids, ones = run.ids, run.ones
    outputs = run.model(input_ids=ids, attention_mask=ones, use_cache=False)
    logits, mask = outputs.logits[:, :-1], ones[:, 1:]
    chosen, rejected = of_sequences(logits, ids, ones).chunk(2)
    if run.setup.reference == "precomputed":
        reference_chosen = reference_rejected = run.table
    else:
        with run.without_gradient() as model:
            reference_outputs = model(input_ids=ids, attention_mask=ones, use_cache=False)
        reference = of_sequences(reference_outputs.logits[:, :-1], ids, ones)
        reference_chosen, reference_rejected = reference.chunk(2)
    up, down = chosen - reference_chosen, rejected - reference_rejected
    margin = up - down
    loss = 0.0 + (-F.logsigmoid(BETA * margin)).mean() * 1.0
    log_entropy(run, logits.detach(), mask)
    run.gather(ones.sum()).sum().item()
    log_logits(run, logits.detach(), ids[:, 1:], mask)
    up, down = BETA * up.detach(), BETA * down.detach()
    log_means(run, up, down, (up > down).float(), up - down, chosen, rejected)
    return loss


def log_logits(run: Run, logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    sums = []
    for part, flags in zip(logits.chunk(2), mask.chunk(2), strict=True):
        sums += [part[flags.bool()].mean(-1).sum(), flags.sum()]
    for number in sums:
        run.gather(number).sum().item()
    half = len(mask) // 2
    best, flags = logits.chunk(2)[0].argmax(-1), mask[:half].bool()
    right = (best == tokens[:half]) & flags
    whole, part = run.gather(flags.sum()), run.gather(right.sum())
    whole = whole.sum()
    assert not whole > 0 or (part.sum() / whole).item() is not None


def log_means(run: Run, *values: torch.Tensor) -> None:
    for value in values:
        run.gather(value).mean().item()


def reward(run: Run) -> torch.Tensor:
    ids, ones = run.ids, run.ones
    outputs = run.model(input_ids=ids, attention_mask=ones, use_cache=False)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    loss = -F.logsigmoid(chosen - rejected).mean()
    run.gather(ones.sum()).sum().item()
    with torch.no_grad():
        rewards = run.gather(outputs.logits)
        for extreme in (torch.min, torch.mean, torch.max):
            extreme(rewards).item()
        log_means(run, (chosen > rejected).float().mean(), (chosen - rejected).mean())
    return loss


def in_two(run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels of chosen above rejected sequences."""
    ids, ones, labels = (torch.cat(both) for both in zip(run.chosen, run.rejected, strict=True))
    return ids, ones, labels


def likelihood_of_chosen(logits: torch.Tensor, labels: torch.Tensor, pairs: int) -> torch.Tensor:
    kept, target = logits[:pairs, :-1].contiguous(), labels[:pairs, 1:].contiguous()
    return F.cross_entropy(kept.view(-1, kept.shape[-1]), target.view(-1))


def of_labels(logits: torch.Tensor, labels: torch.Tensor, *, average: bool, in_place: bool) -> torch.Tensor:
    labels = labels[:, 1:].clone()
    flags = labels != -100
    if in_place:
        labels[labels == -100] = 0
    else:
        labels = torch.where(labels == -100, 0, labels)
    each = picked_log_probabilities(logits[:, :-1], labels)
    return (each * flags).sum(-1) / flags.sum(-1) if average else (each * flags).sum(-1)


def orpo(run: Run) -> torch.Tensor:
    ids, ones, labels = in_two(run)
    pairs = run.setup.batch
    logits = run.model(ids, attention_mask=ones, use_cache=False).logits
    all_labels = torch.where(ones == 1, ids.clone(), -100)
    likely = likelihood_of_chosen(logits, all_labels, pairs)
    each = of_labels(logits, labels, average=True, in_place=False)
    chosen_logps, rejected_logps = each[:pairs], each[pairs:]
    chosen, rejected = chosen_logps.float(), rejected_logps.float()
    odds = (chosen - rejected) - (log_of_rest(chosen) - log_of_rest(rejected))
    ratio = F.logsigmoid(odds)
    losses = BETA * ratio
    up, down = BETA * chosen.detach(), BETA * rejected.detach()
    means = [ratio.mean(), odds.mean()]
    loss = likely - losses.mean()
    better = (up > down).float()
    metrics = [run.gather(x).mean() for x in (up, down, better, up - down)]
    metrics += [run.gather(x.detach()).mean() for x in (rejected_logps, chosen_logps)]
    metrics += [run.gather(half.detach().mean()).mean() for half in (logits[pairs:, :-1], logits[:pairs, :-1])]
    metrics += [run.gather(x.detach()).mean() for x in (likely, *means)]
    for metric in metrics:
        metric.item()
    return loss


def log_of_rest(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < -0.6931, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def cpo(run: Run, *, average: bool = False) -> torch.Tensor:
    ids, ones, labels = in_two(run)
    pairs = run.setup.batch
    logits = run.model(ids, attention_mask=ones, use_cache=False).logits
    likely = likelihood_of_chosen(logits, labels.clone(), pairs)
    each = of_labels(logits, labels, average=average, in_place=True)
    chosen, rejected = each[:pairs], each[pairs:]
    margin = chosen - rejected - 0.5 if average else chosen - rejected
    losses = -F.logsigmoid(BETA * margin) * 1.0 - F.logsigmoid(-BETA * margin) * 0.0
    up, down = BETA * chosen.detach(), BETA * rejected.detach()
    loss = losses.mean() + 1.0 * likely
    log_means(run, up, down, (up > down).float(), up - down, rejected.detach(), chosen.detach())
    log_means(run, logits[pairs:].detach().mean(), logits[:pairs].detach().mean(), likely.detach())
    return loss


def kto(run: Run) -> torch.Tensor:
    ids, ones, samples = run.ids, run.ones, run.setup.batch
    flags = torch.tensor([2 * i < samples for i in range(samples)])
    many = flags.sum()
    few = samples - many
    with torch.no_grad():
        others = run.model(input_ids=ids, attention_mask=ones).logits
    far = of_sequences(others[:, :-1], ids, ones)
    del others
    logits = run.model(input_ids=ids, attention_mask=ones).logits
    each = of_sequences(logits[:, :-1], ids, ones)
    kinds = [torch.nonzero(flags).view(-1), torch.nonzero(~flags).view(-1)]
    own, own_logits = ([x.index_select(0, kind) for kind in kinds] for x in (each, logits))
    if run.setup.reference == "precomputed":
        reference_far = reference = run.table
    else:
        with run.without_gradient() as model:
            reference_others = model(input_ids=ids, attention_mask=ones).logits
            reference_far = of_sequences(reference_others[:, :-1], ids, ones)
            del reference_others
            reference_logits = model(input_ids=ids, attention_mask=ones).logits
        reference = of_sequences(reference_logits[:, :-1], ids, ones)
    references = [reference.index_select(0, kind) for kind in kinds]
    apart = run.gather((far - reference_far).mean().detach()).mean().clamp(min=0)
    losses, rewards = [], []
    for kind, (value, base) in enumerate(zip(own, references, strict=True)):
        if not len(value):
            losses.append(run.nothing)
            continue
        ratios = value - base
        losses.append(1 - F.sigmoid(BETA * (apart - ratios if kind else ratios - apart)))
        rewards.append(BETA * ratios.detach())
    every = torch.cat([1.0 * loss for loss in losses])
    apart.item()
    log_entropy(run, logits[:, :-1].detach(), ones[:, 1:])
    run.gather(ones.sum()).sum().item()
    for number in (many, few):
        run.gather(number).sum().item()
    for values in zip(rewards, own, own_logits, strict=False):
        for value in values:
            run.gather(value.nansum()).nansum().item()
    return every.nanmean()


def of_completions(run: Run, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of completions, and their logits."""
    ids = torch.cat((run.prompts, run.completions), 1)
    ones = torch.cat((run.prompt_ones, run.completion_ones), 1)
    length = run.completions.shape[1]
    logits = model(input_ids=ids, attention_mask=ones, logits_to_keep=length + 1, use_cache=False).logits
    logits = logits[:, :-1, :]
    logits = logits[:, -length:, :]
    logits.div_(1.0)
    return torch.cat([picked_log_probabilities(logits, ids[:, -length:])]), logits


def grpo(run: Run) -> torch.Tensor:
    mask, named = run.completion_ones, run.setup.reference != "auto"
    if named:
        with run.without_gradient() as model:
            reference = of_completions(run, model)[0]
    each, logits = of_completions(run, run.model)
    with torch.no_grad():
        entropies = torch.cat([entropy_of(logits)])
    del logits
    advantages = run.advantages.unsqueeze(1)
    ratio = torch.exp(each - each.detach())
    if named:
        apart = torch.exp(reference - each) - (reference - each) - 1
    clipped = torch.clamp(ratio, 0.8, 1.2)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    if named:
        loss = loss + BETA * apart
    total = (loss * mask).sum() / (run.tokens / 1)
    count = mask.sum().clamp(min=1.0)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (x * mask).sum() / count

    for value in [apart, entropies] if named else [entropies]:
        run.gather(mean(value)).nanmean().item()
    low, high = (ratio < 0.8) & (advantages < 0), (ratio > 1.2) & (advantages > 0)
    shares = [mean(x.float()) for x in (low, high, low | high)]
    for share, extreme in zip(shares, (torch.min, torch.max, None), strict=True):
        share = run.gather(share)
        share.nanmean().item()
        if extreme is not None and not torch.isnan(share).all():
            extreme(share[~torch.isnan(share)]).item()
    return total


LOSSES: dict[str, Loss] = {
    "dpo": dpo, "kto": kto, "reward": reward, "orpo": orpo, "cpo": cpo, "simpo": partial(cpo, average=True),
    "grpo": grpo, }  # fmt: skip
