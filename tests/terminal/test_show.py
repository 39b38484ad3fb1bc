"""The verb `show`: what stands in the file is what is seen, with colour and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from redflag.data.rows import Row, write_rows
from redflag.errors import RedflagError
from redflag.lab.nano.rows import nano_rows
from redflag.terminal import show
from redflag.terminal.paint import RESET, paint, printable, span, wants_colour
from redflag.terminal.show import ShowArguments, run, what_is_in
from redflag.trace import Alarm, Escalation, Halt, Reflection, Resume, Text, Trace, write_traces

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well. Burn it."}]
SCORED = {
    "id": "s1",
    "tokens": ["Well", ".", " Burn", " it"],
    "token_ids": [1, 2, 3, 4],
    "flag_probs": [[0.0], [0.02], [0.3], [0.97]],
    "peak": [0.97],
    "onset": 2,
    "category": "harm",
    "group": None,
    "source": "here",
}
TRACE = Trace(
    id="t1",
    categories=("harm",),
    token_ids=[7, 8],
    flag_probs=[(0.0,), (0.95,)],
    scores=[(0.0,), (0.95,)],
    events=[Text(0, (7,), "Well"), Alarm(1, "harm", 0.95, 0.5, "halt"), Halt(1, "alarm", "harm")],
)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    write_rows(tmp_path / "rows.jsonl", [Row(CHAT, "harm", 6, id="r1"), Row(CHAT, id="r2")])
    (tmp_path / "scored.jsonl").write_text(json.dumps(SCORED) + "\n")
    write_traces(tmp_path / "traces.jsonl", [TRACE], text=True)
    write_traces(tmp_path / "numbers.jsonl", [TRACE])
    return {path.stem: str(path) for path in tmp_path.iterdir()}


def _shown(capsys: pytest.CaptureFixture[str], file: str, **options: object) -> str:
    assert run(ShowArguments(file, **options)) == 0  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_the_kind_of_a_file_is_seen_from_its_first_line(files: dict[str, str]) -> None:
    kinds = {name: what_is_in(file) for name, file in files.items()}
    assert kinds == {"rows": "rows", "scored": "scored rows", "traces": "traces", "numbers": "traces"}


def test_rows_are_shown_with_harm_marked_from_the_onset(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = _shown(capsys, files["rows"])
    assert "r1 · harm from character 6" in out
    assert "user: Hi\nassistant: Well. [[Burn it.]]\n" in out
    assert "r2 · harmless\nuser: Hi\nassistant: Well. Burn it.\n" in out
    assert "\x1b" not in out


def test_colour_underlines_harm_and_explains_itself(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    out = _shown(capsys, files["rows"], color="always")
    assert out.startswith("p(flag) before each token: ")
    assert "Well. " + span("Burn it.", None, True) in out


def test_limit_and_only_choose_what_is_shown(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "r2" not in _shown(capsys, files["rows"], limit=1)
    assert "r2" in _shown(capsys, files["rows"], limit=0)
    assert "r1" not in _shown(capsys, files["rows"], only="harmless")
    with pytest.raises(RedflagError, match="must have entries for --only harmless"):
        run(ShowArguments(files["scored"], only="harmless"))


def test_scored_rows_are_shown_token_by_token(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "s1 · harm from token 2, highest p(flag) 0.97 · here\nWell.[[ Burn it]]" in _shown(capsys, files["scored"])
    assert span(" it", 0.97, True) in _shown(capsys, files["scored"], color="always")


@pytest.mark.parametrize("name, body", [("traces", "Well"), ("numbers", "7 8 ")])
def test_traces_are_shown_with_their_events(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], name: str, body: str
) -> None:
    out = _shown(capsys, files[name])
    assert f"t1 · harm\n{body}\n" in out
    assert "alarm at token 1: harm, score 0.95 >= 0.5, halt\n  halted at token 1: alarm harm" in out


def test_traces_tell_what_became_of_alarms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reviewed = Trace(
        id="t2",
        categories=("harm",),
        token_ids=[7, 8, 9],
        flag_probs=[(0.0,), (0.95,), (0.99,)],
        scores=[(0.0,), (0.95,), (0.99,)],
        events=[
            Text(0, (7,), "Well"),
            Alarm(1, "harm", 0.95, 0.5, "reflect"),
            Reflection(1, (4, 5, 6), "harmless", 0.125, "Is it bad?\nNo."),
            Resume(2),
            Alarm(2, "harm", 0.99, 0.5, "escalate"),
            Escalation(3, "unanswered", 1.0, "late\x07"),
            Halt(1, "alarm", "harm", text="Let us talk of bread."),
        ],
    )
    path = str(tmp_path / "traces.jsonl")
    write_traces(path, [reviewed], text=True)
    assert (
        "  alarm at token 1: harm, score 0.95 >= 0.5, reflect\n"
        "  reflection at token 1: 3 hidden tokens, harmless 0.12\n    | Is it bad?\n    | No.\n"
        "  resumed at token 2\n"
        "  alarm at token 2: harm, score 0.99 >= 0.5, escalate\n"
        "  second judge on 3 tokens: unanswered (late\ufffd)\n"
        "  halted at token 1: alarm harm\n"
        "  replaced by: Let us talk of bread.\n"
    ) in _shown(capsys, path)
    assert "\x1b[2m    | Is it bad?\x1b[0m\n" in _shown(capsys, path, color="always")
    write_traces(path, [reviewed])  # numbers only
    out = _shown(capsys, path)
    assert "3 hidden tokens, harmless 0.12" in out and "Is it bad" not in out and "bread" not in out


def test_with_a_model_rows_are_shown_as_the_trainer_sees_them(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def token_view(model: str, placement: str) -> Any:
        return lambda row: [(f"<{model} {placement}>", None, False), ("tok", 1.0, True)]

    monkeypatch.setattr(show, "token_view", token_view)
    assert "assistant: <m insert>[[tok]]" in _shown(capsys, files["rows"], model="m", limit=1, placement="insert")
    with pytest.raises(RedflagError, match="have their tokens already"):
        run(ShowArguments(files["scored"], model="m"))


def test_bad_rows_are_named_and_the_others_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\nnonsense\n" + json.dumps({"prompt": "a", "response": "b"}))
    assert run(ShowArguments(str(path))) == 0
    shown = capsys.readouterr()
    assert f"skipped {path}:2: malformed JSON" in shown.err
    assert "assistant: b" in shown.out


@pytest.mark.parametrize("text", ["no such file.jsonl", "", "."])
def test_a_file_that_cannot_be_shown_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RedflagError):
        run(ShowArguments(str(tmp_path / text)))


def test_no_control_character_reaches_the_terminal() -> None:
    assert printable("a\x1b[31mb\x9b\x00\n\t") == "a\ufffd[31mb\ufffd\ufffd\n\t"
    pieces = [("\x1b[2J", 0.99, True), ("\x07", None, False)]
    assert "\x1b[2J" not in "".join(paint(pieces, True)) + "".join(paint(pieces, False))


def test_every_coloured_line_ends_uncoloured() -> None:
    for line in "".join(paint([("one\ntwo", 0.7, True), ("\n\nthree", 0.02, False)], True)).split("\n"):
        assert line == "" or line.endswith(RESET)


def test_shades_follow_the_probability() -> None:
    starts = [span("x", p).split("x")[0] for p in (0.0, 0.009, 0.01, 0.04, 0.05, 0.3, 0.6, 0.95)]
    assert starts[0] == starts[1] == ""
    assert starts[2] == starts[3]
    assert len(set(starts)) == 6


def test_colour_is_off_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_colour("auto")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour("auto")
    assert wants_colour("always")
    assert not wants_colour("never")


def test_nano_rows_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = nano_rows("train", 20)
    out = _shown(capsys, str(write_rows(tmp_path / "nano.jsonl.gz", rows)), limit=0)
    assert out.count("[[") == sum(row.harmful for row in rows)


def test_thoughts_and_tool_calls_of_a_row_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = {"function": {"name": "weather"}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Dry.", "name": "weather"},
        {"role": "assistant", "content": "None.", "reasoning_content": "It is dry."},
    ]
    out = _shown(capsys, str(write_rows(tmp_path / "rows.jsonl", [Row(messages)])), color="never")
    assert out.splitlines()[1:7] == [
        "user: Rain?",
        """    > {"function": {"name": "weather"}}""",
        "assistant: ",
        "tool: Dry.",
        "    | It is dry.",
        "assistant: None.",
    ]
