"""redflag: catch harm while a language model's answer is being written.

`import redflag` is instant: each public name loads its module, and torch or trl with it, when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redflag.calibrating.calibrate import calibrate
    from redflag.flags import FlagSpec
    from redflag.guard.guard import Guard
    from redflag.lab.evaluating.arguments import EvaluateArguments
    from redflag.lab.evaluating.evaluate import evaluate
    from redflag.trace import Halt, Step, Text, Thought, Trace
    from redflag.training.encode import build_dataset
    from redflag.training.train import train
    from redflag.training.trainer import RedFlagConfig, RedFlagTrainer
    from redflag.watching.memory import Memory
    from redflag.watching.monitor import Monitor
    from redflag.watching.policy import Policy
    from redflag.watching.thresholds import Thresholds

__version__ = "0.1.0"

_HOME = {
    "EvaluateArguments": "redflag.lab.evaluating.arguments",
    "FlagSpec": "redflag.flags",
    "Guard": "redflag.guard.guard",
    "Halt": "redflag.trace",
    "Memory": "redflag.watching.memory",
    "Monitor": "redflag.watching.monitor",
    "Policy": "redflag.watching.policy",
    "RedFlagConfig": "redflag.training.trainer",
    "RedFlagTrainer": "redflag.training.trainer",
    "Step": "redflag.trace",
    "Text": "redflag.trace",
    "Thought": "redflag.trace",
    "Thresholds": "redflag.watching.thresholds",
    "Trace": "redflag.trace",
    "build_dataset": "redflag.training.encode",
    "calibrate": "redflag.calibrating.calibrate",
    "evaluate": "redflag.lab.evaluating.evaluate",
    "train": "redflag.training.train",
}

__all__ = [
    "EvaluateArguments",
    "FlagSpec",
    "Guard",
    "Halt",
    "Memory",
    "Monitor",
    "Policy",
    "RedFlagConfig",
    "RedFlagTrainer",
    "Step",
    "Text",
    "Thought",
    "Thresholds",
    "Trace",
    "build_dataset",
    "calibrate",
    "evaluate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'redflag' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
