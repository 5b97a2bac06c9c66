"use strict";
// Draws the figures from the numbers in the page, and keeps them in step with its controls.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const data = read("report-data");
  const charts = read("report-charts");
  const views = new Map(); // by name of a chart
  const state = { shown: new Set(data.runs.map((run) => run.id)), run: 0, layer: 0 };

  // a table of columns as rows
  const expanded = {};
  function rows(table) {
    if (!(table in expanded)) {
      const columns = Object.entries(data[table]);
      expanded[table] = columns[0][1].map((_, i) => {
        const row = Object.fromEntries(columns.map(([name, values]) => [name, values[i]]));
        row.label = data.runs[row.run].label;
        if ("layer" in row) row.name = data.layers_named[row.layer];
        return row;
      });
    }
    return expanded[table];
  }

  function chosen(chart) {
    const all = chart.tables[0] === "runs" ? data.runs.map((run) => ({ ...run, run: run.id })) : chart.tables.flatMap(rows);
    return all
      .filter((row) => chart.run === null || row.run === chart.run)
      .filter((row) => chart.side === null || row.side === chart.side)
      .filter((row) => chart.needs.some((name) => (row[name] ?? null) !== null))
      .filter((row) => (chart.scope === "one" ? row.run === state.run : state.shown.has(row.run)))
      .filter((row) => chart.scope === "all" || row.layer === state.layer);
  }

  function colored(spec) {
    if (Array.isArray(spec)) return spec.map(colored);
    if (spec === null || typeof spec !== "object") return spec;
    const copy = Object.fromEntries(Object.entries(spec).map(([key, part]) => [key, colored(part)]));
    if (copy.field === "run" && copy.scale) {
      copy.scale = { domain: data.runs.map((run) => run.id), range: data.runs.map((run) => `var(--run-${run.id})`) };
    }
    return copy;
  }

  function filled(text) {
    return text.replaceAll("{layer}", data.layers_named[state.layer]).replaceAll("{run}", data.runs[state.run].label);
  }

  async function draw(chart) {
    const box = document.querySelector(`[data-chart="${chart.name}"]`);
    const values = chosen(chart);
    const note = box.parentElement.querySelector(".note");
    box.hidden = values.length === 0;
    note.hidden = values.length > 0;
    box.parentElement.querySelector("figcaption").hidden = values.length === 0;
    const alt = filled(chart.alt);
    if (!values.length) {
      const own = chart.scope === "one" ? data.runs[state.run].notes[chart.note] : null;
      note.textContent = own || "Nothing to show for this choice of networks and layer.";
      return;
    }
    box.setAttribute("aria-label", alt);
    const view = views.get(chart.name);
    if (view) {
      await view.data("rows", values).runAsync();
      return;
    }
    const spec = { ...colored(chart.spec), description: alt, data: { name: "rows" }, datasets: { rows: values } };
    const options = { actions: false, renderer: "svg", tooltip: { theme: "custom" } };
    views.set(chart.name, (await vegaEmbed(box, spec, options)).view);
  }

  let last = Promise.resolve();
  function drawAll(scopes) {
    last = last.then(async () => {
      for (const chart of charts) if (scopes.includes(chart.scope)) await draw(chart);
      document.documentElement.dataset.drawn = String(Number(document.documentElement.dataset.drawn || 0) + 1);
    });
  }

  function showTables() {
    for (const table of document.querySelectorAll("[data-of-run]")) table.hidden = Number(table.dataset.ofRun) !== state.run;
    for (const select of document.querySelectorAll('[data-select="run"]')) select.value = String(state.run);
    for (const place of document.querySelectorAll("[data-chosen]")) place.textContent = filled("{layer}, {run}");
  }

  function offerLayers() {
    const select = document.querySelector('[data-select="layer"]');
    const own = rows("layers").filter((row) => row.run === state.run);
    if (!own.some((row) => row.layer === state.layer)) state.layer = own[0].layer;
    select.replaceChildren(...own.map((row) => new Option(row.name, row.layer, false, row.layer === state.layer)));
  }

  function sort(button) {
    const head = button.closest("th");
    const body = button.closest("table").tBodies[0];
    const rising = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = (row) => {
      const text = row.cells[head.cellIndex].dataset.value;
      return text === "" ? -Infinity : head.classList.contains("text") ? text : Number(text);
    };
    const sorted = [...body.rows].sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (rising ? 1 : -1));
    body.append(...sorted);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("thead button");
    if (button) sort(button);
  });
  document.addEventListener("change", (event) => {
    const control = event.target;
    if (control.dataset.show !== undefined) {
      const run = Number(control.dataset.show);
      if (control.checked) state.shown.add(run);
      else state.shown.delete(run);
      drawAll(["all", "layer"]);
    } else if (control.dataset.select) {
      state[control.dataset.select] = Number(control.value);
      offerLayers();
      showTables();
      drawAll(["layer", "one"]);
    }
  });

  const quantized = rows("layers").find((row) => row.weight_alpha !== null) || rows("layers")[0];
  state.run = quantized.run;
  state.layer = quantized.layer;
  offerLayers();
  showTables();
  drawAll(["all", "layer", "one"]);
})();
