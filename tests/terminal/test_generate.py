from __future__ import annotations

import io
import re

import pytest

from redflag.errors import RedflagError
from redflag.guard.options import PolicyOptions
from redflag.terminal import generate
from redflag.terminal.generate import GenerateArguments
from redflag.terminal.screen import paint, summary
from redflag.trace import read_traces
from redflag.watching.policy import Policy

ASK = [{"role": "user", "content": "hello"}]
PLAIN = re.compile(r"\x1b\[[0-9;]*m")


def painted(guard, coloured):
    stream = guard.stream(ASK)
    return list(paint(stream, stream.trace, coloured)), stream.trace


def test_the_colour_behind_a_token_is_its_own_probability(guard_of, script):
    steps = script("abc", {0: (0.001, 0.0), 1: (0.0, 0.3), 2: (0.49, 0.0)})
    for hold_back in (0, 2):
        pieces, _ = painted(guard_of(steps, Policy(hold_back=hold_back)), True)
        joined = "".join(pieces)
        assert PLAIN.sub("", joined) == "abc"
        assert joined.startswith("a\x1b[48;5;214;") and joined.count("48;5;214;") == 2


def test_nothing_held_or_dropped_is_painted_and_the_halt_is_seen(guard_of, script):
    guard = guard_of(script("abcdefghij", {6: (0.9, 0.0)}), Policy(hold_back=2))
    pieces, trace = painted(guard, True)
    assert PLAIN.sub("", "".join(pieces)) == "abcd[halted: harm]"
    assert "".join(painted(guard, False)[0]) == "abcd"
    assert summary(trace) == [
        "alarm: harm at token 6, score 0.9 >= threshold 0.5, action halt",
        "halted: alarm harm; 4 tokens shown, 3 dropped",
        "highest p(flag): harm 0.9 at token 6, theft 0.02 at token 0",
    ]


def test_observed_alarms_are_marked_and_text_goes_on(guard_of, script):
    guard = guard_of(script("abcd", {1: (0.9, 0.0)}), Policy(observe=True))
    assert PLAIN.sub("", "".join(painted(guard, True)[0])) == "a[alarm: harm]bcd"
    assert "".join(painted(guard, False)[0]) == "abcd"


def test_a_model_cannot_steer_the_terminal(guard_of, script):
    pieces, _ = painted(guard_of(script("a\x1b[2J\x07\x9b1m\r\nb\tc")), False)
    assert "".join(pieces) == "a\ufffd[2J\ufffd\ufffd1m\ufffd\nb\tc"


def test_a_background_never_runs_over_a_line_end(guard_of, script):
    pieces, _ = painted(guard_of(script("a\n\nb", dict.fromkeys(range(4), (0.4, 0.4)))), True)
    for line in "".join(pieces).split("\n"):
        assert line == "" or line.endswith("\x1b[0m")


def test_a_fault_is_told_with_its_reason(guard_of, script):
    _, trace = painted(guard_of(script("abc"), fail_at=2), False)
    assert (
        summary(trace)[0] == "halted: fault, ConnectionError: the scripted engine was lost; 2 tokens shown, 0 dropped"
    )


def test_text_goes_to_standard_output_and_all_else_to_standard_error(model_dir, capsys, tmp_path):
    record = tmp_path / "traces.jsonl"
    arguments = GenerateArguments(
        prompt="hello", model=str(model_dir), max_new_tokens=5, temperature=0.0, system="be kind", record=str(record)
    )
    for _ in range(2):
        assert generate.run(arguments) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out and out.endswith("\n")
    assert "done: length; 5 tokens" in err and "highest p(flag): harm" in err
    first, second = read_traces(record)
    assert first.token_ids == second.token_ids and len(first.token_ids) == 5
    assert first.id != second.id and first.text is None


def test_a_halted_response_shows_no_text_and_is_no_failure(model_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    arguments = GenerateArguments(prompt="-", model=str(model_dir), threshold=1e-9, color="always", prefill="Sure")
    assert generate.run(arguments) == 0
    out, err = capsys.readouterr()
    assert PLAIN.sub("", out) == "[halted: harm]\n" and out.endswith("\x1b[0m\n")
    assert "p(flag) before each token:" in err and "halted: alarm harm; 0 tokens shown, 1 dropped" in err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt": " "}, "prompt"),
        ({"prompt": "hello " * 200}, "context"),
        ({"temperature": -1.0}, "temperature"),
        ({"threshold": 7.0}, "threshold"),
        ({"model": "/nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_used_is_named(model_dir, options, named):
    with pytest.raises(RedflagError, match=named):
        generate.run(GenerateArguments(**{"prompt": "hello", "model": str(model_dir)} | options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"hold_back": -1}, "hold_back"),
        ({"actions": "violence=halt"}, "violence"),
        ({"action": "escalate"}, "judge"),
        ({"action": "replace"}, "replacement"),
    ],
)
def test_a_policy_that_cannot_be_carried_out_is_named(model_dir, options, named):
    with pytest.raises(RedflagError, match=named):
        generate.run(GenerateArguments(prompt="hello", model=str(model_dir)), PolicyOptions(**options))


def test_a_replacement_is_what_a_reader_gets(model_dir, capsys):
    arguments = GenerateArguments(prompt="hello", model=str(model_dir), threshold=1e-9)
    assert generate.run(arguments, PolicyOptions(action="replace", replacement="Let us talk of bread.")) == 0
    out, err = capsys.readouterr()
    assert out == "Let us talk of bread.\n"
    assert "0 tokens shown, 1 dropped, replaced by a text of 21 characters" in err


def test_an_upstream_gets_its_options(model_dir, monkeypatch):
    made = []

    def from_pretrained(*args, **options):
        made.append((args, options))
        raise RedflagError("enough")

    monkeypatch.setattr("redflag.guard.guard.Guard.from_pretrained", from_pretrained)
    monkeypatch.setenv("UP_KEY", "s3cret")
    arguments = GenerateArguments(
        prompt="hello",
        model="m",
        upstream="http://h:1",
        upstream_model="nano",
        upstream_key_env="UP_KEY",
        upper_bound=True,
        threshold=0.25,
    )
    with pytest.raises(RedflagError, match="enough"):
        generate.run(arguments)
    options = {"model": "nano", "api_key": "s3cret", "headers": {}, "upper_bound": True, "route": "completions"}
    assert made == [(("m", Policy(), 0.25, "auto", "auto", None, "http://h:1", "off"), options)]
    monkeypatch.delenv("UP_KEY")
    with pytest.raises(RedflagError, match="UP_KEY"):
        generate.run(arguments)
