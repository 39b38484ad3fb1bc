"""What is said of labels before they are learnt from, line by line."""

from __future__ import annotations

from typing import Any

import pytest

from redflag.data.rows import Rows, load_rows
from redflag.data.summary import label_table, warnings_about

PAIR = {"prompt": "How do I kill a process?", "response": "Use kill PID."}
TOPIC = PAIR | {"category": "violence"}

EVERY = (
    "warning: every row has a category, so all 20 count as harmful. If category is the topic of the request, drop it "
    """with --columns '{"category": null}', or name the column that says whether the response is harmful: --columns """
    """'{"label": "COLUMN"}'"""
)


def of(*counted: tuple[int, dict[str, Any]], **options: Any) -> Rows:
    return load_rows([record for count, record in counted for _ in range(count)], **options)


# What there is -> rows, options, the warnings.
WARNED: dict[str, tuple[list[tuple[int, dict[str, Any]]], dict[str, Any], list[str]]] = {
    "a topic in every row": ([(20, TOPIC)], {}, [EVERY]),
    "the topic dropped": ([(20, TOPIC)], {"columns": {"category": None}}, []),
    "harmful rows beside harmless ones": ([(20, TOPIC), (5, PAIR)], {}, []),
    "no harmful row": ([(5, PAIR)], {}, []),
    "labels": ([(5, TOPIC | {"label": "benign"}), (5, TOPIC | {"label": "harmful"})], {}, []),
    "labels that say harmful throughout": ([(5, TOPIC | {"label": "harmful"})], {}, []),
    "topics without a label beside labels": (
        [(5, TOPIC | {"label": "benign"}), (3, TOPIC), (2, PAIR)],
        {},
        [
            "warning: 3 rows have a category and no label, beside 5 rows with a label. Those 3 count as harmful: "
            "if their category is the topic of the request, give them a label"
        ],
    ),
    "a label beside the category": (
        [(5, TOPIC | {"toxicity": 0.1}), (5, PAIR | {"toxicity": 0.9})],
        {},
        [
            "warning: the column toxicity looks like a label and is not read; category decides. If one says whether "
            """the response is harmful, give --columns '{"label": "toxicity"}', and --labels unless its values are """
            "words like harmful"
        ],
    ),
    "labels and no category": (
        [(5, PAIR | {"prompt_label": "unsafe", "response_label": "safe", "tagged": 1})],
        {},
        [
            "warning: the columns response_label, prompt_label look like a label and are not read; every row counts as "
            """harmless. If one says whether the response is harmful, give --columns '{"label": "response_label"}', """
            "and --labels unless its values are words like harmful"
        ],
    ),
    "a label that is used beside another": (
        [(5, TOPIC | {"label": "benign", "refusal": True})],
        {},
        [],
    ),
    "words that only contain one": ([(5, PAIR | {"unsafely": 1, "labelled_by": "x"})], {}, []),
}


@pytest.mark.parametrize("rows, options, warnings", WARNED.values(), ids=WARNED.keys())
def test_doubtful_labels_are_warned_of_and_others_are_not(
    rows: list[tuple[int, dict[str, Any]]], options: dict[str, Any], warnings: list[str]
) -> None:
    assert warnings_about(of(*rows, **options)) == warnings


def test_the_table_counts_every_category_and_source() -> None:
    benched, chats = TOPIC | {"source": "bench"}, PAIR | {"source": "chats"}
    rows = of((1200, chats), (3, TOPIC), (4, benched), (2, PAIR), (3, TOPIC | {"category": "a"}))
    assert label_table(rows) == [
        "1,212 rows: 10 harmful, 1,202 harmless",
        "      1,200  harmless  (source chats)",
        "          4  harmful   violence  (source bench)",
        "          3  harmful   a",
        "          3  harmful   violence",
        "          2  harmless",
    ]


@pytest.mark.parametrize("kinds, lines", [(1, 2), (11, 12), (12, 12), (40, 12)])
def test_the_table_is_short_and_its_lines_add_up(kinds: int, lines: int) -> None:
    rows = of(*((i + 1, TOPIC | {"category": f"c{i}"} if i % 2 else PAIR | {"source": f"s{i}"}) for i in range(kinds)))
    table = label_table(rows)
    assert len(table) == lines
    assert sum(int(line.split()[0]) for line in table[1:]) == len(rows)
    if kinds == 40:
        assert table[-1] == "        465  in 30 further kinds: 240 harmful, 225 harmless"
