"""The fixed-position flag: trained and judged before the first response token alone (baseline of arXiv 2502.16366)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from redflag.data.rows import Row, write_rows
from redflag.errors import RedflagError
from redflag.files import keep_json, kept_json
from redflag.lab.baselines.own_softmax import OwnSoftmax
from redflag.lab.baselines.shared import BaselineContext, digest, model_stamp, thinned
from redflag.scoring.processes import World
from redflag.scoring.recording import Recording

# As the demo trains its flags; a folder's own settings go into `options`.
SETTINGS: dict[str, Any] = {
    "learning_rate": 5e-3,
    "keep_coef": 4.0,
    "per_device_train_batch_size": 8,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 50,
}


class FixedPosition(OwnSoftmax):
    """A flag trained with `--placement first`; its probability at position 0 holds for the whole response."""

    note = (
        "takes the place of the model: one probability of its own softmax, read {when}; the time is that of the pass "
        "over the prompts, batched, spread over the response's tokens"
    )

    def __init__(
        self,
        context: BaselineContext,
        model: Path,
        *,
        most_rows: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """`settings` are options of `redflag train`, in place of `SETTINGS`."""
        rows = "the same rows as the flag" if most_rows is None else f"at most {most_rows} of the flag's rows"
        what = (
            "Fixed-position flag: trained and read before the first response token alone, where it decides for the "
            f"whole response; trained on {rows}."
        )
        super().__init__(name="fixed position", what=what, context=context, at_first=True)
        self.model = model
        self._most_rows = most_rows
        self._settings = SETTINGS if settings is None else settings

    def fit(self, train: Sequence[Row]) -> None:
        """Trains, or takes the model that an earlier run trained."""
        rows = thinned(train, self._most_rows, self.context.seed)
        stamp = [self._settings, self.context.seed, self.context.limit, model_stamp(self.context.base)]
        key = digest([stamp, [row.to_dict() for row in rows]])
        done = self.model / "trained.json"
        if not kept_json(done, fingerprint=key):
            self._train(rows)
            keep_json(done, {"fingerprint": key})

    def score(self, rows: Sequence[Row]) -> Recording:
        from redflag.backends.load import load_flagged

        self._backend, _, _ = load_flagged(self.model, self.context.device)
        return super().score(rows)

    def _train(self, rows: Sequence[Row]) -> None:
        from redflag.training.train import train as train_flag

        if (size := World.here().size) > 1:
            raise RedflagError(
                f"the fixed-position flag must be trained by one process (got {size}). The others have left when rows "
                "are scored. Give the same command again without `accelerate launch`: it goes on from there."
            )
        shutil.rmtree(self.model, ignore_errors=True)
        path = write_rows(self.model / "rows.jsonl", rows)
        # Categories are many and the flag is one: it stands for all of them.
        options: dict[str, Any] = {
            "placement": "first",
            "categories": ["harm"],
            "eval_share": 0.0,
            "seed": self.context.seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": self.context.device == "cpu",
            **({"max_length": self.context.limit} if self.context.limit else {}),
            **self._settings,
        }
        try:
            with redirect_stdout(sys.stderr):  # where training reports its progress
                train_flag(self.context.base, rows=path, output_dir=self.model, **options)
        except (TypeError, ValueError) as error:
            raise RedflagError(
                f"the fixed-position flag must be trained with options of `redflag train` (got {self._settings}: "
                f"{error}). Give other settings."
            ) from error
        path.unlink()
