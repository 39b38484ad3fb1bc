"use strict";
// Draws the charts: Vega-Lite, as SVG, with colours that are the page's own and so follow its theme.
(() => {
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const font = getComputedStyle(document.body).fontFamily;
  const config = {
    background: null,
    font,
    padding: 2,
    view: { stroke: null },
    axis: {
      labelColor: "var(--quiet)", titleColor: "var(--quiet)", gridColor: "var(--grid)", domainColor: "var(--grid)",
      tickColor: "var(--grid)", titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11, titlePadding: 8,
      labelPadding: 5, tickSize: 4,
    },
    axisY: { titleAngle: 0, titleAlign: "left", titleAnchor: "end", titleY: -12, titleX: 0, tickCount: 5 },
    legend: {
      labelColor: "var(--ink)", orient: "bottom", direction: "horizontal", labelFontSize: 12, symbolSize: 80,
      columns: 4, labelLimit: 180, unselectedOpacity: 0.8, offset: 10, symbolStrokeWidth: 2,
    },
  };

  function draw(figure) {
    const chart = charts[figure.dataset.chart];
    const plot = figure.querySelector(".plot");
    const views = figure.querySelector(".views");
    let drawn = null;

    async function show(i) {
      const view = chart.views[i];
      figure.querySelector(".note").textContent = view.caption;
      for (const [j, button] of [...views.querySelectorAll("button")].entries()) {
        button.setAttribute("aria-pressed", String(i === j));
      }
      const narrow = plot.clientWidth < 520;
      const spec = {
        $schema: "https://vega.github.io/schema/vega-lite/v6.json",
        width: "container",
        autosize: { type: "fit-x", contains: "padding" },
        data: { values: structuredClone(chart.data) },
        config: { ...config, axisY: { ...config.axisY, labelLimit: narrow ? 120 : 280 }, legend: { ...config.legend, columns: narrow ? 2 : 4 } },
        ...structuredClone(view.spec),
      };
      if (drawn) drawn.finalize();
      // `ast` evaluates expressions without eval, which the page's security policy forbids.
      drawn = await vegaEmbed(plot, spec, { actions: false, renderer: "svg", ast: true, mode: "vega-lite" });
      figure.dataset.drawn = view.label;
    }

    if (chart.views.map((view) => view.label).join("").length > 48) {
      const choice = redflag.make("select", { "aria-label": "What to show" });
      chart.views.forEach((view, i) => choice.append(redflag.make("option", { value: i }, view.label)));
      choice.addEventListener("change", () => show(Number(choice.value)));
      views.append(choice);
    } else if (chart.views.length > 1) {
      chart.views.forEach((view, i) => {
        const button = redflag.make("button", { type: "button", "aria-pressed": "false" }, view.label);
        button.addEventListener("click", () => show(i));
        views.append(button);
      });
    }
    return show(0);
  }

  redflag.drawn = Promise.all([...document.querySelectorAll("figure.chart")].map(draw));
})();
