"use strict";
(() => {
  const page = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const DASHES = ["solid", "dot", "dashdot", "dash", "longdash"];
  const colour = (name) => getComputedStyle(page).getPropertyValue(name).trim();

  // A mean over a thirtieth of the curve to each side, drawn over the curve itself.
  const smooth = (values) => {
    const reach = Math.floor(values.length / 30);
    return values.map((_, at) => {
      const near = values.slice(Math.max(0, at - reach), at + reach + 1).filter((value) => value !== null);
      return near.length ? near.reduce((sum, value) => sum + value, 0) / near.length : null;
    });
  };

  const translucent = (hex, alpha) => {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  };

  const traces = (chart) => chart.lines.flatMap((line) => {
    const byRun = data.runs > 1;
    const shade = colour(`--c${(byRun ? line.run : line.kind + (line.held_out ? chart.kinds : 0)) % 7}`);
    const dash = line.held_out ? "dash" : byRun ? DASHES[line.kind % DASHES.length] : "solid";
    const base = { x: line.x, y: line.y, name: line.label, hoverinfo: "x+y+name" };
    if (chart.shape === "histogram") {
      const isStart = line.kind === 0;
      return [{ ...base, mode: "lines", fill: isStart && byRun ? "none" : "tozeroy", fillcolor: translucent(shade, 0.18),
        line: { color: shade, width: 2, shape: "hvh", dash: isStart && byRun ? "dot" : "solid" } }];
    }
    const bands = [];
    if (line.low && line.high) {
      const edge = { x: line.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
      bands.push({ ...edge, y: line.low }, { ...edge, y: line.high, fill: "tonexty", fillcolor: translucent(shade, 0.15) });
    }
    if (line.held_out) {
      const named = { ...base, showlegend: !byRun };  // of several runs the colour tells
      return [...bands, { ...named, mode: "lines+markers", line: { color: shade, width: 2, dash }, marker: { size: 7 } }];
    }
    if (line.x.length < 60 || !chart.noisy) {
      const mode = line.x.length < 12 ? "lines+markers" : "lines";
      return [{ ...base, mode, line: { color: shade, width: 2, dash }, marker: { size: 5 } }];
    }
    return [
      { ...base, mode: "lines", line: { color: translucent(shade, 0.28), width: 1 }, hoverinfo: "skip", showlegend: false },
      { ...base, y: smooth(line.y), mode: "lines", line: { color: shade, width: 2.2, dash } },
    ];
  });

  const named = (chart) => chart.lines.filter((line) => data.runs === 1 || !line.held_out).length;

  const layout = (chart, narrow) => {
    const axis = { gridcolor: colour("--grid"), zerolinecolor: colour("--line"), automargin: true, fixedrange: narrow };
    const many = named(chart) > 1;
    return {
      margin: { l: 8, r: 12, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--text"), size: 12, family: getComputedStyle(document.body).fontFamily },
      xaxis: { ...axis, title: { text: chart.x, standoff: 6 } },
      yaxis: { ...axis, type: chart.log ? "log" : "linear", ...(chart.shape === "histogram" ? { rangemode: "tozero" } : {}) },
      showlegend: many,
      legend: { orientation: "h", traceorder: "normal", x: 0, y: 1.02, yanchor: "bottom" },
      hovermode: "x unified",
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    };
  };

  const draw = () => {
    const narrow = window.innerWidth < 640;
    for (const box of document.querySelectorAll("[data-chart]")) {
      const chart = data.charts[box.dataset.chart];
      box.style.height = `${(narrow ? 250 : 280) + (narrow ? 20 : 8) * Math.max(0, named(chart) - 1)}px`;  // the legend's
      Plotly.react(box, traces(chart), layout(chart, narrow), { responsive: true, displayModeBar: false });
    }
  };

  // Texts that are taller than their boxes fade out at the bottom, and can be scrolled by keyboard.
  const markEnd = (box) => box.classList.toggle("end", box.scrollTop + box.clientHeight >= box.scrollHeight - 2);
  const markCut = () => {
    for (const box of document.querySelectorAll(".tokens, .prompt")) {
      const cut = box.scrollHeight > box.clientHeight + 1;
      box.classList.toggle("cut", cut);
      if (cut) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
      markEnd(box);
    }
  };
  window.addEventListener("resize", markCut);
  document.addEventListener("toggle", markCut, true);
  document.addEventListener("scroll", ({ target }) => target !== document && markEnd(target), true);
  markCut();

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const isDark = () => (page.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.setAttribute("aria-pressed", String(isDark()));
    draw();
  };
  button.addEventListener("click", () => {
    page.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  dark.addEventListener("change", show);
  button.hidden = false;
  show();
  page.dataset.drawn = "yes";
})();
