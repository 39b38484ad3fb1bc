"""The output classifier of constitutional classifiers whole: a model of its own with a token head (arXiv 2501.18837).

The head alone, on a model that stays as it is, is `redflag.lab.baselines.probes.token_head`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redflag.data.rows import Row
from redflag.lab.baselines import Cost
from redflag.lab.baselines.probe_losses import token_bce, towards_maximum
from redflag.lab.baselines.shared import (
    BaselineContext,
    Floats,
    Timing,
    multiplied_weights,
    require_one_process,
    thinned,
    trained_on,
)
from redflag.lab.baselines.tuning import IGNORE, Tuning, fine_tune, hidden_of, language_loss, padded
from redflag.progress import track
from redflag.scoring.recording import Recording


class TokenClassifier:
    """The base model fine-tuned together with a token head: language loss and cross-entropy at every step."""

    def __init__(
        self,
        context: BaselineContext,
        *,
        language: float = 0.5,
        most_rows: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """`language` is the weight of the next-token loss on the responses, a regulariser."""
        self.name = "token head"
        self.what = (
            "Token classifier: a copy of the reference model fine-tuned with a linear token head, next-token loss "
            f"({language:g}) and cross-entropy with the response's label, from each step's logit to the cumulative "
            f"maximum in the course of training; {trained_on(most_rows)}"
        )
        self._context, self._language, self._most_rows = context, language, most_rows
        self._tuning = tuning or Tuning()
        self._model: Any = None
        self._head: Any = None
        self._timing = Timing()

    def fit(self, train: Sequence[Row]) -> None:
        from redflag.backends.load import read_model

        require_one_process(self.name)
        model, _ = read_model(self._context.base, "auto")
        reads = self._context.read(thinned(train, self._most_rows, self._context.seed))
        share = min(max(sum(read.row.harmful for read in reads) / len(reads), 1e-6), 1 - 1e-6)
        head = torch.nn.Linear(self._context.config.hidden_size, 1).to(self._context.device)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        examples = [
            {
                "input_ids": read.prompt_ids + read.judged_ids,
                "labels": [IGNORE] * len(read.prompt_ids) + read.judged_ids,
                "start": len(read.prompt_ids) - 1,  # `steps` logits are read from this position on
                "steps": len(read.judged_ids),
                "harmful": read.row.harmful,
            }
            for read in reads
        ]

        def loss(model: Any, batch: Mapping[str, Tensor], done: float) -> Tensor:
            hidden = hidden_of(model, batch)
            starts, counts, labels = (batch[name][:, None] for name in ("start", "steps", "harmful"))
            steps = torch.arange(int(counts.max()), device=hidden.device)
            mask = steps < counts
            logits = head(hidden)[..., 0].gather(1, (starts + steps).clamp_max(hidden.shape[1] - 1))
            truth = labels.expand_as(mask).float()
            weights = torch.where(truth > 0, 0.5 / share, 0.5 / (1 - share))
            # Padding is behind the last step, where it cannot become a maximum that counts.
            judged = token_bce(towards_maximum(logits.float(), done), truth, mask, weights)
            return judged + self._language * language_loss(model, hidden, batch)

        self._model = fine_tune(
            model.to(self._context.device),
            examples,
            self._tuning,
            seed=self._context.seed,
            loss=loss,
            head=head,
        )
        self._head = head

    @torch.inference_mode()
    def score(self, rows: Sequence[Row]) -> Recording:
        assert self._model is not None, "fit comes before score"
        reads = self._context.read(rows)
        probs: list[Floats] = [np.zeros(0, np.float32)] * len(reads)
        order = sorted(range(len(reads)), key=lambda i: len(reads[i].prompt_ids) + len(reads[i].judged_ids))
        starts = range(0, len(order), self._context.batch_size)
        with self._timing.measuring(sum(len(read.judged_ids) for read in reads)):
            for first in track(starts, f"scoring {self.name}", len(starts), "batches"):
                picks = order[first : first + self._context.batch_size]
                batch = padded([{"input_ids": (reads[i].prompt_ids + reads[i].judged_ids)[:-1]} for i in picks])
                hidden = hidden_of(self._model, {"input_ids": batch["input_ids"].to(self._model.device)})
                scores = torch.sigmoid(self._head(hidden)[..., 0].float()).cpu().numpy()
                for i, one in zip(picks, scores, strict=True):
                    start = len(reads[i].prompt_ids) - 1
                    probs[i] = one[start : start + len(reads[i].judged_ids)]
        return self._context.record(reads, probs, self.name)

    def cost(self) -> Cost:
        assert self._model is not None, "fit comes before cost"
        return self._context.cost(
            self._timing,
            2.0 * (multiplied_weights(self._model) + self._context.config.hidden_size),
            "on top of the model's forward pass: a second model, batched; the time holds the prompts'",
        )
