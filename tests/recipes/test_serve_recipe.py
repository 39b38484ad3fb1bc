"""recipes/scale/serve: dashboard and rules name what the server measures, the container files what it takes."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path

import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from redflag import cli
from redflag.server import serve
from redflag.server.faults import _CLASSES
from redflag.server.metrics import ENDS, Metrics
from redflag.trace import Alarm, Escalation, Halt, Reflection, Resume, Text, Trace

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "scale" / "serve"
DASHBOARD = json.loads((FOLDER / "grafana" / "redflag.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
# What Prometheus itself adds to every series, and the one that it makes for each scrape.
OF_PROMETHEUS = {"job", "instance"}
VALUES = {
    "end": set(ENDS),
    "reason": {"alarm", "fault", "replacement", "judge", "other", *(name for name, _ in _CLASSES)},
    "state": {"active", "waiting"},
    "streamed": {"true", "false"},
}


def series():
    """Name -> labels of every series that the server can show."""
    metrics = Metrics()
    metrics.watch_queue(lambda: (0, 0))
    events = [
        Text(0, (5,), "a"),
        Alarm(1, "harm", 0.9, 0.5, "reflect"),
        Reflection(1, (7,), "harmless", 0.1),
        Escalation(1, "unanswered", 1.0),
        Resume(2),
    ]
    for reason in ("alarm", "fault"):
        trace = Trace(categories=("harm",), token_ids=[5], events=[*events, Halt(1, reason, "harm")])
        metrics.observe(
            trace,
            route="/v1/completions",
            streamed=True,
            overridden=True,
            seconds_to_first=0.1,
            seconds=0.2,
            end="done",
        )
    metrics.observe_step_seconds(0.1)
    found: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


SERIES = series()


def parsed(expression):
    """Every part of an expression; Grafana's own variables are replaced by what it puts there."""
    text = expression.replace("$__rate_interval", "5m").replace("$job", ".*").replace("$instance", ".*")
    waiting, found = [promql.parse(text)], []
    while waiting:
        part = waiting.pop()
        found.append(part)
        inner = [getattr(part, name) for name in dir(part) if not name.startswith("_")]
        for value in itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in inner):
            if isinstance(value, promql.Expr | promql.VectorSelector):
                waiting.append(value)
    return found


def grouped(part):
    modifier = part.modifier if isinstance(part, promql.AggregateExpr) else None
    return set(modifier.labels) if modifier is not None else set()


EXPRESSIONS = [(f"{panel['title']} {t['refId']}", t["expr"]) for panel in PANELS for t in panel["targets"]]
EXPRESSIONS += [(rule["alert"], rule["expr"]) for rule in ALERTS]


@pytest.mark.parametrize(("name", "expression"), EXPRESSIONS, ids=[name for name, _ in EXPRESSIONS])
def test_every_expression_names_series_labels_and_values_that_there_are(name, expression):
    parts = parsed(expression)
    selectors = [part for part in parts if isinstance(part, promql.VectorSelector)]
    assert selectors
    labels = set()
    for selector in selectors:
        assert selector.name in SERIES, selector.name
        known = SERIES[selector.name] | OF_PROMETHEUS
        labels |= known
        for matcher in selector.matchers.matchers:
            assert matcher.name in known, (selector.name, matcher.name)
            if matcher.name in VALUES:
                assert set(matcher.value.split("|")) <= VALUES[matcher.name], matcher.value
        assert "job" in {matcher.name for matcher in selector.matchers.matchers}, "other servers may be scraped too"
    for part in parts:
        assert grouped(part) <= labels, grouped(part)
    # A counter says nothing by itself, and only a counter can be rated.
    rated = {
        argument.vector_selector.name
        for part in parts
        if isinstance(part, promql.Call) and part.func.name in ("rate", "increase")
        for argument in part.args
        if isinstance(argument, promql.MatrixSelector)
    }
    counters = {one.name for one in selectors if one.name.endswith(("_total", "_bucket"))}
    assert counters == rated
    for part in parts:
        if isinstance(part, promql.Call) and part.func.name == "histogram_quantile":
            assert all(
                "le" in grouped(argument) for argument in part.args if isinstance(argument, promql.AggregateExpr)
            )


def test_the_dashboard_leaves_no_metric_out():
    shown = {part.name for t in TARGETS for part in parsed(t["expr"]) if isinstance(part, promql.VectorSelector)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in SERIES if name.startswith("redflag_")}
    families = {name for name in families if not name.endswith("_created")}
    assert {re.sub(r"_bucket$", "", name) for name in shown if name.startswith("redflag_")} == families


