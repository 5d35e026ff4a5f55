"""Losses of LLaMA-Factory's and Axolotl's own trainers in plain torch (see `reference_objectives`)."""

import torch
import torch.nn.functional as F
from reference_objectives import BETA, Loss, Run


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


OWN_LOSSES: dict[str, Loss] = {"asft": asft, "ebft": ebft}
