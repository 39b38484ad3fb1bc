"""Baselines that take the place of the model: a probability of its own softmax is the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from redflag.data.rows import Row
from redflag.lab.baselines import Cost
from redflag.lab.baselines.shared import BaselineContext, Timing, score_pairs
from redflag.scoring.recording import Recording


@dataclass(kw_only=True)
class OwnSoftmax:
    """A trained model, and the summed probability of its flags before each token."""

    name: str
    what: str
    context: BaselineContext
    at_first: bool = False  # whether only the first position is read, for the whole response
    # steps before this one are recorded as 0: what is refused there is the request, not the response
    first_step: int = 0
    note: ClassVar[str]
    _backend: Any = None
    _timing: Timing = field(default_factory=Timing)

    def score(self, rows: Sequence[Row]) -> Recording:
        assert self._backend is not None, "fit comes before score"
        reads = self.context.read(rows)
        # If only the first position is read, no token of the response needs to be run.
        pairs = [(read.prompt_ids, read.judged_ids[:1] if self.at_first else read.judged_ids) for read in reads]
        with self._timing.measuring(sum(len(read.judged_ids) for read in reads)):
            probs = score_pairs(self._backend, pairs, self.context.batch_size, f"scoring {self.name}")
        totals = [np.minimum(one.sum(axis=1), 1.0).astype(np.float32) for one in probs]
        if self.at_first:
            totals = [np.repeat(one, len(read.judged_ids)) for one, read in zip(totals, reads, strict=True)]
        for one in totals:
            one[: self.first_step] = 0.0
        return self.context.record(reads, totals, self.name)

    def cost(self) -> Cost:
        when = "once per response" if self.at_first else "at every step"
        return Cost(self._timing.microseconds_per_token, 0.0, self.note.format(when=when))
