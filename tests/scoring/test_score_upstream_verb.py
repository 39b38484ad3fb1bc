"""`redflag score` and `calibrate` through servers, scripted and stock vLLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scoring_upstream import SPEC, Scoring, connect, exact, short_pauses
from upstream import EOS, Upstream, log_softmax, logits_of

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

__all__ = ["short_pauses"]


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
        with pytest.raises(RedflagError, match=r"^row '\d+': No upstream server is left"):
            verb(server)
    kept = sum(len(path.read_text().splitlines()) for path in (tmp_path / "scored.jsonl.parts").glob("?????-*"))
    assert 0 < kept < 12
    with Scoring().serve() as server:
        assert verb(server) == whole
    assert [row["id"] for row in whole] == [str(i) for i in range(12)] and "upper_bound" not in whole[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "scored.jsonl"]


@pytest.mark.parametrize("prompts", [False, True])
def test_bounds_are_named_as_such_in_the_rows_and_do_not_mix_with_exact_ones(verb: Any, prompts: bool) -> None:
    with Scoring().serve() as server:
        assert all(row["upper_bound"] is True for row in verb(server, upper_bound=True, prompts=prompts))
        assert not any("upper_bound" in row for row in verb(server, prompts=prompts))


def test_a_key_that_is_not_there_is_said(verb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with Scoring(api_key="secret").serve() as server:
        with pytest.raises(RedflagError, match="the environment variable NO_KEY must be set"):
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
