// Draws the graphs of a console page with Prometheus' own library for them, and keeps graphs and figures fresh.
"use strict";

const REFRESH_MS = 5000;
const INSTANCE = new URLSearchParams(location.search).get("instance") || ".*";

const { humanize, humanize1024 } = PromConsole.NumberFormatter;
const WRITTEN = {
  short: humanize,
  s: (value) => `${humanize(value)}s`,
  percentunit: (value) => `${humanize(value * 100)}%`,
  ops: (value) => `${humanize(value)}/s`,
  reqps: (value) => `${humanize(value)}/s`,
  bytes: (value) => `${humanize1024(value)}B`,
  Bps: (value) => `${humanize1024(value)}B/s`,
};

/** The name of a series, as `{{label}}, half` says; the template makes the same of it. */
const named = (legend) => (labels) => legend.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, label) => labels[label] ?? "");

/** Gives each name below a graph the colour of its line. */
function paint(graph) {
  const colours = new Map(graph.rickshawGraph?.series.map((series) => [series.name, series.color]));
  for (const name of graph.params.node.parentElement.querySelectorAll("th")) {
    name.style.borderColor = colours.get(graph._escapeHTML(name.textContent)) ?? "transparent";
  }
}

const render = PromConsole.Graph.prototype._render;
PromConsole.Graph.prototype._render = function (data) {
  render.call(this, data);
  // The highest line would lie on the edge.
  this.rickshawGraph?.configure({ padding: { top: 0.08 } });
  this.rickshawGraph?.update();
  paint(this);
};

const duration = document.getElementById("duration");

const graphs = [...document.querySelectorAll(".graph")].map((node) => {
  const { unit, stacked, series } = JSON.parse(node.dataset.panel);
  return new PromConsole.Graph({
    node,
    expr: series.map(({ expression }) => expression.replaceAll("$instance", INSTANCE)),
    name: series.map(({ name }) => named(name)),
    renderer: stacked ? "area" : "line",
    height: 150,
    min: 0,
    xTitle: "",
    duration: Number(duration.value),
    // The hours stand where nought would.
    yAxisFormatter: (value) => (value === 0 ? "" : WRITTEN[unit](value)),
    yHoverFormatter: WRITTEN[unit],
  });
});

function redraw() {
  for (const graph of graphs) {
    graph.params.duration = Number(duration.value);
    graph.params.endTime = Date.now() / 1000;
    graph.dispatch();
  }
}

/** Figures are Prometheus' answers in the page: they are taken out of the page as it is now. */
async function look() {
  const answer = await fetch(location.href);
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.querySelectorAll("[data-live]");
  document.querySelectorAll("[data-live]").forEach((old, index) => old.replaceChildren(...fresh[index].childNodes));
  redraw();
}

duration.addEventListener("change", redraw);
setInterval(() => {
  // One that lies under a pointer stays as it is: somebody reads it. Nobody reads a page that is hidden.
  if (!document.hidden && !document.querySelector(".graph:hover")) look().catch(console.error);
}, REFRESH_MS);
