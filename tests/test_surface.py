"""The public surface is exactly `redflag.__all__`, and it costs nothing to import."""

from __future__ import annotations

import subprocess
import sys

import redflag


def test_all_is_sorted_complete_and_importable():
    assert redflag.__all__ == sorted(redflag.__all__) == sorted(redflag._HOME)
    for name in redflag.__all__:
        assert getattr(redflag, name).__doc__


def test_importing_redflag_or_asking_for_help_loads_no_engine():
    code = (
        "import sys, redflag, redflag.cli; assert redflag.cli.main(['--help']) == 0; "
        "heavy = {'torch', 'transformers', 'trl', 'numpy', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "calibrate" in done.stdout
