"""`redflag serve --upstream_route chat` in front of a stock vLLM: its template shows the tools, redflag reads calls."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest
import torch
from stock_vllm import serve_vllm, serving
from tool_doors import TOOLS
from tool_server import ADD, ASK, TOOL
from transformers import AutoModelForCausalLM, AutoTokenizer

from redflag.backends.load import load_flagged
from redflag.flags import FlagSpec
from redflag.prompt import render_prompt, template_hash
from redflag.tool_prompt import FORMATS, ToolUse, render_tool_prompt
from redflag.watching.thresholds import Thresholds

pytestmark = pytest.mark.slow
TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|user|>Result: {{ m.content }}<|end|>{% else %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<|reserved_6|>{{ m.reasoning_content }}<|reserved_7|>{% endif %}{{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and enable_thinking %}<|reserved_6|>"
    "{% endif %}{% endif %}"
)
THOUGHT, CALL = "I had better add.", f"<tool_call>\n{ADD}\n</tool_call>"
AFTER = "It is two."
OPERATOR = "operator-key-0123456789"


def taught(model: Any, pairs: list[tuple[list[int], list[int]]]) -> None:
    """Until it says these answers to these prompts, and nothing else, when asked for the likeliest tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        total = 0.0
        for prompt, answer in pairs:
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        if total < 0.02:
            return
    raise AssertionError(f"the loss is still {total}")


@pytest.fixture(scope="module")
def caller(nano, tmp_path_factory):
    """The nano model with a template that shows tools and thoughts, taught to think and to call one."""
    folder = tmp_path_factory.mktemp("caller")
    tokenizer = AutoTokenizer.from_pretrained(nano / "model")
    model = AutoModelForCausalLM.from_pretrained(nano / "model", dtype=torch.float32)
    tokenizer.chat_template = TEMPLATE
    spec = replace(FlagSpec.load(nano / "model"), template_hash=template_hash(tokenizer))
    use = ToolUse(FORMATS["hermes"], (TOOL,))
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "type": "function", "function": json.loads(ADD)}],
    }
    result = {"role": "tool", "tool_call_id": "c", "content": "2"}

    def written(text: str) -> list[int]:
        return tokenizer(text + "<|end|>", add_special_tokens=False)["input_ids"]

    taught(
        model,
        [
            (render_tool_prompt(tokenizer, [ASK], spec, use).ids, written(CALL)),
            (
                render_tool_prompt(tokenizer, [ASK], spec, use, thinking=True).ids,
                written(f"{THOUGHT}<|reserved_7|>{CALL}"),
            ),
            (render_tool_prompt(tokenizer, [ASK, call, result], spec, use).ids, written(AFTER)),
            (render_prompt(tokenizer, [ASK], spec, thinking=True), written(f"{THOUGHT}<|reserved_7|>{AFTER}")),
        ],
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    spec.save(folder)
    Thresholds.manual(0.5, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash).save(folder)
    load_flagged(folder, "cpu")
    return folder


@pytest.fixture(scope="module")
def upstream(caller, tmp_path_factory):
    with serve_vllm(caller, tmp_path_factory.mktemp("vllm"), name="caller") as server:
        yield server


def requests_of(upstream, path: str) -> int:
    """How many requests to a path the server's log tells of."""
    return upstream.log.read_text(errors="replace").count(f"POST {path} ")


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_tools_and_thoughts_go_through_a_stock_vllm_at_every_door(caller, upstream, monkeypatch, route):
    monkeypatch.setenv("REDFLAG_OPERATOR_KEY", OPERATOR)
    options = ("--upstream_route", route, "--thoughts", "show", "--test_halt", "true")
    with (
        serving(caller, upstream.url, *options) as url,
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as one,
        anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0) as other,
    ):
        before = requests_of(upstream, "/v1/chat/completions"), requests_of(upstream, "/v1/completions")
        name = one.models.list().data[0].id
        chat: dict[str, Any] = {"model": name, "messages": [ASK], "tools": [TOOL], "temperature": 0.0}
        message = one.chat.completions.create(**chat).choices[0].message
        assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [("add", '{"a": 1}')]
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "2"}
        again = one.chat.completions.create(**{**chat, "messages": [ASK, message, result]})
        assert again.choices[0].message.content == AFTER
        thinking = {"chat_template_kwargs": {"enable_thinking": True}}
        with one.chat.completions.stream(**chat, extra_body=thinking) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls" and final.message.model_extra["reasoning_content"] == THOUGHT

        asked: dict[str, Any] = {"model": name, "input": [ASK], "temperature": 0.0, "reasoning": {"effort": "low"}}
        thought, said = one.responses.create(**asked).output
        assert (thought.content[0].text, said.content[0].text) == (THOUGHT, AFTER)
        events = list(one.responses.create(**asked, tools=[TOOLS["/v1/responses"]], stream=True))
        thought, call = events[-1].response.output
        assert (thought.content[0].text, call.name, call.arguments) == (THOUGHT, "add", '{"a": 1}')

        body: dict[str, Any] = {
            "model": name,
            "messages": [ASK],
            "tools": [TOOLS["/v1/messages"]],
            "max_tokens": 200,
            "extra_body": {"temperature": 0.0},
        }
        blocks = other.messages.create(**body, thinking={"type": "enabled", "budget_tokens": 1024}).content
        assert [block.type for block in blocks] == ["thinking", "tool_use"] and blocks[1].input == {"a": 1}
        with other.messages.stream(**body) as stream:
            assert stream.get_final_message().stop_reason == "tool_use"

        headers = {"X-Redflag-Operator": OPERATOR, "X-Redflag-Test": "halt"}  # at the fourth token, in the call
        halted = one.chat.completions.create(**chat, extra_headers=headers).choices[0]
        assert halted.finish_reason == "content_filter" and not halted.message.tool_calls
        events = list(one.responses.create(**{**asked, "reasoning": None}, tools=[TOOLS["/v1/responses"]],
                                           stream=True, extra_headers=headers))  # fmt: skip
        assert "function_call" not in str(events[2:-1]) and events[-1].type == "response.incomplete"
        refused = other.messages.create(**body, extra_headers=headers)
        assert refused.stop_reason == "refusal" and refused.content == []

        after = requests_of(upstream, "/v1/chat/completions"), requests_of(upstream, "/v1/completions")
        assert [now - then for now, then in zip(after, before, strict=True)] == (
            [10, 0] if route == "chat" else [0, 10]
        )


