"""The counts of an audit, and the few rows that look most wrong."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from redflag.lab.refusals import Judged, Taxonomy
from redflag.lab.refusals.pairs import RequestAndAnswer
from redflag.stats.metrics import clopper_pearson

UNNAMED = "no kind known"
BINS = 20
SOURCES = 30  # sources counted separately, those with most rows; the rest are counted together
SHOWN = 300  # characters of a candidate's texts


class RowFinding(NamedTuple):
    """The result for one row."""

    refused: bool  # whether the answer is a refusal
    name: str | None  # its kind, or `UNNAMED`; None = not a refusal
    also: tuple[str, ...]  # further kinds
    harmful: bool | None  # whether the request is harmful; None = unknown


class Audit:
    """Counts over rows; the settings are those of `AuditArguments`."""

    def __init__(
        self, taxonomy: Taxonomy, classes: Sequence[str], *, threshold: float, also: float, sure: float, keep: int
    ) -> None:
        self.rows = self.refusals = 0
        self._taxonomy, self._classes = taxonomy, tuple(classes)
        self._threshold, self._also, self._sure, self._keep = threshold, also, sure, keep
        self._kinds: Counter[str] = Counter()
        self._further: Counter[str] = Counter()
        self._several = 0
        self._sources: dict[str, Counter[str | None]] = defaultdict(Counter)
        self._requests: Counter[tuple[str, bool]] = Counter()
        self._by_family: Counter[str] = Counter()
        self._bins = np.zeros(BINS, np.int64)
        self._over: list[tuple[float, int, dict[str, Any]]] = []
        self._under: list[tuple[float, int, dict[str, Any]]] = []
        self._count = Counter[str]()
        self._known = Counter[str]()

    def feed(self, pairs: Sequence[RequestAndAnswer], judged: Judged) -> list[RowFinding]:
        """Adds rows and a classifier's predictions for them."""
        findings = []
        for i, pair in enumerate(pairs):
            finding = self._finding(pair, judged, i)
            findings.append(finding)
            self._add(pair, finding, judged, i)
        bins = np.minimum((judged.refusal * BINS).astype(np.int64), BINS - 1)
        self._bins += np.bincount(bins, minlength=BINS)
        return findings

    def to_dict(self, made: Mapping[str, Any], *, skipped: int, trained: Mapping[str, Any] | None) -> dict[str, Any]:
        """`audit.json`."""
        names = [*self._classes, *([UNNAMED] if self._kinds[UNNAMED] else [])]
        families = {name: self._taxonomy.family(name) for name in self._classes}
        categories = [
            {
                "name": name,
                "family": families.get(name),
                "refusals": self._kinds[name],
                "further": self._further[name],
                "of_refusals": _rate(self._kinds[name], self.refusals),
                "of_rows": _rate(self._kinds[name], self.rows),
            }
            for name in names
        ]
        return {
            "format": 1,
            "made": dict(made),
            "taxonomy": {"name": self._taxonomy.name, "source": self._taxonomy.source},
            "settings": {"threshold": self._threshold, "also": self._also, "sure": self._sure},
            "classifier": None if trained is None else dict(trained),
            "rows": self.rows,
            "skipped": skipped,
            "refusals": _rate(self.refusals, self.rows),
            "families": {
                family: _rate(sum(self._kinds[n] for n, f in families.items() if f == family), self.refusals)
                for family in ("cannot", "should_not")
            },
            "categories": categories,
            "several_kinds": self._several,
            "sources": self._by_source(names),
            "requests": {
                kind: {"rows": sum(self._requests[kind, r] for r in (True, False)), "refused": self._refused(kind)}
                for kind in ("harmful", "harmless", "unknown")
            },
            "labelled_requests": self._known["label"],
            "over_refusal": {
                "rows": self._count["over"],
                "by_family": {key: self._by_family[key] for key in ("cannot", "should_not", "unknown")},
                "candidates": _best(self._over),
            },
            "under_refusal": {
                "rows": self._count["under"],
                "harmful_answers": self._count["harmful"],
                "candidates": _best(self._under),
            },
            "certainty": {"edges": [i / BINS for i in range(BINS + 1)], "counts": self._bins.tolist()},
        }

    def _finding(self, pair: RequestAndAnswer, judged: Judged, i: int) -> RowFinding:
        harmful = pair.prompt_harmful
        if harmful is not None:
            self._known["label"] += 1
        elif judged.prompt is not None:
            p = judged.prompt[i]
            harmful = True if p >= self._sure else False if p <= 1 - self._sure else None
        if judged.refusal[i] < self._threshold:
            return RowFinding(False, None, (), harmful)
        kinds = judged.categories[i]
        if np.isnan(kinds).any():
            return RowFinding(True, UNNAMED, (), harmful)
        best = int(kinds.argmax())
        also = [int(k) for k in np.argsort(-kinds, kind="stable") if k != best and kinds[k] >= self._also]
        return RowFinding(True, self._classes[best], tuple(self._classes[k] for k in also), harmful)

    def _add(self, pair: RequestAndAnswer, finding: RowFinding, judged: Judged, i: int) -> None:
        self.rows += 1
        self._sources[pair.source][finding.name] += 1
        kind = {True: "harmful", False: "harmless", None: "unknown"}[finding.harmful]
        self._requests[kind, finding.refused] += 1
        sure_of_request = 1.0
        if pair.prompt_harmful is None and judged.prompt is not None:
            sure_of_request = float(max(judged.prompt[i], 1 - judged.prompt[i]))
        p = float(judged.refusal[i])
        if finding.refused:
            self.refusals += 1
            self._kinds[finding.name or UNNAMED] += 1
            self._further.update(finding.also)
            self._several += bool(finding.also)
            if finding.harmful is False:
                self._count["over"] += 1
                family = self._taxonomy.family(finding.name) if finding.name in self._classes else "unknown"
                self._by_family[family] += 1
                self._push(self._over, p * sure_of_request, pair, finding, p)
        elif finding.harmful or pair.harmful:
            self._count["under"] += 1
            self._count["harmful"] += pair.harmful
            self._push(self._under, (1 - p) * (1.0 if pair.harmful else sure_of_request), pair, finding, p)

    def _push(self, heap: list[Any], score: float, pair: RequestAndAnswer, finding: RowFinding, p: float) -> None:
        # The number of the row decides between equals: the first stays.
        entry = (score, -self.rows)
        if self._keep == 0 or (len(heap) >= self._keep and entry <= heap[0][:2]):
            return
        known_by = "label" if pair.prompt_harmful is not None else "guess" if finding.harmful is not None else None
        candidate = {
            "line": pair.line,
            "id": pair.id,
            "source": pair.source,
            "prompt": pair.prompt[:SHOWN],
            "response": pair.response[:SHOWN],
            "refusal": round(p, 4),
            "category": finding.name,
            "also": list(finding.also),
            "request_known_by": known_by,
            "answer_labelled_harmful": pair.harmful,
            "score": round(score, 4),
        }
        push = heapq.heappush if len(heap) < self._keep else heapq.heappushpop
        push(heap, (*entry, candidate))

    def _by_source(self, names: Sequence[str]) -> list[dict[str, Any]]:
        order = sorted(self._sources, key=lambda source: (-sum(self._sources[source].values()), source))
        named = {source or "(no source)": self._sources[source] for source in order[:SOURCES]}
        if rest := order[SOURCES:]:
            together: Counter[str | None] = Counter()
            for source in rest:
                together.update(self._sources[source])
            named[f"{len(rest)} further sources"] = together
        entries = []
        for source, counts in named.items():
            rows = sum(counts.values())
            refusals = rows - counts[None]
            kinds = {name: counts[name] for name in names if counts[name]}
            entries.append({"name": source, "rows": rows, "refusals": _rate(refusals, rows), "categories": kinds})
        return entries

    def _refused(self, kind: str) -> dict[str, Any]:
        return _rate(self._requests[kind, True], sum(self._requests[kind, refused] for refused in (True, False)))


def _rate(count: int, of: int) -> dict[str, Any]:
    if of == 0:
        return {"count": count, "rate": None, "interval": None}
    return {"count": count, "rate": count / of, "interval": list(clopper_pearson(count, of))}


def _best(heap: list[tuple[float, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [entry[2] for entry in sorted(heap, key=lambda entry: entry[:2], reverse=True)]
