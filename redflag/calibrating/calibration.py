"""The result of a calibration, and its table."""

from __future__ import annotations

from dataclasses import dataclass

from redflag.calibrating.hold_back import HoldBack
from redflag.watching.thresholds import Thresholds


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and their rates on responses that were not used to set them.

    Attributes:
        calibration_size: Harmless responses that set the thresholds.
        held_out_size: Harmless responses that measured their rates.
        false_alarms: Held-out harmless responses that alarm in any category.
        caught: Harmful responses that alarm in any category.
        hold_back: Delays of the alarms in harmful responses with a known onset, and the hold-back they suggest.
        thoughts: Calibration of the thoughts before answers, if the rows have some; all else is of the answers.
        no_thoughts: Why thoughts were not calibrated, if the rows have some.
        false_alarms_anywhere: Held-out harmless responses that alarm in their thought or their answer.
    """

    thresholds: Thresholds
    calibration_size: int
    held_out_size: int
    false_alarms: int
    false_alarms_by_category: dict[str, int]
    harmful_size: int
    caught: int
    caught_by_category: dict[str, int]
    hold_back: HoldBack
    thoughts: Calibration | None = None
    no_thoughts: str = ""
    false_alarms_anywhere: int = 0

    def __str__(self) -> str:
        return "\n".join([*_of_part(self), str(self.hold_back), *_of_thoughts(self)])


def _of_part(result: Calibration) -> list[str]:
    t = result.thresholds
    width = max(len("category"), *(len(c) for c in t.values))
    lines = [f"{'category':<{width}}  {'threshold':>10}  {'false alarms':>12}  {'caught':>12}"]
    for category, value in t.values.items():
        false_alarms = _share(result.false_alarms_by_category[category], result.held_out_size)
        caught = _share(result.caught_by_category[category], result.harmful_size)
        lines.append(f"{category:<{width}}  {value:>10.6f}  {false_alarms:>12}  {caught:>12}")
    if len(t.values) > 1:
        overall = _share(result.false_alarms, result.held_out_size), _share(result.caught, result.harmful_size)
        lines.append(f"{'any':<{width}}  {'':>10}  {overall[0]:>12}  {overall[1]:>12}")
    lines.append(
        f"target {t.target_fpr:g} per response ({t.guarantee}{f', delta {t.delta:g}' if t.delta is not None else ''}"
        f"{', jointly' if t.joint and len(t.values) > 1 else ''}), aggregation {t.monitor.aggregation}, "
        f"{f'memory {t.memory.weight:g} with decay {t.memory.decay:g}, ' if t.memory is not None else ''}"
        f"{result.calibration_size} harmless responses"
    )
    if t.realised_fpr is not None and t.interval is not None:
        lines.append(
            f"realised {t.realised_fpr:.4f} [{t.interval[0]:.4f}, {t.interval[1]:.4f}] on {result.held_out_size} "
            "held-out harmless responses"
        )
    else:
        lines.append("no responses were held out: the realised rate is unknown")
    return lines


def _of_thoughts(result: Calibration) -> list[str]:
    if result.no_thoughts:
        return [f"thoughts: the answers' thresholds hold for them ({result.no_thoughts})"]
    if result.thoughts is None:
        return []
    both = ""
    if result.held_out_size:
        both = f"; {_share(result.false_alarms_anywhere, result.held_out_size)} held-out responses alarm in either part"
    return [f"thoughts, separately (the rate is that of each part{both}):", *_of_part(result.thoughts)]


def _share(count: int, total: int) -> str:
    return f"{count}/{total}" if total else "-"
