"""Rows for PRESTO from any row file: refusals after the beginning of a harmful answer to the same request.

    python recipes/papers/presto/prepare.py INPUT.jsonl MODEL OUTPUT.jsonl [COPIES]

Where one row of a group is harmful and another is not, they give a triple (prompt, harmful answer, refusal). What is
not harmful there is taken for the refusal, so the input should hold no other harmless answers to harmful requests. The
input's own rows follow, so that the flag and the language have theirs.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from transformers import AutoTokenizer

from redflag.data.rows import Row, load_rows, write_rows
from redflag.training.answers import deep_alignment_rows


def triples_of(rows: list[Row]) -> list[tuple[str, str, str]]:
    """(prompt, harmful answer, refusal) of every group that has both; one-turn conversations only."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.group is not None and len(row.messages) == 2 and row.prefill is None:
            groups[row.group].append(row)
    found = []
    for members in groups.values():
        refusal = next((row for row in members if not row.harmful), None)
        if refusal is not None:
            found += [(r.messages[0]["content"], r.response, refusal.response) for r in members if r.harmful]
    return found


def main(source: str, model: str, output: str, copies: int = 8) -> None:
    """Writes the rows and says how many there are of each."""
    rows = load_rows(source).rows
    triples = triples_of(rows)
    deep = deep_alignment_rows(triples, AutoTokenizer.from_pretrained(model), copies=copies)
    write_rows(output, deep + rows)
    print(
        f"{len(triples)} triples, {len(deep)} refusals of which {sum(bool(r.prefill) for r in deep)} follow a prefill"
    )


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:5]))
