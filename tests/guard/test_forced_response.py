"""The action `force` from end to end: the flag in the context, never in the text, the model's own words behind it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redflag.backends import Sampling
from redflag.backends.hf import HFBackend
from redflag.backends.load import load_flagged
from redflag.backends.scripted import ScriptedBackend
from redflag.guard.guard import Guard
from redflag.guard.response import adrive, drive
from redflag.prompt import render_prompt
from redflag.server.metrics import Metrics
from redflag.terminal.screen import paint, summary
from redflag.terminal.show import show_trace
from redflag.trace import Alarm, Done, Forced, Halt, Step, Text
from redflag.watching.first_token import FirstTokenRule
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

ASK = [{"role": "user", "content": "hello"}]


class Engine(ScriptedBackend):
    """Writes `answer` from where the context stands, and behind the newest flag what `behind` says for it."""

    def __init__(self, tokenizer, spec, answer, probs, behind, *, fail_behind=False):
        def ids(text):
            return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]

        prompt = len(render_prompt(tokenizer, ASK, spec))
        plain, written = ids(answer), {flag: ids(text) for flag, text in zip(spec.ids, behind, strict=True)}
        self.calls = []

        def steps(token_ids, sampling):
            self.calls.append((tuple(token_ids), sampling))
            flags = [i for i, token in enumerate(token_ids) if token in written]
            if not flags:
                done = len(token_ids) - prompt
                yield from (Step(t, probs.get(at, (0.1, 0.0))) for at, t in enumerate(plain) if at >= done)
                return
            if fail_behind:
                raise ConnectionError("lost")
            done = len(token_ids) - flags[-1] - 1
            yield from (Step(t, (0.1, 0.0)) for t in written[token_ids[flags[-1]]][done:])

        super().__init__(steps, {tokenizer.eos_token_id})


class Loop:
    """The same engine for an event loop."""

    def __init__(self, engine):
        self.engine = engine
        self.eos_ids, self.logprob_mode, self.upper_bound = engine.eos_ids, "raw", False

    async def astream(self, token_ids, sampling, watch=()):
        for step in self.engine.stream(token_ids, sampling, watch):
            await asyncio.sleep(0)
            yield step


@pytest.fixture(params=["sync", "async"])
def run(request, tokenizer, spec):
    def go(engine, policy, sampling=None, monitor=None, messages=ASK):
        thresholds = Thresholds.manual(
            0.5, spec.categories, monitor, run_id=spec.run_id, template_hash=spec.template_hash
        )
        if request.param == "sync":
            guard = Guard(engine, tokenizer, spec, thresholds, policy)
            return list(drive(guard.respond(messages, sampling), engine))
        loop = Loop(engine)
        guard = Guard(loop, tokenizer, spec, thresholds, policy)

        async def collect():
            return [event async for event in adrive(guard.respond(messages, sampling), loop)]

        return asyncio.run(collect())

    return go


def shown(events):
    return "".join(event.text for event in events if isinstance(event, Text))


def kinds(events):
    return [type(event) for event in events if not isinstance(event, Text)]


@pytest.mark.parametrize(
    ("at", "options", "text", "left"),
    [
        (0, {}, "no, sorry", ""),
        (3, {}, "abcno, sorry", "abc"),
        (3, {"hold_back": 2}, "ano, sorry", "a"),
        (3, {"release": "end"}, "no, sorry", ""),
        (8, {}, "abcdefghno, sorry", "abcdefgh"),  # at the end of the answer, which then does not end
    ],
)
def test_the_model_goes_on_behind_the_flag(run, tokenizer, spec, at, options, text, left):
    engine = Engine(tokenizer, spec, "abcdefgh", {at: (0.9, 0.0)}, ("no, sorry", "fine"))
    events = run(engine, Policy(default="force", **options), Sampling(max_new_tokens=30, seed=4))
    assert shown(events) == text and kinds(events) == [Alarm, Forced, Done]
    prompt = render_prompt(tokenizer, ASK, spec)
    kept = tokenizer(left, add_special_tokens=False)["input_ids"] if left else []
    (_, first), (again, second) = engine.calls
    assert list(again) == [*prompt, *kept, spec.ids[0]]
    assert (first.seed, second.seed, second.max_new_tokens) == (4, 5, 30 - len(kept))
    assert engine.open_streams == 0


def test_the_rule_decides_at_the_first_token_and_later_steps_do_nothing(run, tokenizer, spec):
    policy = Policy(default="force", first_token=FirstTokenRule(compare=True))
    first = MonitorConfig("first")
    late = {i: (0.9, 0.9) for i in range(1, 9)}
    events = run(Engine(tokenizer, spec, "abcdefgh", late, ("no", "fine")), policy, None, first)
    assert shown(events) == "abcdefgh" and kinds(events) == [Done]
    # Two of three parts: the likeliest category, against what is left for responding.
    events = run(Engine(tokenizer, spec, "abcdefgh", late | {0: (0.25, 0.4)}, ("no", "stop")), policy, None, first)
    assert shown(events) == "stop" and events[0] == Alarm(0, "theft", 0.4, pytest.approx(0.35), "force")


def test_a_respond_token_stands_before_every_answer_that_is_not_refused(run, tokenizer, spec):
    rule = FirstTokenRule(respond="theft")  # the second flag of these tests
    policy, first = Policy(default="force", first_token=rule), MonitorConfig("first")
    engine = Engine(tokenizer, spec, "abc", {0: (0.2, 0.7)}, ("no, sorry", "of course"))
    events = run(engine, policy, None, first)
    assert shown(events) == "of course" and kinds(events) == [Forced, Done]
    assert engine.calls[-1][0][-1] == spec.ids[1]
    engine = Engine(tokenizer, spec, "abc", {0: (0.6, 0.7)}, ("no, sorry", "of course"))
    assert shown(run(engine, policy, None, first)) == "no, sorry"


@pytest.mark.parametrize("spelt", ["<|harm|>", "x<|harm|>y"])
def test_a_flag_that_the_model_spells_behind_the_flag_is_not_shown(run, tokenizer, spec, spelt):
    engine = Engine(tokenizer, spec, "abcdefgh", {2: (0.9, 0.0)}, ("ok", "ok"))
    pieces = tokenizer(spelt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    engine._script = _then(engine._script, pieces, spec, tokenizer.eos_token_id)
    events = run(engine, Policy(default="force"))
    assert "<|" not in shown(events) and shown(events) == "ab" + spelt.replace("<|harm|>", "")


def _then(script, pieces, spec, eos):
    def steps(token_ids, sampling):
        if spec.ids[0] in token_ids:
            return iter([Step(i, (0.1, 0.0)) for i in (*pieces, eos)])
        return script(token_ids, sampling)

    return steps


def test_an_engine_that_is_lost_behind_the_flag_fails_closed(run, tokenizer, spec):
    engine = Engine(tokenizer, spec, "abcdefgh", {2: (0.9, 0.0)}, ("no", "no"), fail_behind=True)
    events = run(engine, Policy(default="force"))
    assert shown(events) == "ab" and events[-1].reason == "fault" and "lost" in events[-1].detail


def test_text_that_waits_for_its_end_and_a_prefill_survive_the_flag(run, tokenizer, spec):
    """Half a character, or half a stop text, that is released but not yet shown is taken up again."""
    engine = Engine(tokenizer, spec, "abSTé", {4: (0.9, 0.0)}, ("ay", "fine"))
    events = run(engine, Policy(default="force"), Sampling(stop=("STOP",)))
    assert shown(events) == "abSTay"
    engine = Engine(tokenizer, spec, "abSTé", {4: (0.9, 0.0)}, ("OP and on", "fine"))
    events = run(engine, Policy(default="force"), Sampling(stop=("STOP",)))
    assert shown(events) == "ab" and events[-1].reason == "stop"


def test_the_length_limit_holds_behind_the_flag(run, tokenizer, spec):
    engine = Engine(tokenizer, spec, "abcdefgh", {3: (0.9, 0.0)}, ("no, sorry", "fine"))
    events = run(engine, Policy(default="force"), Sampling(max_new_tokens=5))
    assert events[-1] == Done(5, "length") and shown(events) == "abcno"


@given(data=st.data())
def test_no_run_shows_a_flag_an_unjudged_token_or_two_ends(tokenizer, spec, data):
    probs = data.draw(
        st.dictionaries(st.integers(0, 7), st.tuples(st.sampled_from([0.1, 0.6]), st.sampled_from([0.1, 0.6])))
    )
    policy = Policy(
        default=data.draw(st.sampled_from(["force", "halt"])),
        actions=data.draw(st.dictionaries(st.sampled_from(spec.categories), st.sampled_from(["force", "continue"]))),
        hold_back=data.draw(st.integers(0, 3)),
        release=data.draw(st.sampled_from(["steps", "sentence", "end"])),
        max_interventions=data.draw(st.integers(0, 2)),
    )
    engine = Engine(tokenizer, spec, "ab. cd e", probs, ("no. sorry", "fine. so"))
    thresholds = Thresholds.manual(0.5, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash)
    guard = Guard(engine, tokenizer, spec, thresholds, policy)
    with guard.stream(ASK, Sampling(max_new_tokens=20)) as stream:
        events = list(stream)
    assert [isinstance(e, Halt | Done) for e in events].index(True) == len(events) - 1
    assert engine.open_streams == 0 and len(engine.calls) <= policy.max_interventions + 1
    text = shown(events)
    assert not any(flag.token in text for flag in spec.flags)
    released = [i for e in events if isinstance(e, Text) for i in e.token_ids]
    assert released == stream.trace.token_ids[: len(released)] and not set(released) & set(spec.ids)
    assert text == tokenizer.decode(released, skip_special_tokens=True)
    # What was taken back is in none of the contexts that follow it.
    for (context, _), forced in zip(engine.calls[1:], [e for e in events if isinstance(e, Forced)], strict=True):
        behind = context[len(engine.calls[0][0]) :]
        assert len([i for i in behind if i not in spec.ids]) == forced.position


def test_S2_1_a_real_engine_writes_behind_the_flag_what_it_would_from_that_prompt(model_dir, spec):
    """Greedy: the answer is the one to prompt + flag, which is what training shows (placement open)."""
    backend, tokenizer, spec = load_flagged(model_dir, "cpu")
    assert isinstance(backend, HFBackend)
    thresholds = Thresholds.manual(
        1e-9, spec.categories, MonitorConfig("first"), run_id=spec.run_id, template_hash=spec.template_hash
    )
    rule = FirstTokenRule()
    guard = Guard(backend, tokenizer, spec, thresholds, Policy(default="force", first_token=rule))
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    result = guard.generate(ASK, sampling)
    (alarm,) = [e for e in result.events if isinstance(e, Alarm)]
    flag = spec.ids[spec.categories.index(alarm.category)]
    (expected,) = backend.complete([[*render_prompt(tokenizer, ASK, spec), flag]], sampling)
    assert result.trace.token_ids == [step.token_id for step in expected]
    plain = replace(guard.policy, default="continue")
    blind = Guard(backend, tokenizer, spec, thresholds, plain).generate(ASK, sampling)
    assert blind.trace.token_ids == [
        step.token_id for step in backend.complete([render_prompt(tokenizer, ASK, spec)], sampling)[0]
    ]


def test_operators_see_that_a_flag_was_forced_and_users_do_not(tokenizer, spec, tmp_path):
    engine = Engine(tokenizer, spec, "abcdefgh", {3: (0.9, 0.0)}, ("no, sorry", "fine"))
    thresholds = Thresholds.manual(0.5, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash)
    guard = Guard(engine, tokenizer, spec, thresholds, Policy(default="force", hold_back=1))
    with guard.stream(ASK) as stream:
        events = list(stream)
    assert "flag harm forced at token 2: 2 tokens taken back" in summary(stream.trace)
    assert "[flag harm]" in "".join(paint(events, stream.trace, True))
    assert "".join(paint(events, stream.trace, False)) == "abno, sorry"
    assert "flag harm forced at token 2" in show_trace(stream.trace, False)
    metrics = Metrics()
    metrics.observe(
        stream.trace, route="/v1/completions", streamed=True, overridden=False, seconds_to_first=0.1, seconds=0.2,
        end="done",
    )  # fmt: skip
    text = metrics.render()[0].decode()
    assert 'redflag_alarms_total{action="force",category="harm"} 1.0' in text
    assert f"redflag_tokens_generated_total {len(stream.trace.token_ids) + 2}.0" in text
