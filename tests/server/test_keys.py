"""Keys with policies of their own: what holds for whom, and a file that changes while the server runs."""

from __future__ import annotations

import hashlib
import signal

import httpx
import pytest
from running import MODEL, body_of, engine, running, shown_by, start, wait_for

from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.server.audit_log import AuditLog
from redflag.server.keys import Keys, read_keys
from redflag.watching.policy import Policy

PLAIN, STRICT, LOOSE = (f"{name}-key-0123456789" for name in ("plain", "strict", "loose"))
CHAT = "/v1/chat/completions"
FILE = f"""
keys:
  - name: strict
    sha256: {hashlib.sha256(STRICT.encode()).hexdigest()}
    factor: 0.5
    max_tokens: 8
    default_tokens: 4
  - name: loose
    key: {LOOSE}
    thresholds: {{harm: 0.95}}
    action: replace
    replacement: Sorry.
"""


@pytest.fixture
def guard(tokenizer, spec, thresholds, script):
    # Below every threshold but the strict one at token 3, above all but the loose one at token 6.
    _, turns = engine(script("abcdefghij", {3: (0.3, 0.0), 6: (0.9, 0.0)}), tokenizer.eos_token_id)
    return Guard(turns, tokenizer, spec, thresholds, Policy())


@pytest.fixture
def keys(tmp_path, guard):
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    return Keys(path, guard), path


def ask(server, key, route=CHAT, **fields):
    return httpx.post(server.url + route, json=body_of(route, **fields), headers={"Authorization": f"Bearer {key}"})


def text_of(answer):
    choice = answer.json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def test_each_key_has_its_own_thresholds_actions_and_limits(guard, keys, tmp_path):
    audit = AuditLog(tmp_path / "audit.jsonl", guard.thresholds.values)
    limits = Limits(MODEL, api_keys=(PLAIN,), keys=keys[0])
    with running(guard, limits, audit=audit) as server:
        assert text_of(ask(server, PLAIN)) == ("abcdef", "content_filter")
        assert text_of(ask(server, STRICT)) == ("abc", "content_filter")
        assert text_of(ask(server, LOOSE)) == ("abcdefghij", "stop")
        assert [trace.meta.get("key") for trace in server.traces] == [None, "strict", "loose"]
        assert [shown_by(trace) for trace in server.traces] == ["abcdef", "abc", "abcdefghij"]
        # Of harm 0.9 of 0.95 was reached, which a person may want to see; of 0.5 nothing is near that was halted.
        [line] = (tmp_path / "audit.jsonl").read_text().splitlines()
        assert '"near":["harm"]' in line and '"threshold":0.95' in line
        for key in ("another-key-0123456789", "x"):
            assert ask(server, key).status_code == 401


def test_most_tokens_are_the_keys(tokenizer, spec, thresholds, script, tmp_path):
    _, turns = engine(script("abcdefghij"), tokenizer.eos_token_id)
    guard = Guard(turns, tokenizer, spec, thresholds)
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    made = Keys(path, guard)
    with running(guard, Limits(MODEL, api_keys=(PLAIN,), keys=made)) as server:
        assert text_of(ask(server, STRICT)) == ("abcd", "length")
        for asked in (9, 100, -1):
            assert text_of(ask(server, STRICT, max_tokens=asked)) == ("abcdefgh", "length")
        assert text_of(ask(server, PLAIN)) == ("abcdefghij", "stop")
    _, turns = engine(script("abcdefghij"), tokenizer.eos_token_id)  # the server closed the other
    guard = Guard(turns, tokenizer, spec, thresholds)
    with running(guard, Limits(MODEL, keys=made, over_limit="refuse")) as server:
        refused = ask(server, STRICT, max_tokens=9)
        assert refused.status_code == 400 and "8 that this server allows" in refused.json()["error"]["message"]
        assert ask(server, LOOSE, max_tokens=9).status_code == 200
        assert ask(server, PLAIN).status_code == 401, "the file alone says who may ask"


def test_a_replacement_of_a_key_is_its_own(tokenizer, spec, thresholds, script, tmp_path):
    _, turns = engine(script("abc", {0: (0.97, 0.0)}), tokenizer.eos_token_id)
    guard = Guard(turns, tokenizer, spec, thresholds)
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    with running(guard, Limits(MODEL, keys=Keys(path, guard))) as server:
        assert text_of(ask(server, LOOSE)) == ("Sorry.", "content_filter")
        assert text_of(ask(server, STRICT)) == ("", "content_filter")


def test_a_file_that_is_read_again_holds_from_the_next_request_on(guard, keys, caplog):
    made, path = keys
    with running(guard, Limits(MODEL, keys=made)) as server:
        assert ask(server, STRICT, max_tokens=8).status_code == 200
        path.write_text(FILE.replace("factor: 0.5", "factor: 0.9").replace(LOOSE, PLAIN))
        assert text_of(ask(server, STRICT, max_tokens=8)) == ("abc", "content_filter"), "not before"
        made.reload()
        assert text_of(ask(server, STRICT, max_tokens=8)) == ("abcdef", "content_filter")
        assert ask(server, LOOSE).status_code == 401 and ask(server, PLAIN).status_code == 200
        for wrong in ("", "keys: [", "keys: []", FILE.replace("harm:", "harms:"), FILE + "    factor: -1\n"):
            path.write_text(wrong)
            caplog.clear()
            made.reload()
            assert "the keys are unchanged" in caplog.text and PLAIN not in caplog.text
            assert text_of(ask(server, STRICT, max_tokens=8)) == ("abcdef", "content_filter")
            assert ask(server, PLAIN).status_code == 200
        path.unlink()
        made.reload()
        assert ask(server, PLAIN).status_code == 200


