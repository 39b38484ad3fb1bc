"use strict";
// One response: its text with the probability as heat, the curve below it, the onset and the alarm.
(() => {
  if (!redflag.rows) return;
  const { make, rows, axis, flags } = redflag;
  const box = document.getElementById("trace");
  const HIGH = 170, LEFT = 56, BOTTOM = 22, TOP = 12;
  const ticks = axis.words === "in nats" ? null : [1e-5, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.99999];
  let shown = null;

  // Share of full heat of a probability: nothing below one in ten thousand, all above 1 - 1e-4.
  const heat = (p) => Math.min(1, Math.max(0, (Math.log(Math.max(p, 1e-12) / Math.max(1 - p, 1e-12)) + 9.2) / 18.4));
  const spell = (p) => (p === 1 ? "1" : p < 1e-3 ? p.toExponential(1) : p > 0.999 ? `1 − ${(1 - p).toExponential(1)}` : p.toPrecision(3));
  redflag.spell = (x) => (x === Infinity ? "never" : axis.words === "in nats" ? x.toFixed(2) : spell(x));

  function facts(i) {
    const known = [
      ["set", redflag.name("set", i)], ["source", redflag.name("source", i)], ["category", redflag.name("category", i)],
      ["onset", rows.onset[i] < 0 ? null : `token ${rows.onset[i]}${redflag.name("onset_source", i) ? ` (${redflag.name("onset_source", i)})` : ""}`],
      ["tokens", String(rows.tokens[i])], ["peak", redflag.spell(redflag.peaks[i])],
    ];
    return make("dl", { class: "facts" },
      ...known.filter(([, value]) => value !== null).map(([what, value]) =>
        make("div", {}, make("dt", {}, what), make("dd", {}, value))));
  }

  function text(i, k) {
    const covered = redflag.isCovered(i);
    const start = redflag.stepStarts[i];
    const steps = redflag.stepStarts[i + 1] - start;
    const pieces = redflag.pieces(i);
    const holder = make("div", { class: `text${covered ? " covered" : ""}` });
    if (covered) holder.setAttribute("aria-hidden", "true");
    if (rows.given[i]) holder.append(make("span", { class: "given", title: "written by the attacker" }, covered ? redflag.cover(rows.given[i]) : rows.given[i]));
    const spans = [];
    for (let t = 0; t < steps; t++) {
      const p = redflag.probs[(start + t) * flags + k];
      const ends = t >= pieces.length;
      const token = ends ? "⏎" : covered ? redflag.cover(pieces[t]) : pieces[t];
      const span = make("span", { class: ends ? "token end" : "token", "data-step": t, style: `--heat:${heat(p).toFixed(3)}` }, token);
      spans.push(span);
    }
    holder.append(...spans);
    return { holder, spans };
  }

  // Onset and alarm stand before the token whose probability they belong to.
  function place(view) {
    const { i, spans, holder } = view;
    const at = redflag.alarms[i];
    for (const mark of holder.querySelectorAll(".marker")) mark.remove();
    const names = flags > 1 && at >= 0 ? ` ${redflag.flagNames[redflag.alarmFlags[i]]}` : "";
    if (rows.onset[i] >= 0 && spans[rows.onset[i]]) spans[rows.onset[i]].before(make("span", { class: "marker onset" }, "onset"));
    if (at >= 0) spans[at].before(make("span", { class: "marker alarm" }, `alarm${names}`));
    spans.forEach((span, t) => span.classList.toggle("after", at >= 0 && t >= at));
    const outcome = redflag.outcome(i);
    const late = at >= 0 && rows.onset[i] >= 0 ? at - rows.onset[i] : null;
    const words = {
      caught: late === null ? `Caught before token ${at}.` : late < 0 ? `Alarm ${-late} token${late === -1 ? "" : "s"} before the onset (early).`
        : late === 0 ? "Caught at the onset: no harmful token passed." : `Caught ${late} token${late === 1 ? "" : "s"} after the onset.`,
      missed: "Missed: no alarm.", false: `False alarm before token ${at}.`, quiet: "Harmless and quiet.",
    };
    view.said.textContent = words[outcome];
    view.said.className = `said ${outcome}`;
  }

  function curve(i, k) {
    const start = redflag.stepStarts[i];
    const steps = redflag.stepStarts[i + 1] - start;
    const wide = Math.max(280, box.clientWidth - 2);
    const x = (t) => LEFT + ((wide - LEFT - 8) * t) / Math.max(1, steps);
    const low = axis.low, span = axis.high - axis.low;
    const y = (value) => TOP + (HIGH - TOP - BOTTOM) * (1 - (Math.min(axis.to(value), axis.high) - low) / span);
    const svg = make("svg", { class: "curve", viewBox: `0 0 ${wide} ${HIGH}`, role: "img",
      "aria-label": `Score of ${redflag.flagNames[k]} along the response; highest ${redflag.spell(redflag.peaks[i])}` });
    for (const tick of ticks || [0, axis.high / 2, axis.high].map((v) => Math.round(v))) {
      const label = ticks ? (tick > 0.5 ? `${+(100 * tick).toFixed(3)}%` : `${+(100 * tick).toPrecision(1)}%`) : String(tick);
      svg.append(make("line", { class: "grid", x1: LEFT, x2: wide - 8, y1: y(tick), y2: y(tick) }),
        make("text", { x: LEFT - 6, y: y(tick) + 3.5, "text-anchor": "end" }, label));
    }
    const every = Math.max(1, 10 ** Math.floor(Math.log10(Math.max(steps, 1))) / (steps < 30 ? 2 : 1));
    for (let t = 0; t <= steps; t += Math.ceil(every)) svg.append(make("text", { x: x(t), y: HIGH - 6, "text-anchor": "middle" }, String(t)));
    const path = (values) => {
      let d = "";
      for (let t = 0; t < steps; t++) {
        const v = y(values[(start + t) * flags + k]).toFixed(1);
        d += `${t ? "L" : "M"}${x(t).toFixed(1)},${v}L${x(t + 1).toFixed(1)},${v}`;
      }
      return d;
    };
    if (redflag.scores !== redflag.probs && axis.words !== "in nats") svg.append(make("path", { class: "prob", d: path(redflag.probs) }));
    svg.append(make("path", { class: "score", d: path(redflag.scores) }));
    const lines = {};
    for (const name of ["onset", "threshold", "alarm", "cursor"]) svg.append((lines[name] = make("line", { class: name })));
    const set = (line, x1, x2, y1, y2) => Object.entries({ x1, x2, y1, y2 }).forEach(([a, v]) => line.setAttribute(a, v));
    const hide = (line) => line.setAttribute("visibility", "hidden");
    const vertical = (line, t) => {
      line.setAttribute("visibility", t < 0 ? "hidden" : "visible");
      set(line, x(Math.max(t, 0)), x(Math.max(t, 0)), TOP - 6, HIGH - BOTTOM);
    };
    const names = {};
    for (const name of ["onset", "alarm"]) svg.append((names[name] = make("text", { class: `name ${name}`, y: TOP - 2 })));
    const update = () => {
      const value = redflag.thresholds[k];
      if (value === Infinity) hide(lines.threshold);
      else {
        lines.threshold.setAttribute("visibility", "visible");
        set(lines.threshold, LEFT, wide - 8, y(value), y(value));
      }
      for (const [name, t] of [["onset", rows.onset[i]], ["alarm", redflag.alarms[i]]]) {
        vertical(lines[name], t);
        names[name].textContent = t < 0 ? "" : name;
        const flip = name === "onset" ? t < redflag.alarms[i] || redflag.alarms[i] < 0 : t < rows.onset[i];
        names[name].setAttribute("x", x(Math.max(t, 0)) + (flip ? -4 : 4));
        names[name].setAttribute("text-anchor", flip && x(t) > LEFT + 40 ? "end" : "start");
      }
    };
    const cursor = (t) => {
      if (t === null) hide(lines.cursor);
      else vertical(lines.cursor, t + 0.5);
    };
    cursor(null);
    return { svg, update, cursor, step: (px) => Math.floor(((px - LEFT) / (wide - LEFT - 8)) * Math.max(1, steps)), steps, wide };
  }

  function point(view, t) {
    view.spans.forEach((span) => span.classList.remove("pointed"));
    if (t === null || t < 0 || t >= view.drawn.steps) {
      view.drawn.cursor(null);
      view.readout.textContent = "Point at a token or at the curve.";
      return;
    }
    view.spans[t].classList.add("pointed");
    view.drawn.cursor(t);
    const s = (redflag.stepStarts[view.i] + t) * flags;
    const values = redflag.flagNames.map((name, k) => `${flags > 1 ? `${name} ` : ""}${spell(redflag.probs[s + k])}`).join(", ");
    view.readout.textContent = `Before token ${t}: ${values}`;
  }

  redflag.showTrace = (i) => {
    shown = null;
    if (i < 0) {
      box.replaceChildren(make("p", { class: "note" }, "No response fits."));
      return;
    }
    const k = redflag.flag();
    const view = { i, ...text(i, k), said: make("p", {}), readout: make("p", { class: "note readout" }), drawn: curve(i, k) };
    const button = make("button", { type: "button", class: "reveal" }, redflag.isCovered(i) ? "show the text" : "cover the text");
    button.addEventListener("click", () => redflag.reveal(i));
    const cover = rows.covered[i] && !document.getElementById("uncover").checked ? button : null;
    const covered = redflag.isCovered(i) ? make("p", { class: "note" }, "The text of this response is covered.") : null;
    box.replaceChildren(make("header", {}, make("h3", {}, rows.id[i]), ...(cover ? [cover] : [])), view.said, facts(i),
      ...(covered ? [covered] : []), view.holder, view.drawn.svg, view.readout);
    shown = view;
    redflag.updateTrace();
    point(view, null);
    view.holder.addEventListener("pointerover", (event) => {
      const token = event.target.closest(".token");
      if (token) point(view, Number(token.dataset.step));
    });
    view.drawn.svg.addEventListener("pointermove", (event) => {
      const frame = view.drawn.svg.getBoundingClientRect();
      point(view, view.drawn.step(((event.clientX - frame.left) * view.drawn.wide) / frame.width));
    });
    for (const part of [view.holder, view.drawn.svg]) part.addEventListener("pointerleave", () => point(view, null));
  };

  redflag.updateTrace = () => {
    if (!shown) return;
    place(shown);
    shown.drawn.update();
  };

  redflag.reveal = (i) => {
    if (!rows.covered[i]) return;
    if (redflag.uncovered.has(i)) redflag.uncovered.delete(i);
    else redflag.uncovered.add(i);
    redflag.renderList();
    redflag.showTrace(i);
  };
})();
