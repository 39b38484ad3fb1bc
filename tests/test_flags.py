"""FlagSpec and its file."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redflag.errors import RedflagError
from redflag.flags import FILE, Flag, FlagSpec


class TestSpec:
    @pytest.mark.parametrize(
        "categories, category, expected",
        [
            (("harm",), None, 0),
            (("harm",), "harm", 1),
            (("harm",), "weapons", 1),  # a lone flag stands for every category
            (("weapons", "fraud"), None, 0),
            (("weapons", "fraud"), "weapons", 1),
            (("weapons", "fraud"), "fraud", 2),
        ],
    )
    def test_classes(self, categories: tuple[str, ...], category: str | None, expected: int) -> None:
        assert FlagSpec.of(*categories).class_of(category) == expected

    def test_a_category_without_a_flag_is_named(self) -> None:
        with pytest.raises(RedflagError, match=r"weapons, fraud \(got 'theft'\)"):
            FlagSpec.of("weapons", "fraud").class_of("theft")

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("", ""),
            ("harmless", "harmless"),
            ("a<f>b", "ab"),
            ("<f><f>", ""),
            ("<<f>f>", ""),
            ("<<<f>f>f>", ""),
            ("<<gg>f>", ""),  # removing <gg> forms <f>
            ("<g<f>g>", ""),
            ("<F>", "<F>"),
        ],
    )
    def test_strip(self, text: str, expected: str) -> None:
        assert FlagSpec((Flag("one", "<f>"), Flag("two", "<gg>"), Flag("three"))).strip(text) == expected

    @given(st.lists(st.sampled_from(["<", "f", ">", "g", "<f>", "<gg>", "a"]), max_size=30))
    def test_stripped_text_never_holds_a_flag(self, parts: list[str]) -> None:
        text = FlagSpec((Flag("one", "<f>"), Flag("two", "<gg>"))).strip("".join(parts))
        assert "<f>" not in text and "<gg>" not in text

    @pytest.mark.parametrize(
        "make, words",
        [
            (lambda: FlagSpec(()), "at least one flag"),
            (lambda: FlagSpec.of(), "at least one flag"),
            (lambda: FlagSpec.of("harm", "harm"), "its own category .got 'harm' twice"),
            (lambda: FlagSpec.of("a b", "a-b"), "its own token .got '<|redflag_a_b|>' twice"),
            (lambda: FlagSpec((Flag("a", "<f>"), Flag("b", "<f>"))), "its own token .got '<f>' twice"),
            (lambda: FlagSpec((Flag("a", "<f>", id=3), Flag("b", "<g>", id=3))), "its own id .got 3 twice"),
            (lambda: FlagSpec.of(""), "category must not be empty"),
            (lambda: FlagSpec((Flag(" "),)), "category must not be empty"),
            (lambda: FlagSpec((Flag("a", " "),)), "white space"),
            (lambda: FlagSpec.of("harm").ids, "must have a token id"),
        ],
    )
    def test_a_wrong_spec_is_refused(self, make: Any, words: str) -> None:
        with pytest.raises(RedflagError, match=words.replace("|", r"\|")):
            make()

    def test_two_flags_without_a_token_are_fine(self) -> None:
        assert FlagSpec((Flag("a"), Flag("b"))).categories == ("a", "b")


SPEC = FlagSpec(
    (Flag("weapons", "<f>", "Waffen: 'ü'\n", 3, 7), Flag("fraud", "<g>", id=9)), run_id="run-1", template_hash="abc"
)


class TestFile:
    @pytest.mark.parametrize("spec", [SPEC, FlagSpec.of("harm"), dataclasses.replace(SPEC, run_id="")])
    def test_what_was_saved_is_loaded(self, spec: FlagSpec, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "folder"
        spec.save(folder)
        assert FlagSpec.load(folder) == spec
        assert json.loads((folder / FILE).read_text(encoding="utf-8"))["format"] == 1
        assert os.listdir(folder) == [FILE]

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"format": 2}, "must have the format 1 .got 2"),
            ({"format": None}, "must have the format 1 .got None"),
            ({"colour": "red"}, "got 'colour'"),
            ({"flags": None}, "must have a list of flags"),
            ({"flags": {}}, "must have a list of flags"),
            ({"flags": []}, "must have a list of flags"),
            ({"flags": ["<f>"]}, "must have a list of flags"),
            ({"flags": [{"category": "a", "token": "<f>", "color": 1}]}, "got 'color'"),
            ({"flags": [{"token": "<f>", "id": 3}]}, "must have category and token"),
            ({"flags": [{"category": "a", "id": 3}]}, "must have category and token"),
            ({"flags": [{"category": 5, "token": "<f>"}]}, "category: 5"),
            ({"flags": [{"category": "a", "token": ["<f>"]}]}, "token: "),
            ({"flags": [{"category": "a", "token": "<f>", "description": None}]}, "description: None"),
            ({"flags": [{"category": "a", "token": "<f>", "severity": "high"}]}, "severity: 'high'"),
            ({"flags": [{"category": "a", "token": "<f>", "severity": True}]}, "severity: True"),
            ({"flags": [{"category": "a", "token": "<f>", "id": "3"}]}, "id: '3'"),
            ({"flags": [{"category": "a", "token": "<f>", "id": 3.0}]}, "id: 3.0"),
            ({"flags": [{"category": "a", "token": "<f>", "id": True}]}, "id: True"),
            ({"flags": [{"category": "a", "token": "<f>"}, {"category": "a", "token": "<g>"}]}, "its own category"),
            ({"run_id": 5}, "run_id: 5"),
            ({"template_hash": None}, "template_hash: None"),
        ],
    )
    def test_a_file_that_is_not_ours_is_refused(self, change: dict[str, Any], words: str, tmp_path: Path) -> None:
        SPEC.save(tmp_path)
        record = json.loads((tmp_path / FILE).read_text(encoding="utf-8")) | change
        (tmp_path / FILE).write_text(json.dumps(record), encoding="utf-8")
        with pytest.raises(RedflagError, match=words) as caught:
            FlagSpec.load(tmp_path)
        assert str(tmp_path / FILE) in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "content, words",
        [
            (b"", "cannot be read"),
            (b'{"format": 1, "flags": [', "cannot be read"),
            (b"\xff\xfe", "cannot be read"),
            (b"[" * 100_000, "cannot be read"),
            (b"[1]", "must have the format 1"),
            (b"null", "must have the format 1"),
        ],
    )
    def test_what_is_no_json_is_refused(self, content: bytes, words: str, tmp_path: Path) -> None:
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(RedflagError, match=words):
            FlagSpec.load(tmp_path)

    def test_a_missing_file_says_how_to_make_one(self, tmp_path: Path) -> None:
        with pytest.raises(RedflagError, match="Train one with `redflag train`"):
            FlagSpec.load(tmp_path)

    def test_a_failed_write_leaves_the_old_file_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        SPEC.save(tmp_path)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        for name in ("fsync", "replace"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, full)
                with pytest.raises(RedflagError, match="No space left on device"):
                    FlagSpec.of("harm").save(tmp_path)
            assert FlagSpec.load(tmp_path) == SPEC
            assert os.listdir(tmp_path) == [FILE]

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(RedflagError, match="cannot be created"):
            SPEC.save(tmp_path / "file" / "model")
