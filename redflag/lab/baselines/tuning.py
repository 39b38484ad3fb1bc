"""A plain training loop, all weights or LoRA, with cross-entropy on chosen positions by default."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from redflag.backends.head import backbone, head_logits
from redflag.lab.baselines.shared import drawn_batches
from redflag.progress import track

IGNORE = -100
# Models up to this size have all their weights trained by default.
_SMALL = 100_000_000


class Example(NamedTuple):
    """Ids, and for each position its target (predicted from the ids before it), or `IGNORE`.

    A target may differ from the id at its position.
    """

    ids: list[int]
    targets: list[int]


# (model, batch, share of the training done) -> loss
Loss = Callable[[Any, Sequence[Any], float], Tensor]


@dataclass(frozen=True)
class Tuning:
    """How a model is trained."""

    # peak; None: 5e-4 for all weights of a small model, 2e-5 of a large one, 2e-4 for LoRA
    learning_rate: float | None = None
    passes: int = 1  # passes over the rows
    rows: int = 16  # examples per step
    lora_r: int | None = None  # rank; 0 trains all weights; None: all of a model of up to 100 million, else rank 32


def fine_tune(
    model: Any,
    draw: Callable[[int], Sequence[Any]],
    tuning: Tuning,
    *,
    seed: int,
    new_rows: Sequence[int] = (),
    loss: Loss | None = None,
    head: torch.nn.Module | None = None,
) -> Any:
    """Trains a causal language model.

    Args:
        draw: Pass number -> its examples: anything with `ids`, and `targets` unless another loss is given.
        new_rows: Ids of new tokens, whose rows LoRA has to train.
        head: Another module that is trained along.

    Returns:
        The model, adapters merged, in evaluation mode.
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    rank = (0 if size <= _SMALL else 32) if tuning.lora_r is None else tuning.lora_r
    rate = tuning.learning_rate or (2e-4 if rank else 5e-4 if size <= _SMALL else 2e-5)
    torch.manual_seed(seed)
    trained = _with_lora(model, rank, new_rows) if rank else model
    trained.train()
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    parameters += [] if head is None else list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    steps, done = 0, 0
    for number in range(tuning.passes):
        examples = draw(number)
        drawn = drawn_batches([len(one.ids) for one in examples], tuning.rows, generator)
        batches = [[examples[i] for i in picks] for picks in drawn]
        steps = steps or tuning.passes * len(batches)
        for batch in track(batches, f"fine-tuning, pass {number + 1} of {tuning.passes}", len(batches), "steps"):
            share = min(done / steps, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, 20 * (share + 1 / steps)) * (0.5 + 0.5 * math.cos(math.pi * share))
            optimizer.zero_grad()
            (loss_of(trained, batch) if loss is None else loss(trained, batch, share)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            done += 1
    if rank:
        trained = trained.merge_and_unload()
    return trained.eval()


def loss_of(model: Any, batch: Sequence[Example]) -> Tensor:
    """Mean cross-entropy over all targets of a batch."""
    return language_loss(model, hidden_of(model, [example.ids for example in batch]), batch)


def hidden_of(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Last hidden states of a batch, B x T x H.

    No position sees what comes after it, so the padding on the right needs no mask.
    """
    return backbone(model)(input_ids=_padded(model, rows, 0), use_cache=False).last_hidden_state


def language_loss(model: Any, hidden_BTH: Tensor, batch: Sequence[Any]) -> Tensor:
    """As `loss_of`, from hidden states."""
    targets = _padded(model, [example.targets for example in batch], IGNORE)[:, 1:]
    counted = targets != IGNORE
    return cross_entropy(head_logits(model, hidden_BTH[:, :-1][counted]).float(), targets[counted])


def _padded(model: Any, rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    device = next(model.parameters()).device
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


def _with_lora(model: Any, rank: int, new_rows: Sequence[int]) -> Any:
    from peft import LoraConfig, get_peft_model

    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {names[id(embedding)].rpartition(".")[2]: list(new_rows)}
    if head.weight is not embedding.weight:
        rows[names[id(head)].rpartition(".")[2]] = list(new_rows)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        trainable_token_indices=rows if new_rows else None,
    )
    return get_peft_model(model, config)
