"use strict";
// The controls: threshold, filters, search, keys.
(() => {
  if (!redflag.rows) return;
  const { make, rows, axis, size } = redflag;
  const get = (id) => document.getElementById(id);
  const slider = get("threshold"), exact = get("exact"), flag = get("flag"), search = get("search");
  const everything = Array.from({ length: size }, (_, i) => i);
  const texts = [];
  let sieved = everything;

  redflag.flag = () => Number(flag.value || 0);
  redflag.flagNames.forEach((name, k) => flag.append(make("option", { value: k }, name)));
  get("flag-label").hidden = redflag.flags < 2;
  get("to-force").disabled = !redflag.inForce;
  get("to-force").title = redflag.inForce ? "Back to the thresholds in force" : "No threshold was set";
  for (const column of ["set", "source"]) {
    const choice = get(`by-${column}`);
    choice.append(make("option", { value: "" }, "all"));
    redflag.names[column].forEach((name, value) => choice.append(make("option", { value }, name)));
    choice.closest("label").hidden = redflag.names[column].length < 2;
  }
  Object.assign(slider, { min: axis.low, max: axis.high, step: (axis.high - axis.low) / 2000 });

  function textOf(i) {
    texts[i] ??= [rows.id[i], redflag.name("category", i), redflag.name("source", i), rows.given[i], redflag.pieces(i).join("")]
      .filter(Boolean).join("\n").toLowerCase();
    return texts[i];
  }

  function early(i) {
    return rows.harmful[i] && rows.onset[i] >= 0 && redflag.alarms[i] >= 0 && redflag.alarms[i] < rows.onset[i];
  }

  // Whatever does not depend on the threshold.
  function sieve() {
    const set = get("by-set").value, source = get("by-source").value, kind = get("by-kind").value;
    const wanted = search.value.trim().toLowerCase();
    sieved = everything.filter((i) =>
      (set === "" || rows.set[i] === Number(set)) && (source === "" || rows.source[i] === Number(source)) &&
      (kind === "" || Boolean(rows.harmful[i]) === (kind === "harmful")) && (wanted === "" || textOf(i).includes(wanted)));
    refresh(true);
  }

  function ordered(chosen) {
    const late = (i) => (redflag.alarms[i] >= 0 && rows.onset[i] >= 0 ? redflag.alarms[i] - rows.onset[i] : -Infinity);
    const by = { peak: (a, b) => redflag.peaks[b] - redflag.peaks[a], low: (a, b) => redflag.peaks[a] - redflag.peaks[b],
      delay: (a, b) => (late(b) === late(a) ? 0 : late(b) - late(a)) }[get("order").value];
    return by ? [...chosen].sort(by) : chosen;
  }

  function tally(chosen, title) {
    const found = redflag.count(chosen);
    const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}% of ${whole.toLocaleString("en")}` : "none");
    const harmful = found.caught + found.missed, harmless = found.false + found.quiet;
    const one = (name, words, part, whole) => make("td", { "data-count": name, class: name },
      make("b", {}, part.toLocaleString("en")), make("small", {}, share(part, whole)));
    return make("tr", {}, make("th", { scope: "row" }, title), one("caught", "caught", found.caught, harmful),
      one("missed", "missed", found.missed, harmful), one("false", "false alarms", found.false, harmless),
      one("quiet", "quiet", found.quiet, harmless));
  }

  function refresh(moved = false) {
    const want = get("by-outcome").value;
    const chosen = ordered(sieved.filter((i) => want === "" || (want === "early" ? early(i) : redflag.outcome(i) === want)));
    const head = make("tr", {}, make("td"), ...["caught", "missed", "false alarms", "quiet"].map((name) => make("th", { scope: "col" }, name)));
    const body = [tally(everything, "all in this file")];
    if (sieved.length < size) body.push(tally(sieved, "of these filters"));
    get("counts").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
    redflag.showList(chosen);
    // The response in view stays while the threshold moves, even if it no longer fits.
    if (moved && !chosen.includes(redflag.current())) redflag.select(chosen.length ? chosen[0] : -1);
    else redflag.updateTrace();
  }

  function spell() {
    const value = redflag.thresholds[redflag.flag()];
    slider.value = value === Infinity ? axis.high : axis.to(value);
    if (document.activeElement !== exact) exact.value = value === Infinity ? "" : Number(value.toPrecision(8));
    slider.setAttribute("aria-valuetext", redflag.spell(value));
    get("scale").textContent = `${redflag.spell(value)}, ${axis.words}`;
    const force = redflag.inForce && redflag.inForce.every((v, k) => v === redflag.thresholds[k]);
    get("to-force").setAttribute("aria-pressed", String(Boolean(force)));
  }

  // Moves the chosen flag's threshold; the others stay where they are.
  redflag.setThreshold = (value) => {
    redflag.thresholds[redflag.flag()] = value;
    judged();
  };

  function judged() {
    redflag.judge();
    spell();
    refresh();
  }

  let waiting = false;
  slider.addEventListener("input", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      redflag.setThreshold(axis.from(Number(slider.value)));
    });
  });
  exact.addEventListener("input", () => {
    if (exact.value !== "" && Number.isFinite(exact.valueAsNumber)) redflag.setThreshold(exact.valueAsNumber);
  });
  exact.addEventListener("blur", spell);
  function back() {
    if (!redflag.inForce) return;
    redflag.inForce.forEach((value, k) => (redflag.thresholds[k] = value));
    judged();
  }
  get("to-force").addEventListener("click", back);
  flag.addEventListener("change", () => {
    spell();
    redflag.showTrace(redflag.current());
  });
  for (const id of ["by-set", "by-source", "by-kind"]) get(id).addEventListener("change", sieve);
  for (const id of ["by-outcome", "order"]) get(id).addEventListener("change", () => refresh(true));
  search.addEventListener("input", sieve);
  get("uncover").addEventListener("change", () => {
    if (!get("uncover").checked) redflag.uncovered.clear();
    redflag.renderList();
    redflag.showTrace(redflag.current());
  });
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (width === window.innerWidth) return;
    width = window.innerWidth;
    redflag.renderList();
    redflag.showTrace(redflag.current());
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea") || event.metaKey || event.ctrlKey || event.altKey) return;
    const value = redflag.thresholds[redflag.flag()];
    const at = value === Infinity ? axis.high : axis.to(value);
    const nudge = (by) => redflag.setThreshold(axis.from(Math.min(axis.high, Math.max(axis.low, at + by * (axis.high - axis.low) / 100))));
    const keys = { "/": () => search.focus(), r: () => redflag.reveal(redflag.current()), "[": () => nudge(-1), "]": () => nudge(1), 0: back };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });

  spell();
  sieve();
})();
