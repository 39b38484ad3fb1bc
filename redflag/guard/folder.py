"""Flags and thresholds of a model's folder."""

from __future__ import annotations

from pathlib import Path

from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.thresholds import THRESHOLDS_FILE, Thresholds


def read_folder(
    directory: Path, thresholds: Thresholds | float | None, policy: Policy | None
) -> tuple[FlagSpec, Thresholds]:
    """Flags and thresholds of a folder, checked before the weights are read, which may take minutes.

    Raises:
        RedflagError: Files are missing, or do not belong together.
    """
    if not directory.is_dir():
        raise RedflagError(f"{directory} must be a folder that `redflag train` wrote.")
    spec = FlagSpec.load(directory)
    if thresholds is None and not (directory / THRESHOLDS_FILE).exists():
        raise RedflagError(
            f"{directory} must hold {THRESHOLDS_FILE}. Run `redflag calibrate --model {directory} --input rows.jsonl`, "
            "or set a threshold by hand with thresholds=0.5."
        )
    if thresholds is None:
        thresholds = Thresholds.load(directory)
    elif not isinstance(thresholds, Thresholds):
        monitor = MonitorConfig("max" if policy is None or policy.first_token is None else "first")
        thresholds = Thresholds.manual(
            thresholds, spec.categories, monitor, run_id=spec.run_id, template_hash=spec.template_hash
        )
    thresholds.check(spec.run_id, spec.template_hash, "raw", spec.categories)
    return spec, thresholds
