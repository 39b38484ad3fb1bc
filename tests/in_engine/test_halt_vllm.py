"""The in-engine halt inside a stock vLLM: its own environment, its own process, a trained nano model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import stock_vllm
from transformers import AutoTokenizer

from redflag.data.rows import load_rows
from redflag.flags import FlagSpec
from redflag.in_engine.halt_request import halted_by, request_fields
from redflag.watching.monitor import Monitor, MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STEPS, REQUESTS = 40, 32

# vLLM's second model runner is written in Triton, which compiles for GPUs only. Triton's own interpreter runs the same
# kernels here, slowly, once vLLM believes that there is a driver.
INTERPRETER = """
import types, triton.backends

driver = type("Driver", (), {"is_active": staticmethod(lambda: False)})
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
"""


@pytest.fixture(scope="module", params=["v1", "v2"])
def server(
    request: pytest.FixtureRequest, nano: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[stock_vllm.StockVLLM]:
    """A vLLM with the halt in it, behind either of its interfaces."""
    if not stock_vllm.PYTHON.exists():
        pytest.skip(f"no stock vLLM: {stock_vllm.PYTHON} is missing; run scripts/install-vllm-cpu")
    folder = tmp_path_factory.mktemp(request.param)
    path, settings = ROOT.as_posix(), "VLLM_USE_V2_MODEL_RUNNER=0"
    if request.param == "v2":
        if not os.environ.get("REDFLAG_HALT_V2"):
            pytest.skip("the second interface runs in Triton's interpreter, for minutes: set REDFLAG_HALT_V2=1")
        (folder / "site").mkdir()
        (folder / "site/sitecustomize.py").write_text(INTERPRETER)
        path, settings = f"{folder}/site:{path}", "VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1"
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" {settings} exec "{stock_vllm.PYTHON}" "$@"\n')
    python.chmod(0o755)
    options = ["--logits-processors", f"redflag.in_engine.halt_{request.param}:HaltProcessor"]
    # Few tokens per step: prompts are read in pieces. Few blocks: with many requests at once some are put aside.
    options += ["--max-num-batched-tokens", "64", "--max-num-seqs", "64"]
    options += ["--num-gpu-blocks-override", "100", "--block-size", "32", "--no-enable-prefix-caching"]
    options += ["--max-model-len", "512"]  # one request must fit into these blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock_vllm, "PYTHON", python)
        with stock_vllm.serve_vllm(nano / "model", folder, *options) as running:
            yield running


@pytest.fixture(scope="module")
def url(server: stock_vllm.StockVLLM) -> str:
    return server.url


@pytest.fixture(scope="module")
def spec(nano: Path) -> FlagSpec:
    return FlagSpec.load(nano / "model")


def post(url: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps({"model": "nano", **body}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def greedy(url: str, prompt: list[int], **body: Any) -> Any:
    body = {"max_tokens": STEPS, "temperature": 0.0, "return_token_ids": True, **body}
    return post(url, prompt=prompt, **body)["choices"][0]


def all_at_once(call: Any, *columns: Any) -> list[Any]:
    with ThreadPoolExecutor(len(columns[0])) as pool:
        return list(pool.map(call, *columns))


@dataclasses.dataclass
class Observed:
    """A response as path A sees it: nothing in the engine, the flag banned by a bias and measured all the same."""

    prompt: list[int]
    tokens: list[int]
    probs: list[float]


@pytest.fixture(scope="module")
def observed(nano: Path, url: str, spec: FlagSpec) -> list[Observed]:
    """Responses with probabilities that are not all 0 or all 1, to prompts short and long."""
    tokenizer = AutoTokenizer.from_pretrained(nano / "model")
    (flag,) = spec.ids
    rows = list(load_rows(nano / "rows/test.jsonl"))[:80]
    asked = [f"<|user|>{row.messages[0]['content']}<|end|><|assistant|>" for row in rows]
    texts = [
        "".join(asked[: 3 * (i % 5)]) + ask + row.messages[-1]["content"][:30]
        for i, (row, ask) in enumerate(zip(rows, asked, strict=True))
    ]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def watch(prompt: list[int]) -> Observed:
        more = {"logprobs": 1, "logprob_token_ids": [flag], "return_tokens_as_token_ids": True}
        choice = greedy(url, prompt, logit_bias={str(flag): -100}, **more)
        tops = choice["logprobs"]["top_logprobs"]
        return Observed(prompt, choice["token_ids"], [math.exp(top[f"token_id:{flag}"]) for top in tops])

    found = [seen for seen in all_at_once(watch, prompts) if 0.01 < max(seen.probs) < 0.999 and len(seen.probs) > 8]
    assert len(found) >= REQUESTS and max(len(seen.prompt) for seen in found) > 100
    return found[:REQUESTS]


def alarm_step(seen: Observed, thresholds: Thresholds) -> int | None:
    monitor = Monitor(thresholds.monitor, 1)
    (threshold,) = thresholds.values.values()
    scores = [monitor.feed([p])[0] for p in seen.probs]
    return next((t for t, score in enumerate(scores) if score >= threshold), None)


def mixed(observed: list[Observed], spec: FlagSpec) -> list[Thresholds | None]:
    """Another monitor and threshold for each response, some that are never reached; none for every fifth."""
    each: list[Thresholds | None] = []
    for i, seen in enumerate(observed):
        config = (
            MonitorConfig(),
            MonitorConfig("run", window=2),
            MonitorConfig("ema", decay=0.4),
            MonitorConfig(warm_up=6),
        )[i % 4]
        monitor = Monitor(config, 1)
        scores = sorted(monitor.feed([p])[0] for p in seen.probs)
        # Between two scores: a draw on the last digit would be a matter of the batch's shape.
        at = (scores[-1] + scores[-3]) / 2 if i % 3 else (1.0 + scores[-1]) / 2
        each.append(None if i % 5 == 4 else Thresholds.manual(max(at, 1e-6), spec.categories, config))
    return each


def test_every_request_halts_at_the_step_that_a_monitor_outside_would_say(url, spec, observed):
    settings = mixed(observed, spec)

    def ask(seen: Observed, thresholds: Thresholds | None) -> Any:
        return greedy(url, seen.prompt, **(request_fields(spec, thresholds) if thresholds else {}))

    answers = all_at_once(ask, observed, settings)
    (flag,) = spec.ids
    halts = set()
    for seen, thresholds, choice in zip(observed, settings, answers, strict=True):
        if thresholds is None:
            alone = greedy(url, seen.prompt)
            assert choice["token_ids"] == alone["token_ids"] and choice["stop_reason"] == alone["stop_reason"]
        elif (at := alarm_step(seen, thresholds)) is None:
            assert choice["token_ids"] == seen.tokens and choice["stop_reason"] != flag
        else:
            halts.add((thresholds.monitor.aggregation, at))
            assert choice["token_ids"] == [*seen.tokens[:at], flag]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", flag)
            assert halted_by(choice["stop_reason"], spec) == "harm"
    assert len(halts) > 8 and {name for name, _ in halts} == {"max", "run", "ema"}


def test_a_stream_ends_with_the_flag_as_its_stop_reason_and_shows_none_of_it(url, spec, observed):
    seen = observed[0]
    thresholds = Thresholds.manual(max(seen.probs) * 0.9, spec.categories)
    body = {"model": "nano", "prompt": seen.prompt, "max_tokens": STEPS, "temperature": 0.0, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps({**body, "return_token_ids": True, **request_fields(spec, thresholds)}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        lines = [line[6:].strip() for line in answer if line.startswith(b"data: ")]
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    tokens = [token for choice in choices for token in choice["token_ids"] or ()]
    at = alarm_step(seen, thresholds)
    assert at is not None and tokens == [*seen.tokens[:at], *spec.ids]
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", *spec.ids)
    assert spec.flags[0].token not in "".join(choice["text"] for choice in choices)


def test_a_flag_is_never_drawn_however_likely(url, spec, observed):
    fields = request_fields(spec, Thresholds.manual(0.01, spec.categories), Policy(observe=True))
    calls = [seen.prompt for seen in sorted(observed, key=lambda seen: -max(seen.probs))[:4]]
    answers = all_at_once(
        lambda prompt: post(
            url, prompt=prompt, max_tokens=STEPS, temperature=1.0, n=2, return_token_ids=True, **fields
        )["choices"],
        calls,
    )
    for choice in (choice for choices in answers for choice in choices):
        assert not set(choice["token_ids"]) & set(spec.ids)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stop_token_ids": []}, "stop_token_ids must list every flag"),
        ({"logit_bias": {"9": 50}}, "changes the logits before the flags are measured"),
        ({"structured_outputs": {"regex": "[a-z ]+"}}, "changes the logits before the flags are measured"),
        ({"min_tokens": 3}, "changes the logits before the flags are measured"),
        ({"stop_token_ids": [99999999]}, "99999999"),
        ({"vllm_xargs": {"redflag_flag_ids": [5]}}, "redflag_thresholds must be a list of numbers"),
    ],
)
def test_a_request_that_could_not_be_kept_is_refused_with_400(url, spec, observed, change, words):
    fields = request_fields(spec, Thresholds.manual(0.5, spec.categories))
    with pytest.raises(urllib.error.HTTPError) as refused:
        greedy(url, observed[0].prompt, **{**fields, **change})
    assert refused.value.code == 400 and words in json.load(refused.value)["error"]["message"]


def test_requests_that_the_engine_puts_aside_halt_no_later(server, url, spec, observed):
    pairs = [pair for pair in zip(observed, mixed(observed, spec), strict=True) if pair[1]]
    before = server.metric("vllm:num_preemptions_total")
    crowd = [seen.prompt for seen in sorted(observed, key=lambda seen: len(seen.prompt))[:16]]
    with ThreadPoolExecutor(1) as beside:
        # One request, so that all are there at once also on a busy machine; half of them are more than the cache holds.
        long = beside.submit(post, url, prompt=crowd, max_tokens=350, temperature=0.0, ignore_eos=True)
        answers = all_at_once(lambda pair: greedy(url, pair[0].prompt, **request_fields(spec, pair[1])), pairs)
        assert len(long.result()["choices"]) == len(crowd)
    assert server.metric("vllm:num_preemptions_total") > before
    for (seen, thresholds), choice in zip(pairs, answers, strict=True):
        at = alarm_step(seen, thresholds)
        halted = choice["stop_reason"] == spec.ids[0]
        shown = choice["token_ids"][: -1 if halted else None]
        assert halted or at is None
        assert shown == seen.tokens[: len(shown)] and len(shown) <= (len(seen.tokens) if at is None else at)
        if thresholds.monitor.aggregation == "max":
            assert (halted, len(shown)) == (at is not None, len(seen.tokens) if at is None else at)
