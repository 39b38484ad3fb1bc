"""What real clients send beside a plain question: it is answered, and what of it was left out is said."""

# ruff: noqa: F811
from __future__ import annotations

import ast
import json
import logging

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from running import MODEL, ROUTES, body_of
from tolerant_server import (
    ASK,
    CHAT,
    KEY,
    OPERATOR,
    ORIGIN,
    ROOT,
    post,
    server,  # noqa: F401# noqa: F401
    serving,
)

from redflag.api.fields import UNSUPPORTED, header
from redflag.api.schema import ChatRequest, CompletionRequest
from redflag.cli import parse
from redflag.errors import RedflagError
from redflag.server import serve
from redflag.server.access import Limits
from redflag.watching.policy import Policy

# How many tokens


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ({"max_tokens": 32000}, 4),
        ({"max_completion_tokens": 32000}, 4),
        ({"max_tokens": -1}, 4),
        ({"max_tokens": 2}, 2),
        ({"max_tokens": None}, 3),
        ({}, 3),
    ],
)
def test_more_tokens_than_allowed_are_clipped_and_the_answer_ends_with_length(server, route, asked, tokens):
    for stream in (False, True):
        answer = post(server, body_of(route, stream=stream, **asked), route)
        text = answer.text if stream else answer.json()["choices"][0]["finish_reason"]
        assert answer.status_code == 200 and "length" in text
        if not stream:
            assert answer.json()["usage"]["completion_tokens"] == tokens


def test_more_tokens_than_allowed_are_refused_where_the_operator_wants_that(tokenizer, spec, script):
    with serving(tokenizer, spec, script, Limits(MODEL, max_tokens=4, over_limit="refuse")) as server:
        for name in ("max_tokens", "max_completion_tokens"):
            error = post(server, body_of(CHAT, **{name: 5})).json()["error"]
            assert (error["code"], error["param"]) == ("invalid_value", name) and "5 response tokens" in error[
                "message"
            ]
            assert post(server, body_of(CHAT, **{name: 4})).status_code == 200
        assert post(server, body_of(CHAT, max_tokens=-1)).status_code == 200


# Fields that change no token

