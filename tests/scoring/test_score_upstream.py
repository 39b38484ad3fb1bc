"""Scoring by servers: the same numbers as the weights in this process, whoever dies, refuses or is slow meanwhile."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from upstream import EOS, FLAG, VOCABULARY, Upstream, log_softmax, logits_of

from redflag.backends import remote as remote_module
from redflag.backends.hf import HFBackend
from redflag.backends.upstreams import Upstreams
from redflag.calibrating import calibrate
from redflag.data.rows import load_rows, write_rows
from redflag.errors import RedflagError
from redflag.flags import Flag, FlagSpec
from redflag.scoring import options as module
from redflag.scoring.fitting import fit
from redflag.scoring.marker import ServedSource
from redflag.scoring.prompts import FlagReader, score_prompts
from redflag.scoring.score import ScoreArguments, read_scored, run
from redflag.watching.thresholds import Thresholds

SPEC = FlagSpec(flags=(Flag("harm", "<|a|>", id=FLAG), Flag("fraud", "<|b|>", id=17)), run_id="run-1")
PAIRS = [([20, 30 + i, 40], [10 + (i * 7 + t) % 40 for t in range(i % 9)]) for i in range(24)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_FIRST_PAUSE", 0.01)


class Scoring(Upstream):
    """An honest server that also answers whole, and what can go wrong with it.

    Attributes:
        prefill: Whether it knows `prompt_logprob_token_ids`; "wrong" gives other numbers there.
        faults: Statuses that it answers before it does as asked; one per request for a response.
        refuses: A prompt that begins so gets the status that is said.
        dies_after: Requests until it answers nothing at all any more.
        slow: Seconds for each request.
    """

    def __init__(self, **settings: Any) -> None:
        own = {"prefill": False, "faults": [], "refuses": {}, "dies_after": math.inf, "slow": 0.0}
        for name, default in own.items():
            setattr(self, name, settings.pop(name, default))
        super().__init__(**settings)
        self.whole, self.most_open, self.dead = 0, 0, False

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["stream"]:
            return await super().completions(request)
        return await self.measured(request, body, self.complete)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        if not self.prefill:
            raise web.HTTPNotFound
        return await self.measured(request, await request.json(), self.prefilled)

    async def list_models(self, request: web.Request) -> web.Response:
        if self.dead:
            assert request.transport is not None
            request.transport.abort()
        return await super().list_models(request)

    async def measured(self, request: web.Request, body: dict[str, Any], answer: Any) -> web.StreamResponse:
        prompt = body.get("token_ids") or body["prompt"]
        ids = prompt[0] if isinstance(prompt[0], list) else prompt
        asked = ids[0] == 20  # not by the handshake
        self.whole += asked
        self.dead |= self.whole > self.dies_after
        if self.dead:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if asked and self.faults:
            return web.json_response({"error": {"message": "a fault"}}, status=self.faults.pop(0))
        if status := self.refuses.get(ids[1]):
            return web.json_response({"error": {"message": "not this one"}}, status=status)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(self.slow)
        self.open -= 1
        return web.json_response(answer(body))

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        several = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        choices = []
        for index, prompt in enumerate(several):
            values = log_softmax(logits_of(prompt))
            best = sorted(range(VOCABULARY), key=values.__getitem__, reverse=True)
            shown = body.get("logprob_token_ids") or best[: body["logprobs"]]
            top = {f"token_id:{i}": values[i] for i in {best[0], *shown}}
            name = f"token_id:{best[0]}"
            logprobs = {"tokens": [name], "token_logprobs": [top[name]], "top_logprobs": [top]}
            choices.append({"index": index, "text": "x", "logprobs": logprobs, "finish_reason": "length"})
            if "prompt_logprobs" in body:
                choices[-1]["prompt_logprobs"] = [None, *(self.ranked(prompt, t) for t in range(1, len(prompt)))]
        return {"choices": choices[::-1]}  # in whatever order

    def ranked(self, prompt: list[int], t: int) -> dict[str, dict[str, Any]]:
        values = log_softmax(logits_of(prompt[:t]))
        best = sorted(range(VOCABULARY), key=values.__getitem__, reverse=True)
        own = prompt[t]  # beyond the vocabulary where the rows are another tokenizer's
        shown = {i: i for i in best[:20]} | {own: own % VOCABULARY}
        return {str(i): {"logprob": values[k], "rank": best.index(k) + 1} for i, k in shown.items()}

    def prefilled(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, sampling = body["token_ids"], body["sampling_params"]
        first, rows = sampling["prompt_logprob_start"], sampling["prompt_logprob_token_ids"]
        assert len(rows) == len(ids) - 1 - first
        wrong = self.prefill == "wrong"
        scores = [[log_softmax(logits_of(ids[: first + i + 1 + wrong]))[k] for k in row] for i, row in enumerate(rows)]
        data = io.BytesIO()
        np.save(data, np.array(scores, dtype=np.float32))
        return {"prompt_token_id_logprobs": base64.b64encode(data.getvalue()).decode()}


def exact(prompt: list[int], response: list[int]) -> np.ndarray:
    steps = [log_softmax(logits_of(prompt + response[:t])) for t in range(len(response))]
    return np.exp([[step[i] for i in SPEC.ids] for step in steps]).reshape(-1, 2)


def connect(*servers: Upstream, **options: Any) -> Upstreams:
    return Upstreams([server.url for server in servers], SPEC, frozenset({EOS}), **{"retries": 1} | options)


def scored(scorer: Upstreams, pairs: Any = PAIRS, batch_size: int = 3) -> list[np.ndarray]:
    return list(scorer.score(pairs, batch_size=batch_size))


def assert_exact(found: list[np.ndarray], pairs: Any = PAIRS) -> None:
    assert len(found) == len(pairs)
    for probs, pair in zip(found, pairs, strict=True):
        assert probs.dtype == np.float32 and np.allclose(probs, exact(*pair), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("prefill", "way"), [(False, "steps"), (True, "prefill"), ("wrong", "steps")])
def test_the_fastest_way_that_is_exact_is_taken(prefill: Any, way: str) -> None:
    with Scoring(prefill=prefill).serve() as server, connect(server) as scorer:
        assert scorer.ways == {server.url: way} and scorer.context_length == 64
        assert_exact(scored(scorer))
        requests = server.whole
        full = [([20, 31], [30] * 62)]  # the whole context: no room for a token of the server's own
        assert_exact(scored(scorer, full), full)
        assert requests == sum(bool(response) for _, response in PAIRS), "one request per response, none for none"


def test_a_long_response_travels_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redflag.backends.remote_score._AT_ONCE", 5)
    with Scoring().serve() as server, connect(server) as scorer:
        pairs = [([20, 30], [10 + t for t in range(12)])]
        assert_exact(scored(scorer, pairs), pairs)
        assert server.whole == 3


def test_bounds_are_never_below_and_exact_for_a_likely_flag() -> None:
    with Scoring(knows_ids=False).serve() as server:
        with pytest.raises(RedflagError, match="upper_bound"):
            connect(server)
        with connect(server, upper_bound=True) as scorer:
            assert scorer.ways == {server.url: "bound"} and scorer.upper_bound
            found = scored(scorer)
    likely = 0
    for probs, pair in zip(found, PAIRS, strict=True):
        expected = exact(*pair)
        assert (probs >= expected - 1e-7).all()
        assert np.allclose(probs[expected > 0.05], expected[expected > 0.05], rtol=1e-5)
        likely += int((expected > 0.05).sum())
    assert likely


def test_rows_of_a_dead_server_go_to_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with Scoring(slow=0.01).serve() as one, Scoring(dies_after=4).serve() as two, connect(one, two) as scorer:
        assert_exact(scored(scorer))
        assert list(scorer.ways) == [one.url] and two.whole > 4
    assert capsys.readouterr().err.count("its rows go to the 1 that are left") == 1


def test_with_no_server_left_the_rows_before_are_there_and_one_sentence() -> None:
    with Scoring(dies_after=9).serve() as one, Scoring(dies_after=5).serve() as two, connect(one, two) as scorer:
        found = []
        with pytest.raises(
            RedflagError, match=r"no upstream server is left \(the server .* failed.*start one and give"
        ):
            for probs in scorer.score(PAIRS, batch_size=1):
                found.append(probs)
        assert_exact(found, PAIRS[: len(found)])
        assert 9 <= len(found) < len(PAIRS)


@pytest.mark.parametrize("faults", [[503], [429, 502], [503, 504, 503, 504]])
def test_a_busy_server_is_asked_again(faults: list[int]) -> None:
    with Scoring(faults=list(faults)).serve() as server, connect(server) as scorer:
        assert_exact(scored(scorer))
        assert server.faults == []


@pytest.mark.parametrize(
    ("status", "said"), [(400, "refuses the request .400: not this one"), (500, "500: not this one, 3 times")]
)
def test_a_row_that_no_server_takes_is_an_error_and_costs_no_server(status: int, said: str) -> None:
    refuses = {30 + 13: status}
    with Scoring(refuses=refuses).serve() as one, Scoring(refuses=refuses).serve() as two, connect(one, two) as scorer:
        found = []
        with pytest.raises(RedflagError, match=said):
            for probs in scorer.score(PAIRS, batch_size=2):
                found.append(probs)
        assert_exact(found, PAIRS[:13])
        assert len(found) == 13 and len(scorer.ways) == 2
        assert_exact(scored(scorer, PAIRS[:5]), PAIRS[:5])


def test_a_server_that_cannot_be_judged_by_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    with Scoring().serve() as good, Scoring(mode="processed").serve() as bad:
        with connect(bad, good) as scorer:
            assert list(scorer.ways) == [good.url]
            assert_exact(scored(scorer))
        assert f"left out: The upstream server {bad.url} does not measure raw" in capsys.readouterr().err
        with pytest.raises(RedflagError, match="--logprobs-mode raw_logprobs"):
            connect(bad)
        with pytest.raises(RedflagError, match="must stand once"):
            Upstreams([good.url, good.url + "/v1"], SPEC, frozenset({EOS}))
    with pytest.raises(RedflagError, match="does not answer"):
        connect(good)


def test_a_server_gets_no_more_at_a_time_than_it_should() -> None:
    with Scoring(slow=0.01).serve() as one, Scoring(slow=0.02).serve() as two, connect(one, two) as scorer:
        scored(scorer, batch_size=4)
        assert one.most_open == two.most_open == 4 and one.whole > two.whole


def test_a_consumer_may_leave_and_come_back() -> None:
    with Scoring(slow=0.005).serve() as server, connect(server) as scorer:
        steps = scorer.score(PAIRS, batch_size=2)
        next(steps)
        steps.close()
        assert_exact(scored(scorer))


FLAGS = {"top_logprobs": [{"token_id:9": -1.0, "token_id:5": -2.0, "token_id:17": -3.0}]}
SHAPES: dict[str, Any] = {
    "no JSON object": [],
    "no choices": {},
    "too few": {"choices": []},
    "no log-probabilities": {"choices": [{"index": 0, "logprobs": None}]},
    "another token's": {"choices": [{"index": 0, "logprobs": {"top_logprobs": [{"token_id:9": -1.0}]}}]},
    "copied from another position": {"choices": [{"index": 0, "logprobs": {"tokens": ["token_id:8"], **FLAGS}}]},
    "not the chosen token's": {
        "choices": [{"index": 0, "logprobs": {"tokens": ["token_id:9"], "token_logprobs": [-3.0], **FLAGS}}]
    },
    "no log-probability": {
        "choices": [{"index": 0, "logprobs": {"top_logprobs": [{"token_id:5": 2, "token_id:17": 0}]}}]
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_answer_of_another_shape_is_an_error_and_no_number(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Scoring().serve() as server, connect(server) as scorer:
        monkeypatch.setattr(server, "complete", lambda body: SHAPES[shape])
        with pytest.raises(RedflagError, match=rf"the server (sent|{server.url} sent).*3 times"):
            scored(scorer, [([20, 30], [10])])


def test_bounds_of_another_position_are_an_error_and_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    with Scoring().serve() as server, connect(server, upper_bound=True) as scorer:
        ranked = server.ranked

        def without_own(prompt: list[int], t: int) -> dict[str, dict[str, Any]]:
            return {name: entry for name, entry in ranked(prompt, t).items() if name != str(prompt[t])}

        monkeypatch.setattr(server, "ranked", without_own)
        with pytest.raises(RedflagError, match=r"of another token.*3 times"):
            scored(scorer, [([20, 30], [10, 11])])


@pytest.fixture
def verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, spec: FlagSpec, conversation: Any
) -> Iterator[Any]:
    """Runs the verb in front of servers; the conversations are those of another tokenizer, which they cannot know."""
    write_rows(tmp_path / "rows.jsonl", [conversation("The sea is wide. "[: 3 + i], id=str(i)) for i in range(12)])

    def connected(directory: str, urls: list[str], **options: Any) -> Any:
        own = FlagSpec(flags=SPEC.flags[:1], run_id="run-1")
        options = {"model": options["model"], "api_key": options["api_key"], "upper_bound": options["upper_bound"]}
        return Upstreams(urls, own, frozenset({EOS}), retries=0, **options), tokenizer, spec

    monkeypatch.setattr(module, "open_scorer", connected)
    output = tmp_path / "scored.jsonl"

    def call(*servers: Upstream, **options: Any) -> list[dict[str, Any]]:
        urls = [server.url for server in servers]
        paths = {"model": "m", "input": str(tmp_path / "rows.jsonl"), "output": str(output)}
        run(ScoreArguments(**paths, upstream=urls, batch_size=2, max_length=64, **options))
        return read_scored(output)

    yield call


def test_the_verb_goes_on_where_its_servers_left_off(verb: Any, tmp_path: Path) -> None:
    with Scoring().serve() as server:
        whole = verb(server)
    (tmp_path / "scored.jsonl").unlink()
    with Scoring().serve() as server, pytest.MonkeyPatch.context() as patch:
        count = iter(range(1000))

        def complete(body: dict[str, Any]) -> dict[str, Any]:
            if len(body["prompt"]) > 1 and next(count) > 7:
                server.dead = True
                return {}
            return Scoring.complete(server, body)

        patch.setattr(server, "complete", complete)
        with pytest.raises(RedflagError, match=r"^row '\d+': no upstream server is left"):
            verb(server)
    kept = len((tmp_path / "scored.jsonl.partial").read_text().splitlines())
    assert 0 < kept < 12
    with Scoring().serve() as server:
        assert verb(server) == whole
    assert [row["id"] for row in whole] == [str(i) for i in range(12)] and "upper_bound" not in whole[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "scored.jsonl"]


def test_bounds_are_named_as_such_in_the_rows_and_do_not_mix_with_exact_ones(verb: Any, tmp_path: Path) -> None:
    with Scoring().serve() as server:
        assert all(row["upper_bound"] is True for row in verb(server, upper_bound=True))
        assert "upper_bound" not in verb(server)[0]


def test_a_key_that_is_not_there_is_said(verb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with Scoring(api_key="secret").serve() as server:
        with pytest.raises(RedflagError, match="NO_KEY, which is not set"):
            verb(server, upstream_key_env="NO_KEY")
        with pytest.raises(RedflagError, match="give the API key"):
            verb(server)
        monkeypatch.setenv("THE_KEY", "secret")
        assert len(verb(server, upstream_key_env="THE_KEY")) == 12


@pytest.mark.parametrize("way", ["steps", "prefill", "bound"])
def test_S0_4_servers_measure_after_a_prompt_flags_and_markers_of_ordinary_tokens(
    way: str, tokenizer: Any, conversation: Any
) -> None:
    rows = [conversation("Blue.", prompt="The sea. " * (1 + i % 3), id=str(i)) for i in range(9)]
    markers = [[30, 41, 30], [22], [9, 8]]
    tokens = sorted({token for marker in markers for token in marker})
    bound = way == "bound"
    with Scoring(prefill=way == "prefill", knows_ids=not bound).serve() as server:
        with connect(server, upper_bound=bound) as scorer:
            assert scorer.ways == {server.url: way}
            prompts = [[20, 30 + i, 40] for i in range(7)]
            reader = FlagReader(scorer, SPEC)
            probs = [row["flag_probs"][0] for row in reader.read(prompts, batch_size=2)]
            assert all(row.get("upper_bound", False) == bound for row in reader.read(prompts[:1], 1))
            if way == "steps":
                server.whole = 0
                found = list(score_prompts(reader, tokenizer, SPEC, rows, batch_size=2, max_length=40))
                assert [row["id"] for row in found] == [str(i) for i in range(9)] and len(found[0]["peak"]) == 2
        own = FlagSpec(tuple(Flag(str(token), id=token) for token in tokens))
        with Upstreams([server.url], own, frozenset({EOS}), retries=1, upper_bound=bound) as scorer:
            source = ServedSource(scorer, tokens)
            pairs = [(prompt, marker) for prompt in prompts for marker in markers]
            logs = list(source.log_probs(pairs, batch_size=4))
    for prompt, row in zip(prompts, probs, strict=True):
        expected = exact(prompt, [0])[0]
        assert (np.array(row) >= expected - 1e-7).all() and (bound or np.allclose(row, expected, rtol=1e-5))
    for (prompt, marker), values in zip(pairs, logs, strict=True):
        steps = [log_softmax(logits_of(prompt + marker[:t]))[token] for t, token in enumerate(marker)]
        assert (values >= np.array(steps) - 1e-5).all() and (bound or np.allclose(values, steps, atol=1e-5))


@pytest.mark.slow
def test_S0_4_a_stock_vllm_measures_prompts_and_markers_as_transformers_do(
    vllm_nano: Any, nano: Path, tmp_path: Path
) -> None:
    lines = (nano / "rows" / "test.jsonl").read_text().splitlines()[:20]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    paths = {"model": str(nano / "model"), "input": str(tmp_path / "rows.jsonl"), "prompts": True, "device": "cpu"}
    for name, marker in (("flag", []), ("marker", ["Sorry, I cannot", "Never"])):
        found = []
        for how in ([], [vllm_nano.url]):
            output = str(tmp_path / f"{name}{len(how)}.jsonl")
            run(ScoreArguments(**paths, output=output, marker=marker, upstream=how))
            found.append([row["flag_logprobs"][0] if marker else row["peak"] for row in read_scored(output)])
        worst = float(np.abs(np.array(found[0]) - np.array(found[1])).max())
        print(json.dumps({name: worst}))
        assert len(found[0]) == 20 and worst < (1e-2 if marker else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("upper_bound", [False, True])
def test_a_stock_vllm_measures_what_transformers_measures(vllm_nano: Any, nano: Path, upper_bound: bool) -> None:
    from redflag.backends.load import load_flagged

    backend, tokenizer, spec = load_flagged(nano / "model", device=None)
    assert isinstance(backend, HFBackend)
    fitted = [
        fit(tokenizer, spec, row, i, 512) for i, row in enumerate(load_rows(nano / "rows" / "test.jsonl").rows[:24])
    ]
    pairs = [(item.prompt_ids, item.response_ids + item.tail_ids) for item in fitted]
    expected = backend.score(pairs)
    with ExitStack() as stack:
        scorer = stack.enter_context(Upstreams([vllm_nano.url], spec, backend.eos_ids, upper_bound=upper_bound))
        assert scorer.ways == {vllm_nano.url: "bound" if upper_bound else "steps"}
        found = list(scorer.score(pairs, batch_size=8))
    worst = max(float(np.abs(one - other).max()) for one, other in zip(found, expected, strict=True))
    high = sum(float(one.max()) > 0.5 for one in expected)
    print(json.dumps({"rows": len(pairs), "rows with p > 0.5": high, "largest difference": worst}))
    assert high > 2
    if not upper_bound:
        assert worst < 1e-3
    for one, other in zip(found, expected, strict=True):
        assert (one >= other - 1e-4).all()
        assert np.allclose(one[other > 0.05], other[other > 0.05], atol=1e-3)


@pytest.mark.slow
def test_thresholds_are_calibrated_through_a_stock_vllm(vllm_nano: Any, nano: Path, tmp_path: Path) -> None:
    rows = [row for row in load_rows(nano / "rows" / "calibration.jsonl") if not row.harmful][:24]
    write_rows(tmp_path / "rows.jsonl", rows)
    values = []
    for number, upstream in enumerate(([], [vllm_nano.url])):
        model = shutil.copytree(nano / "model", tmp_path / f"model{number}")
        (model / "thresholds.json").unlink()
        options = {"target_fpr": 0.05, "held_out": 0.0, "device": "cpu", "upstream": upstream}
        calibrate.run(calibrate.CalibrateArguments(model=str(model), input=str(tmp_path / "rows.jsonl"), **options))
        values.append(Thresholds.load(model).values["harm"])
    assert values[0] != values[1], "the servers were not asked"
    assert values[0] == pytest.approx(values[1], rel=1e-3)