def test_a_parser_of_the_upstream_is_not_used(caller, tmp_path):
    """vLLM would parse the calls itself; it is asked not to, and every token comes with its log-probabilities."""
    parses = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    asked: dict[str, Any] = {"messages": [ASK], "tools": [TOOL], "temperature": 0.0}
    with serve_vllm(caller, tmp_path, *parses, name="caller") as upstream:
        with openai.OpenAI(base_url=f"{upstream.url}/v1", api_key="none", max_retries=0) as direct:
            theirs = direct.chat.completions.create(model="caller", **asked, max_tokens=200).choices[0]
        assert theirs.finish_reason == "tool_calls" and not theirs.message.content, "the parser is there"
        with (
            serving(caller, upstream.url, "--upstream_route", "chat") as url,
            openai.OpenAI(base_url=url, api_key="none", max_retries=0) as guarded,
        ):
            name = guarded.models.list().data[0].id
            whole = guarded.chat.completions.create(model=name, **asked)
            with guarded.chat.completions.stream(model=name, **asked) as stream:
                streamed = stream.get_final_completion()
            assert whole.usage is not None
            cut = guarded.chat.completions.create(model=name, **asked, max_tokens=whole.usage.completion_tokens - 1)
    for made, reason in ((whole, "tool_calls"), (streamed, "tool_calls"), (cut, "length")):
        (choice,) = made.choices
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert (calls, choice.finish_reason) == ([("add", '{"a": 1}')], reason)
