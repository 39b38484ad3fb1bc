"""Initial values of the flags' output rows: low on ordinary text, but not too low for a gradient.

A flag's gradient is proportional to its probability. Rows initialised to a mean of others (`redflag.flags.attach`) give
a p(flag) near 1e-6 in a vocabulary of 49,152, and the first 80 steps only raise it. The rows are fitted instead, by
ridge regression on last hidden states h of harmless training rows, to give log-odds of any of K flags near -4:

    w . h  =  logsumexp(language logits at h) - 4 - log K
"""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from redflag.flags import FlagSpec
from redflag.training.adapter import output_head
from redflag.training.encode import PlacementConfig
from redflag.training.hidden_states import last_hidden
from redflag.training.loss import Head
from redflag.weights.precision import widest

STARTS = ("fitted", "mean")
LOG_ODDS = -4.0
# Enough positions to fit some thousand numbers; a model of some billion parameters reads them in a minute on a CPU.
_POSITIONS, _PER_ROW, _PROMPT, _BATCH = 4096, 64, 64, 8
_RIDGE = 1e-3  # Ridge penalty on the change of a row, as a multiple of the states' mean square.


@torch.no_grad()
def fit_flag_rows(model: Any, spec: FlagSpec, examples: Dataset) -> None:
    """Sets the rows of all flags in the output head (which is also the embedding if the two are tied).

    It is deterministic. Without harmless rows, or if the fit fails, the rows are left unchanged.

    Args:
        model: With its flags attached, not yet wrapped by PEFT.
    """
    head = output_head(model, spec)
    ids = torch.tensor(spec.ids, device=head.weight.device)
    states_NH = _ordinary_states(model, examples)
    if not len(states_NH):
        return
    # The wanted logit of a flag at each position, and the current row's distance from it. One row is fitted, and all
    # flags get it.
    target_N = LOG_ODDS - math.log(len(ids)) + _language(states_NH, head, ids)
    wide = widest(states_NH.device)
    start_H = head.weight[ids[0]].to(wide)
    bias = 0.0 if head.bias is None else float(head.bias[ids[0]])
    states = states_NH.to(wide)
    rest_N = _before_head(target_N.to(wide), head) - bias - states @ start_H
    # Ridge regression in closed form, for the change of the row.
    square_HH = states.T @ states
    square_HH.diagonal().add_(_RIDGE * square_HH.diagonal().mean())
    row_H = start_H + torch.linalg.solve(square_HH, states.T @ rest_N)
    if row_H.isfinite().all():
        head.weight[ids] = row_H.to(head.weight)
        if head.bias is not None:
            head.bias[ids] = bias


def may_fit(model: Any, placement: PlacementConfig) -> bool:
    """Whether the rows may be fitted: not if they are input rows too and a flag stands in the text."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is None or head.weight is embedding.weight
    return not (tied and (placement.placement in ("open", "insert", "until") or placement.in_context > 0))


def _ordinary_states(model: Any, examples: Dataset) -> torch.Tensor:
    """Last hidden states (N, H) that judge the first tokens of harmless responses, spread over the rows."""
    harmless = [i for i, kind in enumerate(examples["flag_class"]) if kind == 0]
    step = max(1, len(harmless) * _PER_ROW // _POSITIONS)
    sample = [examples[i] for i in harmless[::step]]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    collected: list[torch.Tensor] = []
    for first in range(0, len(sample), _BATCH):
        batch = sample[first : first + _BATCH]
        starts = [min(e["response_start"], _PROMPT) for e in batch]  # of the response, after the prompt's last tokens
        texts = [
            torch.tensor(e["input_ids"][e["response_start"] - start : e["response_start"] + _PER_ROW], device=device)
            for e, start in zip(batch, starts, strict=True)
        ]
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        hidden = last_hidden(model, pad_sequence(texts, batch_first=True), mask)
        # The state before a token judges it.
        collected += [hidden[i, max(0, start - 1) : len(texts[i]) - 1] for i, start in enumerate(starts)]
    model.train(training)
    states = torch.cat(collected) if collected else torch.zeros(0, 0)
    return states[states.isfinite().all(-1)]


def _language(states_NH: torch.Tensor, head: Head, flag_ids: torch.Tensor) -> torch.Tensor:
    """Logsumexp of the language's logits (N)."""
    parts = []
    for chunk in states_NH.split(head.positions_at_once):
        logits = head.logits(chunk, flag_ids)
        logits[:, flag_ids] = -torch.inf
        parts.append(logits.logsumexp(-1))
    return torch.cat(parts)


def _before_head(logits: torch.Tensor, head: Head) -> torch.Tensor:
    """Inverts cap and scale: the `weight . h + bias` that gives these logits."""
    if head.cap is not None:
        logits = head.cap * torch.atanh((logits / head.cap).clamp(-0.99, 0.99))
    return logits / head.scale
