"""The playground before scripted answers, in a real Chromium."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from running import MODEL, Play, engine, running

from redflag.guard.guard import Guard
from redflag.server.access import Limits


@pytest.fixture
def serve(tokenizer, spec, thresholds, script) -> Iterator[Callable[..., Any]]:
    """A server with the page whose model says `answer`; high: index of a token -> its probabilities."""
    contexts = []

    def start(answer, high=None, policy=None, harm=0.1, limits=None, thought="SECRET thought|", **options):
        hidden = script(thought, end=False)
        play = Play(script(answer, high), spec.ids, hidden, options.pop("pause", (0, 0.0)))
        verdict = [hidden[0]._replace(flag_probs=(harm, 1 - harm))]
        backend, turns = engine(
            play, tokenizer.eos_token_id, watched=lambda prompt, sampling, watch: verdict, **options
        )
        guard = Guard(turns, tokenizer, spec, thresholds, policy)
        context = running(guard, limits or Limits(MODEL), playground=True)
        contexts.append(context)
        server = context.__enter__()
        server.prompts = backend.prompts
        return server

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; whatever it complains of, or asks of any other server, is an error."""
    contexts, wrong = [], []

    def visit(server, ready=True, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith((server.url, "blob:")) else wrong.append(request.url),
        )
        page.goto(server.url)
        page.complaints = wrong
        if ready:
            page.evaluate("playground.ready")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def ask(page, text="hello", answers=1):
    page.fill("#question", text)
    page.press("#question", "Enter")
    over(page, answers)


def over(page, answers=1):
    """Waits for so many answers to be over, with their traces."""
    page.locator(".turn.assistant[aria-busy=false]").nth(answers - 1).wait_for()
    page.locator("#export:not([disabled])").wait_for()
    settle(page)


def settle(page):
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def answer(page):
    return page.locator(".turn.assistant").last.locator("> .text")


def heats(page):
    return page.eval_on_selector_all(
        ".turn.assistant:last-of-type .token",
        "all => all.map(t => [t.textContent, Number(getComputedStyle(t).getPropertyValue('--heat'))])",
    )


def tokens_after(page):
    return page.eval_on_selector_all(".token.after", "all => all.map(t => t.textContent).join('')")
