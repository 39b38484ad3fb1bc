"""Structured output from schema to text: what is refused, what comes out, and what an alarm does to it."""

from __future__ import annotations

import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redflag.backends import Sampling
from redflag.backends.choose import Chooser, measure
from redflag.errors import RedflagError
from redflag.guard.grammar import LONGEST_SCHEMA, Grammars
from redflag.guard.guard import Guard
from redflag.trace import Done, Halt, Resume, Step
from redflag.watching.policy import Policy, Reflect

ASK = [{"role": "user", "content": "hello"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 10, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(tokenizer, spec):
    return Grammars(tokenizer, spec, frozenset([tokenizer.eos_token_id]))


class Logits:
    """An engine whose logits are random numbers that depend on the whole context; its steps are made by `Chooser`."""

    logprob_mode, upper_bound = "raw", False

    def __init__(self, tokenizer, spec, alarms=()):
        self.eos_ids = frozenset([tokenizer.eos_token_id])
        self.flag_ids, self.size, self.alarms = list(spec.ids), len(tokenizer), alarms
        self.calls = []

    def logits(self, context, done):
        numbers = torch.randn(self.size, generator=torch.Generator().manual_seed(hash(tuple(context)) % 2**31))
        numbers[self.flag_ids[0]] = 12.0 if done in self.alarms else -9.0
        return numbers

    def stream(self, token_ids, sampling, watch=()):
        self.calls.append((tuple(token_ids), sampling))
        return self.steps(list(token_ids), sampling, watch)

    def steps(self, context, sampling, watch):
        chooser = Chooser(sampling, [context], torch.tensor(self.flag_ids), torch.device("cpu"), watch)
        self.begin = getattr(self, "begin", len(context))
        for _ in range(sampling.max_new_tokens):
            step = chooser.step(self.logits(context, len(context) - self.begin)[None].clone(), (0,))[0]
            yield step
            if step.token_id in self.eos_ids:
                return
            context.append(step.token_id)


@pytest.fixture
def guard_with(tokenizer, spec, thresholds):
    def build(policy=None, alarms=()):
        engine = Logits(tokenizer, spec, alarms)
        return Guard(engine, tokenizer, spec, thresholds, policy), engine

    return build


def fits(value):
    assert {"name", "age"} <= set(value) <= {"name", "age", "tags"}
    assert len(value["name"]) <= 6 and 10 <= value["age"] <= 99 and set(value.get("tags", ())) <= {"a", "b"}
    return True


def test_an_answer_that_ends_is_json_that_the_schema_allows(guard_with):
    guard, _ = guard_with()
    ends = []
    for seed in range(12):
        sampling = Sampling(200, temperature=1.0, seed=seed, grammar=guard.grammar(PERSON))
        result = guard.generate(ASK, sampling)
        ends.append(result.events[-1].reason)
        assert result.verdict == "completed" and (ends[-1] == "length" or fits(json.loads(result.text)))
    assert "stop" in ends


def test_the_flags_are_measured_over_all_tokens_and_before_the_grammar(guard_with, spec):
    guard, engine = guard_with(Policy(observe=True))
    result = guard.generate(ASK, Sampling(60, seed=1, grammar=guard.grammar(PERSON)))
    context = list(engine.calls[0][0])
    for done, (token_id, probs) in enumerate(zip(result.trace.token_ids, result.trace.flag_probs, strict=True)):
        expected = measure(engine.logits(context, done), torch.tensor(spec.ids)).tolist()
        assert probs == pytest.approx(expected, abs=1e-6)
        context.append(token_id)
    assert len(result.trace.token_ids) > 10


@pytest.mark.parametrize("hold_back", [0, 3])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_an_alarm_in_the_middle_halts_and_leaves_half_of_the_json(guard_with, at, hold_back):
    guard, _ = guard_with(Policy(hold_back=hold_back), alarms={at})
    result = guard.generate(ASK, Sampling(60, seed=2, grammar=guard.grammar(PERSON)))
    assert isinstance(result.events[-1], Halt) and result.events[-1].reason == "alarm"
    assert len(result.trace.token_ids) == at + 1
    assert guard.tokenizer.decode(result.trace.token_ids[: max(0, at - hold_back)]).startswith(result.text)


def test_after_a_reflection_the_json_goes_on_where_it_stood(guard_with, monkeypatch):
    """And the reflection itself is free text."""
    reflect = Reflect(cue=" hm: ", verdict_cue=" so ", words=("x", "y"), stop=(";",), max_tokens=5)
    guard, engine = guard_with(Policy(actions={"harm": "reflect"}, reflect=reflect), alarms={4})
    real = engine.steps
    harmless = Step(0, (0.0, 1.0))
    monkeypatch.setattr(engine, "steps", lambda *asked: iter([harmless]) if asked[2] else real(*asked))
    for seed in range(6):
        del engine.calls[:]
        engine.begin = len(guard.respond(ASK).request.token_ids)
        result = guard.generate(ASK, Sampling(150, seed=seed, grammar=guard.grammar(PERSON)))
        assert any(isinstance(event, Resume) for event in result.events)
        grammars = [sampling.grammar is not None for _, sampling in engine.calls]
        assert grammars == [True, False, False, True]
        if result.events[-1] == Done(len(result.trace.token_ids), "stop"):
            assert fits(json.loads(result.text))
            return
    raise AssertionError("no answer ended by itself")


@pytest.mark.parametrize("action", ["force", "stay"])
def test_the_json_goes_on_behind_a_flag_that_stands_in_the_context(guard_with, monkeypatch, action):
    """A forced flag takes back what was not released; a reflection that the response stays with takes back a token."""
    reflect = Reflect(cue=" hm: ", verdict_cue=" so ", words=("x", "y"), stop=(";",), max_tokens=5, stay=True)
    policy = Policy(actions={"harm": "force" if action == "force" else "reflect"}, reflect=reflect, hold_back=2)
    for seed in range(8):
        guard, engine = guard_with(policy, alarms={4})
        real, harmless = engine.steps, Step(0, (0.0, 1.0))

        def steps(context, sampling, watch, engine=engine, real=real, harmless=harmless):
            if len(engine.calls) > 1:
                engine.alarms = ()  # once
            return iter([harmless]) if watch else real(context, sampling, watch)

        monkeypatch.setattr(engine, "steps", steps)
        result = guard.generate(ASK, Sampling(150, seed=seed, grammar=guard.grammar(PERSON)))
        last, sampling = engine.calls[-1]
        assert len(engine.calls) > 1 and sampling.grammar is not None and guard.spec.ids[0] in last
        if isinstance(result.events[-1], Done) and result.events[-1].reason == "stop":
            assert fits(json.loads(result.text))
            return
    raise AssertionError("no answer ended by itself")


def test_an_answer_that_the_client_began_follows_no_grammar(guard_with):
    guard, _ = guard_with()
    begun = [*ASK, {"role": "assistant", "content": '{"name":'}]
    for messages, thinking in ((begun, None), (ASK, True)):
        with pytest.raises(RedflagError, match="must not be given with a prefill"):
            guard.respond(messages, Sampling(grammar=guard.grammar(PERSON)), thinking=thinking)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "objec"}, "Invalid type: objec"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"not": {"type": "string"}, "x-guidance": {"lenient": True}}, "x-guidance"),
        ({"oneOf": [{}, {"type": "string"}], "x-guidance": {"coerce_one_of": True}}, "x-guidance"),
        ({"oneOf": [{}, {"type": "string"}]}, "oneOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "(?<=x)y"}, "look-behind"),
        ({"type": "string", "format": "soup"}, "soup"),
        ({"$ref": "http://example.org/s.json"}, "does not fetch"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"properties": {"a": False}, "required": ["a"], "type": "object"}, "[Uu]nsatisfiable"),
        ({"type": "string", "description": "x" * LONGEST_SCHEMA}, "characters"),
        ({"const": math.nan}, "not JSON"),
        ({"const": {1, 2}}, "not JSON"),
        ([1], "must be a JSON object"),
        (True, "must be a JSON object"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(grammars, schema, named):
    with pytest.raises(RedflagError, match=named):
        grammars.json(schema)


def test_without_the_package_it_says_what_to_install(grammars, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RedflagError, match=r"redflag-llm\[structured\]"):
        grammars.json({})


def test_special_tokens_are_never_allowed_but_as_an_end(grammars, tokenizer):
    """Not even where a schema spells them."""
    spelled = {"enum": list(tokenizer.get_added_vocab())}
    special = set(tokenizer.get_added_vocab().values()) - {tokenizer.eos_token_id}
    for schema in (spelled, {}, {"type": "string"}, {"patternProperties": {".*": spelled}, "type": "object"}):
        draw, matcher = random.Random(0), grammars.json(schema).begin()
        for _ in range(40):
            allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), bitorder="little"))
            assert not special & set(allowed.tolist())
            token_id = int(draw.choice(allowed))
            assert matcher.accept(token_id)
            if token_id == tokenizer.eos_token_id:
                break


