"""Servers whose models call tools, one for each family of templates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import httpx
import pytest
from running import MODEL, ROUTES, Running, body_of, chunks_of, engine, running, text_of_chunks
from test_chat_templates import world

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


@pytest.fixture(scope="session", autouse=True)
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
