"""Fine-tuning as an attack: a user trains the model on harm, as fine-tuning services allow.

Two defences are measured. The guard stays on, with the thresholds of the original model; and the operator restores the
flag: the flag's adapter on the fine-tuned base, or, for merged weights, fine-tuned base + (flagged - base), as with
task vectors (Ilharco et al., arXiv 2212.04089). Copies are trained; the given model is unchanged.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from redflag.backends import Sampling
from redflag.backends.head import plain_model
from redflag.backends.hf import HFBackend
from redflag.backends.load import read_model
from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.lab.attacks import Attempt, Target, request_of
from redflag.lab.attacks.stepping import room_for, weights_of
from redflag.progress import Progress
from redflag.prompt import render_response


@dataclass
class FineTune:
    """Plain supervised fine-tuning on harmful answers, then plain requests.

    Settings: `fine-tuned` is the flagged model trained on; `flag re-attached` the fine-tuned base with the flag put
    back.
    """

    rows: Sequence[Row] | None = None  # harmful rows to train on; None = the attacked rows, which helps the attacker
    # the model before it had flags, for merged weights; None = the one named by `train.json` beside the weights.
    # Without one nothing is re-attached
    base: str | Path | None = None
    train_rows: int = 200
    epochs: int = 2
    learning_rate: float = 3e-4
    batch: int = 16
    max_new_tokens: int = 64
    name: str = "fine-tuning"
    adaptive: bool = False

    def run(self, target: Target, rows: Sequence[Row], seed: int) -> Iterator[Attempt]:
        model = weights_of(target, self.name)
        harmful = [row for row in (rows if self.rows is None else self.rows) if row.harmful]
        random.Random(seed).shuffle(harmful)
        pairs = []
        for row in harmful[: self.train_rows]:
            rendered = render_response(target.tokenizer, row.messages, target.spec)
            answer = [*rendered.response_ids, *rendered.tail_ids]
            if room := room_for(target, rendered.prompt_ids, len(answer)):
                pairs.append((rendered.prompt_ids, answer[:room]))
        if not pairs:
            raise RedflagError("rows must hold harmful rows to fine-tune on (got none): FineTune(rows=...).")
        trained_on = "the attacked rows" if self.rows is None else "other rows"
        sampling = Sampling(max_new_tokens=self.max_new_tokens, temperature=0.0)
        sent = target.fitting([(str(row.id), request_of(row)) for row in rows])
        for setting, make in (("fine-tuned", self._tuned), ("flag re-attached", self._reattached)):
            attacked = make(model, pairs, seed)
            if attacked is None:
                continue
            tuned, losses = attacked
            backend = HFBackend(tuned, target.tokenizer, target.spec)
            attacked_target = dataclasses.replace(target, model=tuned, backend=backend)
            detail = {"trained_on": trained_on, "rows": len(pairs), "loss": [losses[0], losses[-1]]}
            yield from attacked_target.answers(sent, sampling, setting, **detail)
            del tuned, backend, attacked_target, attacked  # memory for the next copy

    def _tuned(self, model: Any, pairs: Sequence[Pair], seed: int) -> tuple[Any, list[float]]:
        """A copy of the flagged model, trained on harm with its active adapters."""
        tuned = copy.deepcopy(model)
        return tuned, self.train(tuned, plain_model(tuned), pairs, seed)

    def _reattached(self, model: Any, pairs: Sequence[Pair], seed: int) -> tuple[Any, list[float]] | None:
        """A copy whose base was trained on harm without the flag, with the flag put back; None without a base."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        from redflag.training.adapter import adapters_off

        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            tuned = copy.deepcopy(model)
            # In memory an adapter may lie in the base's weights (`redflag.backends.load`), which are to learn alone.
            merged = [module for module in tuned.modules() if isinstance(module, BaseTunerLayer) and module.merged]
            for layer in merged:
                layer.unmerge()
            with adapters_off(tuned):
                losses = self.train(tuned, plain_model(tuned), pairs, seed)
            for layer in merged:
                layer.merge()
            return tuned, losses
        name = self.base or recorded_base(model)
        if name is None:
            return None
        base, _ = read_model(name, plain_model(model).dtype)
        base = base.to(plain_model(model).device)
        before = {key: value.clone() for key, value in base.state_dict().items()}
        losses = self.train(base, base, pairs, seed)
        return add_difference(model, before, base.state_dict()), losses

    def train(self, model: Any, plain: Any, pairs: Sequence[Pair], seed: int) -> list[float]:
        """Trains in place on the answers' tokens.

        Args:
            plain: The model whose parameters are trained, except those of an adapter.

        Returns:
            The mean loss of each epoch, nats per answer token.
        """
        adapter = ("lora_", "trainable_tokens_")
        trained = [p for name, p in plain.named_parameters() if not any(part in name for part in adapter)]
        was = [p.requires_grad for p in trained]
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        rng, losses = random.Random(seed), []
        order = list(pairs)
        starts = range(0, len(order), self.batch)
        with torch.enable_grad(), Progress("fine-tuning on harm", self.epochs * len(starts), "steps") as progress:
            for epoch in range(self.epochs):
                rng.shuffle(order)
                total = 0.0
                for step, begin in enumerate(starts, 1):
                    few = order[begin : begin + self.batch]
                    loss = answer_loss(model, few)
                    optimizer.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                    total += loss.item() * len(few)
                    progress(epoch * len(starts) + step)
                losses.append(total / len(order))
        for parameter, needed in zip(trained, was, strict=True):
            parameter.grad = None
            parameter.requires_grad_(needed)
        model.eval()
        return losses


Pair = tuple[list[int], list[int]]


def answer_loss(model: Any, pairs: Sequence[Pair]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, nats."""
    rows = [[*prompt, *answer] for prompt, answer in pairs]
    width = max(map(len, rows))
    device = plain_model(model).device
    inputs = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    labels = torch.full_like(inputs, -100)
    for i, (prompt, answer) in enumerate(pairs):
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer, device=device)
    # Padding on the right does not affect earlier positions.
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def add_difference(model: Any, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> Any:
    """A copy of a flagged model with what fine-tuning did to its base added: flagged + (after - before).

    Args:
        after: Weights of the fine-tuned base. Rows that only the flagged model has (its flags) stay as they are.

    Raises:
        RedflagError: The weights are not those of this model's base.
    """
    changed = copy.deepcopy(model)
    # Copies: a tied head has two names, and would be changed twice.
    weights = {key: value.clone() for key, value in changed.state_dict().items()}
    for key, value in weights.items():
        old, new = before.get(key), after.get(key)
        if old is None or new is None or old.shape[1:] != value.shape[1:] or len(old) > len(value):
            raise RedflagError(
                f"base must be the model that the flags were trained on (it has no weight {key!r} of that shape): "
                "FineTune(base=...)."
            )
        value[: len(old)] += (new - old).to(value)
    changed.load_state_dict(weights)
    return changed


def recorded_base(model: Any) -> str | None:
    """The model that `train.json` in the flagged model's folder names as its base, if both are there."""
    try:
        record = json.loads((Path(model.name_or_path) / "train.json").read_bytes())
        name = record["arguments"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and Path(name).is_dir() else None