def test_a_token_that_is_not_allowed_changes_nothing(grammars, tokenizer):
    grammar = grammars.json(PERSON)
    matcher, wrong = grammar.begin(), tokenizer("x", add_special_tokens=False)["input_ids"][0]
    before = matcher.mask()
    assert not matcher.accept(wrong) and not matcher.accept(tokenizer.eos_token_id)
    assert matcher.mask() == before == grammar.begin().mask()
    with pytest.raises(RuntimeError, match="does not allow"):
        grammar.after([wrong])


LEAVES = st.sampled_from(
    [{"type": "string", "maxLength": 4}, {"type": "integer", "minimum": 0, "maximum": 7}, {"type": "boolean"},
     {"type": "null"}, {"enum": ["ä", '"', "<|harm|>"]}, {"const": {"k": [1]}}]
)  # fmt: skip
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        inner.map(lambda item: {"type": "array", "items": item, "maxItems": 2}),
        st.dictionaries(st.sampled_from(["a", "b\n", "<|theft|>"]), inner, min_size=1, max_size=2).map(
            lambda items: {
                "type": "object",
                "properties": items,
                "required": list(items),
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=4,
)


def allows(schema, value):
    """A naive validator of the keywords above."""
    if "enum" in schema:
        return value in schema["enum"]
    if "const" in schema:
        return value == schema["const"]
    kind = schema["type"]
    if kind == "object":
        return set(value) == set(schema["properties"]) and all(
            allows(schema["properties"][key], item) for key, item in value.items()
        )
    if kind == "array":
        return len(value) <= 2 and all(allows(schema["items"], item) for item in value)
    if kind == "string":
        return isinstance(value, str) and len(value) <= 4
    if kind == "integer":
        return type(value) is int and 0 <= value <= 7
    return isinstance(value, bool) if kind == "boolean" else value is None


@settings(max_examples=60)
@given(schema=SCHEMAS, seed=st.integers(0, 2**20))
def test_any_walk_through_any_schema_ends_in_json_that_it_allows(grammars, tokenizer, schema, seed):
    draw, matcher, written = random.Random(seed), grammars.json(schema).begin(), []
    for _ in range(400):
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), bitorder="little")).tolist()
        # White space may be written at many places, of which the walk would be full.
        wanted = [i for i in allowed if tokenizer.decode([i]).strip()] or allowed
        token_id = tokenizer.eos_token_id if tokenizer.eos_token_id in allowed else draw.choice(wanted)
        assert matcher.accept(token_id)
        if token_id == tokenizer.eos_token_id:
            text = tokenizer.decode(written, clean_up_tokenization_spaces=False)
            assert allows(schema, json.loads(text)), text
            return
        written.append(token_id)
    raise AssertionError("the walk does not end")
