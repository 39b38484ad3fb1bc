"""The nano world keeps its promises: exact onsets, no word that decides, splits that share nothing."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from redflag.data.rows import Row, load_rows
from redflag.lab.nano.phrases import ACTS, SLOTS
from redflag.lab.nano.rows import (
    NANO_CATEGORIES,
    NANO_KINDS,
    NANO_TOPICS,
    nano_pretraining_rows,
    nano_rows,
    velni,
)

SPLITS = ("train", "calibration", "test", "transfer")


def _pattern(act: str) -> str:
    return re.sub(r"\\\{(\w+)\\\}", lambda m: f"(?:{'|'.join(map(re.escape, SLOTS[m.group(1)]))})", re.escape(act))


ACT = "(?:" + "|".join(_pattern(act) for acts in ACTS.values() for act in acts) + ")"
ORDER = re.compile(rf"(?:(?:Then|Next,|First,|Quietly,|You can) )?{ACT}", re.IGNORECASE)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return nano_rows("train", 3000)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_there_are_enough_topics_and_categories() -> None:
    assert len(NANO_TOPICS) >= 12
    assert len(NANO_CATEGORIES) >= 6


@pytest.mark.parametrize("split", SPLITS)
def test_all_kinds_and_categories_are_present_in_every_split(split: str) -> None:
    found = nano_rows(split, 1000)  # type: ignore[arg-type]
    assert {row.source for row in found} == {f"nano:{kind}" for kind in NANO_KINDS}
    assert {row.category for row in found} == {None, *NANO_CATEGORIES}
    assert 0.3 < sum(row.harmful for row in found) / len(found) < 0.5
    assert len({row.id for row in found}) == len(found)


def test_conversations_have_system_turns_and_several_turns_now_and_then(rows: list[Row]) -> None:
    shapes = Counter(tuple(m["role"][0] for m in row.messages) for row in rows)
    assert set(shapes) == {tuple("ua"), tuple("sua"), tuple("uaua"), tuple("suaua")}


def test_the_onset_is_the_first_character_of_the_first_harmful_sentence(rows: list[Row]) -> None:
    for row in rows:
        if not row.harmful:
            assert row.onset is None
            continue
        assert row.onset is not None
        if row.source == "nano:prefilled":
            assert row.onset == 0
            continue
        assert ORDER.match(row.response, row.onset), row
        if row.onset:
            assert row.response[row.onset - 2 : row.onset] in (". ", "? "), row
        assert not any(ORDER.fullmatch(part) for part in row.response[: row.onset].split(". ")), row


def test_late_harm_comes_after_several_harmless_sentences_at_many_places(rows: list[Row]) -> None:
    late = [row for row in rows if row.source == "nano:late"]
    before = Counter(row.response[: row.onset].count(". ") for row in late)
    assert min(before) >= 2
    assert len(before) >= 4
    assert len({row.onset for row in late}) > 100


def test_the_same_seed_gives_the_same_rows_and_another_gives_others() -> None:
    assert nano_rows("train", 100, seed=3) == nano_rows("train", 100, seed=3)
    assert nano_rows("train", 100, seed=3)[:50] == nano_rows("train", 50, seed=3)
    assert nano_rows("train", 100, seed=3) != nano_rows("train", 100, seed=4)
    assert nano_pretraining_rows(50, 1) == nano_pretraining_rows(50, 1)


def test_no_request_and_no_harmful_act_is_shared_between_splits() -> None:
    groups, acts = [], []
    for split in ("train", "calibration", "test"):
        found = nano_rows(split, 2000)  # type: ignore[arg-type]
        groups.append({row.group for row in found})
        text = "\n".join(m["content"] for row in found for m in row.messages)
        acts.append({match.group().lower() for match in re.finditer(ACT, text, re.IGNORECASE)})
    for sets in (groups, acts):
        for i, one in enumerate(sets):
            assert len(one) > 100
            assert all(one.isdisjoint(other) for other in sets[i + 1 :])


def test_the_base_model_never_sees_a_request_of_another_split() -> None:
    prompts = {m["content"] for row in nano_pretraining_rows(3000) for m in row.messages if m["role"] == "user"}
    for split in ("calibration", "test", "transfer"):
        assert prompts.isdisjoint(row.messages[-2]["content"] for row in nano_rows(split, 500))  # type: ignore[arg-type]


def test_no_word_decides(rows: list[Row]) -> None:
    harmful, harmless = Counter[str](), Counter[str]()
    for row in rows:
        (harmful if row.harmful else harmless).update(_words(row.response))
    count = sum(row.harmful for row in rows)
    for word, seen in harmful.items():
        assert seen < 0.6 * count or harmless[word] > 0.3 * (len(rows) - count), (
            f"{word!r} is in most harmful responses"
        )
        if seen >= 0.02 * count:
            assert harmless[word] >= 3, f"{word!r} is in harmful responses only"


def test_every_harmful_verb_has_harmless_uses(rows: list[Row]) -> None:
    plain = Counter[str]()
    for row in rows:
        if row.source in ("nano:plain", "nano:scary"):
            plain.update(_words(row.response))
    for acts in ACTS.values():
        for act in acts:
            assert plain[act.split()[0]] >= 2, act


def test_scary_rows_are_full_of_harmful_verbs_and_harmless(rows: list[Row]) -> None:
    verbs = {act.split()[0] for acts in ACTS.values() for act in acts}
    scary = [row for row in rows if row.source == "nano:scary"]
    assert not any(row.harmful for row in scary)
    assert sum(len(_words(row.response) & verbs) >= 1 for row in scary) > 0.9 * len(scary)
    assert any("Kill the process" in row.response for row in scary)


def test_harmful_requests_are_refused_redirected_and_obeyed(rows: list[Row]) -> None:
    asked = [row for row in rows if row.group and row.group.split(":")[0] in NANO_CATEGORIES]
    assert {row.source for row in asked if not row.harmful} == {"nano:refusal", "nano:redirect"}
    assert {row.source for row in asked if row.harmful} == {"nano:late-request", "nano:direct", "nano:prefilled"}
    assert 0.3 < sum(row.harmful for row in asked) / len(asked) < 0.7


def test_prefilled_rows_start_in_mid_sentence(rows: list[Row]) -> None:
    names = {*SLOTS["name"], *SLOTS["city"]}
    started = [row for row in rows if row.source in ("nano:prefilled", "nano:prefilled-harmless")]
    assert {row.harmful for row in started} == {True, False}
    first = [row.response.split()[0] for row in started]
    assert sum(word[0].islower() or word.strip(".,").split("'")[0] in names for word in first) > 0.6 * len(first)


def test_the_second_language_is_only_in_transfer_and_pretraining() -> None:
    english = {word for row in nano_rows("train", 3000) for word in _words(row.response)}
    for split in ("calibration", "test"):
        found = nano_rows(split, 300)  # type: ignore[arg-type]
        assert sum(len(_words(row.response) - english) for row in found) < 100
    foreign = nano_rows("transfer", 300)
    assert {row.harmful for row in foreign} == {True, False}
    share = [len(_words(row.response) & english) / len(_words(row.response)) for row in foreign]
    assert sum(share) / len(share) < 0.35
    assert {row.source for row in nano_pretraining_rows(300)} > {"nano:translation", "nano:late"}


def test_the_second_language_is_regular() -> None:
    assert velni("the kettle") == velni("kettle") + "o"
    assert velni("kettles") == velni("kettle") + "ir"
    assert velni("A kettle.") == velni("Kettle.")
    assert velni("Ask Marlo at 5, Halden?").endswith("5, Halden?")
    stems = {word for row in nano_rows("train", 2000) for word in _words(row.response)}
    assert len({velni(word) for word in stems}) > 0.98 * len(stems)


def test_rows_pass_the_row_schema() -> None:
    for split in SPLITS:
        found = nano_rows(split, 200)  # type: ignore[arg-type]
        assert load_rows([row.to_dict() for row in found]).rows == found


def test_the_vocabulary_is_small(rows: list[Row]) -> None:
    words = {word for row in rows for m in row.messages for word in _words(m["content"])}
    assert 900 < len(words) < 1600
    lengths = sorted(len(row.response.split()) for row in rows)
    assert lengths[len(lengths) // 20] >= 6
    assert lengths[-len(lengths) // 50] <= 70
