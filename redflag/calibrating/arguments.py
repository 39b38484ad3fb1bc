"""The options of `redflag calibrate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from redflag.bounds import option
from redflag.calibrating.guarantee import Guarantee
from redflag.data.options import RowOptions
from redflag.scoring.options import ScoringOptions
from redflag.watching.options import MemoryOptions, MonitorOptions


@dataclass(kw_only=True)
class CalibrateArguments(RowOptions, ScoringOptions, MonitorOptions, MemoryOptions):
    """Thresholds for a target false-alarm rate per response, written to <model>/thresholds.json.

    With `memory`: for responses whose scores the earlier answers of their conversations raise.
    With `prompts`: per prompt, to <model>/prompt_thresholds.json, for `--judge-prompt`.
    """

    input: str = field(
        metadata={"help": "Conversations, or a recording of this model (.parquet). Harmful rows only measure the rate."}
    )
    prompts: bool = option(False, "Thresholds of prompts, measured before the answer; category is the prompt's.")
    target_fpr: float = option(0.01, "Share of harmless responses that may alarm.")
    guarantee: Guarantee = option("expected", "expected: on average; high_probability: with probability 1 - delta.")
    delta: float = option(0.05, "Probability that high_probability may fail.")
    joint: bool = option(True, "Whether the rate is that of an alarm in any category.")
    held_out: float = option(0.3, "Share of harmless rows that only measure the realised rate.")
    hold_back_share: float = option(
        0.95, "Share of detected harmful responses whose harm the suggested hold-back hides."
    )
    seed: int = option(0, "Seeds the choice of held-out rows.")
