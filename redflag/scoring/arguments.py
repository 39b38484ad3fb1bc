"""The options of `redflag score`."""

from __future__ import annotations

from dataclasses import dataclass, field

from redflag.bounds import option
from redflag.data.options import RowOptions
from redflag.scoring.options import ScoringOptions


@dataclass(kw_only=True)
class ScoreArguments(RowOptions, ScoringOptions):
    """Flag probabilities of given conversations, one JSON row per input row."""

    input: str = field(metadata={"help": "Conversations: JSONL, JSON, CSV, Parquet, a folder, or a hub data set."})
    output: str = field(metadata={"help": "JSONL to write; an interrupted run is continued from <output>.parts."})
    prompts: bool = option(False, "Measure only before the answer; rows need no response, an existing one is ignored.")
    marker: list[str] = option([], "... the probability that the answer begins with this text, not flags; any model.")
    upper_bound: bool = option(False, "upstream: upper bounds from the 20 most likely tokens: fast, for old servers.")
