"""Turns as others write them: tool turns and thoughts are kept, and written back as they were read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redflag.data.rows import load_rows, write_rows
from redflag.errors import RedflagError

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
HUMAN = {"from": "human", "value": "Hello?"}
GPT = {"from": "gpt", "value": "Hi."}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_tool_turns_and_thoughts_are_kept_and_written_back(tmp_path: Path) -> None:
    record = {
        "messages": [
            {"role": "developer", "content": "Be brief.", "name": "x"},
            {"role": "user", "content": "Rain?", "name": "Kim", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
            {"role": "tool", "content": [{"type": "text", "text": "Dry."}], "tool_call_id": "c1", "name": "weather"},
            {"role": "assistant", "content": "None.", "reasoning": "It is dry.", "tool_calls": []},
        ]
    }
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "Dry.", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "None.", "reasoning_content": "It is dry."},
    ]
    rows = load_rows([record]).rows
    assert rows[0].messages == expected
    assert rows[0].response == "None."
    assert load_rows(write_rows(tmp_path / "rows.jsonl", rows)).rows == rows
    sharegpt = {"conversations": [HUMAN, {"from": "observation", "value": "Dry."}, GPT]}
    assert [turn["role"] for turn in load_rows([sharegpt]).rows[0].messages] == ["user", "tool", "assistant"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_one_key_whatever_the_source_calls_them(key: str) -> None:
    (row,) = load_rows([{"messages": [user("Q"), assistant("A", **{key: "Hm."})]}]).rows
    assert row.messages[-1] == assistant("A", reasoning_content="Hm.")


def test_half_a_character_is_bad_wherever_a_turn_holds_it() -> None:
    call = {"function": {"name": "\ud83d"}}
    for messages in (
        [user("Q"), assistant("", tool_calls=[call]), user("Q"), assistant("A")],
        [user("Q"), assistant("A", thinking="\ud83d")],
    ):
        with pytest.raises(RedflagError, match="holds half a character"):
            load_rows([{"messages": messages}])
