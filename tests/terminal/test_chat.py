"""A guarded conversation: what the model sees of it, what commands do, and how it is left."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from redflag.backends.scripted import ScriptedBackend
from redflag.errors import RedflagError
from redflag.guard.options import PolicyOptions
from redflag.terminal import chat
from redflag.terminal.chat import Chat, ChatArguments
from redflag.terminal.screen import TerminalOptions
from redflag.trace import read_traces
from redflag.watching.policy import Policy

PLAIN = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|[78])")


@pytest.fixture
def talk(tokenizer, spec, guard_of, script):
    """A chat whose model answers by what was asked last, and the prompts that it saw, as text."""

    def start(replies, policy=None, **options):
        seen = []

        def play(prompt, sampling):
            text = tokenizer.decode(prompt)
            seen.append(text)
            for asked, reply in replies.items():
                if f"user\n{asked}<|end|>" in text[text.rindex("user\n") :]:
                    return script(*reply) if isinstance(reply, tuple) else script(reply)
            raise AssertionError(text)

        backend = ScriptedBackend(play, {tokenizer.eos_token_id}, context_length=options.pop("context_length", None))
        return Chat(guard_of(backend, policy), TerminalOptions(model="m", **options)), seen

    return start


def turns(text):
    """What stands in a rendered prompt: (role, content) of every finished turn."""
    return re.findall(r"<\|turn\|>(\w+)\n(.*?)<\|end\|>", text, re.DOTALL)


def test_the_conversation_is_kept(talk, capsys):
    conversation, seen = talk({"a": "one", "b": "two"})
    assert conversation.say("a\n") and conversation.say("b\n")
    assert turns(seen[1]) == [("user", "a"), ("assistant", "one"), ("user", "b")]
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert err.count("done: stop; ") == 2 and err.count("highest p(flag)") == 2


def test_a_halted_answer_is_kept_as_far_as_it_was_released(talk, capsys):
    conversation, seen = talk({"a": ("abcdef", {4: (0.9, 0.0)}), "b": "two"}, Policy(hold_back=2))
    conversation.say("a")
    conversation.say("b")
    assert turns(seen[1]) == [("user", "a"), ("assistant", "ab"), ("user", "b")]
    assert capsys.readouterr().out == "ab\ntwo\n"


def test_a_replacement_is_part_of_what_was_said(talk):
    policy = Policy(default="replace", replacement=" Bread?")
    conversation, seen = talk({"a": ("abcdef", {2: (0.9, 0.0)}), "b": "two"}, policy)
    conversation.say("a")
    conversation.say("b")
    assert turns(seen[1]) == [("user", "a"), ("assistant", "ab Bread?"), ("user", "b")]


def test_an_exchange_that_showed_nothing_is_forgotten(talk, capsys):
    conversation, seen = talk({"a": ("abc", {0: (0.9, 0.0)}), "b": "two"})
    conversation.say("a")
    conversation.say("b")
    assert turns(seen[1]) == [("user", "b")]
    assert "forgotten" in capsys.readouterr().err


def test_a_turn_that_cannot_be_answered_is_said_and_the_others_go_on(talk, capsys):
    conversation, seen = talk({"a": "one"}, context_length=60)
    conversation.say("long " * 50)
    conversation.say("a")
    assert turns(seen[0]) == [("user", "a")]
    out, err = capsys.readouterr()
    assert out == "one\n" and "redflag chat: The prompt has" in err and conversation.faults == 1


def test_commands(talk, capsys):
    conversation, seen = talk({"a": "one", "/b": "two"}, Policy(hold_back=3))
    conversation.say("/system Be kind.")
    conversation.say("a")
    conversation.say("/reset")
    conversation.say("//b")
    conversation.say("/system")
    conversation.say("a")
    assert [turns(text) for text in seen] == [
        [("system", "Be kind."), ("user", "a")],
        [("system", "Be kind."), ("user", "/b")],
        [("user", "/b"), ("assistant", "two"), ("user", "a")],
    ]
    capsys.readouterr()
    conversation.say("/policy")
    assert capsys.readouterr().err == (
        "harm: threshold 0.5, action halt\ntheft: threshold 0.5, action halt\nrelease: steps, hold_back 3\n"
    )
    conversation.say("/policies")
    assert "/policies is no command\n/reset " in capsys.readouterr().err
    assert conversation.say("/help") and conversation.say("  \n") and not conversation.say(" /quit ")
    assert len(seen) == 3


def test_the_policy_is_told_in_full(guard_of, script):
    policy = Policy(
        actions={"theft": "escalate"}, default="replace", replacement="Sorry.", release="sentence", confirmed="replace"
    )
    guard = guard_of(script("a"), Policy())
    guard.judge = lambda messages, answer: 0.0
    guard._policy = policy
    assert chat.describe(guard) == [
        "harm: threshold 0.5, action replace",
        "theft: threshold 0.5, action escalate",
        "release: sentence, hold_back 0",
        "a confirmed alarm leads to replace; at most 2 interventions and 256 hidden tokens",
        "second judge: function, 10 s",
        "replacement: Sorry.",
    ]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_shown(guard_of, script, tokenizer, capsys):
    seen = []

    def play(prompt, sampling):
        seen.append(tokenizer.decode(prompt))
        yield from script("abc", end=len(seen) > 1)
        if len(seen) == 1:
            raise KeyboardInterrupt

    backend = ScriptedBackend(play, {tokenizer.eos_token_id})
    conversation = Chat(guard_of(backend), TerminalOptions(model="m"))
    assert conversation.say("a") and conversation.say("b")
    assert turns(seen[1]) == [("user", "a"), ("assistant", "abc"), ("user", "b")]
    assert capsys.readouterr().err.startswith("stopped from here; 3 tokens shown, 0 dropped\n")


def test_a_pipe_is_read_line_by_line(model_dir, monkeypatch, capsys, tmp_path):
    record = tmp_path / "traces.jsonl"
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/policy\nhow are you\n/quit\nnot said\n"))
    arguments = ChatArguments(model=str(model_dir), max_new_tokens=5, temperature=0.0, record=str(record))
    assert chat.run(arguments, PolicyOptions(hold_back=2)) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "> " not in out
    assert err.count("done: ") == 2 and "release: steps, hold_back 2" in err
    first, second = read_traces(record)
    assert first.id != second.id and len(first.token_ids) == len(second.token_ids) == 5


def test_the_end_of_the_input_ends_and_faults_count(model_dir, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    monkeypatch.setattr("redflag.backends.hf.HFBackend.stream", lambda *args: iter([lambda: None]))
    assert chat.run(ChatArguments(model=str(model_dir))) == 1
    assert "halted: fault" in capsys.readouterr().err


def test_bad_bytes_in_a_pipe_are_replaced(model_dir, monkeypatch):
    heard = []
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfehello\nok\n"), encoding="utf-8"))
    monkeypatch.setattr(Chat, "say", lambda self, line: heard.append(line) or True)
    assert chat.run(ChatArguments(model=str(model_dir))) == 0
    assert heard == ["\ufffd\ufffdhello\n", "ok\n"]


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"model": "/nowhere"}, {"threshold": 7.0}])
def test_what_cannot_be_used_is_named(model_dir, options):
    with pytest.raises(RedflagError, match=next(iter(options))[:5].replace("model", "nowhere")):
        chat.run(ChatArguments(**{"model": str(model_dir)} | options))


PROGRAM = """
import fcntl, sys, termios, time

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches this session