HARMLESS = [
    ({"prompt_cache_key": "a"}, "prompt_cache_key"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"client_metadata": {"a": 1}}, "client_metadata"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"keep_alive": "5m", "options": {}}, "keep_alive"),
    ({"priority": 3, "cache_salt": "x"}, "priority, cache_salt"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": {"all": True}}, "stream_options.all"),
    ({"with space": 1, "ümlaut\n": 2}, "with%20space, %C3%BCmlaut%0A"),
    ({"metadata": {"a": 1}}, None),
    ({"user": 5}, None),
    ({"stop": ""}, None),
    ({"stream_options": {"include_usage": True}}, None),
    ({"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}, None),
    ({"chat_template_kwargs": {"enable_thinking": False}}, None),
    ({"store": False, "n": 1, "tools": [], "parallel_tool_calls": False}, None),
]


@pytest.mark.parametrize("route", ROUTES)
def test_fields_that_change_no_token_are_ignored_and_named_in_a_header(server, route):
    for fields, named in HARMLESS:
        answer = post(server, body_of(route, **fields), route)
        assert answer.status_code == 200, (fields, answer.content)
        assert answer.headers.get("x-ignored-params") == named, fields


def test_fields_that_change_no_token_are_refused_where_the_operator_wants_that(tokenizer, spec, script):
    with serving(tokenizer, spec, script, Limits(MODEL, unknown_fields="refuse")) as server:
        for fields, named in HARMLESS:
            answer = post(server, body_of(CHAT, **fields))
            if named is None:
                assert answer.status_code == 200 and "x-ignored-params" not in answer.headers, fields
                continue
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["code"] == "unknown_parameter"
            assert error["param"] in fields or error["param"].startswith("stream_options.")
        assert (
            post(server, body_of(CHAT) | {"messages": [{**ASK, "id": "m1"}]}).json()["error"]["param"] == "messages.id"
        )


def test_the_log_tells_of_an_ignored_field_once_and_of_no_value(server, caplog):
    caplog.set_level(logging.INFO, "redflag.server.server")
    for _ in range(3):
        assert post(server, body_of(CHAT, seen_once="SECRET")).status_code == 200
    lines = [record.getMessage() for record in caplog.records if "seen_once" in record.getMessage()]
    assert len(lines) == 1 and "SECRET" not in caplog.text


def test_a_client_that_makes_up_names_does_not_fill_the_log(server, caplog):
    caplog.set_level(logging.INFO, "redflag.server.server")
    for start in range(0, 600, 100):
        fields = {f"made_up_{number}": 1 for number in range(start, start + 100)}
        answer = post(server, body_of(CHAT, **fields))
        assert answer.headers["x-ignored-params"].count(",") == 31
    assert len([record for record in caplog.records if "made_up_" in record.getMessage()]) <= 256


@given(st.lists(st.text(), max_size=40))
def test_whatever_a_field_is_called_the_header_is_one_line_of_bounded_length(names):
    value = header(names)
    assert value.isascii() and "\n" not in value and "\r" not in value and len(value) <= 32 * (64 * 12 + 2)
    httpx.Headers({"x-ignored-params": value})


# Parameters of the openai package that are neither carried out nor refused: none changes a token.
IGNORED_OF_OPENAI = {
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning_effort",
    "service_tier",
    "store",
    "verbosity",
}


def test_of_every_parameter_of_the_openai_package_it_is_known_what_becomes_of_it():
    for module, kind in ((chat_create_params, ChatRequest), (completion_create_params, CompletionRequest)):
        params = set(module.CompletionCreateParamsBase.__annotations__) | {"stream"}
        assert params - set(kind.model_fields) - set(UNSUPPORTED) <= IGNORED_OF_OPENAI


IGNORED_OF_VLLM = {
    "cache_salt",
    "ec_transfer_params",
    "include_reasoning",
    "kv_transfer_params",
    "media_io_kwargs",
    "mm_payload",
    "parallel_tool_calls",
    "priority",
    "reasoning_effort",
    "request_id",
    "return_mm_kwargs",
    "routed_experts_prompt_start",
    "session_id",
    "stream_interval",
    "thinking_token_budget",
    "truncation_side",
}


def test_of_every_parameter_of_vllm_it_is_known_what_becomes_of_it():
    entrypoints = ".vllm/lib/python3*/site-packages/vllm/entrypoints/openai"
    kinds = (("chat_completion", ChatRequest), ("completion", CompletionRequest))
    paths = [next(ROOT.glob(f"{entrypoints}/{folder}/protocol.py"), None) for folder, _ in kinds]
    if None in paths:
        pytest.skip("vLLM is not installed in .vllm")
    for path, (_, kind) in zip(paths, kinds, strict=True):
        (fields,) = (
            [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ClassDef) and node.name.endswith("CompletionRequest") and "Batch" not in node.name
        )
        known = set(kind.model_fields) | set(UNSUPPORTED) | IGNORED_OF_VLLM
        assert [name for name in fields if not name.startswith("_") and name not in known] == []


# Bodies of clients as recorded, but for tools.
RECORDED = {
    "opencode": {"max_tokens": 32000, "stream": True, "stream_options": {"include_usage": True}},
    "Cline": {
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "reasoning_effort": "medium",
    },
    "CodeCompanion": {
        "messages": [{"role": "user", "content": "hello", "id": 17, "opts": {"visible": True}}],
        "stream": True,
    },
    "AI SDK": {
        "messages": [ASK, {"role": "assistant", "content": "hi", "reasoning_content": "hm"}, ASK],
        "max_tokens": 8192,
        "stream": True,
    },
    "LiteLLM": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": "hi", "provider_specific_fields": {"refusal": None}},
            ASK,
        ],
        "metadata": {"a": 1},
        "extra_headers": {},
    },
}


@pytest.mark.parametrize("client", RECORDED)
def test_requests_of_clients_as_recorded_are_answered(server, client):
    answer = post(server, body_of(CHAT) | RECORDED[client])
    assert answer.status_code == 200, answer.content


# Browsers, keys, addresses

PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os,x-stainless-lang",
}


def test_a_page_from_an_allowed_origin_may_ask_and_its_preflight_needs_no_key(server):
    answer = httpx.options(server.url + CHAT, headers=PREFLIGHT)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == ORIGIN
    allowed = answer.headers["access-control-allow-headers"].lower()
    assert all(name in allowed for name in ("authorization", "content-type", "x-stainless-os"))
    for stream in (False, True):
        headers = {"Origin": ORIGIN, "Authorization": f"Bearer {KEY}"}
        answer = post(server, body_of(CHAT, stream=stream), headers=headers)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
    refused = post(server, body_of(CHAT), headers={"Origin": ORIGIN})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == ORIGIN


