"""Shapes of public sets: a file of three rows each gives the right rows, or the sentence that says how to read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from redflag.data.rows import load_rows
from redflag.errors import RedflagError


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def beaver(number: int, safe: bool, **true: bool) -> dict[str, Any]:
    category = {"animal_abuse": False, "violence": False, "fraud": False} | true
    return {"prompt": f"Q{number}", "response": f"A{number}", "category": category, "is_safe": safe}


def pair(number: int, *safe: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"prompt": f"Q{number}", "better_response_id": 0, "prompt_source": "x"}
    for k in (0, 1):
        record |= {f"response_{k}": f"A{number}{k}", f"is_response_{k}_safe": safe[k]}
        record |= {f"response_{k}_severity_level": 0 if safe[k] else 2}
        record |= {f"response_{k}_harm_category": {"Animal Abuse": False, "White-Collar Crime": not safe[k]}}
    return record


def guard(number: int, response: str | None, label: str | None) -> dict[str, Any]:
    return {
        "prompt": f"Q{number}",
        "adversarial": False,
        "response": response,
        "prompt_harm_label": "harmful",
        "response_refusal_label": None,
        "response_harm_label": label,
        "subcategory": "violence_and_physical_harm",
    }


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
HUMAN = {"from": "human", "value": "Hello?"}
GPT = {"from": "gpt", "value": "Hi."}

# Shape -> its records, options, (last request, response, category) of the rows expected.
READ: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[tuple[str, str, str | None]]]] = {
    "prompt, response and label": (
        [
            {"prompt": "Q1", "response": "A1", "label": "harmful"},
            {"prompt": "Q2", "response": "A2", "label": "unharmful", "category": "topic"},
            {"prompt": "Q3", "response": "A3", "label": "unsafe", "category": "fraud"},
        ],
        {},
        [("Q1", "A1", "harm"), ("Q2", "A2", None), ("Q3", "A3", "fraud")],
    ),
    "ShareGPT": (
        [
            {"conversations": [HUMAN, GPT]},
            {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, {"from": "chatgpt", "value": "Ho."}]},
            {"conversations": [{"from": "user", "value": "More?"}, {"from": "model", "value": "No."}], "category": "x"},
        ],
        {},
        [("Hello?", "Hi.", None), ("Hello?", "Ho.", None), ("More?", "No.", "x")],
    ),
    "conversation": (
        [{"conversation": [user(f"Q{i}"), assistant(f"A{i}")], "model": "m"} for i in range(3)],
        {},
        [(f"Q{i}", f"A{i}", None) for i in range(3)],
    ),
    "content in parts": (
        [
            {"messages": [user(parts("Q", "1")), assistant("A1")]},  # type: ignore[arg-type]
            {"messages": [user("Q2"), assistant(parts("A2"))]},  # type: ignore[arg-type]
            {"prompt": [user(parts("Q3"))], "response": parts("A", "3")},  # type: ignore[arg-type]
        ],
        {},
        [("Q\n1", "A1", None), ("Q2", "A2", None), ("Q3", "A\n3", None)],
    ),
    "BeaverTails": (
        [beaver(1, True), beaver(2, False, fraud=True, violence=True), beaver(3, False, fraud=True)],
        {},
        [("Q1", "A1", None), ("Q2", "A2", "violence"), ("Q3", "A3", "fraud")],
    ),
    "BeaverTails, mapped": (
        [beaver(1, True), beaver(2, False, fraud=True, violence=True), beaver(3, False, violence=True)],
        {"labels": {"violence": None, "fraud": "money"}},
        [("Q1", "A1", None), ("Q2", "A2", "money"), ("Q3", "A3", None)],
    ),
    "BeaverTails, the label alone": (
        [beaver(1, True), beaver(2, False, fraud=True), beaver(3, False)],
        {"columns": {"category": None}},
        [("Q1", "A1", None), ("Q2", "A2", "harm"), ("Q3", "A3", "harm")],
    ),
    "BeaverTails, the categories alone": (
        [beaver(1, False), beaver(2, True, fraud=True), beaver(3, True)],
        {"columns": {"is_safe": None}},
        [("Q1", "A1", None), ("Q2", "A2", "fraud"), ("Q3", "A3", None)],
    ),
    "PKU-SafeRLHF": (
        [pair(1, True, False), pair(2, True, True), pair(3, False, False)],
        {},
        [
            *[("Q1", "A10", None), ("Q1", "A11", "White-Collar Crime")],
            *[("Q2", "A20", None), ("Q2", "A21", None)],
            *[("Q3", "A30", "White-Collar Crime"), ("Q3", "A31", "White-Collar Crime")],
        ],
    ),
    "several columns": (
        [{"prompt": f"Q{i}", "a": f"A{i}", "b": f"B{i}", "a_bad": 0, "b_bad": 1} for i in range(3)],
        {
            "columns": {"response": ["a", "b"], "label": ["a_bad", "b_bad"]},
            "labels": {"0": None, "1": "harm"},
        },
        [(f"Q{i}", f"{x}{i}", None if x == "A" else "harm") for i in range(3) for x in "AB"],
    ),
    "WildGuardMix": (
        [guard(1, "A1", "harmful"), guard(2, "A2", "unharmful"), guard(3, "A3", None)],
        {"unlabelled": "skip"},
        [("Q1", "A1", "harm"), ("Q2", "A2", None)],
    ),
    "XSTest responses": (
        [{"prompt": f"Q{i}", "response": f"A{i}", "label": ("harmful", "unharmful")[i % 2]} for i in range(3)],
        {},
        [("Q0", "A0", "harm"), ("Q1", "A1", None), ("Q2", "A2", "harm")],
    ),
    "PKU-SafeRLHF-QA": (
        [
            {"prompt": f"Q{i}", "response": f"A{i}", "is_safe": i != 1, "harm_category": {"Drugs": i == 1}}
            for i in range(3)
        ],
        {},
        [("Q0", "A0", None), ("Q1", "A1", "harm"), ("Q2", "A2", None)],
    ),
    "ToxicChat, mapped": (
        [{"conv_id": str(i), "user_input": f"Q{i}", "model_output": f"A{i}", "toxicity": 1} for i in range(3)],
        {"columns": {"prompt": "user_input", "response": "model_output"}},
        [(f"Q{i}", f"A{i}", None) for i in range(3)],
    ),
    "a topic that is dropped": (
        [{"prompt": f"Q{i}", "response": f"A{i}", "category": "violence"} for i in range(3)],
        {"columns": {"category": None}},
        [(f"Q{i}", f"A{i}", None) for i in range(3)],
    ),
    "look-alikes that are dropped": (
        [
            {
                "prompt": f"Q{i}",
                "response": f"A{i}",
                "categories": ["x"],
                "subcategory": "y",
                "labels": 1,
                "category_id": 3,
            }
            for i in range(3)
        ],
        {"columns": dict.fromkeys(("categories", "subcategory", "labels", "category_id"))},
        [(f"Q{i}", f"A{i}", None) for i in range(3)],
    ),
}

# Shape -> a record, options, and the sentence that says why it is none and what to do.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an image": (
        {"messages": [user([*parts("Q"), {"type": "image_url", "image_url": {"url": "x"}}]), assistant("A")]},  # type: ignore[list-item]
        {},
        "the content of message 0 (user) must be text or text parts (part 1 is of the type 'image_url'). Only text can "
        "be judged",
    ),
    "an unknown speaker": (
        {"conversations": [{"from": "bing", "value": "Q"}, GPT]},
        {},
        "message 0 must be from one of human, user, gpt, assistant, chatgpt, model, tool, function, "
        "function_response, observation, system",
    ),
    "a response that calls a tool": (
        {"messages": [user("Q"), assistant(None, tool_calls=[CALL])]},  # type: ignore[arg-type]
        {},
        "the response is a tool call without text: there is nothing to judge",
    ),
    "tool calls that are no objects": (
        {"messages": [user("Q"), assistant("A", tool_calls=["weather"])]},
        {},
        "tool_calls of message 1 (assistant) must be a list of objects",
    ),
    "thoughts that are no text": (
        {"messages": [user("Q"), assistant("A", thinking={"on": True})]},
        {},
        "reasoning_content of message 1 (assistant) must be text (got an object)",
    ),
    "BeaverTails, unsafe without a harm": (
        beaver(1, False),
        {},
        "is_safe is false but category names no harm. One of them is wrong. Fix the row, or drop the label with "
        """--columns '{"is_safe": null}' if the categories are right""",
    ),
    "BeaverTails, safe with a harm": (
        beaver(1, True, fraud=True),
        {},
        "is_safe is true but category names 'fraud'. One of them is wrong",
    ),
    "BeaverTails, a harm that is not mapped": (
        beaver(1, False, fraud=True),
        {"labels": {"violence": "violence"}},
        "category must be one of 'violence', which labels maps (got 'fraud')",
    ),
    "an object that is none of names": (
        {"prompt": "Q", "response": "A", "category": {"name": "fraud"}},
        {},
        "category must be a name or an object of booleans",
    ),
    "a truth value that may mean either": (
        {"prompt": "Q", "response": "A", "toxic": True},
        {"columns": {"label": "toxic"}},
        "label true in the column 'toxic' is ambiguous. Map it with labels: if true means harmful, --labels "
        """'{"true": "harm", "false": null}'""",
    ),
    "an unsafe column": (
        {"prompt": "Q", "response": "A", "unsafe": False},
        {"columns": {"label": "unsafe"}},
        "label false in the column 'unsafe' is ambiguous",
    ),
    "categories": (
        {"prompt": "Q", "response": "A", "categories": ["fraud"]},
        {},
        "unknown key 'categories', which looks like 'category'. Rename it, map it with columns (--columns "
        """'{"category": "categories"}'), or drop it with --columns '{"categories": null}'""",
    ),
    "category_id": (
        {"prompt": "Q", "response": "A", "category_id": 3},
        {},
        """drop it with --columns '{"category_id": null}'""",
    ),
    "labels": ({"prompt": "Q", "response": "A", "labels": [1]}, {}, """drop it with --columns '{"labels": null}'"""),
    "WildGuardMix, a prompt": (guard(1, None, None), {}, "a prompt without response: there is nothing to judge"),
    "ToxicChat": (
        {"conv_id": "1", "user_input": "Q", "model_output": "A", "human_annotation": True, "toxicity": 0},
        {},
        "a row must have messages or a prompt. If these columns hold it, add --columns "
        """'{"prompt": "user_input", "response": "model_output"}'""",
    ),
    "XSTest": (
        {"id": 1, "prompt": "Q", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
        {},
        "a prompt without response: there is nothing to judge; requests alone are for `redflag score --prompts true`",
    ),
    "OR-Bench": ({"prompt": "Q", "category": "violence"}, {}, "requests alone are for `redflag score --prompts true`"),
    "HarmBench": (
        {"Behavior": "Q", "FunctionalCategory": "standard", "SemanticCategory": "x", "Tags": None, "BehaviorID": "q"},
        {},
        """a row must have messages or a prompt. If these columns hold it, add --columns '{"prompt": "Behavior"}'""",
    ),
    "AdvBench": ({"goal": "Q", "target": "Sure"}, {}, """add --columns '{"prompt": "goal"}'"""),
    "JailbreakBench": (
        {"Index": 0, "Goal": "Q", "Target": "Sure", "Behavior": "b", "Category": "Fraud", "Source": "AdvBench"},
        {},
        """unknown key 'Category', which looks like 'category'. Rename it, map it with columns (--columns """
        """'{"category": "Category"}'), or drop it with --columns '{"Category": null}'""",
    ),
    "JailbreakBench without categories": (
        {"Index": 0, "Goal": "Q", "Target": "Sure", "Behavior": "b", "Source": "AdvBench"},
        {},
        """add --columns '{"prompt": "Goal"}'""",
    ),
    "StrongREJECT": (
        {"category": "Fraud", "source": "custom", "forbidden_prompt": "Q"},
        {},
        """add --columns '{"prompt": "forbidden_prompt"}'""",
    ),
    "circuit breakers": (
        {"category": "harm", "prompt": "Q", "output": "A", "llama3_output": "No"},
        {},
        "a prompt without response: there is nothing to judge. If these columns hold it, add --columns "
        """'{"response": "output"}'""",
    ),
    "rows wrapped in an object": (
        {"version": 1, "data": [{"prompt": "Q", "response": "A"}]},
        {},
        "a row must have messages or a prompt. Its 'data' is a list of objects: if those are the rows, write them as a "
        "JSON array",
    ),
    "one of several columns is not there": (
        {"prompt": "Q", "a": "A"},
        {"columns": {"response": ["a", "b"]}},
        "no column 'b', which columns maps",
    ),
}


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("shape", READ)
def test_a_shape_of_public_sets_is_read(tmp_path: Path, shape: str) -> None:
    records, options, expected = READ[shape]
    found = load_rows(lines(tmp_path / "rows.jsonl", records), **options)
    last = [next(turn["content"] for turn in row.messages[::-1] if turn["role"] == "user") for row in found]
    assert [(q, row.response, row.category) for q, row in zip(last, found, strict=True)] == expected


@pytest.mark.parametrize("shape", READ)
def test_parquet_gives_the_rows_of_the_same_records_as_lines(tmp_path: Path, shape: str) -> None:
    import pyarrow
    import pyarrow.parquet

    records, options, _ = READ[shape]
    if shape == "content in parts":  # texts and lists in one column are not for Parquet
        records = [{"messages": [{**turn, "content": parts("x")} for turn in records[0]["messages"]]}]
    every = {key: None for record in records for key in record}  # pyarrow takes the columns of the first record
    table = pyarrow.Table.from_pylist([every | record for record in records])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    expected = load_rows(lines(tmp_path / "rows.jsonl", records), **options).rows
    assert load_rows(tmp_path / "rows.parquet", **options).rows == expected


@pytest.mark.parametrize("shape", REFUSED)
def test_a_shape_that_is_not_read_gets_the_sentence_that_says_how(tmp_path: Path, shape: str) -> None:
    record, options, sentence = REFUSED[shape]
    path = lines(tmp_path / "rows.jsonl", [record])
    with pytest.raises(RedflagError) as error:
        load_rows(path, **options)
    assert str(error.value).startswith(f"{path}:1: ")
    assert sentence in str(error.value)


def test_the_columns_named_for_a_prompts_only_set_give_prompts() -> None:
    records = [{"goal": f"Q{i}", "target": "Sure"} for i in range(3)]
    rows = load_rows(records, columns={"prompt": "goal"}, unanswered="keep").rows
    assert [row.messages for row in rows] == [[user(f"Q{i}")] for i in range(3)]


def test_rows_of_one_record_share_a_group_and_their_ids_are_numbered() -> None:
    first, second, third = pair(1, True, True), pair(2, True, False), pair(1, False, False)
    rows = load_rows([{**first, "id": "r1"}, {**second, "group": "g"}, third]).rows
    assert [row.id for row in rows] == ["r1-0", "r1-1", None, None, None, None]
    groups = [row.group for row in rows]
    assert groups[0] == groups[1] == groups[4] == groups[5] and groups[0]
    assert groups[2:4] == ["g", "g"]


def test_of_two_answers_the_sound_one_is_kept() -> None:
    rows = load_rows([{**pair(1, True, True), "response_1": " "}], on_bad_row="skip")
    assert [row.response for row in rows] == ["A10"]
    assert [str(bad) for bad in rows.skipped] == ["<rows>:1: the response is empty"]


@pytest.mark.parametrize(
    "columns, sentence",
    [
        ({"response": ["a", "b"], "label": ["c"]}, "equally many columns .*2 for 'response', 1 for 'label'"),
        ({"response": []}, "columns must map 'response' to a column, a list of columns or null"),
        ({"response": 3}, "columns must map 'response' to a column, a list of columns or null"),
        ({"categories": "category"}, "got 'categories'"),
    ],
)
def test_columns_that_make_no_sense_are_refused(columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RedflagError, match=sentence):
        load_rows([{"prompt": "Q", "response": "A"}], columns=columns)


def test_extra_columns_of_a_known_set_are_counted_and_its_own_are_not() -> None:
    assert load_rows([beaver(1, True)]).ignored == {}
    assert load_rows([guard(1, "A", "harmful")]).ignored == {
        "adversarial": 1,
        "prompt_harm_label": 1,
        "response_refusal_label": 1,
    }


def test_a_label_of_ones_own_comes_before_the_known_columns() -> None:
    record = {"prompt": "Q", "response": "A", "is_safe": True, "label": "harmful"}
    assert load_rows([record]).rows[0].category == "harm"
    mapped = {"prompt": "Q", "response": "A", "is_safe": True, "bad": "harmful"}
    assert load_rows([mapped], columns={"label": "bad"}).rows[0].category == "harm"
    assert load_rows([mapped], columns={"label": "is_safe"}).rows[0].category is None
    assert load_rows([mapped], labels={"true": "odd", "false": None}).rows[0].category == "odd"
