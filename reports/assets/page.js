// The page works without this script: the table is complete and every figure has its numbers in words.
// This adds sorting, filtering and the drawn figures. No network, no storage, no library but plotly.js.
(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);

  // ---- table of checks -------------------------------------------------------------------------------
  const table = byId("checks");
  const rows = table ? [...table.tBodies[0].rows] : [];

  function addSorting() {
    table.querySelectorAll("thead th[data-sort]").forEach((head) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sortBy(head));
    });
  }

  function sortBy(head) {
    const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    const sign = direction === "ascending" ? 1 : -1;
    const numeric = head.dataset.sort === "number";
    const key = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
    const compare = (a, b) => {
      if (!numeric) return sign * key(a).localeCompare(key(b));
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // unknown goes last either way
      return sign * (Number(x) - Number(y));
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    table.querySelectorAll("thead th[data-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction);
  }

  function addFilters() {
    const form = byId("filters");
    const selects = [...form.querySelectorAll("select")];
    for (const select of selects) {
      const values = [...new Set(rows.map((row) => row.dataset[select.name]))];
      for (const value of values) select.add(new Option(value, `=${value}`)); // "=": a run may be named ""
    }
    const apply = () => {
      const wanted = selects.filter((select) => select.value !== "");
      let shown = 0;
      for (const row of rows) {
        row.hidden = !wanted.every((select) => `=${row.dataset[select.name]}` === select.value);
        shown += row.hidden ? 0 : 1;
      }
      byId("shown").textContent = `${shown} of ${rows.length} checks`;
    };
    form.addEventListener("change", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    apply();
  }

  // ---- figures ---------------------------------------------------------------------------------------
  const specs = JSON.parse(byId("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const drawn = new Set();
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };

  // plotly knows no CSS variables: every "var(--name)" becomes the colour that the theme gives it now.
  function themed(value, style) {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return typeof value[0] === "object" ? value.map((item) => themed(item, style)) : value;
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
  }

  function draw(plot) {
    const style = getComputedStyle(document.documentElement);
    const spec = themed(specs[plot.id], style);
    spec.layout.font.family = getComputedStyle(document.body).fontFamily;
    drawn.add(plot);
    return Plotly.react(plot, spec.data, spec.layout, config);
  }

  async function loadPlotly() {
    const packed = Uint8Array.from(atob(byId("plotly").textContent), (char) => char.charCodeAt(0));
    const source = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(source).text();
    document.head.append(script); // runs at once; the page's content security policy names its hash
  }

  async function addFigures() {
    if (!plots.length) return;
    await loadPlotly();
    const observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        observer.unobserve(entry.target);
        draw(entry.target);
      }
    }, { rootMargin: "600px" });
    plots.forEach((plot) => observer.observe(plot)); // a page of many runs draws what is looked at
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
    addEventListener("beforeprint", () => plots.filter((plot) => !drawn.has(plot)).forEach(draw));
  }

  function explain(error) {
    for (const plot of plots) {
      plot.className = "unavailable";
      plot.textContent = "This browser cannot draw the figure; its numbers stand above.";
    }
    console.error(error);
  }

  if (table) { addSorting(); addFilters(); }
  addFigures().catch(explain);
})();
