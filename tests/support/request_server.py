"""One server with two clients, an operator and an audit log, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from running import MODEL, ROUTES, Running, engine, running

from redflag.guard.guard import Guard
from redflag.server.access import Limits
from redflag.server.audit_log import AuditLog
from redflag.trace import Step
from redflag.watching.thresholds import Thresholds

CHAT, TEXT = ROUTES
KEY, OTHER_KEY, OPERATOR = "sk-first-client-key-0", "sk-other-client-key-0", "operator-key-0123456789"
OPEN = {"Authorization": f"Bearer {KEY}"}
BODY_LIMIT = 1_000_000


@pytest.fixture(scope="module")
def server(tokenizer, spec, tmp_path_factory) -> Iterator[Running]:
    """One server for all requests: two clients, an operator, an audit log. Its engine says "the cat" and alarms."""
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    steps = [
        Step(ids[0], (0.01, 0.0)),
        *(Step(i, (0.9, 0.0)) for i in ids[1:]),
        Step(tokenizer.eos_token_id, (0.0, 0.0)),
    ]
    _, turns = engine(steps, tokenizer.eos_token_id, context_length=500_000)
    thresholds = Thresholds.manual(0.5, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash)
    audit = AuditLog(tmp_path_factory.mktemp("audit") / "audit.jsonl", thresholds.values)
    limits = Limits(
        MODEL,
        api_keys=(KEY, OTHER_KEY),
        operator_key=OPERATOR,
        max_body_bytes=BODY_LIMIT,
        max_tokens=100,
        default_tokens=50,
        body_timeout=1.0,
    )
    with running(Guard(turns, tokenizer, spec, thresholds), limits, audit=audit) as made:
        made.audit_path = audit._path
        yield made


def post(server, route, content, headers=OPEN):
    options = {"content": content} if isinstance(content, bytes) else {"json": content}
    return httpx.post(server.url + route, headers=headers, timeout=20, **options)


def refusal(answer, status, code, param=None):
    assert answer.status_code == status, answer.content
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param), body
    assert body["error"]["message"] and answer.headers["content-type"] == "application/json"
    return body["error"]
