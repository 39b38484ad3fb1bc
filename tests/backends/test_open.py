"""`redflag.backends.open`: folder and addresses -> what measures."""

from __future__ import annotations

import asyncio
import shutil
import sys
from typing import Any

import pytest

from redflag import cli
from redflag.backends import Sampling, open
from redflag.backends.hf import HFBackend
from redflag.backends.remote import RemoteBackend
from redflag.backends.turns import Turns
from redflag.errors import RedflagError
from redflag.server import log


@pytest.mark.parametrize("opener", [open.open_backend, open.open_scorer])
def test_options_of_a_server_are_refused_where_the_model_runs_here(opener: Any) -> None:
    with pytest.raises(RedflagError, match="api_key, retries must come with upstream"):
        opener("anywhere", api_key="x", retries=2)


def test_an_engine_in_this_process_takes_turns_and_is_proved_by_a_step(backend: HFBackend) -> None:
    served, probe = open.for_event_loop(backend, 2, 3)
    assert isinstance(served, Turns) and served.eos_ids == backend.eos_ids

    async def probed() -> None:
        await probe()
        await served.aclose()
        with pytest.raises(ConnectionError):
            await probe()

    asyncio.run(probed())


def test_a_server_is_driven_as_it_is_and_proved_by_a_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    async def shake_hands(backend: RemoteBackend) -> None:
        asked.append(backend)

    monkeypatch.setattr("redflag.backends.remote_handshake.shake_hands", shake_hands)
    remote = RemoteBackend("http://127.0.0.1:9", [5], [1])
    served, probe = open.for_event_loop(remote, 1, 0)
    asyncio.run(probe())
    assert served is remote and asked == [remote]


@pytest.mark.parametrize("folder", ["model", "base"])
def test_a_writer_is_a_model_flagged_or_not(nano: Any, folder: str) -> None:
    backend, tokenizer, spec = open.open_writer(nano / folder, device="cpu")
    ids = tokenizer("The sea is")["input_ids"]
    steps = list(backend.stream(ids, Sampling(max_new_tokens=3, temperature=0.0)))
    assert steps and not {step.token_id for step in steps} & set(spec.ids)


@pytest.mark.parametrize(
    "words",
    [
        "generate --model {0}/model Hello",
        "chat --model {0}/model",
        "serve --model {0}/model --port 0",
        "score --model {0}/model --input {0}/rows.jsonl --output {1}/scored.jsonl",
        "calibrate --model {1}/model --input {0}/rows.jsonl --target_fpr 0.3",
        "synthesize --forecasts {0}/rows.jsonl --model {0}/model --judge oracle --yes true --output_dir {1}/out",
    ],
)
def test_no_verb_chooses_its_engine_elsewhere(words: str, origin: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """So a further engine needs its own module and `redflag.backends.open`."""
    shutil.copytree(origin / "model", tmp_path / "model")
    callers = []

    def load_flagged(*_: Any) -> Any:
        callers.append(sys._getframe(1).f_globals["__name__"])
        raise RedflagError("enough")

    monkeypatch.setattr("redflag.backends.load.load_flagged", load_flagged)
    try:
        assert cli.main(words.format(origin, tmp_path).split()) == 2
    finally:
        log.teardown()
    assert callers == ["redflag.backends.open"]


def test_a_served_scorer_finds_its_way_again_after_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import redflag.backends.remote_score as module

    found, faults = [], []

    async def find_way(backend):
        found.append(backend)
        return f"way {len(found)}"

    async def score_response(backend, way, prompt, response):
        if faults:
            raise faults.pop()
        return way, prompt, response

    monkeypatch.setattr(module, "find_way", find_way)
    monkeypatch.setattr(module, "score_response", score_response)
    score = open.event_loop_scorer(RemoteBackend("http://127.0.0.1:9", [5], [1]))

    async def main():
        assert await score([2], [3]) == ("way 1", [2], [3])
        assert await score([4], [3]) == ("way 1", [4], [3]), "it is not asked twice"
        for error, way in ((RedflagError("refused"), "way 1"), (ConnectionError("lost"), "way 2")):
            faults.append(error)
            with pytest.raises(type(error)):
                await score([2], [3])
            assert (await score([2], [3]))[0] == way

    asyncio.run(main())
