"""Losses of LLaMA-Factory's, Axolotl's and TRL's experimental trainers in plain torch (see `reference_objectives`)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reference_objectives import BETA, Loss, Run, picked_log_probabilities


def asft(run: Run) -> torch.Tensor:
    ids, ones = run.ids, run.ones
    with run.without_gradient() as model:
        others = model(input_ids=ids, attention_mask=ones).logits
    outputs = run.model(input_ids=ids, attention_mask=ones, labels=ids)
    logits = outputs.logits.float()
    own, tokens, others = logits[:, :-1].contiguous(), ids[:, 1:].contiguous(), others[:, :-1].contiguous()
    own, others, tokens = own.view(-1, own.shape[-1]), others.view(-1, others.shape[-1]), tokens.view(-1)
    each = F.cross_entropy(own, tokens, reduction="none")
    flags = tokens != -100
    assert flags.any()
    kept = each[flags]
    with torch.no_grad():
        weights = torch.exp(-kept)
    first = (kept * weights).mean()
    logs, wanted = F.log_softmax(own, -1), F.softmax(others, -1)
    apart = F.kl_div(logs, wanted, reduction="none").sum(-1)
    mask = (tokens != -100).float()
    return first + BETA * ((apart * mask).sum() / mask.sum())


def ebft(run: Run) -> torch.Tensor:
    ids, ones, start = run.ids, run.ones, run.prompts.shape[1] - 1
    options = {} if run.reference is not None else {"logits_to_keep": run.completions.shape[1] + 1}
    logits = run.model(input_ids=ids, attention_mask=ones, use_cache=False, **options).logits
    tokens = ids[:, 1:]
    each = torch.zeros(tokens.shape, dtype=torch.float32)
    generated, targets = logits[:, :-1, :][:, -run.completions.shape[1] :], tokens[:, start:]
    for i in range(0, generated.shape[1], 256):
        part, target = generated[:, i : i + 256], targets[:, i : i + 256]
        logs = F.log_softmax(part.float(), dim=-1)
        each[:, start + i : start + i + part.shape[1]] = logs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        del logs
    del logits, generated
    if run.reference is None:
        del part
    flags = torch.zeros(each.shape, dtype=torch.bool)
    flags[:, start:] = True
    with run.without_gradient() as model:
        model(input_ids=ids, attention_mask=ones, use_cache=False)
    advantages = torch.zeros_like(each)
    advantages[:, start:] = run.block_advantages
    first = (-each * advantages.detach() * flags.float()).sum() / flags.float().sum().clamp(min=1)
    second = torch.tensor(0.0)
    loss = 1.0 * first + 0.0 * second
    first.item(), second.item()
    return loss


def mean_of(values: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    return (values * flags).sum() / flags.sum()


def ppo(run: Run) -> torch.Tensor:
    places, start = np.arange(run.setup.batch), run.prompts.shape[1] - 1
    t: dict[str, Any] = {"advantages": run.rollouts["advantages"][places], "tokens": run.rollouts["tokens"][places]}
    all_tokens, drawn_by = run.rollouts["all_tokens"][places], run.rollouts["logps"][places]
    returns, expected = run.rollouts["returns"][places], run.rollouts["values"][places]

    def outside() -> torch.Tensor:
        return run.rollouts["outside"][places]

    real = all_tokens != -1
    at = real.cumsum(1) - real.long()
    ids = torch.masked_fill(all_tokens, ~real, 0)
    output, values = run.model(input_ids=ids, attention_mask=real, position_ids=at, output_hidden_states=True)
    run.variables |= {"output": output, "values": values}
    logits = output.logits[:, start:-1]
    logits /= 0.7 + 1e-7
    each = torch.masked_fill(picked_log_probabilities(logits, t["tokens"]), outside(), 1.0)
    found = torch.masked_fill(values[:, start:-1].squeeze(-1), outside(), 0)
    near = torch.clamp(found, expected - 0.2, expected + 0.2)
    far, less = torch.square(found - returns), torch.square(near - returns)
    of_values = 0.5 * mean_of(torch.max(far, less), ~outside())
    clipped_values = mean_of((less > far).float(), ~outside())
    apart = each - drawn_by
    ratio = torch.exp(apart)
    plain = -t["advantages"] * ratio
    clipped = -t["advantages"] * torch.clamp(ratio, 0.8, 1.2)
    of_policy = mean_of(torch.max(plain, clipped), ~outside())
    made = of_policy + 0.1 * of_values

    @torch.no_grad()
    def after() -> None:
        share = mean_of((clipped > plain).float(), ~outside())
        likely = F.softmax(logits, dim=-1)
        entropy = torch.logsumexp(logits, dim=-1) - torch.sum(likely * logits, dim=-1)
        run.variables["likely"] = likely
        distance = 0.5 * (apart**2).mean()
        for value in (distance, share, of_policy, of_values, clipped_values):
            run.statistics[0, 0, 0] = value
        run.statistics[0, 0, 0] = entropy.mean()
        run.statistics[0, 0, 0] = ratio.mean()
        if run.setup.grad_accum == 1:
            run.variables.clear()

    run.after = after
    return made


OWN_LOSSES: dict[str, Loss] = {"asft": asft, "ebft": ebft, "ppo": ppo}
