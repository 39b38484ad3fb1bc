"""The pages of an audit and of a classifier's training: one file each, nothing fetched, all text escaped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redflag.lab.refusals import RefusalClassifier, audit_charts
from redflag.lab.refusals.audit_charts import FAMILIES
from redflag.lab.report import page as report_page
from redflag.lab.report.parts import Cell, Section, Table, between, cell, left, number, percent, rate

STAGES = {"refusal": "Refusal or not", "category": "Kind of refusal", "prompt": "Request harmful or not"}


def page(record: Mapping[str, Any]) -> str:
    """The page of an `audit.json`."""
    all_sections = [
        _kinds(record),
        _sources(record),
        _candidates(record, "over"),
        _candidates(record, "under"),
        _certainty(record),
        *(_held_out(record["classifier"]["held_out"]) if record["classifier"] else []),
        _made(record["made"], record["settings"]),
    ]
    sections = [section for section in all_sections if section is not None]
    refused, requests = record["refusals"], record["requests"]
    share = f"{number(refused['count'])} of {number(record['rows'])}"
    figures = [(percent(refused["rate"]), "of the answers refuse", share)]
    for family in ("cannot", "should_not") if refused["count"] else ():
        figures.append((percent(record["families"][family]["rate"]), f"of refusals: {FAMILIES[family]}", ""))
    for kind in ("harmful", "harmless"):
        if rows := requests[kind]["rows"]:
            rate_of = percent(requests[kind]["refused"]["rate"])
            figures.append((rate_of, f"of {kind} requests refused", f"of {number(rows)}"))
    return report_page.render("Refusals", warnings(record), sentences(record), figures, sections, None)


def training(classifier: RefusalClassifier) -> str:
    """The page of a classifier's training."""
    made = classifier.made
    lines = [f"Trained on {number(made['rows'])} rows: {classifier.what}."]
    figures = []
    for name, one in made["held_out"].items():
        lines.append(
            f"{STAGES[name]}: macro-F1 {one['macro_f1']:.3f} ({between(one['macro_f1_interval'], 1, 3)}) on "
            f"{number(one['rows'])} rows of {number(one['requests'])} held-out requests."
        )
        figures.append((f"{one['macro_f1']:.3f}", STAGES[name], between(one["macro_f1_interval"], 1, 3)))
    facts = {key: made[key] for key in ("features", "c", "seed", "files", "versions")}
    sections = [*_held_out(made["held_out"]), _made(facts, {})]
    return report_page.render(f"Classifier of refusals: {classifier.taxonomy.name}", [], lines, figures, sections, None)


def sentences(record: Mapping[str, Any]) -> list[str]:
    """The result of an audit, in sentences."""
    refused, rows = record["refusals"], record["rows"]
    lines = [
        f"{number(refused['count'])} of {number(rows)} answers refuse: {percent(refused['rate'])} "
        f"({between(refused['interval'])})."
    ]
    if refused["count"]:
        most_common = max(record["categories"], key=lambda one: one["refusals"])
        lines.append(
            f"Most often: {most_common['name']}, {percent(most_common['of_refusals']['rate'])} of the refusals."
        )
    for kind, what in (("over", "harmless requests were refused"), ("under", "harmful requests were followed")):
        count = record[f"{kind}_refusal"]["rows"]
        lines.append(f"{number(count)} look like {kind}-refusals: {what}.")
    return lines


def warnings(record: Mapping[str, Any]) -> list[str]:
    """Warnings at the top of the page."""
    lines = []
    if record["classifier"] is None:
        lines.append(f"Judged by {record['made']['judged_by']}.")
    requests = record["requests"]
    if requests["unknown"]["rows"] == record["rows"]:
        lines.append(
            "Nothing is known of the requests, so over-refusals cannot be seen and under-refusals only where the "
            "answer is labelled harmful: give rows with prompt_label, or a classifier trained on such."
        )
    elif record["labelled_requests"] < record["rows"]:
        guessed = record["rows"] - record["labelled_requests"]
        lines.append(
            f"Whether {number(guessed)} requests are harmful is not labelled: it is the classifier's guess, or unknown."
        )
    if record["skipped"]:
        lines.append(f"{number(record['skipped'])} rows were left out: they could not be read as rows.")
    return lines


def _kinds(record: Mapping[str, Any]) -> Section:
    rows = [
        [
            left(one["name"]),
            left(FAMILIES[one["family"]], quiet=one["family"] is None),
            cell(number(one["refusals"])),
            rate(one["of_refusals"]["rate"], one["of_refusals"]["interval"]),
            rate(one["of_rows"]["rate"], one["of_rows"]["interval"]),
            cell(number(one["further"])),
        ]
        for one in record["categories"]
    ]
    head = ["kind", "family", "refusals", "of refusals", "of rows", "as second kind"]
    name = record["taxonomy"]["name"]
    several = record["several_kinds"]
    return Section(
        "kinds",
        "Kinds of refusal",
        f"Kinds are those of the taxonomy {name}. A refusal counts once, under its likeliest kind; "
        f"{number(several)} have a second one that is likely as well.",
        [Table(head, rows, note="Intervals are of counting alone; the classifier's mistakes come on top.")],
        [audit_charts.kinds(record["categories"])] if record["refusals"]["count"] else [],
    )