def test_the_dashboard_is_one_that_grafana_can_lay_out():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]+)", json.dumps(DASHBOARD["panels"]))) <= variables
    for target in TARGETS:
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        kept = set().union(*map(grouped, parsed(target["expr"])))
        aggregated = any(isinstance(part, promql.AggregateExpr) for part in parsed(target["expr"]))
        assert named <= (kept if aggregated else OF_PROMETHEUS), target["legendFormat"]


def test_every_alert_says_what_it_is_about():
    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names) == 12
    for rule in ALERTS:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket", "info")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert re.fullmatch(r"\d+[mhd]", rule.get("for", "1m"))
        for text in rule["annotations"].values():
            assert set(re.findall(r"\$(\w+)", text)) <= {"value", "labels"} and text.count("{{") == text.count("}}")


def test_prometheus_reads_the_rules_and_shows_the_key_as_the_server_wants_it():
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text(encoding="utf-8"))
    assert [(FOLDER / name).is_file() for name in config["rule_files"]] == [True]
    (scrape,) = config["scrape_configs"]
    assert scrape["job_name"] == "redflag", "the rules ask for this job"
    assert scrape["authorization"] == {"type": "Bearer", "credentials_file": "/run/secrets/operator_key"}
    assert COMPOSE["services"]["prometheus"]["secrets"] == ["operator_key"]
    assert COMPOSE["secrets"]["operator_key"] == {"environment": serve.OPERATOR_KEY}
    port = COMPOSE["services"]["redflag"]["command"][COMPOSE["services"]["redflag"]["command"].index("--port") + 1]
    assert scrape["static_configs"] == [{"targets": [f"redflag:{port}"]}]


def test_redflag_takes_its_options_and_keys_in_the_container():
    service = COMPOSE["services"]["redflag"]
    arguments, _ = cli.parse(serve, service["command"], "redflag serve")
    assert (arguments.upstream, arguments.host, arguments.port) == ("http://vllm:8000", "0.0.0.0", 8080)
    assert set(service["environment"]) == {serve.API_KEYS, serve.OPERATOR_KEY}
    assert all(value.startswith("${" + name + ":?") for name, value in service["environment"].items()), "required"
    assert service["ports"][0].startswith("${PORT:-127.0.0.1:8080}:8080")
    assert int(service["stop_grace_period"].removesuffix("s")) >= arguments.grace + 15
    assert service["ulimits"]["nofile"] >= 2 * arguments.max_open


def test_nobody_reaches_the_engine_past_redflag():
    vllm = COMPOSE["services"]["vllm"]
    assert (
        "ports" not in vllm and vllm["networks"] == ["engine"] and COMPOSE["networks"]["engine"] == {"internal": True}
    )
    assert [name for name, service in COMPOSE["services"].items() if "engine" in service["networks"]] == [
        "vllm",
        "redflag",
    ]


def test_what_is_mounted_and_copied_is_there():
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith("./") or (FOLDER / source).is_file(), source
            assert source.startswith(("./", "${MODEL")) or source in COMPOSE["volumes"], source
    build = COMPOSE["services"]["redflag"]["build"]
    context = (FOLDER / build["context"]).resolve()
    assert context == ROOT and (context / build["dockerfile"]).is_file()
    lines = (FOLDER / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    for word, rest in steps:
        if word == "COPY":
            *sources, _ = rest.split()
            assert [source for source in sources if not (ROOT / source).exists()] == []
    commands = dict(step for step in steps if step[0] in ("ENTRYPOINT", "CMD", "HEALTHCHECK", "USER"))
    assert json.loads(commands["ENTRYPOINT"]) == ["redflag", "serve"]
    assert commands["USER"] == "redflag" and "/ready" in commands["HEALTHCHECK"]
    extras = re.search(r'"\.\[([a-z,]+)\]"', "\n".join(lines))
    assert extras is not None and "serve" in extras[1].split(",")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==", pinned, re.M) and "grep '^torch==' constraints.txt" in "\n".join(lines)
    for line in lines:
        if line.startswith("RUN"):
            assert shlex.split(line)[0] == "RUN"


def test_grafana_finds_data_source_and_dashboard():
    source = yaml.safe_load((FOLDER / "grafana" / "datasource.yaml").read_text(encoding="utf-8"))
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((FOLDER / "grafana" / "dashboards.yaml").read_text(encoding="utf-8"))["providers"]
    mounts = COMPOSE["services"]["grafana"]["volumes"]
    assert any(mount.split(":")[1].startswith(provider["options"]["path"]) for mount in mounts)
