"""The package on systems other than Linux, as far as that can be tried on Linux."""

from __future__ import annotations

import ast
import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from foreign import WITHOUT_POSIX

from redflag.server import exchange

PACKAGE = Path(__file__).parent.parent / "redflag"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What `os` and `signal` have on POSIX alone; `getattr` with a default is the way to them.
POSIX_NAMES = {
    *("fork", "forkpty", "killpg", "getpgid", "setsid", "setpgid", "getuid", "geteuid", "getgid", "uname", "wait3"),
    *("pread", "pwrite", "preadv", "pwritev", "openpty", "chown", "fchmod", "fchown", "nice", "sched_getaffinity"),
    *("O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY", "O_SYNC", "statvfs", "mkfifo", "getloadavg"),
    *("SIGALRM", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "SIGQUIT", "SIGWINCH", "alarm"),
}
MODULES = """
import importlib, json, pkgutil
import redflag
failed = {}
for module in pkgutil.walk_packages(redflag.__path__, "redflag."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = str(error)
print(json.dumps(failed))
"""


def test_every_module_can_be_imported_where_there_is_no_posix() -> None:
    words = [sys.executable, "-c", WITHOUT_POSIX + MODULES]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    failed = json.loads(said.splitlines()[-1])
    assert all("vllm" in error for error in failed.values()), failed


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}", node


def test_no_function_of_posix_alone_is_called() -> None:
    used = [
        f"{place} {node.value.id}.{node.attr}"
        for place, node in nodes()
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("os", "signal")
        and node.attr in POSIX_NAMES
    ]
    assert not used


def test_descriptors_are_opened_in_one_place_which_knows_of_windows_text_mode() -> None:
    opened = {
        place.rpartition(":")[0]
        for place, node in nodes()
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if (node.value.id, node.attr) == ("os", "open")
    }
    assert opened <= {"files.py", "cli.py"}  # the latter opens the null device


def test_a_time_limit_that_is_over_is_caught_in_python_310_too_where_its_error_is_another_class() -> None:
    caught: list[str] = []
    for place, node in nodes():
        if not place.startswith("server/") or not isinstance(node, ast.Try):
            continue
        calls = [ast.unparse(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)]
        if "timeout_at" in calls:
            caught += [f"{place} {ast.unparse(handler.type)}" for handler in node.handlers if handler.type is not None]
    assert caught and not [line for line in caught if line.endswith(" TimeoutError")], caught
    assert set(exchange.TIMEOUTS) == {TimeoutError, asyncio.TimeoutError}


def _is_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    if not isinstance(call.func, ast.Name) or name != "open":
        return False
    mode = next((word.value for word in call.keywords if word.arg == "mode"), None)
    mode = mode or (call.args[1] if len(call.args) > 1 else ast.Constant("r"))
    return not any(isinstance(part, ast.Constant) and "b" in str(part.value) for part in ast.walk(mode))


def test_text_files_say_their_encoding() -> None:
    silent = [
        place
        for place, node in nodes()
        if isinstance(node, ast.Call) and _is_text(node) and not any(word.arg == "encoding" for word in node.keywords)
    ]
    assert not silent
