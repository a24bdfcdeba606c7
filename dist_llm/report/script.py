"""The page's own script: draws the figures in the shown theme and width, sorts the table, toggles layouts, picks a Gantt chart.

It reads its data with JSON.parse from an inert block and never writes HTML.
"""

SCRIPT = """
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const hidden = new Set();
  const theme = getComputedStyle(document.documentElement);

  // Replaces `var(--name)` by the theme's value, in keys that hold colours only.
  function painted(value, key) {
    if (Array.isArray(value)) return value.map((item) => painted(item, key));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, painted(item, name)]));
    }
    const name = key === "color" && typeof value === "string" && value.match(/^var\\((--[a-z0-9-]+)\\)$/);
    return name ? theme.getPropertyValue(name[1]).trim() : value;
  }

  function axis(given) {
    const line = { color: "var(--line)" };
    return {
      automargin: true, gridcolor: line.color, linecolor: line.color, zeroline: false, ...given,
      title: given.title ? { ...given.title, standoff: 8, font: { size: 12, color: "var(--muted)" } } : undefined,
      tickfont: { size: 12, color: "var(--muted)" },
    };
  }

  // The rows of a figure that lists layouts: names left of the plot, or above each row where the page is narrow.
  function rowAxis(figure, narrow) {
    const places = figure.labels.map((_, index) => index);
    const range = [figure.labels.length - 0.5, -0.5 - (narrow ? 0.15 : 0)];
    const common = { ...figure.layout.yaxis, range, fixedrange: true, tickvals: places };
    if (!narrow) return { yaxis: { ...common, ticktext: figure.labels.map((text) => text + " ") } };
    const annotations = figure.labels.map((text, index) => ({
      text, x: 0, xref: "paper", y: index - 0.35, yref: "y", xanchor: "left", yanchor: "bottom", showarrow: false,
      font: { size: 12, color: "var(--ink)" },
    }));
    return { yaxis: { ...common, showticklabels: false, showgrid: false }, annotations };
  }

  function layoutOf(figure, box) {
    const narrow = box.clientWidth < 560;
    const rows = figure.labels ? rowAxis(figure, narrow) : {};
    const layout = { ...figure.layout, ...rows };
    for (const name of Object.keys(layout)) if (/^[xy]axis\\d*$/.test(name)) layout[name] = axis(layout[name]);
    if (figure.labels) layout.height = 84 + figure.labels.length * (narrow ? figure.row + 18 : figure.row);
    if (narrow && layout.hovermode === "x unified") layout.hovermode = "closest";
    const legend = { orientation: "h", x: 0, y: 1, yanchor: "bottom", xanchor: "left", font: { size: 12, color: "var(--ink)" } };
    const family = getComputedStyle(document.body).fontFamily;
    const top = layout.showlegend === false ? 12 : 30;
    return {
      ...layout, width: box.clientWidth, legend: { ...legend, ...layout.legend },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 8, r: 12, t: top, b: 8, pad: 2, ...layout.margin },
      font: { family, size: 12, color: "var(--ink)" },
      hoverlabel: {
        bgcolor: "var(--card)", bordercolor: "var(--line)", font: { family, size: 12, color: "var(--ink)" }, align: "left", namelength: -1,
      },
      uniformtext: { minsize: 8, mode: "hide" },
    };
  }

  // Plotly names some colours of a layout with a prefix: they take part in `painted` under their plain name.
  function themed(layout) {
    const walk = (value, key) => {
      if (Array.isArray(value)) return value.map((item) => walk(item, key));
      if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, walk(v, k)]));
      return key.endsWith("color") ? painted(value, "color") : value;
    };
    return walk(layout, "");
  }

  // Loss curves: the shown ones that coincide become the strands of one striped line, each drawing its own dash of it.
  function stranded(traces) {
    const shown = traces.filter((trace) => !trace.meta || !hidden.has(trace.meta.row));
    const rope = shown.filter((trace) => trace.meta && trace.meta.rope);
    const length = 9;
    return shown.map((trace) => {
      const place = rope.indexOf(trace);
      if (place < 0 || rope.length < 2) return trace;
      const dash = [0, place * length, length, (rope.length - 1 - place) * length].map((part) => part + "px").join(",");
      return { ...trace, line: { ...trace.line, width: 3, dash } };
    });
  }

  function draw(box) {
    let figure = figures[box.dataset.figure];
    if (box.dataset.figure === "spans") {
      const [, caption, chosen] = figure[document.getElementById("pick").value];
      document.getElementById("caption").textContent = caption;
      figure = chosen;
    }
    Plotly.react(box, stranded(themed(figure.data)), themed(layoutOf(figure, box)), { displayModeBar: false, doubleClick: "reset" });
  }

  const boxes = [...document.querySelectorAll(".figure")];
  const drawAll = () => boxes.forEach(draw);
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 120); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();

  const pick = document.getElementById("pick");
  if (pick) pick.addEventListener("change", () => boxes.filter((box) => box.dataset.figure === "spans").forEach(draw));

  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const row = Number(chip.dataset.row);
      if (!hidden.delete(row)) hidden.add(row);
      chip.setAttribute("aria-pressed", String(!hidden.has(row)));
      boxes.filter((box) => ["proof", "losses"].includes(box.dataset.figure)).forEach(draw);
    });
  }

  const keyOf = (row, column) => {
    const cell = row.cells[column];
    if (!cell || cell.dataset.value === undefined || cell.dataset.value === "") return null;
    const value = Number(cell.dataset.value);
    return Number.isNaN(value) ? cell.dataset.value : value;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = [...body.rows].map((row) => [keyOf(row, column), row]);
      keyed.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : down ? compare(b, a) : compare(a, b)));
      body.append(...keyed.map(([, row]) => row));
    }));
  }
})();
"""
