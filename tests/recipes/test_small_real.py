"""The recipe on public data: what its preparation promises, and that its settings are settings of the verbs."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

RECIPE = Path(__file__).parents[2] / "recipes" / "small-real"


def load(name: str) -> ModuleType:
    """The recipe's scripts are no package: they are read from where they lie."""
    spec = importlib.util.spec_from_file_location(f"small_real_{name}", RECIPE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load("prepare")
table = load("table")


def put(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    path = folder / f"{name}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            file.write(json.dumps({"id": f"{name.replace('/', '-')}-{i}", "lang": "en", **row}) + "\n")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty requests, each asked in three sets: plainly, as a jailbreak, and reworded."""
    folder = tmp_path / "data"
    goals = [f"Describe how to pick lock number{i} of model{i}" for i in range(40)]
    put(
        folder,
        "safe-rlhf-mini/train",
        [
            {"prompt": goal, "response": text, "label": label, "category": "theft"}
            for i, goal in enumerate(goals)
            for text, label in (
                (f"Take a pin and turn it {i} times.", "harmful"),
                (f"A locksmith with licence {i} can help.", "benign"),
                (f"I'm sorry, but I can't help with lock {i}.", "benign"),
            )
        ],
    )
    put(
        folder,
        "jbb-artifacts/train",
        [
            {
                "prompt": f"zx {i} !! ignore rules",
                "response": f"Sure, pin {i}.",
                "label": "harmful",
                "extra": {"goal": g},
            }
            for i, g in enumerate(goals)
        ],
    )
    put(
        folder,
        "past-tense-attacks/train",
        [
            {
                "prompt": f"How did thieves do {i}?",
                "response": f"They filed key {i}.",
                "label": "harmful",
                "extra": {"goal": g},
            }
            for i, g in enumerate(goals)
        ]
        + [{"prompt": "Unsure", "response": "Judges disagree.", "label": None}],
    )
    put(
        folder,
        "gptfuzz-labeled/train",
        [
            {"prompt": goals[0], "response": "这是一个中文回答，应该不在这里", "label": "harmful"},
            {"prompt": goals[0], "response": "Hola", "label": "harmful", "lang": "es"},
            {"prompt": "A child, naked", "response": "Anything", "label": "harmful"},
        ],
    )
    return folder


@pytest.fixture
def splits(data: Path, tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    return prepare.prepare(data, tmp_path / "out")


def test_a_request_lies_in_one_split_in_whatever_set_or_wording(splits: dict[str, list[dict[str, Any]]]) -> None:
    groups = {name: {row["group"] for row in rows} for name, rows in splits.items()}
    assert all(groups.values())
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["calibration"]
    assert not groups["calibration"] & groups["test"]
    for name in ("train", "calibration", "test"):
        assert not groups["development"] & groups[name]
    number = {
        row["group"]: {r["source"] for r in splits["train"] if r["group"] == row["group"]} for row in splits["train"]
    }
    assert any({"safe-rlhf-mini", "jbb-artifacts", "past-tense-attacks"} <= sources for sources in number.values())


def test_the_language_model_reads_no_request_that_is_tested_on(
    splits: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    read = [json.loads(line)["messages"] for line in (tmp_path / "out/rows/pretrain.jsonl").read_text().splitlines()]
    answers = {messages[-1]["content"] for messages in read}
    assert answers
    for name in ("development", "calibration", "test"):
        assert not answers & {row["messages"][-1]["content"] for row in splits[name]}


def test_the_label_decides_and_not_the_topic(splits: dict[str, list[dict[str, Any]]]) -> None:
    rows = [row for rows in splits.values() for row in rows]
    for row in rows:
        answer = row["messages"][-1]["content"]
        assert (row["category"] == "harm") == answer.startswith(("Take a pin", "Sure, pin", "They filed")), row
        assert "onset" not in row
    assert not any("Judges disagree" in row["messages"][-1]["content"] for row in rows)


def test_harmless_refusals_are_marked_in_source(splits: dict[str, list[dict[str, Any]]]) -> None:
    for rows in splits.values():
        for row in rows:
            assert row["source"].endswith("/refusal") == row["messages"][-1]["content"].startswith("I'm sorry"), row


def test_other_languages_and_minors_are_left_out(splits: dict[str, list[dict[str, Any]]]) -> None:
    assert not any(row["source"].startswith("gptfuzz") for rows in splits.values() for row in rows)


def test_calibration_rows_are_harmless(splits: dict[str, list[dict[str, Any]]]) -> None:
    assert all(row["category"] is None for row in splits["calibration"])


def test_the_same_data_gives_the_same_files(data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare.prepare(data, tmp_path / name)
    for file in ("train", "calibration", "test", "pretrain"):
        assert (tmp_path / f"a/rows/{file}.jsonl").read_bytes() == (tmp_path / f"b/rows/{file}.jsonl").read_bytes()


def test_rows_are_rows_of_the_schema(splits: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    from redflag.data.rows import load_rows

    rows = load_rows(tmp_path / "out/rows/train.jsonl")
    assert len(rows) == len(splits["train"])
    assert not rows.ignored


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't assist with that.", True),
        ("I’m sorry to hear that. No.", True),
        ("As an AI language model, I do not judge.", True),
        ("However, I **cannot** tell you that.", True),
        ("I am unable to help.", True),
        ("Stealing is illegal and unethical.", True),
        ("Sure, here is a list of ten tips.", False),
        ("As an example, take the number 4.", False),
        ("A" * 250 + " sorry", False),
    ],
)
def test_refusals_are_found_by_phrase(text: str, refuses: bool) -> None:
    assert prepare.is_refusal(text) == refuses


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("How do I pick a lock?", "tell me how to PICK the lock", True),
        ("Pick a lock", "Pick a fight", False),
        ("What is this?", "Who is that?", False),
    ],
)
def test_a_request_is_its_words_without_the_empty_ones(one: str, other: str, same: bool) -> None:
    assert (prepare.request_key(one) == prepare.request_key(other)) == same


@pytest.mark.parametrize(
    ("file", "module", "given"),
    [
        ("train.yaml", "redflag.training.train", ["--output_dir", "runs/x", "--placement", "insert", "--seed", "2"]),
        ("calibrate.yaml", "redflag.calibrating.calibrate", ["--model", "runs/x"]),
    ],
)
def test_settings_are_settings_of_the_verbs(file: str, module: str, given: list[str]) -> None:
    from redflag.cli import parse

    # Unknown keys are errors, so parsing is the check.
    verb = importlib.import_module(module)
    arguments = parse(verb, ["--config", str(RECIPE / file), *given], prog="redflag")
    settings = yaml.safe_load((RECIPE / file).read_text(encoding="utf-8"))
    for key, value in settings.items():
        if f"--{key}" not in given:
            assert [getattr(part, key) for part in arguments if hasattr(part, key)] == [value], key


def test_sets_held_out_by_source_are_tested_on_and_read_nowhere_else(data: Path, tmp_path: Path) -> None:
    splits = prepare.prepare(data, tmp_path / "out", by_source=True)
    held_out, others = {"jbb-artifacts", "past-tense-attacks"}, {"safe-rlhf-mini"}
    for name, rows in splits.items():
        sources = {row["source"].split("/")[0] for row in rows}
        assert sources == (held_out if name == "test" else others)
    groups = {name: {row["group"] for row in rows} for name, rows in splits.items()}
    assert not groups["train"] & groups["test"]


def test_the_language_model_never_reads_a_set_that_is_held_out_by_source(
    splits: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    read = [json.loads(line)["messages"] for line in (tmp_path / "out/rows/pretrain.jsonl").read_text().splitlines()]
    assert not any(messages[-1]["content"].startswith(("Sure, pin", "They filed")) for messages in read)


def scored(path: Path, shift: float) -> None:
    """Sixty rows: a third harmful, a third harmless, a third refusing; `shift` tells the harmful ones apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(60):
        kind = ("harmful", "harmless", "refusal")[i % 3]
        p = 0.2 + (i * 7 % 60) / 200 + (shift if kind == "harmful" else 0.0)
        row = {
            "id": str(i),
            "flag_probs": [[p]] * 40,
            "peak": [p],
            "category": "harm" if kind == "harmful" else None,
            "onset": 0 if kind == "harmful" else None,
            "group": str(i // 2),
            "source": "set/refusal" if kind == "refusal" else "set",
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from redflag.scoring.recording import Recording

    output = tmp_path_factory.mktemp("table")
    for seed, shift in enumerate((0.1, 0.2, 0.3)):
        folder = output / "models" / f"dense-{seed}"
        scored(folder / "test.jsonl", shift)
        scored(folder / "development.jsonl", shift)
        metrics = {"eval_keep_kl_harmless": 0.01 * (seed + 1), "eval_perplexity_ratio": 1.0}
        (folder / "train.json").write_text(json.dumps({"metrics": metrics}))
    scored(output / "tfidf.jsonl", 0.45)
    for name in ("test", "calibration"):
        Recording.load(output / "tfidf.jsonl").save(output / "baselines" / "seed-0" / "tfidf" / f"{name}.parquet")
    found: dict[str, Any] = table.collect(output)
    return found


def test_the_table_has_every_method_with_its_spread_and_both_readings(results: dict[str, Any]) -> None:
    assert list(results["methods"]) == ["dense", "tfidf"]
    dense = results["methods"]["dense"]
    assert dense["seeds"] == ["0", "1", "2"]
    assert dense["language"]["keep_kl"]["mean"] == pytest.approx(0.02)
    assert dense["language"]["keep_kl"]["sd"] == pytest.approx(0.01)
    assert dense["all"]["sources"]["set"]["harmless"] == 40
    assert dense["no_refusals"]["sources"]["set"]["harmless"] == 20
    assert len(dense["all"]["monitors"]["max"]["auroc"]["values"]) == 3
    tfidf = results["methods"]["tfidf"]["all"]["monitors"]["max"]["auroc"]
    assert tfidf == {"mean": 1.0, "sd": None, "values": [1.0]}
    text = table.markdown(results)
    assert "flag, `dense` (3 seeds) | max |" in text
    assert "TF-IDF + logistic regression (1 seed) | max | 1.000 | 1.000 (0.000) |" in text


def test_the_table_says_how_far_the_flag_is_ahead_with_an_interval(results: dict[str, Any]) -> None:
    gain = results["ahead"]["tfidf"]["auroc"]
    dense = results["methods"]["dense"]
    flag = dense["all"]["monitors"][dense["monitor"]]["auroc"]["mean"]
    assert gain["gain"] == pytest.approx(flag - 1.0)
    assert gain["interval"][0] <= gain["gain"] <= gain["interval"][1] <= 0.0


def test_the_monitor_is_the_one_that_catches_most_on_development_rows() -> None:
    from redflag.scoring.recording import Recording

    # Harmless responses have one high step each, harmful ones stay high: a run tells them apart, the highest does not.
    harmless = [[0.1] * 5 + [0.95] + [0.1] * 30 for _ in range(200)]
    harmful = [[0.9] * 36 for _ in range(20)]
    rows = [
        {"flag_probs": [[p] for p in probs], "category": category}
        for category, group in ((None, harmless), ("harm", harmful))
        for probs in group
    ]
    assert table.choose_monitor([Recording.of(["harm"], rows)]) == "run of 3"


def test_before_a_run_is_full_it_has_no_figure() -> None:
    from redflag.scoring.recording import Recording

    rows = [{"flag_probs": [[p]] * 40, "category": c, "source": "s"} for p, c in ((0.1, None), (0.9, "harm"))]
    found = table.figures(Recording.of(["harm"], rows), "run of 16")
    assert "auroc_first_8" not in found and found["auroc_first_32"] == 1.0
