"""The options of `redflag calibrate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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
        metadata={
            "help": "Conversations, as `redflag score` reads; or a recording of this model (.parquet), which is not "
            "measured again. Harmful rows only measure what is caught."
        }
    )
    prompts: bool = field(
        default=False,
        metadata={"help": "Thresholds of prompts, measured before the answer; rows need none. category: the prompt's."},
    )
    target_fpr: float = field(default=0.01, metadata={"help": "Share of harmless responses that may alarm."})
    guarantee: Literal["expected", "high_probability"] = field(
        default="expected",
        metadata={
            "help": "expected: the rate holds on average; high_probability: it holds with probability 1 - delta."
        },
    )
    delta: float = field(default=0.05, metadata={"help": "Probability that high_probability may fail."})
    joint: bool = field(default=True, metadata={"help": "Whether the rate is that of an alarm in any category."})
    held_out: float = field(
        default=0.3, metadata={"help": "Share of harmless rows that only measure the realised rate."}
    )
    hold_back_share: float = field(
        default=0.95,
        metadata={"help": "Share of detected harmful responses that the suggested hold-back keeps wholly back."},
    )
    seed: int = field(default=0, metadata={"help": "Seeds the choice of held-out rows."})
