"""The output classifier of constitutional classifiers whole: a model of its own with a token head (arXiv 2501.18837).

The head alone, on a model that stays as it is, is `redflag.lab.baselines.probes.token_head`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from redflag.data.rows import Row
from redflag.lab.baselines import Cost
from redflag.lab.baselines.bench import Bench, Floats, thinned
from redflag.lab.baselines.probe_losses import token_bce, towards_maximum
from redflag.lab.baselines.tuning import IGNORE, Tuning, fine_tune, hidden_of, language_loss
from redflag.progress import track
from redflag.scoring.recording import Recording


class _Judged(NamedTuple):
    """An example with its label: `steps` logits are read from position `start` on."""

    ids: list[int]
    targets: list[int]
    start: int
    steps: int
    harmful: bool


class TokenClassifier:
    """The base model fine-tuned together with a token head: language loss and cross-entropy at every step."""

    def __init__(
        self,
        bench: Bench,
        *,
        language: float = 0.5,
        most_rows: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """Sets it up.

        Args:
            language: Weight of the next-token loss on the responses, a regulariser.
            most_rows: Most training rows; None: all.
            tuning: How it is trained; `lora_r` as there.
        """
        self.name = "token head"
        rows = "the same rows as the flag" if most_rows is None else f"at most {most_rows} of the flag's rows"
        self.what = (
            "Token classifier: a copy of the reference model fine-tuned with a linear token head, next-token loss "
            f"({language:g}) and cross-entropy with the response's label, from each step's logit to the cumulative "
            f"maximum in the course of training; trained on {rows}."
        )
        self._bench, self._language, self._most_rows = bench, language, most_rows
        self._tuning = tuning or Tuning()
        self._model: Any = None
        self._head: Any = None
        self._seconds, self._steps = 0.0, 0

    def fit(self, train: Sequence[Row]) -> None:
        """Trains; see `Baseline.fit`."""
        from redflag.backends.load import read_model

        model, _ = read_model(self._bench.base, "auto")
        reads = self._bench.read(thinned(train, self._most_rows, self._bench.seed))
        share = min(max(sum(read.row.harmful for read in reads) / len(reads), 1e-6), 1 - 1e-6)
        head = torch.nn.Linear(self._bench.config.hidden_size, 1).to(self._bench.device)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        examples = [
            _Judged(
                read.prompt_ids + read.judged_ids,
                [IGNORE] * len(read.prompt_ids) + read.judged_ids,
                len(read.prompt_ids) - 1,
                len(read.judged_ids),
                read.row.harmful,
            )
            for read in reads
        ]

        def loss(model: Any, batch: Sequence[_Judged], done: float) -> Tensor:
            hidden = hidden_of(model, [one.ids for one in batch])
            starts, counts, labels = (
                torch.tensor([one[i] for one in batch], device=hidden.device)[:, None] for i in (2, 3, 4)
            )
            steps = torch.arange(int(counts.max()), device=hidden.device)
            mask = steps < counts
            logits = head(hidden)[..., 0].gather(1, (starts + steps).clamp_max(hidden.shape[1] - 1))
            truth = labels.expand_as(mask).float()
            weights = torch.where(truth > 0, 0.5 / share, 0.5 / (1 - share))
            # Padding is behind the last step, where it cannot become a maximum that counts.
            judged = token_bce(towards_maximum(logits.float(), done), truth, mask, weights)
            return judged + self._language * language_loss(model, hidden, batch)

        self._model = fine_tune(
            model.to(self._bench.device),
            lambda number: examples,
            self._tuning,
            seed=self._bench.seed,
            loss=loss,
            head=head,
        )
        self._head = head

    @torch.inference_mode()
    def score(self, rows: Sequence[Row]) -> Recording:
        """Scores; see `Baseline.score`."""
        assert self._model is not None, "fit comes before score"
        reads = self._bench.read(rows)
        probs: list[Floats] = [np.zeros(0, np.float32)] * len(reads)
        order = sorted(range(len(reads)), key=lambda i: len(reads[i].prompt_ids) + len(reads[i].judged_ids))
        begun = time.perf_counter()
        starts = range(0, len(order), self._bench.batch_size)
        for first in track(starts, f"scoring {self.name}", len(starts), "batches"):
            picks = order[first : first + self._bench.batch_size]
            hidden = hidden_of(self._model, [(reads[i].prompt_ids + reads[i].judged_ids)[:-1] for i in picks])
            scores = torch.sigmoid(self._head(hidden)[..., 0].float()).cpu().numpy()
            for i, one in zip(picks, scores, strict=True):
                start = len(reads[i].prompt_ids) - 1
                probs[i] = one[start : start + len(reads[i].judged_ids)]
        self._seconds += time.perf_counter() - begun
        self._steps += sum(map(len, probs))
        return self._bench.record(reads, probs, self.name)

    def cost(self) -> Cost:
        """Cost; see `Baseline.cost`."""
        assert self._model is not None, "fit comes before cost"
        weights = sum(p.numel() for name, p in self._model.named_parameters() if "embed" not in name)
        flops = 2.0 * (weights + self._bench.config.hidden_size)
        return Cost(
            microseconds_per_token=1e6 * self._seconds / self._steps if self._steps else None,
            flops_per_token=flops,
            note="on top of the model's forward pass: a second model, batched; the time holds the prompts'"
            + self._bench.beside_forward(flops),
        )
