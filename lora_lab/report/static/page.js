// The page's own code: sorting, finding, figures drawn when they come into view, and the pages of single runs.
// Every text from the ledger is set as text, never as markup.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const read = (id) => { const block = byId(id); return block ? JSON.parse(block.textContent) : null; };
  const parsed = new Map();
  const once = (id) => { if (!parsed.has(id)) parsed.set(id, read(id)); return parsed.get(id); };

  const make = (tag, attributes, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) node.append(child);
    return node;
  };

  // Sorting. What has no number stays at the end, whichever way.
  const sortBy = (heading) => {
    const table = heading.closest("table");
    const index = [...heading.parentNode.children].indexOf(heading);
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const isNumber = heading.dataset.kind === "number";
    const key = (row) => {
      const text = row.children[index].dataset.sort;
      return isNumber ? (text === undefined ? NaN : Number(text)) : (text ?? row.children[index].textContent);
    };
    const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (isNumber) {
        if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
        return down ? b - a : a - b;
      }
      return (down ? -1 : 1) * String(a).localeCompare(String(b), undefined, { numeric: true });
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };
  const makeSortable = (root) => {
    for (const button of root.querySelectorAll("table.sortable thead button")) {
      button.addEventListener("click", () => sortBy(button.closest("th")));
    }
  };

  const find = byId("find");
  if (find) {
    const rows = [...byId("run-table").tBodies[0].rows];
    const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
    find.addEventListener("input", () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        row.hidden = !words.every((word) => texts.get(row).includes(word));
        shown += !row.hidden;
      }
      byId("found").textContent = words.length ? `${shown} of ${rows.length}` : "";
    });
  }

  const effectMetric = byId("effect-metric");
  if (effectMetric) {
    const show = () => {
      for (const row of byId("effect-table").tBodies[0].rows) row.hidden = row.dataset.metric !== effectMetric.value;
    };
    effectMetric.addEventListener("change", show);
    show();
  }

  // Figures.
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const themed = (layout) => {
    const axis = { gridcolor: colour("--grid"), zerolinecolor: colour("--grid"), linecolor: colour("--line"), automargin: true };
    const narrow = window.innerWidth <= 640;
    const own = {};
    const names = Object.keys(layout).filter((name) => /^[xy]axis\d*$/.test(name));
    for (const name of names) own[name] = { ...axis, ...layout[name] };
    // The titles of panels side by side have no room on a narrow page, unless they are slanted.
    if (narrow && layout.xaxis3) for (const name of names) if (name.startsWith("x")) own[name].tickangle = -45;
    return {
      xaxis: axis, yaxis: axis, ...layout, ...own,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: colour("--ink") },
      margin: { ...(narrow ? { l: 50, r: 12, t: 16, b: 52 } : { l: 70, r: 24, t: 24, b: 64 }), ...(layout.margin || {}) },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--line"), activecolor: colour("--accent") },
      hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left" },
      legend: narrow
        ? { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: 11 } }
        : { orientation: "v", x: 1.02, y: 1, font: { size: 12 }, ...(layout.legend || {}) },
    };
  };
  const options = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const drawn = new Map();
  const draw = (place, figure) => {
    drawn.set(place, figure);
    place.classList.toggle("empty", !figure || !figure.data);
    if (!figure || !figure.data) {
      window.Plotly.purge(place);
      place.textContent = figure ? figure.missing : "Nothing to draw for this choice.";
      return;
    }
    if (!place.classList.contains("js-plotly-plot")) place.textContent = "";
    const layout = themed(figure.layout);
    if (window.innerWidth <= 640 && !layout.height && figure.data.length > 8) layout.height = 440 + 18 * figure.data.length;
    const data = figure.data.map((trace) => (trace.ink ? { ...trace, [trace.ink]: { ...trace[trace.ink], color: colour("--ink") } } : trace));
    place.style.height = layout.height ? `${layout.height}px` : "";
    window.Plotly.react(place, data, layout, { ...options, displayModeBar: window.innerWidth <= 640 ? false : "hover" });
  };
  const redraw = () => { for (const [place, figure] of drawn) if (place.isConnected) draw(place, figure); };
  const showFamily = (section) => {
    const choice = [...section.querySelectorAll("select")].map((select) => select.value);
    const figures = once(`figures-${section.dataset.family}`);
    draw(section.querySelector(".plot"), figures[choice.join("|")] || figures[""] || null);
  };
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      showFamily(entry.target);
    }
  }, { rootMargin: "300px" });
  for (const section of document.querySelectorAll("section.figures")) {
    seen.observe(section);
    section.addEventListener("change", () => showFamily(section));
  }

  // Light and dark.
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // Pages of runs and of settings.
  const detail = byId("detail");
  const main = byId("top");
  const pairs = (list, differing) => make("dl", { class: "pairs" }, list.map(([name, value]) => [
    make("dt", {}, name), make("dd", { class: differing && differing.has(name) ? "differs" : null }, value)]));
  const fileLinks = (run) => make("ul", { class: "files" }, run.files.map((name) =>
    make("li", {}, make("a", { href: run.folder + name.split("/").map(encodeURIComponent).join("/") }, name))));
  const titled = (title, ...nodes) => [make("h3", {}, title), ...nodes];
  const chip = (state) => make("span", { class: `chip ${state.toLowerCase()}` }, state);
  const back = () => make("a", { class: "back", href: "#top" }, "← all settings");
  const tableOf = (titles, rows) => make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, titles.map((title, index) => make("th", { class: index ? "number" : null }, title)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((cell, index) =>
      make(index ? "td" : "th", { class: index ? "number" : null }, cell)))))));

  const curveOf = (run) => {
    const place = make("div", { class: "plot" });
    const keys = Object.keys(run.curves.values);
    const select = make("select", {}, keys.map((key) => make("option", { value: key }, key.replaceAll("_", " "))));
    const show = () => {
      const key = select.value;
      const points = run.curves.values[key];
      const x = points.x || run.curves.steps;
      const data = [{ x, y: points.y, mode: points.y.length > 60 ? "lines" : "lines+markers", name: key, line: { color: "#4477AA" } }];
      draw(place, { data, layout: { xaxis: { title: { text: "step" } }, yaxis: { title: { text: points.unit } }, showlegend: false } });
    };
    select.addEventListener("change", show);
    return [[make("p", { class: "picks" }, make("label", {}, "Curve ", select)), place], show];
  };

  // Sections of figures that were computed for the run; those without a figure say why.
  const sectionsOf = (sections) => {
    const places = sections.map((one) => [make("div", { class: "plot", role: "img", "aria-label": one.title }), one.figure]);
    const nodes = sections.map((one, index) => titled(one.title, one.lead ? make("p", { class: "lead" }, one.lead) : null,
      places[index][0], one.notes.map((text) => make("p", { class: "note" }, text))));
    return [nodes.flat(Infinity).filter((node) => node !== null), () => { for (const [place, figure] of places) draw(place, figure); }];
  };

  const memoryOf = (memory) => titled("Predicted memory", make("p", {}, memory.sentence),
    memory.rows.length ? tableOf(memory.titles, memory.rows) : null,
    [memory.lead, ...memory.notes].filter(Boolean).map((text) => make("p", { class: "note" }, text)));

  const sample = (one) => make("dl", { class: "sample pairs" },
    make("dt", {}, "prompt"), make("dd", { dir: "auto" }, one.prompt),
    make("dt", {}, "expected"), make("dd", { dir: "auto" }, one.expected),
    make("dt", {}, one.is_complete ? "answer" : "answer, cut"),
    make("dd", { dir: "auto", class: one.answer.trim() === one.expected.trim() ? "good" : null }, one.answer));

  const showRun = (id) => {
    const run = once(`run-data-${id}`);
    if (!run) return showMissing(`This page holds no run ${id}.`);
    const common = once("runs-common");
    const differing = new Set(Object.keys(run.config));
    const config = Object.entries({ ...common.config, ...run.config }).sort(([a], [b]) => (differing.has(b) - differing.has(a)) || (a < b ? -1 : 1));
    let afterwards = () => {};
    let curve = [];
    if (Object.keys(run.curves.values).length) [curve, afterwards] = curveOf(run);
    const [layers, drawLayers] = sectionsOf(run.layers);
    detail.replaceChildren(
      back(),
      make("p", { class: "kicker" }, "run ", make("code", {}, run.id), run.setting ? [" of ", make("a", { href: `#setting-${run.setting}` }, "its setting")] : null),
      make("h1", {}, run.name, " ", chip(run.state)),
      ...(run.reason ? [make("pre", { class: "reason" }, run.reason)] : []),
      ...run.warnings.map((text) => make("p", { class: "note warn" }, text)),
      fileLinks(run),
      ...(run.metrics.length ? titled("Scores", tableOf(["metric", "value", "± 95 % over examples", "examples", "chance"], run.metrics.map(
        (row) => [row[0], make("a", { href: run.folder + "result.json" }, row[1]), ...row.slice(2)]))) : []),
      ...titled("Training", ...(curve.length ? curve : [make("p", { class: "note" }, run.curves.missing || "Nothing was trained.")])),
      ...layers,
      ...(run.memory ? memoryOf(run.memory).flat(Infinity).filter((node) => node !== null) : []),
      ...(run.answers.length ? titled("Sample answers", make("p", { class: "lead" }, "Greedy answers to the first held-out prompts; green where the answer is the expected one, to the letter."), make("div", { class: "answers" }, run.answers.map(sample))) : []),
      make("div", { class: "grid" },
        make("div", {}, titled("Measured", pairs(run.measurements))),
        make("div", {}, titled("Environment", pairs(run.environment === null ? [["missing", "environment.json cannot be read"]] : common.environments[run.environment]))),
        make("div", {}, titled("Configuration", make("p", { class: "lead" }, differing.size && Object.keys(common.config).length ? "What differs between the runs of this page comes first." : ""), pairs(config, differing))),
        make("div", {}, titled("Identity", pairs(run.identity)), run.missing.length ? titled("Missing, and why", pairs(run.missing)) : null)),
    );
    open(); afterwards(); drawLayers();
  };

  const showSetting = (id) => {
    const one = (once("settings-data") || {})[id];
    if (!one) return showMissing(`This page holds no setting ${id}.`);
    const runs = one.runs.map((run) => [
      make("a", { href: `#run-${run.id}` }, run.name), chip(run.state),
      ...run.values.map((value, index) => value === null ? make("span", { title: run.missing[index] }, "-")
        : make("a", { href: run.folder + "result.json", title: "open result.json" }, value))]);
    detail.replaceChildren(
      back(), make("p", { class: "kicker" }, "setting ", make("code", {}, id)), make("h1", {}, one.name),
      ...titled("Runs", tableOf(["run", "status", ...one.titles], runs)),
      ...one.notes.map((text) => make("p", { class: "note" }, text)),
      make("div", { class: "grid" },
        make("div", {}, titled("Mean over seeds", pairs(one.means))),
        make("div", {}, titled("What sets it apart", one.axes.length ? pairs(one.axes) : make("p", { class: "note" }, "The only setting of this page.")))),
    );
    open();
  };

  const showMissing = (text) => { detail.replaceChildren(back(), make("p", {}, text)); open(); };
  let returnTo = 0;
  const open = () => {
    if (!main.hidden) returnTo = window.scrollY;
    main.hidden = true; detail.hidden = false; window.scrollTo(0, 0);
  };
  const route = () => {
    const name = decodeURIComponent(location.hash.slice(1));
    if (name.startsWith("run-")) return showRun(name.slice(4));
    if (name.startsWith("setting-")) return showSetting(name.slice(8));
    if (!main.hidden) return undefined;
    main.hidden = false; detail.hidden = true; detail.replaceChildren();
    const target = name && name !== "top" ? byId(name) : null;
    if (target) target.scrollIntoView(); else window.scrollTo(0, returnTo);
    return undefined;
  };
  window.addEventListener("hashchange", route);
  makeSortable(document);
  route();
})();