from transformers import AutoTokenizer
from redflag.backends.scripted import ScriptedBackend
from redflag.flags import FlagSpec
from redflag.terminal import chat
from redflag.guard.guard import Guard
from redflag.terminal.screen import TerminalOptions
from redflag.trace import Step
from redflag.watching.thresholds import Thresholds

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])

def play(prompt, sampling):
    text = tokenizer.decode(prompt)
    asked = text[text.rindex("user\\n"):]
    if "slow" in asked:
        while True:
            yield Step(tokenizer.convert_tokens_to_ids("s"), (0.0, 0.0))
            time.sleep(0.05)
    said = "held" if "hold" in asked else "kept" if "assistant\\ns" in text else "fresh"
    for token_id in tokenizer(said, add_special_tokens=False)["input_ids"]:
        yield Step(token_id, (0.3, 0.0))
        time.sleep(0.3 if said == "held" else 0.0)
    yield Step(tokenizer.eos_token_id, (0.0, 0.0))

backend = ScriptedBackend(play, {tokenizer.eos_token_id})
TerminalOptions.guard = lambda self, options: Guard(
    backend, tokenizer, FlagSpec.load(sys.argv[1]), Thresholds.load(sys.argv[1]), options.policy()
)
options = chat.PolicyOptions(release="end" if "end" in sys.argv else "steps")
sys.exit(chat.run(chat.ChatArguments(model="m", max_new_tokens=10000), options))
"""


class Pty:
    """A program on a terminal of its own."""

    def __init__(self, *command):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30", "PYTHONPATH": os.getcwd()}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def until(self, pattern, seconds=120):
        """Reads until the pattern is there; gives what came, and forgets it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, PLAIN.sub("", self.seen), re.DOTALL)):
            left = end - time.monotonic()
            assert left > 0 and select.select([self.master], [], [], left)[0], f"no {pattern!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # the program is gone
                assert re.search(pattern, PLAIN.sub("", self.seen), re.DOTALL), self.seen
        raw, self.seen = self.seen, ""
        return found[0], raw

    def interrupt(self, pattern):
        """Presses Ctrl-C until the pattern comes: readline misses a signal in the instant before it waits for a key."""
        for _ in range(12):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.until(pattern, 10)
        raise AssertionError(f"no {pattern!r} after Ctrl-C in {self.seen!r}")


@pytest.fixture
def terminal(model_dir, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    started = []

    def start(*words):
        started.append(Pty(sys.executable, "-W", "error", str(program), str(model_dir), *words))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait(10)
        os.close(one.master)


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminal):
    session = terminal()
    session.until(r"/reset .*> $")
    session.type("hello\n")
    _, raw = session.until(r"fresh.*done: stop.*> $")
    assert "\x1b[48;5;214;38;5;16mf\x1b[0m" in raw  # the colour of 0.3
    session.type("slow\n")
    session.until(r"sss")
    session.type("\x03")
    session.until(r"stopped from here; \d+ tokens shown, 0 dropped.*> $")
    session.type("again\n")  # the model sees what was shown before Ctrl-C
    session.until(r"kept.*done: stop.*> $")
    session.type("half a line")  # Ctrl-C at the prompt starts a new line
    session.until(r"half a line$")
    session.interrupt(r"> $")
    session.type("\x04")
    assert session.process.wait(20) == 0


def test_on_a_terminal_held_tokens_are_counted_and_not_shown(terminal):
    session = terminal("end")
    session.until(r"/reset .*> $")
    session.type("hold\n")
    session.until(r"hold\s* \[[1-3] held\]")  # nothing between the question and the count
    session.until(r"\]held\s*done: stop; 4 tokens.*> $")
    session.type("/quit\n")
    assert session.process.wait(20) == 0
