"""`--playground`: who may read what, and that a trace read piece by piece is the trace."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import MODEL, Play, body_of, chunks_of, engine, running, text_of_chunks

from redflag import cli
from redflag.cli import parse
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.server import playground, serve
from redflag.server.access import Limits
from redflag.trace import Text, Thought, Trace, read_traces
from redflag.watching.policy import Policy, Reflect

CHAT = "/v1/chat/completions"
OPERATOR, API = "operator-key-0123456789", "api-key-0123456789"
REFLECT = Reflect(cue="Hm.", words=("yes", "no"), verdict_cue="So:", stop=("|",), max_tokens=20)
HARM = {6: (0.9, 0.0)}
ROUTES = ("/playground/guard", "/playground/traces/x")
POLICIES = {
    "plain": Policy(),
    "held back": Policy(hold_back=3),
    "at the end": Policy(release="end", observe=True),
    "by sentence": Policy(release="sentence", observe=True),
    "resumed": Policy(default="reflect", reflect=REFLECT),
    "resumed elsewhere": Policy(default="reflect", reflect=Reflect(**{**vars(REFLECT), "stay": True})),
    "forced": Policy(default="force", hold_back=2),
    "replaced": Policy(default="replace", replacement="No."),
}


@pytest.fixture
def guard(tokenizer, spec, thresholds, script):
    """A guard for a server: its model says `answer`, alarms at the seventh token, and finds that harmless."""

    def build(policy=None, answer="ab. cdefghé", high=HARM, **options):
        thought = script("SECRET|", end=False)
        play = Play(script(answer, high), () if (policy or Policy()).default == "force" else spec.ids, thought)
        verdict = [thought[0]._replace(flag_probs=(0.1, 0.9))]
        _, turns = engine(play, tokenizer.eos_token_id, watched=lambda prompt, sampling, watch: verdict, **options)
        return Guard(turns, tokenizer, spec, thresholds, policy)

    return build


def ask(server, **fields):
    """A streamed answer: its text, its id, and the lines of its trace."""
    answer = httpx.post(server.url + CHAT, json=body_of(CHAT, stream=True, **fields))
    name = answer.headers["x-request-id"]
    lines = httpx.get(f"{server.url}/playground/traces/{name}").raise_for_status().text.splitlines()
    return text_of_chunks(chunks_of(answer.content)), name, [json.loads(line) for line in lines]


def folded(lines):
    """What a reader has after all lines but the last: probabilities, scores, events, released text."""
    probs, scores, events = [], [], []
    for line in lines:
        for column, key in ((probs, "flag_probs"), (scores, "scores")):
            assert line["start"] <= len(column)
            column[line["start"] :] = map(tuple, line[key])
        events += line["events"]
    return probs, scores, events, "".join("".join(e["pieces"]) for e in events if e["kind"] == "text")


def test_nothing_of_it_is_there_unless_it_is_asked_for(guard):
    with running(guard()) as server:
        name = httpx.post(server.url + CHAT, json=body_of(CHAT)).headers["x-request-id"]
        for path in ("/", "/playground/guard", f"/playground/traces/{name}"):
            assert httpx.get(server.url + path).status_code == 404
    assert not cli.parse(serve, ["--model", "m"], "redflag serve")[0].playground
    assert cli.parse(serve, ["--model", "m"], "redflag serve")[0].host == "127.0.0.1"


@pytest.mark.parametrize("path", ROUTES)
def test_the_operators_key_is_asked_for_where_there_is_one(guard, path):
    with running(guard(), Limits(MODEL, operator_key=OPERATOR), playground=True) as server:
        assert httpx.get(server.url).status_code == 200, "the page itself holds nothing of the operator's"
        for headers, status, code in (
            ({}, 403, "operator_key_required"),
            ({"authorization": f"Bearer {OPERATOR}"}, 403, "operator_key_required"),
            ({"x-redflag-operator": "operator-key-012345678x"}, 403, "invalid_operator_key"),
            ({"x-redflag-operator": OPERATOR}, 200 if path.endswith("guard") else 404, None),
        ):
            answer = httpx.get(server.url + path, headers=headers)
            assert answer.status_code == status, headers
            assert code is None or answer.json()["error"]["code"] == code
            assert status == 200 or "hold_back" not in answer.text


@pytest.mark.parametrize("path", ROUTES)
def test_an_api_key_is_asked_for_as_everywhere(guard, path):
    with running(guard(), Limits(MODEL, api_keys=(API,)), playground=True) as server:
        assert httpx.get(server.url + path).status_code == 401
        right = httpx.get(server.url + path, headers={"authorization": f"Bearer {API}"})
        assert right.status_code == (200 if path.endswith("guard") else 404)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:99"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"host": "10.1.2.3"}, 200),
        ({"host": "10.1.2.3:80", "origin": "http://10.1.2.3:80"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "10.1.2.3:80", "origin": "http://10.1.2.3:81"}, 403),
        ({"host": "rebound.example:8080"}, 403),
        ({"host": "rebound.example:8080", "origin": "http://rebound.example:8080"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": ""}, 403),
    ],
)
def test_without_a_key_no_page_of_another_origin_reads_a_number(guard, headers, status):
    with running(guard(), Limits(MODEL, allow_origins=("*",)), playground=True) as server:
        answer = httpx.get(server.url + "/playground/guard", headers=headers)
        assert answer.status_code == status
    with running(guard(), Limits(MODEL, operator_key=OPERATOR), playground=True) as server:
        answer = httpx.get(server.url + "/playground/guard", headers={**headers, "x-redflag-operator": OPERATOR})
        assert answer.status_code == 200, "with the key a name will do"


def test_what_the_responses_are_judged_by(guard, thresholds):
    with running(guard(Policy(hold_back=4)), playground=True) as server:
        found = httpx.get(server.url + "/playground/guard").json()
    assert found["model"] == MODEL and found["categories"] == ["harm", "theft"] and found["thresholds"] == [0.5, 0.5]
    assert found["hold_back"] == 4 and found["release"] == "steps" and found["monitor"]["aggregation"] == "max"


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_read_in_pieces_is_the_trace(guard, name, tmp_path):
    with running(guard(POLICIES[name]), playground=True) as server:
        text, response, (*lines, last) = ask(server, max_tokens=20)
        trace = server.told()
    probs, scores, events, released = folded(lines)
    assert (probs, scores) == (trace.flag_probs, trace.scores)
    assert [e["kind"] for e in events] == [type(e).__name__.lower() for e in trace.events]
    assert text == released + getattr(trace.end, "text", ""), "what any client got"
    file = tmp_path / "exported.json"
    file.write_text(json.dumps(last["trace"]) + "\n")
    (read,) = read_traces(file)
    assert (read.id, read.flag_probs, read.token_ids) == (response, trace.flag_probs, trace.token_ids)
    assert read.events == trace.events


@pytest.mark.parametrize("name", ["at the end", "by sentence"])
def test_tokens_released_together_keep_their_own_text(guard, name):
    with running(guard(POLICIES[name]), playground=True) as server:
        text, _, (*lines, _) = ask(server)
    pieces = [piece for event in folded(lines)[2] if event["kind"] == "text" for piece in event["pieces"]]
    # é is two bytes, and the last token ends the turn.
    assert text == "ab. cdefghé" and pieces == [*"ab. cdefgh", "", "é", ""]


def test_a_text_that_cannot_be_cut_into_tokens_stays_in_one_piece(guard):
    with running(guard(POLICIES["at the end"]), playground=True) as server:
        text, _, (*lines, _) = ask(server, stop="de")
    (event,) = (e for e in folded(lines)[2] if e["kind"] == "text")
    assert event["pieces"] == [text] == ["ab. c"] and event["tokens"] > 5


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    looks=st.lists(st.booleans(), min_size=40, max_size=40),
    high=st.sets(st.integers(0, 10), max_size=3),
)
def test_it_does_not_matter_when_one_looks(make_response, policy, looks, high):
    response, steps = make_response(POLICIES[policy], {i: (0.9, 0.0) for i in high})
    seen, at = [], (0, 0)
    for look in looks:
        if response.request is None:
            break
        steps(response)
        if look:
            news, at = playground.since(response.trace, *at, lambda trace, event: [event.text])
            seen += [news] if news is not None else []
    news, at = playground.since(response.trace, *at, lambda trace, event: [event.text])
    probs, scores, events, released = folded([*seen, *([news] if news is not None else [])])
    assert (probs, scores) == (response.trace.flag_probs, response.trace.scores)
    assert len(events) == len(response.trace.events)
    assert released == "".join(event.text for event in response.trace.events if isinstance(event, Text))
    assert playground.since(response.trace, *at, lambda trace, event: [event.text]) == (None, at)


def test_text_of_another_part_is_told_apart():
    trace = Trace(token_ids=[5, 6], events=[Thought(0, (5,), "hm"), Text(1, (6,), "a")])
    news, _ = playground.since(trace, 2, 0, lambda trace, event: [event.text])
    assert [(e["kind"], e["part"], e["position"], e["pieces"]) for e in news["events"]] == [
        ("text", "thought", 0, ["hm"]),
        ("text", "answer", 1, ["a"]),
    ]
    assert news["answer_at"] == 0


@pytest.fixture(scope="module")
def make_response(request):
    """A response that is fed by hand, one step at a time, whatever it asks for."""
    from redflag.backends import Sampling
    from redflag.backends.scripted import ScriptedBackend
    from redflag.trace import Step
    from redflag.watching.thresholds import Thresholds

    tokenizer, spec = request.getfixturevalue("tokenizer"), request.getfixturevalue("spec")
    thresholds = Thresholds.manual(0.5, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash)
    ids = tokenizer("ab. cdefghé", add_special_tokens=False)["input_ids"]

    def make(policy, high):
        guard = Guard(ScriptedBackend([], {tokenizer.eos_token_id}), tokenizer, spec, thresholds, policy)
        response = guard.respond([{"role": "user", "content": "x"}], Sampling(max_new_tokens=15))
        given = iter(range(1000))

        def step(response):
            index = next(given)
            watch = getattr(response.request, "watch", ())
            probs = (0.1, 0.9) if watch else high.get(index, (0.01, 0.02))
            before = response.request
            response.feed(Step(ids[index % len(ids)], probs))
            if response.request is before and index > 30:
                response.ended()

        return response, step

    return make


def test_a_fault_and_a_client_that_left_have_their_traces_too(guard):
    with running(guard(fail_at=4, high={}), playground=True) as server:
        _, _, (*lines, last) = ask(server)
        assert folded(lines)[2][-1]["kind"] == "halt" and last["trace"]["events"][-1]["reason"] == "fault"
    with running(guard(), playground=True) as server:
        for _ in range(40):
            httpx.post(server.url + CHAT, json=body_of(CHAT))
        assert len(server.server.record.__self__._over) == 32, "a bounded number is kept"
        gone = httpx.get(f"{server.url}/playground/traces/{server.traces[0].id}")
        assert gone.status_code == 404 and gone.json()["error"]["code"] == "not_found"


def test_the_page_runs_nothing_but_its_own_scripts_and_fetches_nothing(guard):
    with running(guard(), playground=True) as server:
        answer = httpx.get(server.url)
        assert httpx.head(server.url).status_code == 200
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
    html = answer.text
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S)
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts]
        assert hashes and policy[directive].split() == hashes
    assert set(re.findall(r"https?://[^\s\"'`)]*", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", html
    )
    assert not re.search(r"<[^>]*\s(on\w+|style|src)=", re.sub(r"<script>.*?</script>", "", html, flags=re.S))
    assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", html), "keys outlive no page"


def test_its_colours_are_the_reports():
    root = Path(playground.__file__).parents[1]
    sheets = [root / "server" / "assets" / "page.css", root / "lab" / "report" / "assets" / "report.css"]
    page, report = (
        [
            dict(re.findall(r"(--\w+): ([^;]+);", block))
            for block in re.findall(r":root[^{]*\{(.*?)\}", sheet.read_text(), re.S)
        ]
        for sheet in sheets
    )
    assert len(page) == len(report) == 3
    for mine, theirs in zip(page, report, strict=True):
        assert {name: mine[name] for name in mine if name in theirs} == {
            name: theirs[name] for name in mine if name != "--mono"
        }


@pytest.mark.parametrize(("key", "warnings"), [(None, 1), (OPERATOR, 0)])
def test_the_start_says_where_it_is_and_whether_a_key_protects_it(key, warnings, caplog):
    with caplog.at_level(logging.INFO, logger=serve.__name__):
        serve.tell_of_playground("http://127.0.0.1:8080/", Limits(MODEL, operator_key=key))
    assert "http://127.0.0.1:8080/" in caplog.records[0].getMessage()
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == warnings and all("REDFLAG_OPERATOR_KEY" in text for text in warned)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "guard.example.org"])
def test_without_an_operator_key_the_page_is_for_this_machine_alone(host):
    def limits(*words, key=None):
        arguments = parse(serve, ["--model", "m", *words], "redflag serve")[0]
        return serve.limits_of(arguments, {} if key is None else {"REDFLAG_OPERATOR_KEY": key})

    with pytest.raises(RedflagError, match=r"host must be 127\.0\.0\.1 .*REDFLAG_OPERATOR_KEY"):
        limits("--playground", "--host", host)
    assert limits("--playground").operator_key is None
    assert limits("--host", host) and limits("--playground", "--host", host, key=OPERATOR).operator_key == OPERATOR
