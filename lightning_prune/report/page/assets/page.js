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
      pointRadius: data.markers ? 4 : line.points.length > 60 ? 0 : 2.5,
      pointHitRadius: 8,
      showLine: !data.markers,
      stepped: line.is_stepped ? "before" : false,
      spanGaps: true,
    }));
    const range = data.is_percent ? { min: 0, max: 1 } : { grace: "5%" };
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
          x: axis(data.x, number, { type: "linear", ticks: { color: colour("muted"), callback: number, maxRotation: 0 } }),
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
      const config = data.kind === "lines" ? lines(data, chosen) : bars(data, canvas.parentElement.clientWidth);
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
