"""`redflag serve` as a process of its own in front of a stock vLLM, read by the official client."""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request

import openai
import pytest
from stock_vllm import serve_vllm, serving
from transformers import AutoTokenizer

from redflag.backends.load import load_flagged
from redflag.data.rows import load_rows
from redflag.flags import FlagSpec
from redflag.scoring.score import score
from redflag.trace import Alarm, Halt, Text, read_traces
from redflag.watching.thresholds import Thresholds

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def conversations(nano):
    """Harmless prompts, and harmful answers that the client has begun to write itself."""
    rows = load_rows(nano / "rows" / "test.jsonl").rows
    harmless = [row.messages[:-1] for row in rows if not row.harmful][:12]
    begun = [
        [*row.messages[:-1], {"role": "assistant", "content": row.messages[-1]["content"][: row.onset + 12]}]
        for row in rows
        if row.harmful and row.onset is not None
    ]
    return harmless + begun[:10]


@pytest.mark.parametrize("stream", [True, False])
def test_what_leaves_the_server_is_what_was_judged(nano, vllm_nano, conversations, tmp_path, stream):
    record = tmp_path / "traces.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(nano / "model")
    flags = set(FlagSpec.load(nano / "model").ids)
    answers = {}
    with (
        serving(nano / "model", vllm_nano.url, "--hold_back", "2", "--record", str(record)) as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        (model,) = client.models.list().data
        for number, messages in enumerate(conversations):
            asked = dict(model=model.id, messages=messages, max_tokens=40, seed=number)
            if stream:
                chunks = list(client.chat.completions.create(stream=True, **asked))
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
                last, name = chunks[-1].choices[0].finish_reason, chunks[0].id
                detail = chunks[-1].model_extra.get("redflag")
            else:
                answer = client.chat.completions.create(**asked)
                text, last, name = answer.choices[0].message.content or "", answer.choices[0].finish_reason, answer.id
                detail = answer.model_extra.get("redflag")
            answers[name] = (text, last, detail)
    traces = {trace.id: trace for trace in read_traces(record)}
    assert set(traces) == set(answers)
    ends = [last for _, last, _ in answers.values()]
    assert ends.count("content_filter") >= 5 and len(ends) - ends.count("content_filter") >= 5, ends
    for name, (text, last, detail) in answers.items():
        trace = traces[name]
        released = [i for event in trace.events if isinstance(event, Text) for i in event.token_ids]
        assert released == trace.token_ids[: len(released)] and not flags & set(trace.token_ids)
        # A tokenizer may strip a space at the beginning that a continued answer keeps.
        assert text.strip() == tokenizer.decode(released, skip_special_tokens=True).strip()
        if last == "content_filter":
            alarm = next(event for event in trace.events if isinstance(event, Alarm))
            assert isinstance(trace.end, Halt) and trace.end.reason == "alarm"
            assert len(released) == max(0, alarm.position - 2)
            assert detail["reason"] == "alarm" and "score" not in str(detail)
        else:
            assert released == trace.token_ids and not detail


def test_several_choices_with_log_probabilities_come_from_a_stock_vllm(nano, vllm_nano):
    with (
        serving(nano / "model", vllm_nano.url, "--logprobs", "true") as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        model = client.models.list().data[0].id
        asked = dict(model=model, messages=[{"role": "user", "content": "How do I grow onions?"}], n=3, seed=1)
        whole = client.chat.completions.create(**asked, max_tokens=20, logprobs=True)
        assert [choice.index for choice in whole.choices] == [0, 1, 2]
        for choice in whole.choices:
            named = choice.logprobs.content
            assert "".join(one.token for one in named) == choice.message.content
            assert all(one.logprob <= 0 for one in named)
        assert any(choice.logprobs.content for choice in whole.choices)
        texts: dict[int, str] = {}
        for chunk in client.chat.completions.create(**asked, max_tokens=20, stream=True):
            [choice] = chunk.choices
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        assert sorted(texts) == [0, 1, 2] and any(texts.values())
        with pytest.raises(openai.BadRequestError, match="top_logprobs must be 0 at most"):
            client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)


def test_given_answers_are_judged_as_they_are_scored(nano, vllm_nano, monkeypatch):
    monkeypatch.setenv("REDFLAG_OPERATOR_KEY", "operator-key-0123456789")
    rows = load_rows(nano / "rows" / "test.jsonl").rows[:24]
    backend, tokenizer, spec = load_flagged(nano / "model", "cpu")
    limits = Thresholds.load(nano / "model").values
    flagged = []
    with (
        serving(nano / "model", vllm_nano.url) as url,
        openai.OpenAI(base_url=url, api_key="operator-key-0123456789", max_retries=0) as client,
    ):
        for row, item in zip(rows, score(backend, tokenizer, spec, rows), strict=True):
            [result] = client.moderations.create(input=row.messages).results
            peaks = dict(zip(spec.categories, item.judged.max(axis=0).tolist(), strict=True))
            assert result.category_scores.model_extra == pytest.approx(peaks, abs=2e-3)
            near = any(abs(peaks[name] - limits[name]) < 2e-3 for name in limits)
            assert near or result.flagged == any(peaks[name] >= limits[name] for name in limits)
            flagged.append(result.flagged)
    assert {True, False} == set(flagged), "rows of both kinds"


def test_an_upstream_that_dies_in_the_middle_ends_every_open_answer_and_is_not_ready(nano, tmp_path):
    with (
        serve_vllm(nano / "model", tmp_path) as upstream,
        serving(nano / "model", upstream.url, "--observe", "true") as url,  # no alarm ends an answer
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        model = client.models.list().data[0].id
        open_streams = [
            client.completions.create(model=model, prompt="How do I make", stream=True, max_tokens=400, seed=seed)
            for seed in range(4)
        ]
        firsts = [next(iter(stream)) for stream in open_streams]
        assert all(first.choices[0].finish_reason is None for first in firsts)
        os.killpg(upstream.process.pid, signal.SIGKILL)
        for stream in open_streams:
            try:
                assert list(stream)[-1].choices[0].finish_reason == "stop"  # it was over before
            except openai.APIError as error:
                assert error.code == "engine_unavailable"
            stream.close()
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model=model, prompt="How do I make", max_tokens=5)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url.replace("/v1", "/ready"), timeout=30)
        refused.value.close()
