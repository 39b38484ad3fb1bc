"""Tools over HTTP: calls leave once the response has ended by itself, and nothing of them leaves behind a halt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import httpx
import openai
import pytest
from running import MODEL, ROUTES, Running, body_of, chunks_of, engine, running, text_of_chunks
from test_chat_templates import world

from redflag.api.wire import REFUSAL
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.trace import Step
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

CHAT, TEXT = ROUTES
TEMPLATES = files("trl") / "chat_templates"
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.last and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have 9 characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% endfor %}]{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
ASK = {"role": "user", "content": "hello"}
ADD = '{"name": "add", "arguments": {"a": 1}}'
# template -> what a model of that family writes to call, and what of it a user may see
FAMILIES = {
    "hermes": ((TEMPLATES / "qwen3.jinja").read_text(), f"Well.\n<tool_call>\n{ADD}\n</tool_call>", "Well."),
    "llama": ((TEMPLATES / "llama3_1.jinja").read_text(), '{"name": "add", "parameters": {"a": 1}}', ""),
    "mistral": (MISTRAL, f"Well.[TOOL_CALLS][{ADD}]", "Well."),
    "harmony": (
        (TEMPLATES / "gptoss.jinja").read_text(),
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary<|message|>Well.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.add<|constrain|>json<|message|>{"a": 1}',
        "Well.",
    ),
    "json": (PLAIN, ADD, ""),
}
HARM = 0.9


class World:
    """A server of a template's family; `say` sets what its model writes from now on."""

    def __init__(self, family: str, policy: Policy | None = None, **limits: Any) -> None:
        self.tokenizer, self.spec = world(FAMILIES[family][0])
        if family == "mistral":
            marks = ["[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[INST]", "[/INST]", "[TOOL_RESULTS]"]
            self.tokenizer.add_special_tokens({"additional_special_tokens": [*marks, "[/TOOL_RESULTS]"]})
        monitor = limits.pop("monitor", MonitorConfig())
        thresholds = Thresholds.manual(
            0.5, self.spec.categories, monitor, template_hash=self.spec.template_hash, run_id=self.spec.run_id
        )
        self.steps: list[Any] = []
        self.backend, turns = engine(self._play, self.tokenizer.eos_token_id)
        self.guard = Guard(turns, self.tokenizer, self.spec, thresholds, policy)
        self.limits = Limits(MODEL, **limits)

    def _play(self, prompt: Any, sampling: Any) -> Iterator[Step]:
        for step in self.steps:
            if step is None:
                raise ConnectionError("lost")
            yield step

    def say(self, text: str, alarm: int | None = None, *, end: bool = True, lost: int | None = None) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, self.tokenizer.eos_token_id] if end else ids
        self.steps = [Step(token, (HARM if i == alarm else 0.01,)) for i, token in enumerate(ids)]
        if lost is not None:
            self.steps = [*self.steps[:lost], None]
        return ids

    @contextmanager
    def running(self) -> Iterator[Running]:
        with running(self.guard, self.limits) as server:
            yield server

    def prompt(self) -> str:
        return str(self.tokenizer.decode(self.backend.prompts[-1]))


CLIENT = httpx.Client(timeout=20)


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    CLIENT.close()


def post(server: Running, stream: bool = False, **fields: Any) -> httpx.Response:
    return CLIENT.post(server.url + CHAT, json={**body_of(CHAT, stream=stream), "tools": [TOOL], **fields})


def answer_of(response: httpx.Response, stream: bool) -> dict[str, Any]:
    """Content, calls, finish reason and refusal of an answer, whole or streamed."""
    assert response.status_code == 200, response.content
    if not stream:
        choice = response.json()["choices"][0]
        message = choice["message"]
        return {
            "content": message["content"] or "",
            "calls": message.get("tool_calls", []),
            "finish": choice["finish_reason"],
            "refusal": message["refusal"],
        }
    chunks = chunks_of(response.content)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call.pop("index") for call in calls] == list(range(len(calls)))
    return {
        "content": text_of_chunks(chunks),
        "calls": calls,
        "finish": chunks[-1]["choices"][0]["finish_reason"],
        "refusal": "".join(delta.get("refusal") or "" for delta in deltas) or None,
    }


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[tuple[World, Running, str, str]]:
    made = World(request.param)
    with made.running() as server:
        yield made, server, *FAMILIES[request.param][1:]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_read_in_the_format_of_the_models_family(family: Any, stream: bool) -> None:
    made, server, written, shown = family
    made.say(written)
    answer = answer_of(post(server, stream), stream)
    assert answer["content"] == shown and answer["finish"] == "tool_calls" and answer["refusal"] is None
    (call,) = answer["calls"]
    assert call["type"] == "function" and call["id"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 1})


