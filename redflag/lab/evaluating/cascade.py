"""A cascade: a cheap method judges every token, and its alarm asks a second judge, who decides.

The two stages of "Constitutional Classifiers++" (arXiv 2601.04603: a probe on all traffic, a
classifier on the 5.5% that it escalates), as a guard with the action `escalate` runs them:

1. The first stage's monitor folds its probabilities; its alarm, raised at step a, asks the second judge. The threshold
   is set so that a given share of harmless calibration responses ask at all.
2. The second judge reads the response up to and with token a, and gives a probability of harm. Nothing is shown in the
   meantime. At and above the cascade's threshold the response is halted, and token a is never shown.
3. Otherwise the response goes on, and the alarm is muted until the first stage's score has fallen (`Policy.rearm`,
   `Policy.mute_limit`). A later alarm asks again, until `Policy.max_interventions` are spent; then an alarm halts.

What comes of that is a `Recording` again: 0 at every step but those at which the second judge was asked (there its
probability) or at which an alarm halted without it (there 1). A verdict below the threshold changes nothing of what is
asked later, so one recording serves all thresholds, and every table of a method can be made of it (monitor `max`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from redflag.calibrating import replay
from redflag.calibrating.guarantee import fit_thresholds, required
from redflag.data.rows import Row, Rows
from redflag.errors import RedflagError
from redflag.files import keep_json, kept_json
from redflag.judges import UnansweredError
from redflag.judges.cache import CachedJudge
from redflag.lab.baselines import Cost
from redflag.lab.baselines.shared import forward_flops
from redflag.lab.evaluating.cost import of_cascade
from redflag.lab.report.method import CascadeFacts
from redflag.progress import track
from redflag.scoring.recording import Recording
from redflag.stats.intervals import rate_interval, unit_of
from redflag.trace import Step
from redflag.watching.monitor import MonitorConfig, _logit
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds

if TYPE_CHECKING:
    from redflag.lab.evaluating.arguments import EvaluateArguments

# (response, step of the alarm) -> probability that the response is harmful, as far as it is written.
SecondJudge = Callable[[int, int], float]


class Cascade(NamedTuple):
    """What a cascade did on N responses."""

    recording: Recording  # one flag, "harm": the verdicts where they were given, 0 elsewhere
    calls: npt.NDArray[np.int64]  # N numbers of verdicts that were asked for
    read: npt.NDArray[np.int64]  # N numbers of tokens that the second judge read: at each call all that is written


def cascade(first: Recording, thresholds: Thresholds, second: SecondJudge, policy: Policy | None = None) -> Cascade:
    """Replays a cascade over recorded responses.

    Args:
        thresholds: At which its alarms ask; their monitor folds the probabilities.
        policy: How alarms are muted and how often may be asked; its action must be `escalate`.

    Example:
        >>> first = Recording.of(["harm"], [{"flag_probs": [[0.1], [0.8], [0.1], [0.9]]}])
        >>> replayed = cascade(first, Thresholds.manual(0.5, ["harm"]), lambda response, step: (step + 2) / 8)
        >>> replayed.recording.probs[:, 0].tolist(), replayed.calls.tolist(), replayed.read.tolist()
        ([0.0, 0.375, 0.0, 0.625], [2], [6])
    """
    policy = policy or Policy(default="escalate")
    verdicts = np.zeros((len(first.probs), 1), dtype=np.float32)
    calls, read = np.zeros((2, len(first)), dtype=np.int64)
    limits = [thresholds.values[category] for category in first.categories]
    alarmed = np.flatnonzero(replay.alarms(thresholds.monitor, first, limits) >= 0).tolist()
    for i in track(alarmed, "asking the second stage", len(alarmed), "responses"):
        session = Session(thresholds, policy, first.categories)
        for step, probs in enumerate(first.steps(i).tolist()):
            session.feed(Step(0, tuple(probs)))
            if session.pending is not None:
                verdicts[first.starts[i] + step] = second(i, step)
                calls[i] += 1
                read[i] += min(step + 1, first.lengths[i])
                # As if harmless: whatever threshold is tried later, the first verdict that reaches it has the say.
                session.answer(0.0)
            if session.finished:
                verdicts[first.starts[i] + step] = 1.0
                break
    recording = Recording(
        ("harm",), verdicts, first.starts, first.lengths, first.columns, first.token_ids, {"cascade": first.meta}
    )
    return Cascade(recording, calls, read)


def asking(calibration: Recording, monitor: MonitorConfig, share: float) -> Thresholds:
    """Thresholds at which a share of harmless responses alarm, in expectation: the first stage's.

    Raises:
        RedflagError: There are too few harmless responses for that share.
    """
    peaks = replay.peaks(monitor, calibration, np.flatnonzero(~calibration.harmful))
    values = fit_thresholds(peaks, share)
    return Thresholds(dict(zip(calibration.categories, values, strict=True)), monitor)


def so_far(second: Recording, first: Recording) -> SecondJudge:
    """A method that was recorded as second judge: its highest probability over the text that is written.

    The step behind token a is the one that has read token a; at the last step there is none behind.

    Raises:
        RedflagError: The two were not recorded on the same steps.
    """
    if second.columns["id"] != first.columns["id"] or not np.array_equal(second.starts, first.starts):
        raise RedflagError(
            "the stages of a cascade must be recorded on the same rows with the same max_length (got other rows or "
            "lengths). Else the second cannot be asked about a step of the first."
        )
    return lambda i, step: float(second.steps(i)[: step + 2].max())


def weighted(second: SecondJudge, first: Recording, share: float) -> SecondJudge:
    """The verdict of both: share x the first stage's log-odds at the alarm + (1 - share) x the second judge's.

    CC++ takes 0.55; 0 leaves the decision to the second judge, as a guard does.
    """

    def judge(i: int, step: int) -> float:
        ours, theirs = float(first.steps(i)[step].max()), second(i, step)
        log_odds = share * _logit(ours) + (1 - share) * _logit(theirs)
        return 1.0 / (1.0 + math.exp(-log_odds))

    return judge if share else second


@dataclass
class TextReader:
    """A judge of texts as second judge. One that gives no verdict leaves the alarm standing."""

    judge: CachedJudge
    rows: Sequence[Row]
    first: Recording  # of the same rows
    tokenizer: Any
    seconds: float = 0.0  # that new verdicts took
    tokens: int = 0  # that were read for them

    def __call__(self, i: int, step: int) -> float:
        assert self.first.token_ids is not None
        begin = int(self.first.lengths[:i].sum())
        ids = self.first.token_ids[begin : begin + min(step + 1, int(self.first.lengths[i]))].tolist()
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        begun, asked_before = time.perf_counter(), self.judge.asked
        try:
            harm = self.judge(self.rows[i].messages[:-1], text).harm
        except UnansweredError:
            harm = 1.0
        if self.judge.asked > asked_before:
            self.seconds += time.perf_counter() - begun
            self.tokens += len(ids)
        return harm


class CascadeStage(NamedTuple):
    """A method of an evaluation, which may be a stage of a cascade or a cascade."""

    test: Recording
    calibration: Recording
    cost: Cost  # per response token
    what: str = ""  # how it judges, in one sentence
    facts: CascadeFacts | None = None  # of a cascade: what its first stage asked


def cascades_of(arguments: EvaluateArguments, baselines: Sequence[str], rows: Mapping[str, Rows]) -> list[list[str]]:
    """The cascades that are asked for, each as its two stages.

    Raises:
        RedflagError: A stage is not known, or the rows cannot set its threshold.
    """
    cascades = []
    names = ["flag", *baselines]
    for text in dict.fromkeys(arguments.cascades):
        stages = [name.strip() for name in text.split(" then ")]
        if len(stages) != 2 or stages[0] not in names or stages[1] not in (*names, "judge") or stages[0] == stages[1]:
            raise RedflagError(
                f"cascades must be 'FIRST then SECOND', with any of {', '.join(names)}, or judge as the second "
                f"(got {text!r})."
            )
        if stages[1] == "judge" and arguments.judge in ("none", "oracle"):
            raise RedflagError(
                f"judge must be endpoint or model for the cascade {text!r} (got {arguments.judge}). No guard could ask "
                "another."
            )
        cascades.append(stages)
    if not cascades:
        return cascades
    _policy(arguments)
    share, harmless = arguments.escalation_share, sum(not row.harmful for row in rows["calibration"])
    if harmless < required(share):
        raise RedflagError(
            f"calibration must hold at least {required(share)} harmless rows (got {harmless}), for {share:g} of them "
            "to reach a threshold. Give more, or a larger escalation_share."
        )
    return cascades


def measure(
    arguments: EvaluateArguments,
    names: Sequence[str],
    stages: Mapping[str, CascadeStage],
    monitor: MonitorConfig,
    rows: Mapping[str, Rows],
    folder: Path,
) -> CascadeStage:
    """Replays a cascade over test and calibration rows.

    Args:
        names: The first and the second stage; "judge": the evaluation's judge reads the text.
        monitor: The first stage's.
        folder: Where a judge's verdicts are cached.
    """
    first = stages[names[0]]
    thresholds = asking(first.calibration, monitor, arguments.escalation_share)
    readers: list[TextReader] = []

    def second(split: str, recording: Recording) -> SecondJudge:
        if names[1] == "judge":
            readers.append(_reader(arguments, rows[split], recording, folder))
            return weighted(readers[-1], recording, arguments.escalation_weight)
        return weighted(so_far(getattr(stages[names[1]], split), recording), recording, arguments.escalation_weight)

    policy = _policy(arguments)
    test = cascade(first.test, thresholds, second("test", first.test), policy)
    calibration = cascade(first.calibration, thresholds, second("calibration", first.calibration), policy)
    harmful = first.test.harmful
    units = unit_of(first.test.columns["group"], len(harmful))
    escalated = test.calls > 0
    read = float(test.read[~harmful].sum() / max(1, first.test.lengths[~harmful].sum()))
    cost = _cost_of_judge(arguments, readers, folder) if readers else stages[names[1]].cost
    what = (
        f"{names[0]} at every token; its alarm, set so that {arguments.escalation_share:g} of harmless responses raise "
        f"one, asks {names[1]}, which has read the response so far and decides (at most {policy.max_interventions} "
        f"times; after {policy.mute_limit} tokens a score that stays high asks again)"
    )
    if arguments.escalation_weight:
        what += f" with {1 - arguments.escalation_weight:g} of the log-odds, the first stage with the rest"
    facts = CascadeFacts(
        first=names[0],
        second=names[1],
        share=arguments.escalation_share,
        thresholds=dict(thresholds.values),
        asked=float(escalated[~harmful].mean()),
        asked_interval=rate_interval(escalated[~harmful], units[~harmful]),
        asked_harmful=float(escalated[harmful].mean()),
        calls=float(test.calls[~harmful].mean()),
        read=read,
    )
    return CascadeStage(test.recording, calibration.recording, of_cascade(first.cost, cost, read), f"{what}.", facts)


def _policy(arguments: EvaluateArguments) -> Policy:
    return Policy(default="escalate", mute_limit=arguments.mute_limit, max_interventions=arguments.max_interventions)


def _reader(arguments: EvaluateArguments, rows: Rows, first: Recording, folder: Path) -> TextReader:
    from redflag.backends.load import load_tokenizer
    from redflag.lab.evaluating.stages import judge_of

    tokenizer, _, _ = load_tokenizer(arguments.model)
    return TextReader(CachedJudge(judge_of(arguments), folder / "verdicts.jsonl"), rows.rows, first, tokenizer)


def _cost_of_judge(arguments: EvaluateArguments, readers: Sequence[TextReader], folder: Path) -> Cost:
    """Per token of the answers that it reads: its time as measured when the verdicts were given, its FLOPs as given."""
    path = folder / "judge.json"
    identity = readers[0].judge.identity
    cached = kept_json(path, identity=identity) or {"seconds": 0.0, "tokens": 0}
    seconds = cached["seconds"] + sum(reader.seconds for reader in readers)
    tokens = cached["tokens"] + sum(reader.tokens for reader in readers)
    keep_json(path, {"identity": identity, "seconds": seconds, "tokens": tokens})
    flops = arguments.judge_flops
    if flops is None and arguments.judge == "model":
        flops = forward_flops(str(arguments.judge_name))
    return Cost(
        microseconds_per_token=1e6 * seconds / tokens if tokens else None,
        flops_per_token=flops,
        note="a judge that reads the text anew at each question",
    )
