"""Baselines that take the place of the model: trained from the base, a probability of their own softmax is the score.

`fixed_position` is the flag trained and judged before the first response token alone (baseline of arXiv 2502.16366);
`redflag.lab.baselines.refusing` has those that learn to refuse.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from redflag.data.rows import Row, write_rows
from redflag.errors import RedflagError
from redflag.files import keep_json, kept_json
from redflag.flags import Flag, FlagSpec
from redflag.lab.baselines import Cost
from redflag.lab.baselines.shared import (
    BaselineContext,
    Timing,
    digest,
    require_one_process,
    score_pairs,
    thinned,
    trained_on,
)
from redflag.scoring.recording import Recording
from redflag.weights.stamp import model_stamp

# As the demo trains its flags.
SETTINGS: dict[str, Any] = {
    "learning_rate": 5e-3,
    "keep_coef": 4.0,
    "per_device_train_batch_size": 8,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 50,
}


@dataclass(kw_only=True)
class Trained:
    """A model that `redflag train` trains for this baseline, and the summed probability of some tokens before each."""

    name: str
    what: str
    context: BaselineContext
    model: Path  # folder of the trained model, which attacks can be run against
    settings: Mapping[str, Any]  # options of `redflag train`
    most_rows: int | None = None  # maximum number of training rows
    rows_of: Callable[[Sequence[Row]], list[Row]] = list  # the rows to train on, from those of the flag
    watched: tuple[int, ...] = ()  # ids whose summed probability is the score; empty = those of the model's flags
    at_first: bool = False  # whether only the first position is read, for the whole response
    _timing: Timing = field(default_factory=Timing)

    def fit(self, train: Sequence[Row]) -> None:
        """Trains, or takes the model that an earlier run trained."""
        rows = self.rows_of(thinned(train, self.most_rows, self.context.seed))
        stamp = [self.settings, self.context.seed, self.context.limit, model_stamp(self.context.base)]
        key = digest([stamp, [row.to_dict() for row in rows]])
        done = self.model / "trained.json"
        if not kept_json(done, fingerprint=key):
            require_one_process(self.name)
            shutil.rmtree(self.model, ignore_errors=True)
            self._train(rows)
            keep_json(done, {"fingerprint": key})

    def score(self, rows: Sequence[Row]) -> Recording:
        backend, reads = self._backend(), self.context.read(rows)
        # If only the first position is read, no token of the response needs to be run.
        pairs = [(read.prompt_ids, read.judged_ids[:1] if self.at_first else read.judged_ids) for read in reads]
        with self._timing.measuring(sum(len(read.judged_ids) for read in reads)):
            probs = score_pairs(backend, pairs, self.context.batch_size, f"scoring {self.name}")
        totals = [np.minimum(one.sum(axis=1), 1.0).astype(np.float32) for one in probs]
        if self.at_first:
            totals = [np.repeat(one, len(read.judged_ids)) for one, read in zip(totals, reads, strict=True)]
        else:
            # At step 0 such a model refuses the request, to which a harmless answer looks no different yet.
            for one in totals:
                one[:1] = 0.0
        return self.context.record(reads, totals, self.name)

    def cost(self) -> Cost:
        what, over = ("once per response", "over the prompts, ") if self.at_first else ("at every step", "")
        note = (
            f"takes the place of the model: one probability of its own softmax is read {what}, nothing comes on top; "
            f"the time is that of its own forward pass {over}batched, spread over the response's tokens"
        )
        return Cost(self._timing.microseconds_per_token, 0.0, note)

    def _train(self, rows: Sequence[Row]) -> None:
        from redflag.training.train import train as train_flag

        path = write_rows(self.model / "rows.jsonl", rows)
        # Categories are many and the flag is one: it stands for all of them.
        options: dict[str, Any] = {
            "categories": ["harm"],
            "eval_share": 0.0,
            "seed": self.context.seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": self.context.device == "cpu",
            **({"max_length": self.context.limit} if self.context.limit else {}),
            **self.settings,
        }
        try:
            with redirect_stdout(sys.stderr):  # where training reports its progress
                train_flag(self.context.base, rows=path, output_dir=self.model, **options)
        except (TypeError, ValueError) as error:
            raise RedflagError(
                f"the baseline {self.name!r} must be trained with options of `redflag train` (got "
                f"{dict(self.settings)}: {error}). Give other settings."
            ) from error
        path.unlink()

    def _backend(self) -> Any:
        from redflag.backends.hf import HFBackend
        from redflag.backends.load import load_flagged, read_model

        if not self.watched:
            return load_flagged(self.model, self.context.device)[0]
        spec = FlagSpec(tuple(Flag(f"refusal {i}", id=token) for i, token in enumerate(self.watched)))
        model = read_model(self.model, "auto")[0].to(self.context.device)
        return HFBackend(model, self.context.tokenizer, spec, reuse_prefix=False)


def fixed_position(
    context: BaselineContext,
    model: Path,
    *,
    most_rows: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Trained:
    """A flag trained with `--placement first`; its probability at position 0 holds for the whole response.

    `settings` are options of `redflag train`, in place of `SETTINGS`.
    """
    return Trained(
        name="fixed position",
        what="Fixed-position flag: trained and read before the first response token alone, where it decides for the "
        f"whole response; {trained_on(most_rows)}",
        context=context,
        model=model,
        settings={"placement": "first", **(SETTINGS if settings is None else settings)},
        most_rows=most_rows,
        at_first=True,
    )
