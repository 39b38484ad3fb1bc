"""`redflag audit`: which answers of a file of rows refuse, why, and which of them should not have; or should have.

After "Cannot or Should Not?" (von Recum and others, arXiv 2412.16974). With `--train` it learns to tell refusals and
their kinds apart; with `--input` it judges rows, by what was learnt or by a taxonomy's phrases alone. It reads and
judges some thousands of rows at a time and keeps counts, not rows.
"""

from __future__ import annotations

import gzip
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from redflag.bounds import check_bounds, option
from redflag.data.options import RowOptions
from redflag.data.rows import RecordReader, Row
from redflag.data.sources import Provenance
from redflag.data.summary import label_warnings, report_skipped
from redflag.errors import RedflagError
from redflag.files import atomic_write, require_writable
from redflag.lab.refusals import PhraseClassifier, RefusalClassifier, Taxonomy, audit_page, load_taxonomy
from redflag.lab.refusals.audit_counts import Audit, RowFinding
from redflag.lab.refusals.pairs import read_labelled, read_rows
from redflag.lab.report import page
from redflag.progress import Progress
from redflag.versions import versions


@dataclass
class AuditArguments(RowOptions):
    """Refusals in a file of rows: how many, of which kind, and those that look wrong."""

    input: str | None = option(None, "Rows to audit: JSONL, JSON, CSV, Parquet, a folder, or a hub data set.")
    output_dir: str = option("runs/audit", "Where audit.json and audit.html go.")
    classifier: str | None = option(None, "Folder of a trained classifier; with --train it is written there.")
    taxonomy: str | None = option(None, "YAML file of categories; default: CoCoNot's, or the classifier's own.")
    train: list[str] = option([], "Rows to train on: prompt, response, refusal, refusal_category, prompt_label.")
    embedding: str | None = option(None, "train: model (folder or hub name) for embeddings; default: n-grams.")
    level: Literal["category", "subcategory"] = option("category", "train: how fine the kinds are.")
    c: float = option(10.0, "train: inverse strength of the regressions' penalty.")
    folds: int = option(5, "train: parts for the figures on held-out requests; 0: none.")
    threshold: float = option(0.5, "Probability from which an answer is a refusal.", above=0, most=1)
    also: float = option(0.3, "Probability from which a refusal has a second kind as well.", above=0, most=1)
    sure: float = option(0.9, "Harmful from here, harmless below 1 - this (unlabelled requests).", above=0.5, most=1)
    candidates: int = option(50, "Over- and under-refusals listed, the surest first.", least=0)
    write_rows: str | None = option(None, "Write rows here, kinds of refusal as categories, for `redflag train`.")
    unlabelled: Literal["stop", "skip", "harmless"] = field(
        default="harmless", kw_only=True, metadata={"help": "What a row does whose label is null."}
    )
    on_bad_row: Literal["stop", "skip"] = option("stop", "What a malformed row does.")
    batch_size: int = option(32, "Texts per forward pass of an embedding model.", least=1)
    seed: int = option(0, "Seeds training and intervals.")


ARGUMENTS = AuditArguments
POSITIONAL = None


def run(arguments: AuditArguments) -> int:
    """The verb."""
    _check(arguments)
    require_writable(arguments.output_dir, "output_dir")
    taxonomy = load_taxonomy(arguments.taxonomy)
    classifier: RefusalClassifier | PhraseClassifier
    if arguments.train:
        classifier = _train(arguments, taxonomy)
    elif arguments.classifier is not None:
        classifier = RefusalClassifier.load(arguments.classifier)
        _replace_taxonomy(classifier, taxonomy, arguments)
    else:
        classifier = PhraseClassifier(taxonomy)
    if isinstance(classifier, RefusalClassifier):
        classifier.threshold = arguments.threshold
    if arguments.input is not None:
        _audit(arguments, classifier)
    return 0


def _check(arguments: AuditArguments) -> None:
    if arguments.input is None and not arguments.train:
        raise RedflagError("input or train must be set. Give --input ROWS to audit, or --train ROWS to learn from.")
    if arguments.train and arguments.classifier is None:
        raise RedflagError("classifier must be set with train. The trained classifier is saved in that folder.")
    check_bounds(arguments)
    if arguments.write_rows is not None and arguments.input is None:
        raise RedflagError("write_rows must come with input. It writes the rows of --input.")
    if arguments.embedding is not None and not arguments.train:
        raise RedflagError("embedding must come with train. It chooses the features of training.")
    page.require()


def _replace_taxonomy(classifier: RefusalClassifier, taxonomy: Taxonomy, arguments: AuditArguments) -> None:
    """Replaces the classifier's taxonomy by the option's, which must have all its classes."""
    if arguments.taxonomy is None:
        return
    if unknown := [name for name in classifier.classes if name not in taxonomy.classes(classifier.level)]:
        raise RedflagError(
            f"the taxonomy {arguments.taxonomy} must have all classes of the classifier {arguments.classifier} "
            f"({unknown[0]!r} is missing). Leave --taxonomy out, or train a classifier for it."
        )
    classifier.taxonomy = taxonomy