def test_the_prompt_names_the_tool_and_the_turns_may_be_sent_back(family: Any) -> None:
    made, server, written, _ = family
    made.say(written)
    first = post(server).json()["choices"][0]["message"]
    assert "Adds two numbers." in made.prompt() and "add" in made.prompt()
    made.say("It is 2." if "<|channel|>" not in written else "<|channel|>final<|message|>It is 2.")
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "the sum is 2"}
    answer = answer_of(post(server, messages=[ASK, first, result]), False)
    assert answer["content"] == "It is 2." and answer["finish"] == "stop" and not answer["calls"]
    assert "the sum is 2" in made.prompt() and '"a": 1' in made.prompt()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_back", [0, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_halt_at_any_token_leaves_no_call(name: str, hold_back: int, stream: bool) -> None:
    made = World(name, Policy(hold_back=hold_back))
    _, written, shown = FAMILIES[name]
    ids = made.say(written)
    with made.running() as server:
        for position in range(0, len(ids), 1 if hold_back and stream else 4):
            made.say(written, position)
            response = post(server, stream)
            answer = answer_of(response, stream)
            assert not answer["calls"] and answer["finish"] == "content_filter"
            assert shown.startswith(answer["content"])
            assert (answer["refusal"] == REFUSAL) == (answer["content"] == "")
            assert "tool_calls" not in response.text and "arguments" not in response.text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fault_at_any_token_leaves_no_call(name: str) -> None:
    made = World(name)
    _, written, shown = FAMILIES[name]
    ids = made.say(written)
    with made.running() as server:
        for position in range(0, len(ids), 3):
            made.say(written, lost=position)
            assert post(server).status_code == 503
            streamed = post(server, stream=True)
            assert "tool_calls" not in streamed.text
            if streamed.status_code == 200:
                *chunks, last = chunks_of(streamed.content)
                assert "error" in last and shown.startswith(text_of_chunks(chunks))
            else:
                assert streamed.status_code == 503


def test_a_second_call_that_is_halted_takes_the_first_one_with_it() -> None:
    made = World("hermes")
    written = f"<tool_call>{ADD}</tool_call><tool_call>{ADD}</tool_call>"
    ids = made.say(written)
    with made.running() as server:
        made.say(written, len(ids) - 2)
        for stream in (False, True):
            answer = answer_of(post(server, stream), stream)
            assert (answer["finish"], answer["calls"], answer["content"]) == ("content_filter", [], "")
        made.say(written)
        assert len(answer_of(post(server), False)["calls"]) == 2
        assert len(answer_of(post(server, parallel_tool_calls=False), False)["calls"]) == 1


