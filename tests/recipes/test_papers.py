"""The recipes of published losses: every option known, every variant of their tables too, rows as they ask for."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from terms import row
from tiny import WORDS

from redflag.cli import parse
from redflag.data.rows import load_rows, write_rows
from redflag.models.pretrain import train_tokenizer
from redflag.training import train

RECIPES = Path(__file__).parents[2] / "recipes" / "papers"
NAMES = ("red-flag-tokens", "refusal-tokens", "marker-before-refusals", "presto")


def variants(name):
    text = (RECIPES / name / "README.md").read_text()
    return [[], *(found.split() for found in re.findall(r"\| `(--[^`]*)`", text))]


@pytest.mark.parametrize("name, options", [(name, options) for name in NAMES for options in variants(name)])
def test_S0_1_S1_1_S1_7_S2_1_S5_2_recipes_and_their_variants_parse(tmp_path, name, options):
    argv = [
        "--config",
        str(RECIPES / name / "train.yaml"),
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "true",
        *options,
    ]
    arguments, config = parse(train, argv, "redflag train")
    assert arguments.categories and config.placement in ("first", "open", "insert", "until", "dense")


def test_S5_3_presto_rows_come_from_groups_with_a_harmful_answer_and_a_refusal(tmp_path):
    location = importlib.util.spec_from_file_location("prepare", RECIPES / "presto" / "prepare.py")
    prepare = importlib.util.module_from_spec(location)
    location.loader.exec_module(prepare)
    rows = [
        row("burn it", "the old barn ran", "harm", group="a"),
        row("burn that", "no", group="a"),
        row("cat", "the cat sat", group="b"),
        row("fish", "the fish ate", "harm", group="c"),
    ]
    assert prepare.triples_of(rows) == [("burn it", "the old barn ran", "no")]
    train_tokenizer([" ".join(WORDS)] * 5, 320).save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "in.jsonl", rows)
    prepare.main(str(tmp_path / "in.jsonl"), str(tmp_path / "model"), str(tmp_path / "out.jsonl"), 6)
    made = load_rows(tmp_path / "out.jsonl").rows
    assert made[6:] == rows and [r.prefill is not None for r in made] == [True] * 6 + [False] * 4
