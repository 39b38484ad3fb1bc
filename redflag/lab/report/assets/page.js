"use strict";
// Shared by the scripts of the page; and the switch between light, dark and the system's colours.
const redflag = {};

(() => {
  const names = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  let chosen = "auto";
  try {
    chosen = localStorage.getItem("redflag-theme") || "auto";
  } catch {
    // A file opened from disk may have no storage: the choice then lasts as long as the page.
  }

  function show() {
    if (!names.includes(chosen)) chosen = "auto";
    if (chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    button.querySelector("span").textContent = chosen;
    button.setAttribute("aria-label", `Colours: ${chosen === "auto" ? "as the system" : chosen}`);
  }

  button.addEventListener("click", () => {
    chosen = names[(names.indexOf(chosen) + 1) % names.length];
    try {
      localStorage.setItem("redflag-theme", chosen);
    } catch {
      // As above.
    }
    show();
  });
  show();

  // An element with attributes and children; text only ever becomes text.
  redflag.make = (tag, attributes = {}, ...children) => {
    const svg = ["svg", "g", "path", "line", "rect", "circle", "text", "title"].includes(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  };
})();
