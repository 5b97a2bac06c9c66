"use strict";
// Draws the figures from the numbers in the page, and keeps them in step with its controls.
(async () => {
  const text = (id) => document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(text("report-data")), (letter) => letter.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = await new Response(plain).json();
  const charts = JSON.parse(text("report-charts"));
  const views = new Map(); // by name of a chart
  const state = { shown: new Set(data.runs.map((run) => run.id)), run: 0, layer: 0 };

  // a table of columns as rows: those of a run and a layer, or of all
  function rows(table, run = null, layer = null) {
    const columns = Object.entries(data[table]);
    const found = [];
    for (let i = 0; i < columns[0][1].length; i++) {
      if ((run !== null && data[table].run[i] !== run) || (layer !== null && data[table].layer[i] !== layer)) continue;
      const row = Object.fromEntries(columns.map(([name, values]) => [name, values[i]]));
      row.label = data.runs[row.run].label;
      if ("layer" in row) row.name = data.layers_named[row.layer];
      found.push(row);
    }
    return found;
  }

  function chosen(chart) {
    const run = chart.scope === "one" ? state.run : chart.run;
    const layer = chart.scope === "all" ? null : state.layer;
    const all = chart.tables[0] === "runs" ? data.runs.map((of) => ({ ...of, run: of.id })) : chart.tables.flatMap((table) => rows(table, run, layer));
    return all
      .filter((row) => chart.side === null || row.side === chart.side)
      .filter((row) => chart.needs.some((name) => (row[name] ?? null) !== null))
      .filter((row) => chart.scope === "one" || state.shown.has(row.run));
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
    const own = rows("layers", state.run);
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

  // keys do what the mouse does, in the middle of the figure
  function zoom(chart, key) {
    const ground = chart.querySelector("svg path.background");
    const box = ground.getBoundingClientRect();
    const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
    const at = (dx, dy) => ({ bubbles: true, cancelable: true, view: window, clientX: x + dx, clientY: y + dy, pointerType: "mouse" });
    const turns = { "+": -120, "=": -120, "-": 120 };
    const moves = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    if (key in turns) {
      ground.dispatchEvent(new WheelEvent("wheel", { ...at(0, 0), shiftKey: true, deltaY: turns[key] }));
    } else if (key in moves) {
      const [dx, dy] = [moves[key][0] * box.width * 0.1, moves[key][1] * box.height * 0.1];
      ground.dispatchEvent(new PointerEvent("pointerdown", at(0, 0)));
      window.dispatchEvent(new PointerEvent("pointermove", at(dx, dy)));
      window.dispatchEvent(new PointerEvent("pointerup", at(dx, dy)));
    } else if (key === "0") {
      ground.dispatchEvent(new MouseEvent("dblclick", at(0, 0)));
    } else return false;
    return true;
  }

  document.addEventListener("keydown", (event) => {
    const isPlain = !event.ctrlKey && !event.altKey && !event.metaKey;
    if (isPlain && event.target.matches(".chart[tabindex]") && zoom(event.target, event.key)) event.preventDefault();
  });
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
