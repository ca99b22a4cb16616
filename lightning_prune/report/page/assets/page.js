/* Draws the plots of a lightning_prune page from the JSON beside each canvas, in the colours of its style sheet. */
(() => {
  "use strict";
  const charts = [];

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const series = (index) => colour(`series-${(index % 5) + 1}`);
  const percent = (value) => `${+(100 * value).toFixed(Math.abs(value) < 0.1 ? 2 : 1)} %`;
  const number = (value) => {
    const size = Math.abs(value);
    if (size >= 1e6) return value.toExponential(2);
    return size >= 1000 ? value.toLocaleString("en") : `${+value.toPrecision(4)}`;
  };
  const shorten = (text, room) => (text.length > room ? `…${text.slice(1 - room)}` : text);

  function axis(title, format, extra) {
    return {
      title: { display: Boolean(title), text: title, color: colour("muted") },
      ticks: { color: colour("muted"), ...(format ? { callback: format } : {}) },
      grid: { color: colour("line") },
      border: { color: colour("line") },
      ...extra,
    };
  }

  function common(plugins) {
    return {
      responsive: true,
      maintainAspectRatio: false,
      animation: false,
      plugins: { legend: { labels: { color: colour("text"), boxWidth: 22, boxHeight: 2 } }, ...plugins },
    };
  }

  function lines(data, chosen) {
    const shown = data.choose ? [data.lines[chosen]] : data.lines;
    const format = data.is_percent ? percent : number;
    const datasets = shown.map((line, index) => ({
      label: line.name,
      data: line.points.map(([x, y]) => ({ x, y })),
      borderColor: series(index),
      backgroundColor: series(index),
      borderDash: line.is_dashed ? [6, 4] : [],
      borderWidth: 2,
      pointRadius: data.markers ? 4 : line.points.length > 30 ? 0 : 2.5,
      pointHitRadius: 8,
      clip: 6,  // a point at the edge is seen as a whole
      showLine: !data.markers,
      stepped: line.is_stepped ? "before" : false,
      spanGaps: true,
    }));
    const highest = Math.max(...shown.flatMap((line) => line.points.map(([, y]) => y ?? -Infinity)));
    const isFraction = highest <= 1 && highest > 0.9; // such as an accuracy: there is nothing above 1
    const range = data.is_percent ? { min: 0, max: 1 } : { grace: "5%", ...(isFraction ? { max: 1 } : {}) };
    const single = shown.length < 2;
    const labels = { title: (items) => `${data.x} ${number(items[0].parsed.x)}`,
                     label: (item) => `${item.dataset.label}: ${format(item.parsed.y)}` };
    const options = common({ tooltip: { callbacks: labels } });
    options.plugins.legend.display = !single;
    return {
      type: "line",
      data: { datasets },
      options: {
        ...options,
        parsing: false,
        interaction: { mode: "nearest", axis: "x", intersect: false },
        scales: {
          x: axis(data.x, number, { type: "linear", beginAtZero: true, ticks: { color: colour("muted"), callback: number, maxRotation: 0 } }),
          y: axis(data.y, format, range),
        },
      },
    };
  }

  function bars(data, width) {
    const format = data.is_percent ? percent : number;
    const room = Math.max(10, Math.floor(width / 18));
    const datasets = data.series.flatMap(([name, values], index) => {
      const look = { backgroundColor: series(index), borderColor: series(index) };
      if (!data.intervals) {
        return [{ type: "bar", label: name, data: values, ...look, maxBarThickness: 14, minBarLength: 2 }];
      }
      const muted = `${series(index)}66`;
      const spans = values.map((value) => value && [value[0], value[2]]);
      const middles = values.map((value) => value && value[1]);
      return [
        { type: "line", label: name, data: middles, ...look, showLine: false, pointRadius: 5, pointHoverRadius: 6 },
        { type: "bar", label: "interval", data: spans, backgroundColor: muted, maxBarThickness: 16, minBarLength: 3 },
      ];
    });
    const told = (item) => {
      const raw = item.raw;
      const text = Array.isArray(raw) ? `${format(raw[0])} to ${format(raw[1])}` : format(raw);
      return `${item.dataset.label}: ${text}`;
    };
    const options = common({
      tooltip: { callbacks: { title: (items) => data.labels[items[0].dataIndex], label: told } },
    });
    options.plugins.legend.labels.filter = (item) => item.text !== "interval";
    options.plugins.legend.labels.boxHeight = 10;
    options.plugins.legend.labels.boxWidth = 14;
    options.plugins.legend.display = data.series.length > 1;
    const values = { min: 0, ...(data.is_percent ? { max: 1 } : {}), position: "top" };
    if (data.intervals) { delete values.min; values.grace = "10%"; }
    if (data.is_percent && data.series.some(([, column]) => column.some((value) => value > 1))) delete values.max;
    return {
      type: "bar",
      data: { labels: data.labels.map((label) => shorten(label, room)), datasets },
      options: {
        ...options,
        indexAxis: "y",
        interaction: { mode: "index", axis: "y", intersect: false },
        scales: {
          x: axis(data.x, format, values),
          y: axis("", null, { ticks: { color: colour("muted"), autoSkip: false }, grid: { display: false } }),
        },
      },
    };
  }

  const spread = {
    id: "spread",
    beforeDatasetsDraw(chart) {
      const { ctx, chartArea, scales: { x, y } } = chart;
      ctx.save();
      ctx.beginPath();
      ctx.rect(chartArea.left, chartArea.top, chartArea.width, chartArea.height);
      ctx.clip();
      const line = (x0, y0, x1, y1) => { ctx.beginPath(); ctx.moveTo(x0, y0); ctx.lineTo(x1, y1); ctx.stroke(); };
      const level = chart.options.level;
      if (level !== null) {
        ctx.strokeStyle = colour("muted");
        ctx.setLineDash([2, 4]);
        line(chartArea.left, y.getPixelForValue(level), chartArea.right, y.getPixelForValue(level));
        ctx.setLineDash([]);
      }
      chart.data.datasets.forEach((dataset, index) => {
        if (!chart.isDatasetVisible(index)) return;
        ctx.strokeStyle = `${dataset.borderColor}99`;
        dataset.data.forEach((spot) => {
          const [cx, cy] = [x.getPixelForValue(spot.x), y.getPixelForValue(spot.y)];
          const low = chart.options.is_log ? Math.max(spot.x - spot.x_spread, spot.x / 100) : spot.x - spot.x_spread;
          if (spot.x_spread) line(x.getPixelForValue(low), cy, x.getPixelForValue(spot.x + spot.x_spread), cy);
          if (spot.y_spread) {
            line(cx, y.getPixelForValue(spot.y - spot.y_spread), cx, y.getPixelForValue(spot.y + spot.y_spread));
          }
        });
      });
      ctx.restore();
    },
  };

  function scatter(data) {
    const looks = {
      plain: { borderColor: colour("muted"), pointRadius: 4 },
      joined: { borderColor: series(0), pointRadius: 5, showLine: true, borderWidth: 2 },
      star: { borderColor: series(1), pointRadius: 11, pointHoverRadius: 13, pointStyle: "star", borderWidth: 3 },
    };
    const datasets = data.kinds.filter((kind) => kind.spots.length).map((kind) => ({
      label: kind.name,
      data: kind.spots,
      ...looks[kind.look],
      backgroundColor: looks[kind.look].borderColor,
      pointHitRadius: 12,
      order: -Object.keys(looks).indexOf(kind.look),
    }));
    const options = common({ tooltip: { callbacks: { label: (item) => item.raw.text } } });
    options.plugins.legend.labels.usePointStyle = true;
    options.plugins.legend.labels.boxHeight = 8;
    const all = data.kinds.flatMap((kind) => kind.spots);
    const ys = all.flatMap((spot) => [spot.y - spot.y_spread, spot.y + spot.y_spread]);
    if (data.level !== null) ys.push(data.level);
    const room = 0.06 * (Math.max(...ys) - Math.min(...ys)) || 0.05;
    const xs = all.map((spot) => spot.x);
    const wide = data.is_log ? { type: "logarithmic", min: Math.min(...xs) / 1.2, max: Math.max(...xs) * 1.2 }
      : { type: "linear", grace: "8%" };
    const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
    const isRound = (value) => [1, 2, 5].includes(+(value / 10 ** Math.floor(Math.log10(value))).toPrecision(3));
    const ticks = { color: colour("muted"), maxRotation: 0,
                    callback: (value) => {
                      if (data.is_log && !isRound(value)) return null;
                      return Math.abs(value) < 1000 ? number(value) : short.format(value);
                    } };
    return {
      type: "scatter",
      data: { datasets },
      options: {
        ...options,
        level: data.level,
        is_log: data.is_log,
        interaction: { mode: "nearest", intersect: true },
        scales: {
          x: axis(data.x, null, { ...wide, ticks }),
          y: axis(data.y, number, { min: Math.min(...ys) - room, max: Math.max(...ys) + room,
                                    ticks: { color: colour("muted"), callback: number, includeBounds: false } }),
        },
      },
      plugins: [spread],
    };
  }

  const value = (text) => (text === "" ? NaN : Number(text.replaceAll(",", "").split(" ")[0]));

  function align(table) {
    [...table.tHead.rows[0].cells].forEach((head, index) => {
      const cells = [...table.tBodies[0].rows].map((row) => row.cells[index]);
      if (cells.every((cell) => Number.isNaN(value(cell.textContent.trim())))) {
        [head, ...cells].forEach((cell) => cell.classList.add("text"));
      }
    });
  }

  function sort(head) {
    const table = head.closest("table");
    const body = table.tBodies[0];
    const descends = head.getAttribute("aria-sort") !== "descending";
    const key = (row) => row.cells[head.cellIndex].textContent.replace("★", "").trim();
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;  // what is no number comes last
      const difference = Number.isNaN(x) ? a.localeCompare(b) : x - y;
      return descends ? -difference : difference;
    };
    body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descends ? "descending" : "ascending");
  }

  function menu(figure, data, draw) {
    const select = document.createElement("select");
    select.setAttribute("aria-label", `${data.title}: which line`);
    data.lines.forEach((line, index) => select.add(new Option(line.name, index)));
    select.addEventListener("change", () => draw(Number(select.value)));
    figure.querySelector(".menu").append(select);
  }

  function start(figure) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const canvas = figure.querySelector("canvas");
    let chosen = 0;
    let chart = null;
    const draw = (index = chosen) => {
      chosen = index;
      if (chart) chart.destroy();
      const kinds = { lines, scatter, bars: () => bars(data, canvas.parentElement.clientWidth) };
      const config = kinds[data.kind](data, chosen);
      chart = new Chart(canvas, config);
    };
    if (data.choose && data.lines.length > 1) menu(figure, data, draw);
    draw();
    charts.push({ draw, resize: () => chart.resize() });
  }

  function copy(button) {
    const text = button.parentElement.querySelector("code").textContent;
    const done = () => {
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    };
    const select = () => {
      getSelection().selectAllChildren(button.parentElement.querySelector("code"));
      if (document.execCommand("copy")) done();
    };
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, select);
    else select();
  }

  document.querySelectorAll("figure.chart").forEach(start);
  document.querySelectorAll("table.sortable").forEach(align);
  document.querySelectorAll("table.sortable thead th").forEach((head) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head));
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(head); });
  });
  document.querySelectorAll("button.copy").forEach((b) => b.addEventListener("click", () => copy(b)));
  const again = () => charts.forEach(({ draw }) => draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  matchMedia("print").addEventListener("change", again);
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((d) => { d.dataset.was = d.open ? "open" : ""; d.open = true; });
    charts.forEach(({ resize }) => resize());
  });
  addEventListener("afterprint", () => {
    document.querySelectorAll("details").forEach((d) => { d.open = d.dataset.was === "open"; });
  });
  document.documentElement.dataset.ready = String(charts.length);
})();
