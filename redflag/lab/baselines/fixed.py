"""The fixed-position flag: trained and judged before the first response token alone (baseline of arXiv 2502.16366)."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from redflag.data.rows import Row, write_rows
from redflag.errors import RedflagError
from redflag.files import keep_json, kept_json
from redflag.lab.baselines import Cost
from redflag.lab.baselines.bench import Bench, digest, model_stamp, score_pairs, thinned
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


class FixedPosition:
    """A flag trained with `--placement first`; its probability at position 0 holds for the whole response.

    Attributes:
        model: Folder of the flagged model.
    """

    def __init__(
        self, bench: Bench, model: Path, *, most_rows: int | None = None, settings: dict[str, Any] | None = None
    ) -> None:
        """Sets it up.

        Args:
            model: Folder to train into.
            most_rows: Most training rows; None: all.
            settings: Options of `redflag train` -> value, in place of `SETTINGS`.
        """
        self.name = "fixed position"
        rows = "the same rows as the flag" if most_rows is None else f"at most {most_rows} of the flag's rows"
        self.what = (
            "Fixed-position flag: trained and read before the first response token alone, where it decides for the "
            f"whole response; trained on {rows}."
        )
        self.model = model
        self._bench, self._most_rows = bench, most_rows
        self._settings = SETTINGS if settings is None else settings
        self._seconds, self._steps = 0.0, 0

    def fit(self, train: Sequence[Row]) -> None:
        """Trains, or takes what an earlier run trained; see `Baseline.fit`."""
        from redflag.training.train import train as train_flag

        rows = thinned(train, self._most_rows, self._bench.seed)
        stamp = [self._settings, self._bench.seed, self._bench.limit, model_stamp(self._bench.base)]
        key = digest([stamp, [row.to_dict() for row in rows]])
        done = self.model / "trained.json"
        if kept_json(done, fingerprint=key):
            return
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
            "seed": self._bench.seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": self._bench.device == "cpu",
            **({"max_length": self._bench.limit} if self._bench.limit else {}),
            **self._settings,
        }
        try:
            with redirect_stdout(sys.stderr):  # where training says how it goes
                train_flag(self._bench.base, rows=path, output_dir=self.model, **options)
        except (TypeError, ValueError) as error:
            raise RedflagError(
                f"the fixed-position flag must be trained with options of `redflag train` (got {self._settings}: "
                f"{error}). Give other settings."
            ) from error
        path.unlink()
        keep_json(done, {"fingerprint": key})

    def score(self, rows: Sequence[Row]) -> Recording:
        """Scores; see `Baseline.score`."""
        from redflag.backends.load import load_flagged

        backend, _, _ = load_flagged(self.model, self._bench.device)
        reads = self._bench.read(rows)
        pairs = [(read.prompt_ids, read.judged_ids[:1]) for read in reads]
        begun = time.perf_counter()
        first = score_pairs(backend, pairs, self._bench.batch_size, f"scoring {self.name}")
        self._seconds += time.perf_counter() - begun
        self._steps += sum(len(read.judged_ids) for read in reads)
        probs = [np.repeat(one[0, 0], len(read.judged_ids)) for one, read in zip(first, reads, strict=True)]
        return self._bench.record(reads, probs, self.name)

    def cost(self) -> Cost:
        """Cost; see `Baseline.cost`."""
        return Cost(
            microseconds_per_token=1e6 * self._seconds / self._steps if self._steps else None,
            flops_per_token=0.0,
            note="takes the place of the model: one probability of its own softmax, read once per response; the time "
            "is that of the pass over the prompts, batched, spread over the response's tokens",
        )
