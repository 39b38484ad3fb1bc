"use strict";
// The conversation: asked and shown as by any client of /v1/chat/completions; colour is put under what was shown.
(() => {
  const { get, make, request, lines, say, perFrame } = playground;
  const question = get("question"), log = get("log"), fields = get("fields");
  let model = "";
  let history = []; // messages as they are sent back
  let calls = []; // tool calls whose results are still to be given
  let turns = [];
  let running = null; // an AbortController while an answer comes

  // One answer: what came over the API, and the trace beside it.
  function newTurn() {
    const turn = {
      trace: playground.newTrace(), content: "", thoughts: "", refusal: "", calls: [], finish: null, redflag: null,
      answer: { holder: make("p", { class: "text" }), spans: [], offset: 0 },
      thinking: { holder: make("p", { class: "text" }), spans: [], offset: 0 },
      end: make("span", { class: "end" }), choose: make("button", { type: "button", class: "choose" }, "inspect"),
      folded: make("details", { class: "thoughts", hidden: "" }, make("summary", {}, "Thoughts")), called: make("div", {}), extra: make("div", {}),
    };
    turn.trace.name = `Answer ${turns.length + 1}`;
    turn.choose.setAttribute("aria-label", `inspect answer ${turns.length + 1}`);
    turn.choose.addEventListener("click", () => {
      playground.show(turn.trace);
      get("panel").scrollIntoView({ block: "start" }); // on a narrow screen it stands below
    });
    turn.folded.append(turn.thinking.holder);
    turn.node = make("article", { class: "turn assistant", "aria-busy": "true", "aria-label": turn.trace.name },
      make("header", {}, make("h3", {}, "Model"), turn.end, turn.choose), turn.folded, turn.answer.holder, turn.called, turn.extra);
    turn.node.addEventListener("pointerover", (event) => {
      const token = event.target.closest(".token[data-step]");
      if (token) playground.point(turn.trace, Number(token.dataset.step));
    });
    return turn;
  }

  function take(turn, chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    turn.redflag = chunk.redflag ?? turn.redflag;
    for (const choice of chunk.choices ?? []) {
      if (choice.index) continue;
      const delta = choice.delta ?? {};
      turn.content += delta.content ?? "";
      turn.thoughts += delta.reasoning_content ?? delta.reasoning ?? "";
      turn.refusal += delta.refusal ?? "";
      for (const part of delta.tool_calls ?? []) {
        const call = (turn.calls[part.index ?? turn.calls.length] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
        call.id = part.id ?? call.id;
        call.function.name += part.function?.name ?? "";
        call.function.arguments += part.function?.arguments ?? "";
      }
      turn.finish = choice.finish_reason ?? turn.finish;
    }
  }

  // A text cut where its tokens are, as far as the trace has told: [text, first step, behind its last]; the rest has no step.
  function segments(text, offset, pieces) {
    const found = [];
    let at = 0, start = 0;
    for (const piece of pieces) {
      const end = start + piece.text.length;
      if (end > offset) {
        const part = piece.text.slice(Math.max(0, offset - start), offset + text.length - start);
        if (!part || text.slice(at, at + part.length) !== part) break;
        found.push([part, piece.step, piece.upto]);
        at += part.length;
      }
      start = end;
    }
    if (at < text.length) found.push([text.slice(at), -1, -1]);
    return found;
  }

  // Brings a channel's spans up to its text; those that are right stay.
  function write(channel, text, pieces) {
    const wanted = segments(text, channel.offset, pieces);
    for (const [i, [part, step, upto]] of wanted.entries()) {
      const old = channel.spans[i];
      if (old && old.text === part && old.step === step) continue;
      const node = step < 0 ? make("span", {}, part) : make("span", { class: "token", "data-step": step }, part);
      if (old) old.node.replaceWith(node);
      else channel.holder.append(node);
      channel.spans[i] = { node, text: part, step, upto, heat: null };
    }
    for (const span of channel.spans.splice(wanted.length)) span.node.remove();
  }

  function colour(channel, trace, first, pointed) {
    const k = playground.flag();
    for (const span of channel.spans) {
      if (span.step < 0) continue;
      const p = Math.max(0, ...trace.probs.slice(span.step, span.upto).map((row) => row[k]));
      const heat = playground.heat(p).toFixed(3);
      if (heat !== span.heat) span.node.style.setProperty("--heat", (span.heat = heat));
      span.node.classList.toggle("after", first !== null && span.upto > first.at);
      span.node.classList.toggle("pointed", span.step <= pointed && pointed < span.upto);
    }
  }

  // Marks stand before the token whose probability they belong to; behind the text where that token was not shown.
  function mark(turn, first) {
    for (const old of turn.node.querySelectorAll(".marker")) old.remove();
    const alarms = turn.trace.events.filter((event) => event.kind === "alarm");
    const marks = alarms.map((event) => [event.position, "alarm", `alarm ${event.category}`]);
    if (first && !playground.inForce() && !alarms.some((event) => event.position === first.at)) marks.push([first.at, "whatif", "would alarm"]);
    for (const [at, kind, words] of marks) {
      const node = make("span", { class: `marker ${kind}` }, words);
      const place = [...turn.thinking.spans, ...turn.answer.spans].find((span) => span.upto > at);
      if (place) place.node.before(node);
      else turn.answer.holder.append(node);
    }
  }

  function render(turn) {
    const { trace } = turn;
    const told = trace.pieces.some((piece) => piece.part === "thought");
    const thought = told ? trace.pieces.filter((piece) => piece.part === "thought") : trace.pieces;
    const answered = told ? trace.pieces.filter((piece) => piece.part !== "thought") : trace.pieces;
    // Between marks of calls, and of thoughts that were not told apart, a text has to be found in what the model wrote.
    const whole = turn.calls.length === 0 && (told || !turn.thoughts);
    const find = (part, pieces, since, known) => {
      const at = whole || !part ? 0 : pieces.map((piece) => piece.text).join("").indexOf(part, since);
      return at >= 0 ? at : known;
    };
    turn.thinking.offset = told ? 0 : find(turn.thoughts, thought, 0, turn.thinking.offset);
    turn.answer.offset = find(turn.content, answered, told ? 0 : turn.thinking.offset + turn.thoughts.length, turn.answer.offset);
    write(turn.thinking, turn.thoughts, thought);
    write(turn.answer, turn.content, answered);
    const first = playground.firstAlarm(trace), pointed = playground.pointed(trace);
    for (const channel of [turn.thinking, turn.answer]) colour(channel, trace, first, pointed);
    mark(turn, first);
    turn.folded.hidden = !turn.thoughts;
    turn.answer.holder.hidden = !turn.answer.holder.hasChildNodes();
    while (turn.called.childElementCount < turn.calls.length) turn.called.append(make("details", { class: "call" }, make("summary"), make("pre")));
    turn.calls.forEach((call, i) => {
      turn.called.children[i].children[0].textContent = `Tool call ${call.function.name}`;
      turn.called.children[i].children[1].textContent = call.function.arguments;
    });
    turn.node.classList.toggle("chosen", trace === playground.shown() && turns.length > 1);
  }

  playground.paint = perFrame(() => turns.forEach(render));

  function ending(turn) {
    const halted = turn.finish === "content_filter";
    turn.end.classList.toggle("halted", halted);
    const known = { stop: "", length: "cut at its length", tool_calls: "waits for the tool" };
    turn.end.textContent = halted ? `halted: ${turn.redflag?.category ?? "alarm"}` : known[turn.finish] ?? turn.finish ?? "";
    if (turn.refusal) turn.extra.append(make("p", { class: "refusal" }, turn.refusal));
    say(halted ? `Halted: ${turn.redflag?.category ?? "alarm"}` : "The answer is complete");
  }

  function follow(turn, id) {
    turn.followed ??= playground.follow(turn.trace, id, playground.redraw).then(() => {
      if (turn.trace.record) turn.trace.record.meta.request = turn.body;
    });
  }

  // The end of the conversation is kept in view, unless the reader has gone elsewhere.
  const tail = get("tail");
  const atEnd = () => tail.getBoundingClientRect().top < log.getBoundingClientRect().bottom + 60 && tail.getBoundingClientRect().top < window.innerHeight;
  const toEnd = () => requestAnimationFrame(() => requestAnimationFrame(() => tail.scrollIntoView({ block: "nearest" })));

  async function answer(turn) {
    const response = await request("/v1/chat/completions", {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(turn.body), signal: running.signal,
    });
    if (response.headers.get("x-request-id")) follow(turn, response.headers.get("x-request-id"));
    for await (const line of lines(response)) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const bottom = atEnd();
      const chunk = JSON.parse(line.slice(6));
      if (chunk.id) follow(turn, chunk.id);
      take(turn, chunk);
      playground.redraw();
      if (bottom) toEnd();
    }
    ending(turn);
  }

  async function send(messages) {
    const turn = newTurn();
    turn.body = { model, messages, stream: true, ...settings() };
    turns.push(turn);
    tail.before(turn.node);
    toEnd();
    playground.show(turn.trace);
    running = new AbortController();
    busy(true);
    let failed = false;
    try {
      await answer(turn);
    } catch (error) {
      failed = true;
      const left = error.name === "AbortError";
      const id = error.response?.headers.get("x-request-id");
      if (id) follow(turn, id); // an answer that broke before anything was shown has a trace all the same
      turn.end.textContent = left ? "stopped" : "failed";
      turn.end.classList.toggle("fault", !left);
      if (!left) turn.extra.append(make("p", { class: "error", role: "alert" }, error.message));
    }
    running = null;
    busy(false);
    const bottom = atEnd();
    render(turn); // not busy is said of text that stands there, not of text that the next frame will bring
    turn.node.setAttribute("aria-busy", "false");
    playground.redraw();
    if (bottom) toEnd();
    calls = failed ? [] : turn.calls.filter(Boolean);
    if (failed && !turn.content) return false;
    history = [...messages, { role: "assistant", content: turn.content, ...(calls.length ? { tool_calls: [...calls] } : {}) }];
    return true;
  }

  function settings() {
    const found = fields.value.trim() ? JSON.parse(fields.value) : {};
    for (const [id, name] of [["max-tokens", "max_tokens"], ["temperature", "temperature"], ["seed", "seed"]]) {
      if (get(id).value !== "") found[name] = get(id).valueAsNumber;
    }
    return found;
  }

  // Says what is wrong with the fields; "" for nothing.
  function wrongFields() {
    try {
      const found = fields.value.trim() ? JSON.parse(fields.value) : {};
      return found !== null && typeof found === "object" && !Array.isArray(found) ? "" : "Give an object of JSON, such as {\"top_p\": 0.9}";
    } catch (error) {
      return `This is not JSON: ${error.message}`;
    }
  }

  function busy(on) {
    get("send").disabled = on;
    get("stop").hidden = !on;
    get("clear").disabled = on;
    document.querySelector("label[for=question]").textContent = calls.length ? `Result of the tool ${calls[0].function.name}` : "Your message";
  }

  async function ask() {
    const text = question.value;
    fields.setCustomValidity(wrongFields());
    if (running || !text.trim()) return;
    if (!get("composer").checkValidity()) {
      get("settings").open = true;
      get("composer").reportValidity();
      return;
    }
    get("nothing").hidden = true;
    const call = calls.shift();
    const message = call ? { role: "tool", tool_call_id: call.id, content: text } : { role: "user", content: text };
    tail.before(make("article", { class: "turn user" }, make("header", {}, make("h3", {}, call ? `Tool ${call.function.name}` : "You")), make("p", { class: "text" }, text)));
    question.value = "";
    const before = history;
    history = [...history, message];
    if (calls.length) return busy(false); // more results are to come
    const system = get("system").value.trim();
    const spoken = history.filter((one) => one.role !== "system");
    const went = await send(system ? [{ role: "system", content: system }, ...spoken] : spoken);
    busy(false);
    if (went) return;
    history = before; // nothing was answered: the message can be sent again
    calls = call ? [call] : [];
    if (!question.value) question.value = text;
  }

  get("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  fields.addEventListener("input", () => fields.setCustomValidity(""));
  const stop = () => running?.abort();
  get("stop").addEventListener("click", () => {
    stop();
    question.focus();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && !get("keys").open && stop());
  get("clear").addEventListener("click", () => {
    for (const node of log.querySelectorAll(".turn")) node.remove();
    history = [];
    calls = [];
    turns = [];
    get("nothing").hidden = false;
    playground.show(null);
    busy(false);
    question.focus();
  });

  async function start() {
    await playground.open();
    try {
      model = (await (await request("/v1/models")).json()).data[0].id;
      get("model").textContent = model;
      question.focus();
    } catch (error) {
      get("nothing").textContent = error.message;
    }
  }
  playground.ready = start();
})();
