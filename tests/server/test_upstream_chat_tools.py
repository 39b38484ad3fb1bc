"""Tools and thoughts before an upstream that renders conversations itself (`--upstream_route chat`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from running import MODEL, Running, running
from test_chat_templates import world
from tool_doors import DOORS, NO_THOUGHT, THINK, ask, choice, read, result, turns
from tool_server import ADD, FAMILIES, PLAIN, TOOL, _closed  # noqa: F401
from upstream import DONE, PARTS, Upstream, event

from redflag.backends.remote import RemoteBackend
from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

CALL = f"<tool_call>\n{ADD}\n</tool_call>"
# As DeepSeek R1's or Nemotron's: the thought is opened in the prompt.
OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "<think>\n{% if enable_thinking is defined and enable_thinking is false %}\n</think>\n\n{% endif %}{% endif %}"
)


class Stock:
    """A vLLM that renders with the model's own template, and writes what it is told.

    Attributes:
        alarm: The step of a harm.
        parses: It reads calls itself, though it is asked for none: `ids` with their log-probabilities, `bare` without,
            `late` with those of a whole call in one chunk.
    """

    def __init__(
        self, template: str, policy: Policy | None = None, *, leaves_tools_out: bool = False, parses: str = ""
    ) -> None:
        self.tokenizer, self.spec = world(template)
        self.policy, self.leaves_tools_out, self.parses = policy, leaves_tools_out, parses
        self.ids: list[int] = []
        self.alarm: int | None = None
        self.upstream = Upstream(script=self._answer)

    def say(self, text: str, alarm: int | None = None, *, cut: bool = False) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.ids = [*ids] if cut else [*ids, self.tokenizer.eos_token_id]
        self.alarm = alarm
        return self.ids

    def render(self, body: dict[str, Any]) -> list[int]:
        messages = json.loads(json.dumps(body["messages"]))
        for message in messages:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        kwargs = body["chat_template_kwargs"]
        tools = None if self.leaves_tools_out else body.get("tools")
        text = self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, **kwargs
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _answer(self, body: dict[str, Any], count: int) -> Iterator[bytes]:
        chat = "messages" in body
        if chat:
            first = {"choices": [], "prompt_token_ids": self.render(body)}
            yield b"data: " + json.dumps(first).encode() + b"\n\n"
        flag = self.spec.ids[0]
        late: list[dict[str, Any]] = []
        for index, token in enumerate(self.ids):
            top: dict[int, float | None] = {token: -0.1, flag: -0.1 if index == self.alarm else -5.0}
            end = "stop" if token == self.tokenizer.eos_token_id else "length"
            finish = end if index + 1 == len(self.ids) else None
            sent = event([token], [top], finish)
            if chat:
                (one,) = json.loads(sent[6:])["choices"]
                names = zip(*(one["logprobs"][part] for part in PARTS), strict=True)
                one["logprobs"]["content"] = [
                    {"token": a, "logprob": b, "top_logprobs": [{"token": k, "logprob": v} for k, v in c.items()]}
                    for a, b, c in names
                ]
                one["delta"] = {"content": one.pop("text")}
                if self.parses:
                    one = self._parsed(one, late, finish)
                    if one is None:
                        continue
                sent = b"data: " + json.dumps({"choices": [one]}).encode() + b"\n\n"
            yield sent
        yield DONE

    def _parsed(self, one: dict[str, Any], late: list[dict[str, Any]], finish: str | None) -> dict[str, Any] | None:
        """A chunk of vLLM's with a parser: no content, and of the call something else than the model wrote."""
        wrong = {"index": 0, "id": "theirs", "function": {"name": "add", "arguments": '{"a": "forged"}'}}
        one["delta"] = {"tool_calls": [wrong]}
        one["finish_reason"] = finish and "tool_calls"
        if self.parses == "bare":
            del one["token_ids"], one["logprobs"]
        if self.parses == "late":
            late.append(one)
            if finish is None:
                return None
            one["token_ids"] = [token for each in late for token in each["token_ids"]]
            one["logprobs"] = {"content": [item for each in late for item in each["logprobs"]["content"]]}
        return one

    @contextmanager
    def running(self, route: Any = "chat") -> Iterator[Running]:
        with self.upstream.serve() as upstream:
            backend = RemoteBackend(
                upstream.url,
                self.spec.ids,
                [self.tokenizer.eos_token_id],
                route=route,
                retries=0,
                context_length=4096,
                model="tiny",
            )
            named = {"run_id": self.spec.run_id, "template_hash": self.spec.template_hash}
            thresholds = Thresholds.manual(0.5, self.spec.categories, **named)
            guard = Guard(backend, self.tokenizer, self.spec, thresholds, self.policy)
            with running(guard, Limits(MODEL)) as server:
                yield server

    @property
    def asked(self) -> dict[str, Any]:
        """The last request that came."""
        return self.upstream.bodies[-1]

    def prompt(self) -> list[int]:
        return self.render(self.asked) if "messages" in self.asked else self.asked["prompt"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_the_upstream_shows_tools_and_redflag_reads_the_calls(door: str, stream: bool) -> None:
    made = Stock(FAMILIES["hermes"][0])
    with made.running() as server:
        made.say(f"Well.{CALL}")
        answer = read(door, ask(server, door, stream), stream)
        assert (answer.text, answer.calls, answer.how) == ("Well.", [("add", {"a": 1})], "calls")
        assert made.asked["tools"] == [TOOL] and made.asked["tool_choice"] == "none" and "prompt" not in made.asked
        if not stream or door == "/v1/responses":
            made.say("It is 2.")
            back = turns(door, *answer.turn, result(door, answer.ids[0], "the sum is 2"))
            assert read(door, ask(server, door, stream, **back), stream).text == "It is 2."
            (call,) = made.asked["messages"][1]["tool_calls"]
            assert call["function"] == {"name": "add", "arguments": '{"a": 1}'} and "messages" in made.asked


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_a_whole_call_in_an_answer_cut_at_its_limit_is_sent_and_the_end_says_that_it_was_cut(
    door: str, stream: bool, route: str
) -> None:
    made = Stock(FAMILIES["hermes"][0])
    with made.running(route) as server:
        for text, calls in ((CALL, 1), (CALL + CALL[: len(CALL) // 2], 1), (CALL[: len(CALL) // 2], 0)):
            made.say(text, cut=True)
            answer = read(door, ask(server, door, stream), stream)
            assert (answer.calls, answer.how) == ([("add", {"a": 1})] * calls, "length")


@pytest.mark.parametrize("parses", ["ids", "late"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_a_call_that_the_upstream_parses_unasked_is_read_from_the_judged_tokens(
    door: str, stream: bool, parses: str
) -> None:
    """Every step is judged, the call is the model's and not the parser's, and a halt within it leaves none."""
    made = Stock(FAMILIES["hermes"][0], parses=parses)
    with made.running() as server:
        ids = made.say(f"Well.{CALL}")
        answer = read(door, ask(server, door, stream), stream)
        assert (answer.text, answer.calls, answer.how) == ("Well.", [("add", {"a": 1})], "calls")
        assert answer.ids != ["theirs"] and server.told().token_ids == ids
        for position in range(0, len(ids), 6):
            made.say(f"Well.{CALL}", position)
            response = ask(server, door, stream)
            answer = read(door, response, stream)
            assert (answer.calls, answer.how) == ([], "halted") and "Well.".startswith(answer.text)
            assert "forged" not in response.text


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_a_call_that_the_upstream_parses_and_that_cannot_be_judged_is_a_fault(
    door: str, stream: bool, cut: bool
) -> None:
    """Without ids there is nothing to judge; `tool_calls` at no end of a turn hides why the answer ended."""
    made = Stock(FAMILIES["hermes"][0], parses="ids" if cut else "bare")
    with made.running() as server:
        made.say(CALL, cut=cut)
        response = ask(server, door, stream)
        answer = read(door, response, stream)
        assert (answer.text, answer.calls, answer.how) == ("", [], "fault")
        assert "forged" not in response.text


@pytest.mark.parametrize("door", DOORS)
def test_a_halt_within_a_call_that_the_upstream_was_asked_for_leaves_none(door: str) -> None:
    made = Stock(FAMILIES["hermes"][0])
    with made.running() as server:
        for position in range(0, len(made.say(CALL)), 6):
            for stream in (False, True):
                made.say(CALL, position)
                answer = read(door, ask(server, door, stream), stream)
                assert (answer.calls, answer.how, answer.text) == ([], "halted", "")


def test_the_prompt_is_that_of_the_other_route() -> None:
    prompts: dict[str, list[list[int]]] = {}
    for route in ("completions", "chat"):
        made = Stock(OPENED, Policy(thoughts="show"))
        with made.running(route) as server:
            seen = prompts[route] = []
            for fields in (
                {"tools": [], **THINK[DOORS[0]]},
                {"tools": [], **NO_THOUGHT[DOORS[0]]},
                {"tools": []},
                {},  # in words: this template shows no tools
                THINK[DOORS[0]],
                {"tool_choice": "none"},
            ):
                made.say("Hm.\n</think>\n\nYes.")
                answer = read(DOORS[0], ask(server, DOORS[0], **fields), False)
                assert answer.how == "done" and answer.text.endswith("Yes.")
                assert bool(answer.thought) == bool(fields.get("chat_template_kwargs", {}).get("enable_thinking"))
                assert ("messages" in made.asked) == (route == "chat") and "tools" not in made.asked
                seen.append(made.prompt())
    assert prompts["chat"] == prompts["completions"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_an_upstream_that_leaves_tools_out_is_refused_and_nothing_shown(door: str, stream: bool) -> None:
    made = Stock(FAMILIES["hermes"][0], leaves_tools_out=True)
    with made.running() as server:
        made.say(CALL)
        answer = ask(server, door, stream)
        assert answer.status_code == 400 and "leaves tools out" in answer.json()["error"]["message"]
        assert server.told().token_ids == [] and server.ends() == {"refused"}


@pytest.mark.parametrize("spelled", ["<|flag|>", "<|im_end|>", "<tool_call>"])
def test_a_definition_or_result_that_spells_a_control_token_is_refused_and_nothing_shown(spelled: str) -> None:
    made = Stock(FAMILIES["hermes"][0])
    with made.running() as server:
        made.say(CALL)
        described = {**TOOL, "function": {**TOOL["function"], "description": f"Adds {spelled}."}}
        call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        history = turns(DOORS[0], {"role": "assistant", "tool_calls": [call]}, result(DOORS[0], "c", f"2 {spelled}"))
        for fields in ({"tools": [described]}, history):
            answer = ask(server, DOORS[0], **fields)
            assert answer.status_code == 400 and "same prompt" in answer.json()["error"]["message"]


def test_what_is_begun_in_the_prompt_goes_by_ids() -> None:
    """A forced call, and a thought that redflag opens because the template leaves that to the model."""
    made = Stock(FAMILIES["hermes"][0], Policy(thoughts="show"))
    with made.running() as server:
        for wanted in ("required", "add"):
            made.say(' {"a": 1}}\n</tool_call>')
            answer = read(DOORS[0], ask(server, DOORS[0], **choice(DOORS[0], wanted)), False)
            assert answer.how == "calls" and "prompt" in made.asked
        made.say("Hm.\n</think>\n\nYes.")
        answer = read(DOORS[0], ask(server, DOORS[0], **THINK[DOORS[0]]), False)
        assert (answer.thought, answer.text) == ("Hm.\n", "Yes.") and "prompt" in made.asked


def test_plain_templates_get_tools_in_words() -> None:
    made = Stock(PLAIN)
    with made.running() as server:
        made.say(ADD)
        answer = read(DOORS[0], ask(server, DOORS[0]), False)
        assert answer.calls == [("add", {"a": 1})]
        assert "tools" not in made.asked and "Adds two numbers." in made.asked["messages"][0]["content"]
