"""Constitutional classifiers (arXiv 2501.18837, 2601.04603): token head, probe, cascade, and accuracy against cost."""

from __future__ import annotations

import math
import random
import threading

import numpy as np
import pytest
import torch
from tiny import make_rows

from redflag.backends.load import load_tokenizer
from redflag.backends.scripted import ScriptedBackend
from redflag.calibrating import replay
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.judges import Verdict
from redflag.judges.cache import CachedJudge
from redflag.lab.baselines import probes
from redflag.lab.baselines.hidden import hidden_states
from redflag.lab.baselines.probe_losses import ema, softmax_weighted, swim, token_bce, towards_maximum
from redflag.lab.baselines.shared import BaselineContext
from redflag.lab.evaluating.cascade import TextReader, asking, cascade, so_far, weighted
from redflag.scoring.recording import Recording
from redflag.trace import Escalation, Halt, Step, Text
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds


@pytest.fixture
def context(origin, tmp_path):
    return BaselineContext(origin / "base", origin / "model", tmp_path / "hidden", seed=1, batch_size=8)


def bce(label, z):
    return math.log1p(math.exp(-z)) if label else math.log1p(math.exp(z))


# ---- S3.2: the token head ----


def test_S3_2_the_loss_moves_from_each_logit_to_the_greatest_so_far():
    logits = torch.tensor([[1.0, -2.0, 3.0, 0.0]])
    ones = torch.ones(1, 4)
    for omega, predicted in [
        (0.0, [1.0, -2.0, 3.0, 0.0]),
        (0.5, [1.0, -0.5, 3.0, 1.5]),
        (1.0, [1.0, 1.0, 3.0, 3.0]),
    ]:
        moved = towards_maximum(logits, omega)
        assert moved.tolist() == [predicted]
        loss = token_bce(moved, ones, ones.bool(), ones)
        assert float(loss) == pytest.approx(sum(bce(1, z) for z in predicted) / 4, rel=1e-6)


def test_S3_2_what_is_trained_at_the_end_and_judged_by_a_maximum_never_falls():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    assert (towards_maximum(logits, 1.0).diff(dim=1) >= 0).all()
    probs = torch.sigmoid(logits[0]).tolist()
    recording = Recording.of(["harm"], [{"flag_probs": [[p] for p in probs]}])
    at = [replay.alarms(MonitorConfig(), recording, [threshold])[0] for threshold in (0.3, 0.5, 0.7)]
    # The alarm of a threshold is where the maximum so far reaches it.
    assert at == [next(t for t, p in enumerate(probs) if max(probs[: t + 1]) >= limit) for limit in (0.3, 0.5, 0.7)]


def test_S3_2_the_head_is_the_regression_that_newton_finds_and_training_on_from_there_tells_classes_apart(context):
    rows = make_rows(36)
    head = probes.token_head(context, fitting=probes.Fitting(lbfgs=300, passes=0, l2=1e-2))
    head.fit(rows)
    reads = context.read(rows)
    states = hidden_states(context, reads).states[:, -1].astype(np.float64)
    inputs = np.c_[(states - states.mean(0)) / (states.std(0) + 1e-5), np.ones(len(states))]
    labels = np.repeat([float(read.row.harmful) for read in reads], [len(read.judged_ids) for read in reads])
    share = np.mean([read.row.harmful for read in reads])
    pulls = np.where(labels > 0, 0.5 / share, 0.5 / (1 - share)) / len(labels)
    penalty, found = np.diag([2e-2] * (inputs.shape[1] - 1) + [0.0]), np.zeros(inputs.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-inputs @ found))
        gradient = inputs.T @ (pulls * (p - labels)) + penalty @ found
        found -= np.linalg.solve((inputs * (pulls * p * (1 - p))[:, None]).T @ inputs + penalty, gradient)
    scored = head.score(rows).probs[:, 0]
    assert np.abs(scored - 1 / (1 + np.exp(-inputs @ found))).max() < 2e-3

    trained = probes.token_head(context, fitting=probes.Fitting(lbfgs=20, passes=40, rows=12, validation=0.0))
    trained.fit(rows)
    peaks = replay.peaks(MonitorConfig(), trained.score(rows))[:, 0]
    harmful = np.array([row.harmful for row in rows])
    assert peaks[harmful].mean() > peaks[~harmful].mean() + 0.2


# ---- S3.3: the linear probe on all layers ----


