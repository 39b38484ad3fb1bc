"""`redflag VERB ...`: verb -> function, nothing else. `redflag --help` loads neither torch nor trl."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from redflag.errors import RedflagError

VERBS = {
    "demo": ("redflag.demo", "the nano world from nothing to a watched stream, in minutes"),
    "train": ("redflag.training.train", "train a model to raise its flags; saves model, tokenizer, redflag.json"),
    "score": ("redflag.measuring.score", "flag probabilities of given conversations, token by token"),
    "calibrate": ("redflag.measuring.calibrate", "thresholds for a target false-alarm rate per response"),
    "generate": ("redflag.serving.generate", "stream a guarded answer to the terminal"),
    "show": ("redflag.training.show", "rows, encoded examples or traces in colour"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0, 2 for a mistake in the input, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: redflag VERB [--config FILE.yaml] [--option VALUE ...]\n")
        for verb, (_, help_text) in VERBS.items():
            print(f"  {verb:<10} {help_text}")
        print("\n`redflag VERB --help` lists the options of a verb; a YAML file may hold any of them.")
        return 0
    if argv[0] == "--version":
        from redflag import __version__

        print(__version__)
        return 0
    verb = argv[0]
    if verb not in VERBS:
        print(f"redflag: {verb!r} is no verb; use one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        module = importlib.import_module(VERBS[verb][0])
        arguments = parse(module, argv[1:], prog=f"redflag {verb}")
        status = module.run(*arguments)
    except (RedflagError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
        print(f"redflag {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nredflag {verb}: {stop or 'interrupted; what was written stays'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away (`redflag show F | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status if isinstance(status, int) else 0


def parse(module: Any, argv: list[str], prog: str) -> tuple[Any, ...]:
    """The verb's dataclass(es), filled from the YAML file and the options; options win, unknown keys are errors."""
    from trl import TrlParser

    classes = module.ARGUMENTS if isinstance(module.ARGUMENTS, tuple) else (module.ARGUMENTS,)
    parser = TrlParser(classes, prog=prog, allow_abbrev=False)
    if module.POSITIONAL is not None:
        parser.add_argument("positional", nargs="?", metavar=module.POSITIONAL.upper())
        for action in parser._actions:
            if action.dest == module.POSITIONAL:
                action.required = False
    try:
        found = parser.parse_args_and_config(argv, fail_with_unknown_args=True)
    except (ValueError, TypeError, OSError) as error:
        raise RedflagError(" ".join(str(error).split())) from error
    if module.POSITIONAL is not None:
        *found, rest = found
        if rest.positional is not None:
            setattr(found[0], module.POSITIONAL, rest.positional)
        if getattr(found[0], module.POSITIONAL) is None:
            raise RedflagError(
                f"{module.POSITIONAL} is missing: give it as the last word, {prog} ... {module.POSITIONAL.upper()}"
            )
    return tuple(found)


if __name__ == "__main__":
    sys.exit(main())