def _sources(record: Mapping[str, Any]) -> Section:
    sources = record["sources"]
    names = [one["name"] for one in record["categories"]]
    head = ["source", "rows", "refusals", "of rows", *names]
    rows = [
        [
            left(one["name"]),
            cell(number(one["rows"])),
            cell(number(one["refusals"]["count"])),
            rate(one["refusals"]["rate"], one["refusals"]["interval"]),
            *(cell(number(one["categories"].get(name, 0)), quiet=name not in one["categories"]) for name in names),
        ]
        for one in sources
    ]
    charts = [audit_charts.sources(sources, names)] if record["refusals"]["count"] else []
    return Section(
        "sources",
        "By source",
        "Sources with most rows first.",
        [Table(head, rows, title="Counts", folded=len(rows) > 12)],
        charts,
    )


def _candidates(record: Mapping[str, Any], kind: str) -> Section:
    candidates = record[f"{kind}_refusal"]
    if kind == "over":
        title, who = "Over-refusals, perhaps", "harmless"
        family = candidates["by_family"]
        lead = (
            f"Harmless requests that were refused: {number(candidates['rows'])}, of which "
            f"{number(family['should_not'])} for what should not be done, {number(family['cannot'])} for what cannot "
            f"(which may well be right), {number(family['unknown'])} for no known reason."
        )
    else:
        title, who = "Under-refusals, perhaps", "harmful"
        lead = (
            f"Harmful requests that were not refused: {number(candidates['rows'])}; of "
            f"{number(candidates['harmful_answers'])} the answer itself is labelled harmful. "
            "An answer that helps in another way than asked counts here too."
        )
    requests = record["requests"][who]
    lead += f" {number(requests['rows'])} requests are known or taken for {who}."
    table = Table(
        ["line", "p(refusal)", "kind", "source", "request", "answer", "request known by"],
        [
            [
                left(str(one["line"]), quiet=False),
                cell(f"{one['refusal']:.2f}"),
                left(one["category"] or "", quiet=True),
                left(one["source"]),
                left(one["prompt"]),
                left(one["response"]),
                left(one["request_known_by"] or ("its answer" if one["answer_labelled_harmful"] else "")),
            ]
            for one in candidates["candidates"]
        ],
        title=f"The {number(len(candidates['candidates']))} surest; their texts may be harmful",
        folded=True,
    )
    return Section(f"{kind}-refusal", title, lead, [table] if candidates["candidates"] else [])


def _certainty(record: Mapping[str, Any]) -> Section | None:
    if record["classifier"] is None:
        return None
    certainty = record["certainty"]
    edges, counts = certainty["edges"], certainty["counts"]
    middle = sum(n for low, high, n in zip(edges, edges[1:], counts, strict=False) if low >= 0.2 and high <= 0.8)
    return Section(
        "certainty",
        "How sure",
        f"{number(middle)} answers lie between 0.2 and 0.8: there the classifier may say either.",
        [],
        [audit_charts.certainty(edges, counts, record["settings"]["threshold"])],
    )


def _held_out(figures: Mapping[str, Any]) -> list[Section]:
    sections = []
    for name, one in figures.items():
        confusion, classes = one["confusion"], one["classes"]
        sizes = [sum(row) for row in confusion]
        rows = [
            [
                left(kind),
                cell(number(sizes[i])),
                cell("not measured" if one["f1"][kind] is None else f"{one['f1'][kind]:.3f}"),
                *(
                    Cell(number(count), strong=i == j, quiet=count == 0)
                    for j, count in enumerate(confusion[i])
                    if len(classes) <= 8
                ),
            ]
            for i, kind in enumerate(classes)
        ]
        head = ["class", "rows", "F1", *(f"taken for: {kind}" for kind in classes if len(classes) <= 8)]
        reads = {"response": "the answer", "prompt": "the request"}
        lead = (
            f"Macro-F1 {one['macro_f1']:.3f} ({between(one['macro_f1_interval'], 1, 3)}), accuracy "
            f"{percent(one['accuracy'])}, reading {' and '.join(reads[read] for read in one['reads'])}: "
            f"{number(one['rows'])} rows of {number(one['requests'])} requests, each judged by a regression that had "
            "seen no row of the same request. Labels are the training rows' own, with their mistakes."
        )
        sections.append(
            Section(
                f"held-out-{name}",
                f"Classifier: {STAGES[name].lower()}",
                lead,
                [Table(head, rows, title="Counts" if len(classes) > 8 else "", folded=len(classes) > 8)],
                [audit_charts.confusion(f"confusion-{name}", classes, confusion)],
            )
        )
    return sections


def _made(made: Mapping[str, Any], settings: Mapping[str, Any]) -> Section:
    rows = []
    for key, value in {**made, **settings}.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {what}" for name, what in value.items())
        elif isinstance(value, (list, tuple)):
            value = ", ".join(f"{one['path']} (sha256 {one['sha256'][:12]}…)" for one in value)
        rows.append([left(key.replace("_", " ")), left(str(value))])
    return Section("made", "How it was made", "", [Table(["what", ""], rows)])
