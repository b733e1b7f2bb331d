// Draws the figures of a page from the data beside them, in the colours of the reader's light or dark screen.
"use strict";

const dark = window.matchMedia("(prefers-color-scheme: dark)");

// The palette for white paper is too dark for words on a dark screen.
const LIGHTER = { "#0072B2": "#56A8E8", "#D55E00": "#FF8F47", "#009E73": "#2CC79A", "#CC79A7": "#E29BC4", "#7a828c": "#9aa5b1" };

function repainted(text, isDark) {
  return isDark ? Object.entries(LIGHTER).reduce((held, [from, to]) => held.replaceAll(from, to), text) : text;
}

function coloured(layout, isDark) {
  const ink = isDark ? "#dfe3e8" : "#24292f";
  return { ...layout, font: { ...layout.font, color: ink }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
}

function draw(isDark) {
  for (const holder of document.querySelectorAll("div.figure")) {
    const figure = JSON.parse(repainted(holder.querySelector("script").textContent, isDark));
    const plot = holder.querySelector("div.plot") || holder.appendChild(Object.assign(document.createElement("div"), { className: "plot" }));
    const layout = coloured(figure.layout || {}, isDark);
    delete layout.width;
    layout.autosize = true;
    const config = { ...figure.config, responsive: true, displaylogo: false, displayModeBar: false };
    Plotly.react(plot, figure.data, layout, config);
  }
}

function everyDetail(open) {
  for (const element of document.querySelectorAll("details.source")) element.open = open;
}

document.addEventListener("DOMContentLoaded", () => {
  if (window.Plotly) {
    draw(dark.matches);
    dark.addEventListener("change", (event) => draw(event.matches));
    // Paper is white whatever the screen is.
    window.addEventListener("beforeprint", () => draw(false));
    window.addEventListener("afterprint", () => draw(dark.matches));
  }
  const toggle = document.getElementById("all-code");
  if (toggle) toggle.addEventListener("change", () => everyDetail(toggle.checked));
});
