"""Bounds beside a field are kept, on the command line and in Python."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from redflag import cli
from redflag.bounds import check_bounds
from redflag.errors import RedflagError


@dataclass
class Options:
    share: float = field(default=0.5, metadata={"help": "A share.", "least": 0, "below": 1})
    rank: int | None = field(default=None, metadata={"help": "A rank.", "above": 0, "most": 8})
    free: int = field(default=-1, metadata={"help": "Anything."})


VERB = SimpleNamespace(ARGUMENTS=Options, POSITIONAL=None)


@pytest.mark.parametrize("share", [0, 0.99])
@pytest.mark.parametrize("rank", [None, 1, 8])
def test_what_lies_within_is_taken(share, rank):
    check_bounds(Options(share, rank))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, r"share must be at least 0 and below 1 \(got 1.0\)\."),
        ({"share": -0.1}, r"share must be at least 0 and below 1 \(got -0.1\)\."),
        ({"share": math.nan}, r"share must be .* \(got nan\)"),
        ({"rank": 0}, r"rank must be above 0 and at most 8 \(got 0\)\."),
        ({"rank": 9}, r"rank must be above 0 and at most 8 \(got 9\)\."),
    ],
)
def test_what_lies_outside_is_named_with_its_bounds(options, message):
    with pytest.raises(RedflagError, match=message):
        check_bounds(Options(**options))
    with pytest.raises(RedflagError, match=message):
        cli.parse(VERB, [word for key, value in options.items() for word in (f"--{key}", str(value))], "redflag verb")


def test_help_shows_the_help_and_not_the_bounds(capsys):
    with pytest.raises(SystemExit):
        cli.parse(VERB, ["--help"], "redflag verb")
    assert "A share." in capsys.readouterr().out