def test_S3_3_sixteen_logits_are_averaged_and_the_loss_has_both_readings():
    draw = random.Random(3)
    z = [draw.gauss(0, 2) for _ in range(40)]
    smooth = [sum(z[max(0, t - 15) : t + 1]) / min(t + 1, 16) for t in range(40)]
    logits = torch.tensor([z], dtype=torch.float64)
    assert swim(logits, 16)[0].tolist() == pytest.approx(smooth)
    whole = sum(math.exp(smooth[t]) for t in range(15, 40))
    weight = {t: math.exp(smooth[t]) / whole for t in range(15, 40)}
    mask = torch.ones(1, 40, dtype=torch.bool)
    for label in (0, 1):
        harmful = torch.tensor([float(label)])
        summed = sum(weight[t] * bce(label, smooth[t]) for t in weight)
        pooled = bce(label, sum(weight[t] * smooth[t] for t in weight))
        assert float(softmax_weighted(logits, mask, harmful, 16, 1.0, "sum")) == pytest.approx(summed)
        assert float(softmax_weighted(logits, mask, harmful, 16, 1.0, "pooled")) == pytest.approx(pooled)
    assert summed != pytest.approx(pooled, rel=1e-3)


def test_S3_3_the_probe_reads_all_layers_and_is_averaged_with_two_seventeenths(context):
    rows = make_rows(24)
    probe = probes.all_layer_probe(context, fitting=probes.Fitting(passes=1, rows=8))
    probe.fit(rows)
    assert probe.layers == (0, 1, 2) and probe.decay == 2 / 17
    hidden = hidden_states(context, context.read(rows))
    weight, bias = probe.net.weight[0].tolist(), probe.net.bias[0].item()
    mean, scale = (part.tolist() for part in probe._scale)
    state, expected = probe.start, []
    for step in hidden.of([5], probe.layers).tolist():
        logit = bias + sum(w * (x - m) * s for w, x, m, s in zip(weight, step, mean, scale, strict=True))
        state = state * 15 / 17 + logit * 2 / 17
        expected.append(1 / (1 + math.exp(-state)))
    assert probe.score(rows).steps(5)[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert ema(np.array([17.0, 0.0]), 2 / 17, 0.0).tolist() == pytest.approx([2.0, 30 / 17])


# ---- S3.4: the cascade ----


@pytest.mark.parametrize(
    ("judge", "shown", "end"),
    [
        (lambda messages, answer: 0.1, "the cat sat on a mat", "harmless"),
        (lambda messages, answer: 0.9, "the cat sat", "harmful"),
        (lambda messages, answer: 1 / 0, "the cat sat", "unanswered"),
        (lambda messages, answer: None, "the cat sat", "unanswered"),
        ("late", "the cat sat", "unanswered"),
    ],
)
def test_S3_4_the_second_judge_decides_before_anything_more_is_shown_and_no_verdict_halts(origin, judge, shown, end):
    never = threading.Event()
    tokenizer, spec, _ = load_tokenizer(origin / "model")
    ids = tokenizer("the cat sat on a mat", add_special_tokens=False)["input_ids"]
    before = tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    assert ids[: len(before)] == before
    script = [Step(i, (0.9 if at == len(before) else 0.1, 0.0)) for at, i in enumerate([*ids, tokenizer.eos_token_id])]
    out, asked, prompts = [], [], []

    def written(token_ids, sampling):  # An engine goes on where the context stands.
        prompts.append(len(token_ids))
        return script[prompts[-1] - prompts[0] :]

    def second(messages, answer):
        asked.append(("".join(out), answer))
        return never.wait(30) if judge == "late" else judge(messages, answer)

    guard = Guard(
        ScriptedBackend(written, {tokenizer.eos_token_id}),
        tokenizer,
        spec,
        Thresholds.manual(0.5, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash),
        Policy(default="escalate", judge_timeout=0.2 if judge == "late" else 5.0),
        second,
    )
    events = []
    for event in guard.stream([{"role": "user", "content": "tell cat"}]):
        events.append(event)
        out += [event.text] if isinstance(event, Text) else []
    never.set()
    assert "".join(out) == shown
    # When it was asked, only what stands before the alarm was out; it read one token more.
    ((seen, read),) = asked
    assert (seen, read) == ("the cat sat", tokenizer.decode(ids[: len(before) + 1]))
    (escalation,) = [event for event in events if isinstance(event, Escalation)]
    assert escalation.verdict == end
    assert isinstance(events[-1], Halt) == (end != "harmless")


def halted_at(first, second, ask, confirm, policy):
    """The cascade step by step, as docs/evaluation.md words it: where it halts, and how often it asked."""
    asked = muted = 0
    for a, score in enumerate(first):
        if muted:
            muted = 0 if score < policy.rearm * ask else muted - 1
        elif score >= ask:
            if asked == policy.max_interventions:
                return a, asked
            asked += 1
            if max(second[: a + 2]) >= confirm:
                return a, asked
            muted = policy.mute_limit
    return -1, asked


def noise(seed, count=60):
    """Two methods on the same responses, all of one length and two steps that end the turn."""
    rng = np.random.default_rng(seed)
    both = []
    for _ in range(2):
        rows = [
            {
                "flag_probs": p[:-2],
                "tail_probs": p[-2:],
                "id": str(i),
                "category": "harm" if i % 3 == 0 else None,
                "onset": 0 if i % 3 == 0 else None,
            }
            for i, p in enumerate(rng.random((count, 30, 1)) ** 2)
        ]
        both.append(Recording.of(["harm"], rows))
    return both


@pytest.mark.parametrize("policy", [Policy(default="escalate"), Policy(default="escalate", mute_limit=3, rearm=0.2)])
def test_S3_4_the_replayed_cascade_is_the_loop_over_steps_and_the_session_that_is_answered(policy):
    first, second = noise(0)
    thresholds = Thresholds.manual(0.9, ["harm"])
    found = cascade(first, thresholds, so_far(second, first), policy)
    calls = []
    for confirm in (0.2, 0.93, 0.97, 1.0):
        alarms = replay.alarms(MonitorConfig(), found.recording, [confirm])
        for i in range(len(first)):
            steps, others = first.steps(i)[:, 0].tolist(), second.steps(i)[:, 0].tolist()
            halt, asked = halted_at(steps, others, 0.9, confirm, policy)
            assert alarms[i] == halt
            session = Session(thresholds, policy, ["harm"])
            for a, p in enumerate(steps):
                session.feed(Step(0, (p,)))
                if session.pending:
                    session.answer(1.0 if max(others[: a + 2]) >= confirm else 0.0)
                if session.finished:
                    break
            assert (a if session.finished else -1) == halt
            calls += [asked] if confirm == 1.0 else []
    # No verdict is 1: nothing was confirmed, and all was asked that may be.
    assert found.calls.tolist() == calls and {0, 1, 2} == set(calls)
    assert found.read[found.calls == 0].sum() == 0 and (found.recording.probs == 1.0).any()


def test_S3_4_the_first_threshold_lets_the_given_share_ask_and_the_verdict_may_be_of_both():
    first, second = noise(1, 900)
    thresholds = asking(first, MonitorConfig(), 0.1)
    found = cascade(first, thresholds, so_far(second, first))
    harmless = ~first.harmful
    assert (found.calls[harmless] > 0).sum() == math.floor(0.1 * (harmless.sum() + 1)) - 1
    of_both = weighted(lambda i, step: 0.2, Recording.of(["harm"], [{"flag_probs": [[0.9]]}]), 0.55)(0, 0)
    assert math.log(of_both / (1 - of_both)) == pytest.approx(0.55 * math.log(9) - 0.45 * math.log(4))
    other = Recording.of(["harm"], [{"flag_probs": [[0.5]], "id": "0"}])
    with pytest.raises(RedflagError, match="other rows"):
        so_far(other, first)


def test_S3_4_a_judge_of_texts_reads_up_to_the_alarm_is_asked_once_and_without_an_answer_the_alarm_stands(
    origin, tmp_path
):
    tokenizer = load_tokenizer(origin / "model")[0]
    rows = make_rows(3)
    ids = [tokenizer(row.messages[-1]["content"], add_special_tokens=False)["input_ids"] for row in rows]
    probs = [[[0.9 if t == 4 else 0.1]] for one in ids for t in range(len(one))]
    spans = np.cumsum([0, *map(len, ids)])
    responses = [
        {"flag_probs": np.array(probs).reshape(-1, 1)[spans[i] : spans[i + 1]], "token_ids": one, "id": rows[i].id}
        for i, one in enumerate(ids)
    ]
    first = Recording.of(["harm"], responses)
    asked = []

    def judge(messages, answer):
        asked.append((messages[-1]["content"], answer))
        if len(asked) == 2:
            raise TimeoutError
        return Verdict(0.25)

    reader = TextReader(CachedJudge(judge, tmp_path / "verdicts.jsonl", "a judge"), rows, first, tokenizer)
    found = cascade(first, Thresholds.manual(0.5, ["harm"]), reader)
    assert asked == [
        (row.messages[0]["content"], tokenizer.decode(one[:5])) for row, one in zip(rows, ids, strict=True)
    ]
    assert found.recording.probs[spans[:-1] + 4, 0].tolist() == [0.25, 1.0, 0.25]
    assert reader.tokens == 15 and reader.seconds > 0
    again = TextReader(CachedJudge(judge, tmp_path / "verdicts.jsonl", "a judge"), rows, first, tokenizer)
    cascade(first, Thresholds.manual(0.5, ["harm"]), again)
    assert len(asked) == 4 and again.tokens == 5  # Only what had no verdict is asked again.