A_KEY = "key: first-key-0123456789"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("[]", "keys: list should have at least 1"),
        ("5", "keys"),
        ("[{name: a}]", "keys.0 (a): exactly one of key and sha256"),
        (f"[{{name: a, {A_KEY}, sha256: {'a' * 64}}}]", "exactly one of key and sha256"),
        ("[{name: a, key: short}]", "keys.0.key: string should have at least 16"),
        ("[{name: a, key: 1234567890123456789}]", "keys.0.key"),
        ("[{name: a, sha256: xyz}]", "keys.0.sha256"),
        (f"[{{{A_KEY}}}]", "keys.0.name: field required"),
        (f"[{{name: a, {A_KEY}, rate: 5}}]", "keys.0.rate: extra inputs"),
        (f"[{{name: a, {A_KEY}, factor: 0}}]", "keys.0.factor"),
        (f"[{{name: a, {A_KEY}, factor: .nan}}]", "keys.0.factor"),
        (f"[{{name: a, {A_KEY}, factor: 9}}]", "threshold of 'harm' must be above 0"),
        (f"[{{name: a, {A_KEY}, thresholds: {{wepons: 0.5}}}}]", "thresholds must be of the categories harm, theft"),
        (f"[{{name: a, {A_KEY}, thresholds: {{harm: 0}}}}]", "threshold of 'harm' must be above 0"),
        (f"[{{name: a, {A_KEY}, action: shout}}]", "'shout'"),
        (f"[{{name: a, {A_KEY}, action: replace}}]", "replacement must not be empty"),
        (f"[{{name: a, {A_KEY}, action: escalate}}]", "no second judge"),
        (f"[{{name: a, {A_KEY}, actions: {{wepons: halt}}}}]", "wepons"),
        (f"[{{name: a, {A_KEY}, max_tokens: 0}}]", "keys.0.max_tokens"),
        (f"[{{name: a, {A_KEY}}}, {{name: a, key: other-key-0123456789}}]", "keys.1 (a) must have a name and a key"),
        (f"[{{name: a, {A_KEY}}}, {{name: b, {A_KEY}}}]", "keys.1 (b) must have a name and a key of its own"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_place(entry, words, guard, tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys: {entry}")
    with pytest.raises(RedflagError) as error:
        read_keys(path, guard)
    assert words in str(error.value) and str(path) in str(error.value)
    assert "first-key" not in str(error.value), "no key is repeated"


def test_a_file_that_is_not_there_or_no_yaml_is_named(guard, tmp_path):
    with pytest.raises(RedflagError, match=r"keys must be a readable file \(got .*nothing\.yaml: "):
        read_keys(tmp_path / "nothing.yaml", guard)
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n  - {A_KEY}\n   - [")
    with pytest.raises(RedflagError, match=r"keys must be a YAML file \(got .*, line 3\)") as error:
        read_keys(path, guard)
    assert "first-key" not in str(error.value)


def test_moderations_judge_by_the_keys_thresholds(tokenizer, spec, thresholds, tmp_path):
    import numpy as np

    from redflag.backends.turns import Turns

    class Scoring:
        logprob_mode, upper_bound, eos_ids = "raw", False, frozenset({tokenizer.eos_token_id})

        def stream(self, token_ids, sampling, watch=()):
            raise AssertionError("nothing is generated")

        def score(self, pairs, *, batch_size):
            return [np.full((len(response), 2), 0.3, dtype=np.float32) for _, response in pairs]

    guard = Guard(Turns(Scoring()), tokenizer, spec, thresholds)
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    limits = Limits(MODEL, keys=Keys(path, guard), moderations="all")
    with running(guard, limits) as server:
        for key, flagged in ((STRICT, True), (LOOSE, False)):
            answer = httpx.post(server.url + "/v1/moderations", json={"input": "a"}, headers={"x-api-key": key})
            assert answer.json()["results"][0]["flagged"] is flagged


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_a_signal_reads_the_file_again(nano, tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys: [{{name: a, key: {PLAIN}}}]")
    process, url = start("--model", str(nano / "model"), "--port", "0", "--name", MODEL, "--device", "cpu",
                         "--keys", str(path))  # fmt: skip
    try:
        wait_for(lambda: httpx.get(url + "/ready").status_code == 200)

        def status(key):
            return httpx.get(url + "/v1/models", headers={"x-api-key": key}).status_code

        assert (status(PLAIN), status(STRICT)) == (200, 401)
        for text, wanted in (("keys: 5", (200, 401)), (f"keys: [{{name: b, key: {STRICT}}}]", (401, 200))):
            path.write_text(text)
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: (status(PLAIN), status(STRICT)) == wanted)  # noqa: B023
        assert process.poll() is None
    finally:
        process.terminate()
        process.communicate(timeout=30)