def test_a_replacement_takes_the_place_of_a_call() -> None:
    made = World("json", Policy(actions={"harm": "replace"}, replacement="Ask something else."))
    made.say(ADD, 5)
    with made.running() as server:
        for stream in (False, True):
            answer = answer_of(post(server, stream), stream)
            assert answer["content"] == "Ask something else." and not answer["calls"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_valid_call_is_content(stream: bool) -> None:
    made = World("hermes")
    with made.running() as server:
        for written, content in [
            ("<tool_call>\n{'name': 'add'}\n</tool_call>", "\n{'name': 'add'}\n"),
            (f"<tool_call>{ADD.replace('add', 'rm')}</tool_call>", ADD.replace("add", "rm")),
            ("no call", "no call"),
        ]:
            made.say(written)
            answer = answer_of(post(server, stream), stream)
            assert (answer["content"], answer["calls"], answer["finish"]) == (content, [], "stop")
        ids = made.say(f"<tool_call>{ADD}</tool_call>")
        answer = answer_of(post(server, stream, max_tokens=len(ids) - 4), stream)
        assert answer["calls"] == [] and answer["finish"] == "length" and answer["content"] in ADD


@pytest.mark.parametrize("stop", ["<tool_call>", "ol_call>", "add"])
def test_a_stop_text_may_cut_a_mark_or_a_call(stop: str) -> None:
    made = World("hermes")
    made.say(f"Well.<tool_call>{ADD}</tool_call>")
    with made.running() as server:
        for stream in (False, True):
            answer = answer_of(post(server, stream, stop=[stop]), stream)
            assert (answer["calls"], answer["finish"]) == ([], "stop")
            assert answer["content"] == "Well." + ('{"name": "' if stop == "add" else "")


def test_counts_tell_the_tokens_of_a_call_that_was_not_sent_from_those_that_were() -> None:
    made = World("hermes")
    written = f"Well.<tool_call>{ADD}</tool_call>"
    ids = made.say(written)
    with made.running() as server:
        usage = post(server).json()["usage"]
        details = usage["completion_tokens_details"]
        assert usage["completion_tokens"] == len(ids) == details["released_tokens"] and details["hidden_tokens"] == 0
        made.say(written, len(ids) - 2)
        usage = post(server).json()["usage"]
        shown = len(made.tokenizer("Well.", add_special_tokens=False)["input_ids"])
        assert usage["completion_tokens"] == len(ids) - 1
        assert usage["completion_tokens_details"]["released_tokens"] == shown


# tool_choice


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("hermes", '<tool_call>\n{"name": "add", "arguments":'),
        ("llama", '{"name": "add", "parameters":'),
        ("mistral", '[TOOL_CALLS][{"name": "add", "arguments":'),
        ("harmony", " to=functions.add<|channel|>commentary json<|message|>"),
        ("json", '{"name": "add", "arguments":'),
    ],
)
def test_a_call_that_has_to_be_made_is_begun_in_the_prompt(name: str, opening: str) -> None:
    made = World(name)
    closing = {"harmony": "", "mistral": "}]", "hermes": "}\n</tool_call>"}.get(name, "}")
    with made.running() as server:
        for choice in ("required", {"type": "function", "function": {"name": "add"}}):
            made.say(' {"a": 1}' + closing)
            answer = answer_of(post(server, tool_choice=choice), False)
            assert made.prompt().endswith(opening)
            assert answer["finish"] == "tool_calls" and answer["calls"][0]["function"]["arguments"] == '{"a": 1}'
            made.say(" not at all")
            answer = answer_of(post(server, tool_choice=choice), False)
            assert (answer["finish"], answer["calls"], answer["content"]) == ("stop", [], " not at all")
            made.say(' {"a": 1}' + closing, 3)
            assert answer_of(post(server, tool_choice=choice), False)["calls"] == []
        other = {**TOOL, "function": {"name": "sub"}}
        made.say("x")
        httpx.post(server.url + CHAT, json=body_of(CHAT, tools=[TOOL, other], tool_choice="required"))
        assert made.prompt().endswith(opening.partition("add")[0].rstrip(' "'))


def test_none_leaves_tools_out_of_the_prompt_and_calls_in_the_content() -> None:
    made = World("json")
    with made.running() as server:
        made.say(ADD)
        answer = answer_of(post(server, tool_choice="none"), False)
        assert (answer["content"], answer["finish"]) == (ADD, "stop")
        assert "Adds two numbers." not in made.prompt()


def test_no_call_is_begun_where_the_first_token_decides() -> None:
    made = World("json", monitor=MonitorConfig("first"))
    with made.running() as server:
        made.say(ADD)
        assert post(server).status_code == 200
        error = post(server, tool_choice="required").json()["error"]
        assert "tool_choice must be auto or none" in error["message"]