def _train(arguments: AuditArguments, taxonomy: Taxonomy) -> RefusalClassifier:
    from redflag.lab.refusals.classifier import features_maker
    from redflag.lab.refusals.held_out import train

    provenance = Provenance()
    pairs = read_labelled(arguments.train, provenance)
    features = features_maker(arguments.embedding, arguments.batch_size)
    classifier = train(
        pairs,
        taxonomy,
        features,
        level=arguments.level,
        c=arguments.c,
        folds=arguments.folds,
        seed=arguments.seed,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    what = f"mean hidden states of {arguments.embedding}" if arguments.embedding else "TF-IDF of words and characters"
    classifier.made |= {
        "features": what,
        "files": [{"path": path, "sha256": digest} for path, digest in _files(provenance)],
        "versions": versions("redflag-llm", "numpy", "scikit-learn"),
    }
    if arguments.embedding and Path(arguments.embedding).is_dir():
        # A classifier may be used from another folder than the one in which it was trained.
        for read in (one for stage in classifier.stages.values() for one in stage.features):
            read.model = str(Path(arguments.embedding).resolve())  # type: ignore[attr-defined]
    folder = Path(cast(str, arguments.classifier))
    classifier.save(folder)
    if unknown := classifier.made["unknown"]:
        print(f"{unknown} rows were not used for categories: {taxonomy.name} does not have theirs")
    _write(folder / "training.html", audit_page.training(classifier))
    _write(folder / "training.json", _as_json(classifier.made))
    print(f"classifier in {folder}, its figures on held-out requests in {folder / 'training.html'}")
    return classifier


def _audit(arguments: AuditArguments, classifier: RefusalClassifier | PhraseClassifier) -> None:
    begun = time.monotonic()
    provenance = Provenance()
    audit = Audit(
        classifier.taxonomy,
        classifier.classes,
        threshold=arguments.threshold,
        also=arguments.also,
        sure=arguments.sure,
        keep=arguments.candidates,
    )
    reader = RecordReader(dict(arguments.columns or {}), arguments.labels, arguments.unlabelled)
    chunks = read_rows(
        cast(str, arguments.input), provenance, reader, split=arguments.split, on_bad_row=arguments.on_bad_row
    )
    skipped, held, harmful = [], 0, 0
    with ExitStack() as stack:
        write = _writer(stack, arguments.write_rows)
        progress = stack.enter_context(Progress("judging", None, "rows"))
        for pairs, bad in chunks:
            findings = audit.feed([pair for pair, _ in pairs], classifier.judge([pair for pair, _ in pairs]))
            skipped += bad
            harmful += sum(row.harmful for _, row in pairs)
            held += write([row for _, row in pairs], findings)
            progress(audit.rows, f"{audit.refusals:,} refusals, {audit.rows / (time.monotonic() - begun):,.0f} rows/s")
        if audit.rows == 0:
            why = f"all {len(skipped)} were left out (first: {skipped[0]})" if skipped else "it is empty"
            raise RedflagError(f"no usable row in {arguments.input}: {why}. Give a file of rows.")
    report_skipped(skipped)
    for line in label_warnings(audit.rows, harmful, reader.decided_by, reader.ignored):
        print(line, file=sys.stderr)
    made = {
        "command": " ".join(["redflag audit", *sys.argv[2:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.monotonic() - begun, 1),
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": versions("redflag-llm", "numpy", "scikit-learn"),
        "input": [{"path": path, "sha256": digest} for path, digest in _files(provenance)],
        "judged_by": classifier.what,
    }
    trained = classifier.made if isinstance(classifier, RefusalClassifier) else None
    record = audit.to_dict(made, skipped=len(skipped), trained=trained)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "audit.json", _as_json(record))
    _write(folder / "audit.html", audit_page.page(record))
    for sentence in audit_page.sentences(record):
        print(sentence)
    print(f"{folder / 'audit.html'}, {folder / 'audit.json'}")
    if arguments.write_rows is not None:
        named = [f"{entry['name']!r}" for entry in record["categories"] if entry["refusals"]]
        left = f"; {held:,} with harmful answers that aren't refusals were left out" if held else ""
        print(f"{arguments.write_rows}: {audit.rows - held:,} rows{left}")
        print(f"next: redflag train --input {arguments.write_rows} --categories {' '.join(named)} ...")


def _writer(stack: ExitStack, path: str | None) -> Callable[[list[Row], list[RowFinding]], int]:
    """A function that writes rows with their findings, and returns the number left out.

    A harmful answer that isn't a refusal would become a harmless row, and a flag would learn to be silent there.
    """
    if path is None:
        return lambda rows, findings: 0
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file: BinaryIO = stack.enter_context(atomic_write(path))
    if path.endswith(".gz"):
        file = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=file, mode="wb", mtime=0)))

    def write(rows: list[Row], findings: list[RowFinding]) -> int:
        left_out = 0
        for row, finding in zip(rows, findings, strict=True):
            if row.harmful and not finding.refused:
                left_out += 1
                continue
            record = row.to_dict() | {"category": finding.name if finding.refused else None}
            dropped = ("onset", "onset_source")
            entry = {key: value for key, value in record.items() if key not in dropped and value is not None}
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        return left_out

    return write


def _as_json(record: Any) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "replace"))


def _files(provenance: Provenance) -> Iterable[tuple[str, str]]:
    return zip(provenance.files, provenance.digests, strict=False)
