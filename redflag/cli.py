"""`redflag VERB ...`: verb -> function, nothing else. `redflag --help` loads neither torch nor trl."""

from __future__ import annotations

import argparse
import difflib
import enum
import importlib
import json
import os
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from redflag.errors import RedflagError

VERBS = {
    "demo": ("redflag.lab.demo", "a real model watched and a flag trained, in minutes; or a small world"),
    "train": ("redflag.training.train", "train a model to raise its flags; saves model, tokenizer, redflag.json"),
    "score": ("redflag.scoring.score", "flag probabilities of given conversations, token by token"),
    "calibrate": ("redflag.calibrating.calibrate", "thresholds for a target false-alarm rate per response"),
    "evaluate": ("redflag.lab.evaluating.evaluate", "detection, delay, false alarms, attacks, baselines: one report"),
    "generate": ("redflag.terminal.generate", "stream a guarded answer to the terminal"),
    "chat": ("redflag.terminal.chat", "a guarded conversation on the terminal"),
    "serve": ("redflag.server.serve", "an OpenAI-compatible server whose answers are watched, local or upstream"),
    "audit-log": ("redflag.terminal.audit_log", "who overrode the watch, or came near its thresholds, by user"),
    "audit": ("redflag.lab.refusals.audit", "refusals in a file of rows: how many, which kind, what looks wrong"),
    "synthesize": (
        "redflag.lab.synthesis.synthesize",
        "a constitution in words -> rows with onsets; or onsets for rows",
    ),
    "show": ("redflag.terminal.show", "rows, encoded examples or traces in colour"),
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
        close = _nearest(verb, VERBS, otherwise=f": use one of {', '.join(VERBS)}")
        print(f"redflag: unknown command {verb!r}{close}", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        module = importlib.import_module(VERBS[verb][0])
        arguments = parse(module, argv[1:], prog=f"redflag {verb}")
        _find_model(verb, arguments)
        status = module.run(*arguments)
    except KeyboardInterrupt as stop:
        print(f"\nredflag {verb}: {str(stop) or 'interrupted; what was written stays'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has closed it (`redflag show F | head`), which is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RedflagError, OSError) as error:
        text = f"{error}" if isinstance(error, RedflagError) else f"{error}: fix that and run the command again"
        print(f"redflag {verb}: {' '.join(text.split())}", file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0


def _find_model(verb: str, arguments: Sequence[Any]) -> None:
    """Replaces a flagged model's name by its folder, in the option `model` of every verb but `train`."""
    from redflag.models.named import model_folder

    for options in arguments:
        name = getattr(options, "model", None)
        # With a URL it is the model's name on that server.
        if isinstance(name, str) and verb != "train" and getattr(options, "url", None) is None:
            options.model = model_folder(name)


def parse(module: Any, argv: list[str], prog: str) -> tuple[Any, ...]:
    """The verb's dataclass(es), filled from the YAML file and the options; options win, unknown keys are errors."""
    from trl import TrlParser

    from redflag.bounds import RULES, check_bounds

    class Parser(TrlParser):
        def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
            # The parser passes on all of a field's metadata, including bounds.
            return super().add_argument(*names, **{key: v for key, v in settings.items() if key not in RULES})

    classes = module.ARGUMENTS if isinstance(module.ARGUMENTS, tuple) else (module.ARGUMENTS,)
    parser = Parser(classes, prog=prog, allow_abbrev=False)

    def refuse(message: str) -> None:
        raise RedflagError(f"{message}; `{prog} --help` lists the options")

    parser.error = refuse  # argparse would print pages of usage first
    hints = {name: hint for kind in classes for name, hint in get_type_hints(kind).items()}
    for action in parser._actions:
        hint = hints.get(action.dest)
        either = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if any((get_origin(kind) or kind) is dict for kind in either) and str not in either:
            action.type = _mapping
    if module.POSITIONAL is not None:
        parser.add_argument("positional", nargs="?", metavar=module.POSITIONAL.upper())
        for action in parser._actions:
            if action.dest == module.POSITIONAL:
                action.required = False
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    argv = _spelt_out(argv, parser._actions) if module.POSITIONAL is not None else argv
    # Before what is missing: a misspelt `--model` would be answered with "--model is required".
    spelt = {name for action in parser._actions for name in action.option_strings} | {"--config"}
    for word in argv[: argv.index("--")] if "--" in argv else argv:
        name = word.split("=")[0]
        if name.startswith("--") and " " not in name and name not in spelt:
            raise RedflagError(f"unknown option {name} of {prog}{_nearest(name, spelt)}")
    if "--config" in argv:
        _check_config(argv[argv.index("--config") + 1 :], hints)
    try:
        *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except (ValueError, TypeError, OSError) as error:
        raise RedflagError(str(error)) from error
    if unknown:
        raise RedflagError(f"unknown option {unknown[0]} of {prog}{_nearest(unknown[0], spelt)}")
    if module.POSITIONAL is not None:
        *parsed, rest = parsed
        if rest.positional is not None:
            setattr(parsed[0], module.POSITIONAL, rest.positional)
        if getattr(parsed[0], module.POSITIONAL) is None:
            raise RedflagError(
                f"{module.POSITIONAL} is missing: give it as the last word, {prog} ... {module.POSITIONAL.upper()}"
            )
    for options in parsed:
        check_bounds(options)
    return tuple(parsed)


def _mapping(text: str) -> Any:
    """An option that is a mapping in YAML and JSON on the command line."""
    try:
        value = None if text.lower() == "none" else json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a mapping in JSON (got {text!r}: {error})") from None
    if value is not None and not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a mapping in JSON, such as {{}} (got {text!r})")
    return value


def _spelt_out(argv: Sequence[str], actions: Sequence[Any]) -> list[str]:
    """Expands `--switch WORD` to `--switch true WORD`, unless WORD is a boolean: it is the positional argument."""
    switches = {
        name for action in actions if action.nargs == "?" and action.const is True for name in action.option_strings
    }
    words: list[str] = []
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        words.append(word)
        answer = following.lower() in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")
        if word in switches and not following.startswith("--") and not answer:
            words.append("true")
    return words


def _check_config(words: Sequence[str], hints: Mapping[str, Any]) -> None:
    """Refuses values of a wrong type in a YAML file, which `TrlParser` would pass on unchecked."""
    import yaml

    if not words:
        raise RedflagError("--config is the last word: give the name of a YAML file after it")
    path = words[0]
    try:
        with open(path, encoding="utf-8") as file:
            record = yaml.safe_load(file)
    except OSError as error:
        raise RedflagError(f"the config file {path} cannot be read ({error.strerror}). Check its name.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RedflagError(f"the config file {path} must be YAML ({error}). Fix it.") from error
    if not isinstance(record, dict):
        raise RedflagError(f"the config file {path} must be a mapping, with `option: value` on each line.")
    for key, value in record.items():
        if key == "env" and isinstance(value, dict):  # TRL sets these in the environment
            continue
        if key not in hints:
            raise RedflagError(f"{path} sets the unknown option {key!r}{_nearest(str(key), hints)}")
        if not _fits(value, hints[key]):
            raise RedflagError(
                f"{path} sets {key} to the invalid value {value!r}. YAML reads yes, no, on, off and null as booleans "
                "and null: texts may need quotes. See --help."
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value fits this type; the parser itself converts texts, or refuses them."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kind = get_origin(hint) or hint
    if kind in (int, float):
        return isinstance(value, str) or type(value) in (int, kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return value in [member.value for member in kind]
    if kind is list:
        return isinstance(value, list) and all(_fits(item, (get_args(hint) or (Any,))[0]) for item in value)
    if kind in (str, bool, dict, types.NoneType):
        return isinstance(value, kind) or (kind in (bool, dict) and isinstance(value, str))
    return True


def _nearest(
    name: str, known: Mapping[str, Any] | set[str], otherwise: str = ": leave it out, or see --help for those there are"
) -> str:
    close = difflib.get_close_matches(name, sorted(known), 1)
    return f": did you mean {close[0]}?" if close else otherwise


if __name__ == "__main__":
    sys.exit(main())
