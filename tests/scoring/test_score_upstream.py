"""Scoring by servers: the same numbers as the weights in this process, whoever dies, refuses or is slow meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scoring_upstream import PAIRS, SPEC, Scoring, assert_exact, connect, exact, scored, short_pauses
from upstream import EOS

from redflag.backends.upstreams import Upstreams
from redflag.errors import RedflagError

__all__ = ["short_pauses"]


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
    assert capsys.readouterr().err.count("its rows go to the 1 remaining servers") == 1


def test_with_no_server_left_the_rows_before_are_there_and_one_sentence() -> None:
    with Scoring(dies_after=9).serve() as one, Scoring(dies_after=5).serve() as two, connect(one, two) as scorer:
        found = []
        with pytest.raises(
            RedflagError, match=r"No upstream server is left \(the server .* failed.*Start a server and run"
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
    ("status", "said"), [(400, "refused the request .400: not this one"), (500, "500: not this one, 3 times")]
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
        with pytest.raises(RedflagError, match="each only once"):
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