def test_a_page_from_elsewhere_may_not(server, tokenizer, spec, script):
    answer = httpx.options(server.url + CHAT, headers={**PREFLIGHT, "Origin": "https://evil.example"})
    assert answer.status_code == 400 and "access-control-allow-origin" not in answer.headers
    with serving(tokenizer, spec, script, Limits(MODEL)) as closed:  # the default
        answer = httpx.options(closed.url + CHAT, headers=PREFLIGHT)
        assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
        asked = httpx.post(closed.url + CHAT, json=body_of(CHAT), headers={"Origin": ORIGIN})
        assert asked.status_code == 200 and "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer  "])
def test_the_case_of_bearer_does_not_matter(server, scheme):
    assert post(server, body_of(CHAT), headers={"Authorization": scheme + KEY}).status_code == 200
    scraped = httpx.get(server.url + "/metrics", headers={"Authorization": scheme + OPERATOR})
    assert scraped.status_code == 200


@pytest.mark.parametrize("given", [f"Bearer{KEY}", f"Token {KEY}", "Bearer", f"Bearer {KEY}x", KEY])
def test_other_schemes_and_keys_are_refused(server, given):
    assert post(server, body_of(CHAT), headers={"Authorization": given}).status_code == 401


def test_a_slash_at_the_end_is_no_other_address(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    for route in ROUTES:
        assert post(server, body_of(route), f"{route}/").status_code == 200
    listed = httpx.get(server.url + "/v1/models/", headers=headers)
    assert listed.status_code == 200 and listed.json()["object"] == "list"
    assert httpx.get(f"{server.url}/v1/models/{MODEL}/", headers=headers).json()["id"] == MODEL
    routes = [line for line in server.metrics.render()[0].decode().splitlines() if "requests_total{" in line]
    assert routes and not [line for line in routes if '/"' in line.split("route=")[1].split(",")[0]]


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models"])
def test_monitors_may_ask_by_head(server, path):
    answer = httpx.head(server.url + path, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200 and not answer.content


def test_routes_that_are_missing_name_the_clients_setting(server):
    for path in ("/chat/completions", "/responses", "/moderations/"):
        answer = httpx.post(server.url + path, json=body_of(CHAT))
        assert answer.status_code == 404 and "the base URL ends in /v1" in answer.json()["error"]["message"]


# Options


def limits_by(*words):
    arguments, _ = parse(serve, ["--model", "m", *words], prog="redflag serve")
    return serve.limits_of(arguments, {})


def test_the_options_say_what_is_tolerated():
    plain = limits_by()
    assert (plain.over_limit, plain.unknown_fields, plain.allow_origins) == ("clip", "ignore", ())
    strict = limits_by(
        "--over_limit", "refuse", "--unknown_fields", "refuse", "--allow_origins", f"{ORIGIN}, https://a.b:1"
    )
    assert (strict.over_limit, strict.unknown_fields) == ("refuse", "refuse")
    assert strict.allow_origins == (ORIGIN, "https://a.b:1")
    assert limits_by("--allow_origins", "*").allow_origins == ("*",)
    for wrong in ("https://chat.example.org/", "example.org", "https://"):
        with pytest.raises(RedflagError, match="allow_origins must be origins"):
            limits_by("--allow_origins", wrong)


# What is paid, and what an empty halt says


def test_a_halted_answer_of_a_hundred_tokens_counts_them_though_none_was_shown(tokenizer, spec, script):
    high = {100: (0.9, 0.0)}
    served = serving(tokenizer, spec, script, Limits(MODEL), answer="x" * 150, policy=Policy(release="end"), high=high)
    with served as server:
        usage = post(server, body_of(CHAT)).json()["usage"]
        streamed = post(server, body_of(CHAT, stream=True, stream_options={"include_usage": True})).text
        last = json.loads(streamed.split("data: ")[-2])
    assert usage["completion_tokens"] == 101 and usage["total_tokens"] == usage["prompt_tokens"] + 101
    assert usage["completion_tokens_details"] == {"released_tokens": 0, "hidden_tokens": 101}
    assert last["usage"] == usage


@pytest.mark.parametrize(
    ("policy", "refusal"),
    [
        (Policy(replacement="Let us talk about bread."), "Let us talk about bread."),
        (Policy(replacement="Bread is baked.", decoy=True), None),
        (Policy(), None),
    ],
)
def test_an_answer_that_was_halted_before_its_first_token_says_so(tokenizer, spec, script, policy, refusal):
    from redflag.api.wire import REFUSAL

    with serving(tokenizer, spec, script, Limits(MODEL), policy=policy, high={0: (0.9, 0.0)}) as server:
        message = post(server, body_of(CHAT)).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "", "refusal": refusal or REFUSAL}
