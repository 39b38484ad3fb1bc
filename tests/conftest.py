"""Shared by all tests: no network, one thread per process, tiny models, one nano world."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

# Machines under load are slow now and then; a slow example is no defect.
settings.register_profile("redflag", deadline=None, print_blob=True)
settings.load_profile("redflag")
