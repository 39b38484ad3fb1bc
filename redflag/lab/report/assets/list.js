"use strict";
// The list of responses: only the rows in sight exist, so that thousands scroll smoothly.
(() => {
  if (!redflag.rows) return;
  const { make, rows, axis } = redflag;
  const HEIGHT = 58;
  const box = document.getElementById("list");
  const spacer = document.getElementById("spacer");
  const words = { caught: "caught", missed: "missed", false: "false alarm", quiet: "quiet" };
  const glyphs = { caught: "●", missed: "○", false: "▲", quiet: "·" };
  let order = [];
  let current = -1;
  let waiting = false;
  const cache = new Map();

  // Letters in place of letters: neither the eye, nor copying, nor the browser's search finds what is covered.
  redflag.cover = (text) => {
    let seed = text.length;
    return text.replace(/[\p{L}\p{N}]/gu, () => {
      seed = (seed * 31 + 7) % 9973;
      return "aenorstilucmd"[seed % 13];
    });
  };
  redflag.uncovered = new Set();
  redflag.isCovered = (i) =>
    rows.covered[i] && !document.getElementById("uncover").checked && !redflag.uncovered.has(i);

  function delay(i) {
    const at = redflag.alarms[i];
    if (at < 0 || rows.onset[i] < 0) return "";
    const late = at - rows.onset[i];
    return late < 0 ? `${-late} early` : `+${late}`;
  }
  redflag.delay = delay;

  // The course of the score in a few pixels.
  function sparkline(i) {
    if (cache.has(i)) return cache.get(i);
    const start = redflag.stepStarts[i];
    const steps = redflag.stepStarts[i + 1] - start;
    let path = "";
    for (let x = 0; x < 60 && steps; x++) {
      let high = 0;
      const from = Math.floor((x * steps) / 60);
      const to = Math.max(from + 1, Math.floor(((x + 1) * steps) / 60));
      for (let s = from; s < to; s++) {
        for (let k = 0; k < redflag.flags; k++) high = Math.max(high, redflag.scores[(start + s) * redflag.flags + k]);
      }
      const y = 18 - (17 * (axis.to(high) - axis.low)) / (axis.high - axis.low);
      path += `${x ? "L" : "M"}${x},${y.toFixed(1)}`;
    }
    cache.set(i, path);
    return path;
  }

  function row(place) {
    const i = order[place];
    const outcome = redflag.outcome(i);
    const covered = redflag.isCovered(i);
    const text = redflag.pieces(i).slice(0, 40).join("").replace(/\s+/g, " ").trim();
    const snippet = covered
      ? make("span", { class: "snippet covered", "aria-hidden": "true" }, redflag.cover(text))
      : make("span", { class: "snippet" }, text);
    const line = axis.to(Math.min(...redflag.thresholds.map((t) => Math.min(t, 1e300))));
    const y = 18 - (17 * (Math.min(line, axis.high) - axis.low)) / (axis.high - axis.low);
    const spark = make("svg", { viewBox: "0 0 60 19", class: "spark", "aria-hidden": "true" },
      make("line", { x1: 0, x2: 60, y1: y, y2: y }), make("path", { d: sparkline(i) }));
    return make("div", {
      class: `response ${outcome}`, role: "option", id: `response-${i}`, "data-place": place, "data-response": i,
      "aria-selected": String(i === current), "aria-setsize": order.length, "aria-posinset": place + 1,
      style: `top:${place * HEIGHT}px`,
    },
    make("span", { class: "head" },
      make("span", { class: "outcome" }, `${glyphs[outcome]} ${words[outcome]}`),
      make("span", { class: "delay" }, delay(i)), spark),
    snippet,
    make("span", { class: "from" }, [redflag.name("set", i) === "rows" ? null : redflag.name("set", i),
      redflag.name("source", i), redflag.name("category", i), rows.id[i]].filter(Boolean).join(" · ")));
  }

  function render() {
    waiting = false;
    const first = Math.max(0, Math.floor(box.scrollTop / HEIGHT) - 3);
    const last = Math.min(order.length, Math.ceil((box.scrollTop + box.clientHeight) / HEIGHT) + 3);
    const shown = [];
    for (let place = first; place < last; place++) shown.push(row(place));
    spacer.replaceChildren(...shown);
  }

  redflag.renderList = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(render);
  };

  // Shows these responses, in this order.
  redflag.showList = (chosen) => {
    order = chosen;
    spacer.style.height = `${order.length * HEIGHT}px`;
    document.getElementById("shown").textContent =
      `${order.length.toLocaleString("en")} of ${redflag.size.toLocaleString("en")} responses`;
    redflag.renderList();
  };

  redflag.select = (i, scroll = true) => {
    current = i;
    const place = order.indexOf(i);
    if (scroll && place >= 0) {
      const top = place * HEIGHT;
      if (top < box.scrollTop) box.scrollTop = top;
      else if (top + HEIGHT > box.scrollTop + box.clientHeight) box.scrollTop = top + HEIGHT - box.clientHeight;
    }
    box.setAttribute("aria-activedescendant", `response-${i}`);
    redflag.renderList();
    redflag.showTrace(i);
  };
  redflag.current = () => current;

  redflag.step = (by) => {
    if (!order.length) return;
    const place = order.indexOf(current);
    redflag.select(order[Math.min(order.length - 1, Math.max(0, place < 0 ? 0 : place + by))]);
  };

  box.addEventListener("scroll", redflag.renderList, { passive: true });
  box.addEventListener("click", (event) => {
    const found = event.target.closest(".response");
    if (found) redflag.select(Number(found.dataset.response), false);
  });
  box.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(box.clientHeight / HEIGHT) - 1);
    const by = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 }[event.key];
    if (by === undefined || event.metaKey || event.ctrlKey || event.altKey) return;
    event.preventDefault();
    redflag.step(by);
  });
})();
