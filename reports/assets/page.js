// The pages work without this script: tables are complete and every figure has its numbers in words.
// This adds sorting, filtering, the theme button and the drawn figures. No network, no library but plotly.js.
(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;

  // ---- tables ------------------------------------------------------------------------------------------
  function addSorting(table) {
    table.querySelectorAll("thead th[data-sort]").forEach((head) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sortBy(table, head));
    });
  }

  function sortBy(table, head) {
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

  function addFilters(form) {
    const table = byId(form.dataset.table);
    const rows = [...table.tBodies[0].rows];
    const selects = [...form.querySelectorAll("select")];
    for (const select of selects) {
      const values = [...new Set(rows.map((row) => row.dataset[select.name]))];
      for (const value of values) select.add(new Option(value, `=${value}`)); // "=": a run may be named ""
    }
    const apply = () => {
      const wanted = selects.filter((select) => select.value !== "");
      const words = form.elements.search.value.toLowerCase().split(/\s+/);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !(wanted.every((select) => `=${row.dataset[select.name]}` === select.value)
          && words.every((word) => text.includes(word)));
        shown += row.hidden ? 0 : 1;
      }
      if (form.elements.notes) table.classList.toggle("whole-notes", form.elements.notes.checked);
      form.querySelector("output").textContent = `${shown} of ${rows.length} shown`;
    };
    ["input", "change"].forEach((kind) => form.addEventListener(kind, apply));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    apply();
  }

  // ---- one recorded run at a time ------------------------------------------------------------------------
  function addRunPicker(form) {
    const sections = [...document.querySelectorAll("section.run")];
    const select = form.elements.picked;
    const apply = () => {
      sections.forEach((section, index) => { section.hidden = select.value !== "" && select.value !== String(index); });
      form.querySelectorAll("button").forEach((button) => { button.disabled = select.value === ""; });
    };
    const follow = () => {
      const named = /^#run-(\d+)$/.exec(location.hash);
      if (named && sections[named[1]]) { select.value = named[1]; apply(); sections[named[1]].scrollIntoView(); }
    };
    ["input", "change"].forEach((kind) => form.addEventListener(kind, apply));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("click", (event) => {
      const move = Number(event.target.dataset.move);
      if (!move) return;
      select.value = String((Number(select.value) + move + sections.length) % sections.length);
      apply();
    });
    addEventListener("hashchange", follow);
    addEventListener("beforeprint", () => sections.forEach((section) => { section.hidden = false; }));
    addEventListener("afterprint", apply);
    form.hidden = false;
    apply();
    follow();
  }

  // ---- theme ---------------------------------------------------------------------------------------------
  const THEMES = ["system", "light", "dark"];
  const KEY = "kvtwin-theme";
  function stored(value) { // storage may be forbidden, above all for files
    try {
      if (value === undefined) return localStorage.getItem(KEY);
      localStorage.setItem(KEY, value);
    } catch { /* then the theme is forgotten with the page */ }
    return null;
  }

  function setTheme(theme) {
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
  }

  function addThemeButton() {
    const button = byId("theme");
    let theme = THEMES.includes(stored()) ? stored() : "system";
    button.addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      stored(theme);
      setTheme(theme);
      drawn.forEach(draw);
    });
    button.hidden = false;
    setTheme(theme);
  }

  // ---- ages ----------------------------------------------------------------------------------------------
  function addAge(time) {
    const days = Math.floor((Date.now() - Date.parse(time.dateTime)) / 86_400_000);
    if (!(days >= 0)) return;
    time.after(days === 0 ? ", today" : `, ${days}\u00a0day${days === 1 ? "" : "s"}\u00a0ago`);
  }

  // ---- figures -------------------------------------------------------------------------------------------
  const holder = byId("figures");
  const specs = JSON.parse(holder.textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const drawn = new Set();
  const NARROW = matchMedia("(max-width: 48rem)"); // as in page.css: there, some figures have a form of their own
  const config = { responsive: true, displayModeBar: false }; // dragging zooms, a double click shows all again

  // plotly knows no CSS variables: every "var(--name)" becomes the colour that the theme gives it now.
  function themed(value, colour) {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? colour(name[1]) : value;
    }
    if (Array.isArray(value)) {
      return value.some((item) => typeof item !== "number") ? value.map((item) => themed(item, colour)) : value;
    }
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, colour)]));
  }

  function palette() {
    const probe = document.createElement("span");
    probe.hidden = true;
    document.body.append(probe);
    const known = new Map();
    return (name) => {
      if (!known.has(name)) {
        probe.style.color = `var(${name})`;
        known.set(name, getComputedStyle(probe).color);
      }
      return known.get(name);
    };
  }

  async function draw(plot) {
    const spec = themed((NARROW.matches && specs[plot.id].narrow) || specs[plot.id], palette());
    spec.layout.font.family = getComputedStyle(document.body).fontFamily;
    drawn.add(plot);
    await Plotly.react(plot, spec.data, spec.layout, config);
    // The element is one image with its numbers as its name; its parts would only be noise to a screen reader.
    document.querySelectorAll(".plot svg, #js-plotly-tester").forEach((part) => part.setAttribute("aria-hidden", "true"));
  }

  async function loadPlotly() {
    const script = document.createElement("script");
    const ready = new Promise((resolve, reject) => {
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${holder.dataset.plotly} is missing: copy the whole site`));
    });
    if (holder.dataset.plotly) {
      script.src = holder.dataset.plotly;
      document.head.append(script);
      return ready;
    }
    const packed = Uint8Array.from(atob(byId("plotly").textContent), (char) => char.charCodeAt(0));
    const source = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    script.textContent = await new Response(source).text();
    document.head.append(script); // runs at once; the page's content security policy names its hash
    return undefined;
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
    }, { rootMargin: "500px" });
    plots.forEach((plot) => observer.observe(plot)); // a page of many runs draws what is looked at
    [matchMedia("(prefers-color-scheme: dark)"), NARROW].forEach((media) => {
      media.addEventListener("change", () => drawn.forEach(draw));
    });
    addEventListener("beforeprint", () => plots.filter((plot) => !drawn.has(plot)).forEach(draw));
  }

  function explain(error) {
    for (const plot of plots) {
      plot.className = "unavailable";
      plot.textContent = "This browser cannot draw the figure; its numbers stand above and below.";
    }
    console.error(error);
  }

  addThemeButton();
  document.querySelectorAll("table.sortable").forEach(addSorting);
  document.querySelectorAll("form[data-table]").forEach(addFilters);
  if (byId("run-picker")) addRunPicker(byId("run-picker"));
  document.querySelectorAll("time").forEach(addAge);
  addFigures().catch(explain);
})();
