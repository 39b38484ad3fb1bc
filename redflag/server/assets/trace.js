"use strict";
// What was measured of one response: the curve with its threshold, what another threshold would have done, the events.
(() => {
  const { get, make, request, lines, perFrame, say } = playground;
  const HIGH = 214, LEFT = 52, RIGHT = 10, BOTTOM = 52, TOP = 12;
  const TICKS = [1e-5, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.99999];
  const box = get("curve"), slider = get("threshold"), exact = get("exact"), flag = get("flag"), step = get("step");
  let guard = null; // what the responses are judged by, once the server has said it
  let tried = []; // the threshold of each category that is tried here
  let shown = null; // the response in the panel
  let pointed = -1;

  const logOdds = (p) => Math.log(Math.max(p, 1e-300) / Math.max(1 - p, 1e-16));
  const nats = () => guard.monitor.aggregation === "cusum";
  // Where values stand on the axis: log-odds of probabilities, nats as they are; and back.
  const low = () => (nats() ? 0 : -14);
  const high = () => (nats() ? 1.05 * Math.max(1, ...tried, ...(shown?.scores ?? []).map((row) => Math.max(...row))) : 14);
  const to = (value) => (nats() ? Math.min(high(), value) : Math.min(14, Math.max(-14, logOdds(value))));
  const from = (x) => (nats() ? x : 1 / (1 + Math.exp(-x)));
  // Share of full heat of a probability: nothing below one in ten thousand, all above 1 - 1e-4.
  const heat = (p) => Math.min(1, Math.max(0, (logOdds(p) + 9.2) / 18.4));
  const spellP = (p) => (p < 1e-3 ? p.toExponential(1) : p > 0.999 ? `1 − ${(1 - p).toExponential(1)}` : p.toPrecision(3));
  const spell = (x) => (nats() ? `${x.toFixed(2)} nats` : spellP(x));
  const tokens = (n) => `${n} token${n === 1 ? "" : "s"}`;
  const chosenFlag = () => Number(flag.value || 0);

  const newTrace = () => ({ name: "", pieces: [], open: null, probs: [], scores: [], events: [], released: 0, answered: 0, answerAt: 0, runs: [], over: false, record: null, missing: "" });

  // The pieces of text that an event released, each with its tokens: one of all, or one of each. A token without text of
  // its own, the first byte of a character, goes with the next one.
  function release(trace, event) {
    const each = event.pieces.length === event.tokens;
    event.pieces.forEach((text, i) => {
      const at = event.position + i;
      if (text) trace.pieces.push({ step: trace.open ?? at, upto: each ? at + 1 : at + event.tokens, text, part: event.part });
      trace.open = text ? null : trace.open ?? at;
    });
    const run = trace.runs.at(-1);
    if (run && run[1] === event.position) run[1] += event.tokens;
    else trace.runs.push([event.position, event.position + event.tokens]);
    trace.released += event.tokens;
    if (event.part !== "thought") trace.answered += event.tokens;
  }

  // Follows a response until its trace is whole.
  async function follow(trace, id, changed) {
    if (!guard) return;
    try {
      for await (const line of lines(await request(`/playground/traces/${encodeURIComponent(id)}`))) {
        const message = JSON.parse(line);
        if ("trace" in message) {
          trace.record = message.trace;
          trace.missing = message.error ?? "";
        } else {
          for (const column of ["probs", "scores"]) trace[column].length = message.start;
          trace.probs.push(...message.flag_probs);
          trace.scores.push(...message.scores);
          trace.answerAt = message.answer_at;
          for (const event of message.events) {
            if (event.kind === "text") release(trace, event);
            else {
              trace.events.push(event);
              if (event.kind === "alarm") say(`Alarm: ${event.category}, before token ${event.position}`);
            }
          }
        }
        changed();
      }
    } catch (error) {
      trace.missing = `Nothing was measured for this page: ${error.message}`;
    }
    trace.over = true;
    changed();
  }

  // The first step of the answer at which any category's score reaches the threshold tried; null: none. Thoughts, which
  // end where `answerAt` says, are judged by thresholds of their own.
  function firstAlarm(trace) {
    if (!guard || trace.answerAt === null) return null;
    for (let t = trace.answerAt + guard.monitor.warm_up; t < trace.scores.length; t++) {
      const k = trace.scores[t].findIndex((score, i) => score >= tried[i]);
      if (k >= 0) return { at: t, category: guard.categories[k] };
    }
    return null;
  }

  const inForce = () => guard.thresholds.every((value, k) => value === tried[k]);

  // What the thresholds tried would have done to what was recorded, in words.
  function whatIf(trace) {
    const first = firstAlarm(trace);
    if (trace.answerAt === null) return "Only a thought so far: thoughts are judged by thresholds of their own.";
    const measured = trace.scores.length - trace.answerAt;
    const of = trace.answerAt ? " of the answer" : "";
    if (first === null) {
      const cut = trace.events.some((event) => event.kind === "halt" && event.reason === "alarm");
      const unknown = cut ? " It was halted there: what would have followed was never written." : "";
      return `No alarm in the ${tokens(measured)}${of} measured.${unknown}`;
    }
    const would = {
      steps: `a halt there shows ${tokens(Math.max(0, first.at - trace.answerAt - guard.hold_back))}${of}`,
      sentence: "a halt there shows the whole sentences before it",
      end: "a halt there shows nothing",
    }[guard.release];
    const name = guard.categories.length > 1 ? `${first.category}: first` : "First";
    return `${name} alarm before token ${first.at} of ${trace.scores.length}; ${would} (${trace.answered} ${trace.over ? "were" : "so far"} shown).`;
  }

  function words(event) {
    const threshold = typeof event.threshold === "number" ? ` ≥ ${spell(event.threshold)}` : "";
    return {
      alarm: () => `alarm: ${event.category}, ${spell(event.score)}${threshold}, so ${event.action}`,
      halt: () => `halted: ${event.reason}${event.category ? ` (${event.category})` : ""}${event.detail ? `, ${event.detail}` : ""}`,
      done: () => `done: ${event.reason}`,
    }[event.kind]?.() ?? event.describe ?? event.kind;
  }

  function listed(event, number) {
    const hidden = event.kind === "reflection" ? event.text : event.kind === "halt" ? event.text : "";
    const folded = hidden ? make("details", {}, make("summary", {}, event.kind === "halt" ? "shown instead" : "hidden text"), make("pre", {}, hidden)) : null;
    return make("li", { class: event.kind },
      make("span", { class: "number", "aria-hidden": "true" }, String(number + 1)),
      make("span", { class: "at" }, `token ${event.position}`), make("div", { class: "what" }, words(event), folded));
  }

  // Places of marks on the rail, moved apart where they would cover each other.
  function apart(wanted, most) {
    const found = [];
    wanted.forEach((x, i) => found.push(i ? Math.max(x, found[i - 1] + 15) : x));
    for (let i = found.length - 1, limit = most; i >= 0; i--, limit = found[i + 1] - 15) found[i] = Math.min(found[i], limit);
    return found;
  }

  function curve(trace, k) {
    const steps = trace.scores.length, wide = Math.max(280, box.clientWidth), bottom = HIGH - BOTTOM;
    const x = (t) => LEFT + ((wide - LEFT - RIGHT) * Math.min(t, Math.max(1, steps))) / Math.max(1, steps);
    const y = (value) => TOP + (bottom - TOP) * (1 - (to(value) - low()) / (high() - low()));
    const svg = make("svg", { class: "curve", viewBox: `0 0 ${wide} ${HIGH}`, role: "img",
      "aria-label": `Score of ${guard.categories[k]} before each of ${tokens(steps)}; highest ${spell(Math.max(0, ...trace.scores.map((row) => row[k])))}` });
    const line = (name, x1, x2, y1, y2) => svg.append(make("line", { class: name, x1, x2, y1, y2 }));
    for (const tick of nats() ? [0, high() / 2, high()] : TICKS) {
      const label = nats() ? tick.toFixed(1) : tick > 0.5 ? `${+(100 * tick).toFixed(3)}%` : `${+(100 * tick).toPrecision(1)}%`;
      line("grid", LEFT, wide - RIGHT, y(tick), y(tick));
      svg.append(make("text", { x: LEFT - 6, y: y(tick) + 3.5, "text-anchor": "end" }, label));
    }
    const every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((n) => steps / n <= 8) ?? 2000;
    for (let t = 0; t <= steps; t += every) svg.append(make("text", { x: x(t), y: bottom + 14, "text-anchor": "middle" }, String(t)));
    const path = (rows) => rows.map((row, t) => `${t ? "L" : "M"}${x(t).toFixed(1)},${y(row[k]).toFixed(1)}H${x(t + 1).toFixed(1)}`).join("");
    if (guard.monitor.aggregation !== "max" && !nats()) svg.append(make("path", { class: "prob", d: path(trace.probs) }));
    svg.append(make("path", { class: "score", d: path(trace.scores) }));
    const rail = bottom + 32;
    line("rail", LEFT, wide - RIGHT, rail, rail);
    // A line for each run of tokens that were shown: a hidden thought was not.
    for (const [since, upto] of trace.runs) line("shown", x(since), x(upto), rail, rail);
    const places = apart(trace.events.map((event) => x(event.position)), wide - RIGHT);
    trace.events.forEach((event, i) => svg.append(make("g", { class: `event ${event.kind}` },
      make("circle", { cx: places[i], cy: rail, r: 7 }), make("text", { x: places[i], y: rail + 3.3 }, String(i + 1)))));
    const first = firstAlarm(trace);
    if (first) line("whatif", x(first.at), x(first.at), TOP - 6, bottom);
    if (pointed >= 0) line("cursor", x(pointed + 0.5), x(pointed + 0.5), TOP - 6, bottom);
    if (guard.thresholds[k] !== tried[k]) line("forced", LEFT, wide - RIGHT, y(guard.thresholds[k]), y(guard.thresholds[k]));
    const at = y(tried[k]);
    line("threshold", LEFT, wide - RIGHT, at, at);
    line("grip", LEFT, wide - RIGHT, at, at);
    svg.append(make("circle", { class: "handle", cx: wide - RIGHT - 4, cy: at, r: 5 }));
    const scale = () => wide / svg.getBoundingClientRect().width;
    return {
      svg, steps,
      stepAt: (px) => Math.floor(((px - svg.getBoundingClientRect().left) * scale() - LEFT) / ((wide - LEFT - RIGHT) / Math.max(1, steps))),
      valueAt: (py) => from(low() + (high() - low()) * (1 - Math.min(1, Math.max(0, ((py - svg.getBoundingClientRect().top) * scale() - TOP) / (bottom - TOP))))),
      near: (py) => Math.abs((py - svg.getBoundingClientRect().top) * scale() - at) < 10,
    };
  }

  let drawn = null;

  function draw() {
    get("export").disabled = !shown?.record;
    if (guard) get("which").textContent = shown === null ? "Nothing yet." : `${shown.name}: ${tokens(shown.scores.length)} measured, ${shown.released} shown.${shown.missing ? ` ${shown.missing}` : ""}`;
    get("measured").hidden = !guard || !shown || (shown.scores.length === 0 && shown.events.length === 0);
    if (!get("measured").hidden) {
      const k = chosenFlag(), value = tried[k];
      const last = shown.events.at(-1);
      get("said").textContent = last && ["halt", "done"].includes(last.kind) ? `${words(last)[0].toUpperCase()}${words(last).slice(1)}.` : shown.over ? "Left before its end." : "…";
      Object.assign(slider, { min: low(), max: high() });
      slider.value = to(value);
      slider.setAttribute("aria-valuetext", spell(value));
      if (document.activeElement !== exact) exact.value = Number(value.toPrecision(6));
      get("scale").textContent = spell(value);
      get("in-force").setAttribute("aria-pressed", String(inForce()));
      const told = whatIf(shown);
      if (get("what-if").textContent !== told) get("what-if").textContent = told;
      drawn = curve(shown, k);
      box.replaceChildren(drawn.svg);
      if (get("events").childElementCount !== shown.events.length || get("events").trace !== shown) {
        get("events").replaceChildren(...shown.events.map(listed));
        get("events").trace = shown;
      }
      readout();
    }
    playground.paint();
  }
  const redraw = perFrame(draw);

  function readout() {
    const steps = shown.probs.length;
    step.max = Math.max(0, steps - 1);
    step.disabled = steps === 0;
    let told = "Token: point at one, or move this.";
    if (pointed >= 0 && pointed < steps) {
      const piece = shown.pieces.find((one) => one.step <= pointed && pointed < one.upto);
      const values = guard.categories.map((name, i) => `${name} ${spellP(shown.probs[pointed][i])}`).join(", ");
      told = `Before token ${pointed} ${piece ? JSON.stringify(piece.text) : pointed < shown.released ? "(no text)" : "(not shown)"}: ${values}`;
      step.value = pointed;
    }
    get("readout").textContent = told;
    step.setAttribute("aria-valuetext", told);
  }

  function point(trace, t) {
    if (trace !== shown) show(trace);
    pointed = t;
    redraw();
  }

  function show(trace) {
    if (shown !== trace) pointed = -1;
    shown = trace;
    redraw();
  }

  function setThreshold(value) {
    tried[chosenFlag()] = value;
    redraw();
  }

  slider.addEventListener("input", () => setThreshold(from(Number(slider.value))));
  exact.addEventListener("input", () => exact.value !== "" && exact.valueAsNumber > 0 && setThreshold(exact.valueAsNumber));
  exact.addEventListener("blur", redraw);
  get("in-force").addEventListener("click", () => {
    tried = [...guard.thresholds];
    redraw();
  });
  flag.addEventListener("change", redraw);
  step.addEventListener("input", () => point(shown, Number(step.value)));
  step.addEventListener("focus", () => pointed < 0 && point(shown, Number(step.value)));
  let dragging = false;
  box.addEventListener("pointerdown", (event) => {
    if (!drawn?.near(event.clientY)) return;
    dragging = true;
    box.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  box.addEventListener("pointermove", (event) => {
    if (dragging) setThreshold(drawn.valueAt(event.clientY));
    else if (drawn && shown) {
      const t = drawn.stepAt(event.clientX);
      if (t >= 0 && t < drawn.steps) point(shown, t);
    }
  });
  for (const name of ["pointerup", "pointercancel"]) box.addEventListener(name, () => (dragging = false));
  // On a touch screen the line is dragged; elsewhere on the curve the page scrolls.
  box.addEventListener("touchstart", (event) => drawn?.near(event.touches[0].clientY) && event.preventDefault(), { passive: false });
  new ResizeObserver(redraw).observe(box);

  get("export").addEventListener("click", () => {
    // A line of a file of traces: `redflag show FILE` reads it.
    const text = `${JSON.stringify(shown.record)}\n`;
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: `${shown.record.id}.json` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  });

  async function load() {
    guard = await (await request("/playground/guard")).json();
    tried = [...guard.thresholds];
    flag.replaceChildren(...guard.categories.map((name, k) => make("option", { value: k }, name)));
    get("flag-label").hidden = guard.categories.length < 2;
    get("unlock").hidden = true;
    redraw();
  }

  // Opens the panel; without the operator's key the conversation goes on without it.
  async function open() {
    try {
      await load();
    } catch (error) {
      get("which").textContent = `Nothing is measured for this page: ${error.message}`;
      get("unlock").hidden = error.code === "";
    }
  }
  get("unlock").addEventListener("click", open);

  Object.assign(playground, {
    newTrace, follow, firstAlarm, heat, show, point, redraw, open, inForce: () => !guard || inForce(), flag: chosenFlag,
    pointed: (trace) => (trace === shown ? pointed : -1), shown: () => shown,
  });
})();