REFUSED = [
    ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools.0.function"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "invalid_value", "tools.0.type"),
    ({"tools": [{"type": "function", "function": {"name": "with space"}}]}, "invalid_value", "tools"),
    ({"tools": [TOOL, TOOL]}, "invalid_value", "tools"),
    ({"tools": [TOOL] * 129}, "invalid_value", "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "invalid_type", None),
    ({"tools": "add"}, "invalid_type", "tools"),
    ({"tool_choice": "always"}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools"}}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "invalid_value", "tool_choice"),
    ({"tool_choice": "required", "tools": []}, "invalid_value", "tool_choice"),
    ({"parallel_tool_calls": "yes"}, "invalid_type", "parallel_tool_calls"),
    ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
]


@pytest.mark.parametrize(("fields", "code", "param"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_called_is_refused_by_name(fields: dict[str, Any], code: str, param: str | None) -> None:
    with World("json").running() as server:
        answer = httpx.post(server.url + CHAT, json=body_of(CHAT) | {"tools": [TOOL]} | fields)
        assert answer.status_code == 400, answer.content
        assert answer.json()["error"]["code"] == code
        assert param is None or answer.json()["error"]["param"] == param


def test_the_operator_may_switch_tools_off_and_name_the_format() -> None:
    with World("hermes", tool_format="off").running() as server:
        assert post(server).json()["error"]["param"] == "tools"
        assert httpx.post(server.url + CHAT, json=body_of(CHAT)).status_code in (200, 503)
    made = World("hermes", tool_format="json")
    with made.running() as server:
        made.say(ADD)
        assert answer_of(post(server), False)["finish"] == "tool_calls"
        assert "<tools>" not in made.prompt()
    made = World("json", tool_format="hermes")
    with pytest.raises(RedflagError, match="tool_format must be auto or json"), made.running():
        pass


def test_a_definition_is_not_held_to_its_schema_and_says_so() -> None:
    made = World("json")
    with made.running() as server:
        made.say(ADD)
        strict = {"type": "function", "function": {**TOOL["function"], "strict": True, "x": 1}, "cache_control": {}}
        answer = httpx.post(server.url + CHAT, json=body_of(CHAT, tools=[strict]))
        assert answer.headers["x-ignored-params"] == "tools.cache_control, tools.function.x, tools.function.strict"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_behind_a_thought(stream: bool) -> None:
    made = World("hermes")
    asked = {"chat_template_kwargs": {"enable_thinking": True}}
    with made.running() as server:
        made.say(f"<tool_call>{ADD}</tool_call> is a thought.\n</think>\n\nWell.<tool_call>{ADD}</tool_call>")
        answer = answer_of(post(server, stream, **asked), stream)
        assert (answer["content"], answer["finish"], len(answer["calls"])) == ("Well.", "tool_calls", 1)
        assert made.prompt().endswith("<think>\n")
        made.say(' {"a": 1}}')
        answer = answer_of(post(server, stream, tool_choice="required", **asked), stream)
        assert made.prompt().endswith('"arguments":') and len(answer["calls"]) == 1


def test_what_does_not_go_with_tools_is_refused_by_name() -> None:
    with World("json", logprobs=True).running() as server:
        for fields, param in (
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"logprobs": True}, "logprobs"),
        ):
            error = post(server, **fields)
            assert (error.status_code, error.json()["error"]["param"]) == (400, param)


def test_each_choice_has_its_own_calls() -> None:
    made = World("json")
    made.say(ADD)
    with made.running() as server:
        choices = post(server, n=2).json()["choices"]
        assert [len(choice["message"]["tool_calls"]) for choice in choices] == [1, 1]


def test_tools_belong_to_chats() -> None:
    with World("json").running() as server:
        answer = httpx.post(server.url + TEXT, json=body_of(TEXT, tools=[TOOL]))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


def test_the_openai_package_reads_calls_whole_and_streamed() -> None:
    made = World("hermes")
    made.say(f"Well.<tool_call>{ADD}</tool_call><tool_call>{ADD}</tool_call>")
    with made.running() as server, openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        asked: dict[str, Any] = {"model": MODEL, "messages": [ASK], "tools": [TOOL]}
        message = client.chat.completions.create(**asked).choices[0].message
        assert [call.function.arguments for call in message.tool_calls] == ['{"a": 1}'] * 2
        assert message.content == "Well."
        with client.chat.completions.stream(**asked) as events:
            final = events.get_final_completion()
        assert final.choices[0].finish_reason == "tool_calls"
        assert [call.function.arguments for call in final.choices[0].message.tool_calls] == ['{"a": 1}'] * 2
