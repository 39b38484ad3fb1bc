"use strict";
// Shared by the scripts of the page: elements, keys, requests, and the switch between light, dark and the system's colours.
const playground = {};

(() => {
  const get = (id) => document.getElementById(id);

  // An element with attributes and children. Text only ever becomes text: nothing here makes markup of a string.
  const SVG = ["svg", "g", "path", "line", "circle", "text"];
  function make(tag, attributes = {}, ...children) {
    const svg = SVG.includes(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  const say = (words) => (get("status").textContent = words);

  // Keys live in these two variables and in nothing that outlives the page.
  const keys = { operator: "", api: "" };
  let asking = null;

  // Asks for the key that an answer says is missing; false where the reader gives none.
  function askForKeys(error) {
    asking ??= new Promise((done) => {
      const dialog = get("keys");
      const api = error.code === "invalid_api_key";
      get("keys-why").textContent = error.message;
      get("api-label").hidden = !api && !keys.api;
      get("operator-label").hidden = api && !keys.operator;
      dialog.returnValue = "";
      dialog.addEventListener("close", () => {
        for (const name of ["operator", "api"]) keys[name] = get(name).value.trim();
        asking = null;
        done(dialog.returnValue === "ok" && Boolean(api ? keys.api : keys.operator));
      }, { once: true });
      dialog.showModal();
      get(api ? "api" : "operator").focus();
    });
    return asking;
  }

  const NEEDS_KEY = ["invalid_api_key", "operator_key_required", "invalid_operator_key"];

  // fetch with the keys; raises an Error in the server's words, with its code. The operator's key goes to his routes alone.
  async function request(path, options = {}) {
    for (;;) {
      const headers = { ...options.headers };
      if (keys.api) headers.authorization = `Bearer ${keys.api}`;
      if (keys.operator && path.startsWith("/playground/")) headers["x-redflag-operator"] = keys.operator;
      const response = await fetch(path, { ...options, headers, credentials: "omit" });
      if (response.ok) return response;
      let body = {};
      try {
        body = await response.json();
      } catch {
        // A proxy's page: its status says enough.
      }
      const { message = `HTTP ${response.status}`, code = "" } = body.error ?? {};
      if (NEEDS_KEY.includes(code) && (await askForKeys({ message, code }))) continue;
      throw Object.assign(new Error(message), { code, response, body });
    }
  }

  // The lines of an answer, as they come.
  async function* lines(response) {
    const decoder = new TextDecoder();
    const reader = response.body.getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      rest += decoder.decode(value ?? new Uint8Array(), { stream: !done });
      const whole = rest.split("\n");
      rest = whole.pop();
      yield* whole;
      if (done) break;
    }
    if (rest) yield rest;
  }

  // At most one call per frame, of what a stream changes many times.
  function perFrame(work) {
    let waiting = false;
    return () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        work();
      });
    };
  }

  const themes = ["auto", "light", "dark"];
  let theme = 0;
  get("theme").addEventListener("click", () => {
    theme = (theme + 1) % themes.length;
    if (theme === 0) delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = themes[theme];
    get("theme").querySelector("span").textContent = themes[theme];
    get("theme").setAttribute("aria-label", `Colours: ${theme === 0 ? "as the system" : themes[theme]}`);
  });

  Object.assign(playground, { get, make, say, request, lines, perFrame });
})();
