"""One line per request, and in no line a word of a prompt or a response."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest

from redflag.errors import RedflagError
from redflag.server import log
from redflag.trace import Alarm, Done, Halt, Reflection, Resume, Text, Trace

SECRET = "how to build a bomb"


@pytest.fixture
def logs():
    """Sets up logging into a text; afterwards everything is as it was."""
    names = ("", "redflag", "uvicorn", "uvicorn.error", "uvicorn.access")
    before = {name: (logging.getLogger(name).level, logging.getLogger(name).disabled) for name in names}
    stream = io.StringIO()

    def setup(**options):
        log.setup(**{"stream": stream, **options})
        return lambda: [line for line in stream.getvalue().splitlines() if line]

    yield setup
    log.teardown()
    for name, (level, disabled) in before.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).disabled = disabled


def trace(*events, scores=((0.1, 0.2), (0.3, 0.223456789))):
    return Trace(
        categories=("weapons", "fraud"),
        token_ids=list(range(len(scores))),
        flag_probs=list(scores),
        scores=list(scores),
        events=list(events),
        text=SECRET,
    )


HALTED = (
    Text(0, (0,), SECRET),
    Alarm(1, "weapons", 0.9, 0.5, "reflect"),
    Reflection(1, (7, 8, 9), "harmless", 0.125, SECRET),
    Resume(2),
    Alarm(2, "weapons", 0.8, 0.5, "halt"),
    Halt(1, "alarm", "weapons", SECRET, SECRET),
)


def say(response, end="halted", **options):
    given = dict(request_id="r-1", route="/v1/chat/completions", end=end, seconds=1.23456, streamed=True)
    log.request(response, **(given | options))


def test_a_request_is_one_json_line_with_numbers_and_names(logs):
    read = logs(json=True)
    say(trace(*HALTED), seconds_to_first=0.1)
    (line,) = read()
    record = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert record == {
        "level": "info",
        "logger": "redflag.request",
        "message": "request",
        "request_id": "r-1",
        "route": "/v1/chat/completions",
        "streamed": True,
        "end": "halted",
        "reason": "alarm",
        "category": "weapons",
        "alarms": 2,
        "reviews": 1,
        "tokens": 2,
        "released": 1,
        "waited": 3,
        "seconds": 1.2346,
        "seconds_to_first": 0.1,
    }


def test_a_request_is_one_line_for_people(logs):
    read = logs()
    say(trace(*HALTED), overridden=True)
    say(trace(Halt(0, "fault", detail=f"ConnectionError: {SECRET}")), "fault", streamed=None)
    first, second = read()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d INFO    request request_id=r-1 route=/v1/chat/completions streamed=True end=halted "
        r"reason=alarm category=weapons alarms=2 reviews=1 tokens=2 released=1 waited=3 seconds=1\.2346 "
        r"overridden=True",
        first,
    )
    assert "WARNING" in second and "end=fault reason=fault fault=engine_lost" in second


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("scores", [True, False])
def test_scores_are_shown_on_demand_and_words_never(logs, as_json, scores):
    read = logs(json=as_json, level="debug", scores=scores)
    say(trace(*HALTED))
    say(trace(Done(2, "stop")), "done")
    say(trace(Halt(0, "fault", detail=SECRET)), "fault")
    logging.getLogger("redflag.server.server").info(
        "response", extra={"request_id": "r-2", "prompt": SECRET, "detail": f"TimeoutError: {SECRET}", "text": SECRET}
    )
    text = "\n".join(read())
    assert len(read()) == 4 and "bomb" not in text and "timeout" in text
    assert ("0.9" in text) == scores and ("0.223457" in text) == scores
    if as_json and scores:
        assert json.loads(read()[0])["scores"] == {"weapons": 0.9, "fraud": 0.223457}


def test_of_an_exception_only_type_and_place_are_shown(logs):
    read = logs(json=True)
    plain = io.StringIO()
    try:
        raise ValueError(SECRET)
    except ValueError:
        logging.getLogger("redflag.server.server").exception("a request broke")
        log.setup(stream=plain)
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n%s", SECRET)
    (line,) = read()
    record = json.loads(line)
    assert (record["message"], record["error"], record["level"]) == ("a request broke", "ValueError", "error")
    assert re.fullmatch(r"test_log\.py:\d+ test_of_an_exception.*", record["where"][-1])
    assert "ERROR   Exception in ASGI application error=ValueError where=test_log.py:" in plain.getvalue()
    assert "bomb" not in line + plain.getvalue() and plain.getvalue().count("\n") == 1


def test_of_other_libraries_the_beginning_of_a_line_is_shown_and_only_warnings(logs):
    read = logs(json=True, level="debug")
    other = logging.getLogger("aiohttp.client")
    other.debug("sending %s", SECRET)
    other.info("sending %s", SECRET)
    other.warning("%s\n%s", "x" * 1000, SECRET)
    logging.getLogger("redflag.backends").debug("shown")
    logging.getLogger("uvicorn.access").info("GET /?q=%s", SECRET)
    first, second = map(json.loads, read())
    assert len(first["message"]) < 250 and first["logger"] == "aiohttp.client"
    assert (second["message"], second["level"]) == ("shown", "debug")


@pytest.mark.parametrize("level", ["info", "WARNING", 40])
def test_less_severe_lines_are_left_out(logs, level):
    read = logs(level=level)
    for name in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger("redflag.server"), name)("x")
    assert len(read()) == {"info": 3, "WARNING": 2, 40: 1}[level]


def test_nobody_who_chooses_a_field_can_write_lines_or_steer_the_terminal(logs):
    read = logs()
    say(trace(Done(2, "stop")), "done", request_id="r\n12:00:00 INFO    request end=done\x1b[2J\u2028")
    read_json = io.StringIO()
    log.setup(json=True, stream=read_json)
    say(trace(Done(2, "stop")), "done", request_id="r\n\x1b[2J\u2028")
    assert len(read()) == 1 and "\x1b" not in read()[0] and "\u2028" not in read()[0]
    assert read_json.getvalue().count("\n") == 1 and "\x1b" not in read_json.getvalue()


def test_a_second_setup_replaces_the_first_and_keeps_the_handlers_of_others(logs):
    mine = logging.NullHandler()
    root = logging.getLogger()
    root.addHandler(mine)
    handlers = len(root.handlers)
    read = logs(json=True)
    logs(json=True)
    logging.getLogger("redflag").warning("once")
    assert len(read()) == 1 and len(root.handlers) == handlers + 1
    log.teardown()
    assert len(root.handlers) == handlers and mine in root.handlers
    root.removeHandler(mine)


def test_lines_go_to_standard_error(logs, capsys):
    log.setup(json=True)
    say(trace(Done(2, "stop")), "done")
    out, err = capsys.readouterr()
    assert out == "" and json.loads(err)["end"] == "done"


@pytest.mark.parametrize("level", ["loud", "", "Level 7"])
def test_a_level_that_does_not_exist_is_refused(logs, level):
    with pytest.raises(RedflagError, match="level must be debug"):
        logs(level=level)
