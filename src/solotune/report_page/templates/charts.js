// Draws the charts of the page: each .plot has what to draw in data-chart, the numbers are in #curve-data.
// All charts show the same range of steps. A chart outside the window is drawn when it comes into view.
(function () {
  "use strict";
  const runs = JSON.parse(document.getElementById("curve-data").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const charts = new Map(); // element -> {spec, plot, isLog, isStale, isVisible}
  const lastStep = Math.max(1, ...runs.map((run) => run.last_step));
  const whole = [0, lastStep + Math.max(1, lastStep * 0.01)];
  let range = whole.slice();
  let isWaiting = false;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const STYLES = {
    main: { stroke: "main", width: 2 },
    faint: { stroke: "main-faint", width: 1 },
    held_out: { stroke: "held-out", width: 2, points: true },
    other: { stroke: "other", width: 2, dash: [9, 5] }, // dashed: two runs that agree are both seen
    other_held_out: { stroke: "other-held-out", width: 2, dash: [9, 5], points: true },
  };

  function hasPoints(line) {
    const count = runs[line.run].series[line.key].steps.length;
    return count === 1 || (STYLES[line.style].points === true && count <= 60);
  }

  // A jagged line that fills its chart is thin: it is easier to read, and faster to draw.
  const isDense = (line) => !line.key.startsWith("smoothed_") && runs[line.run].series[line.key].steps.length > 2000;

  function written(value, unit) {
    if (value == null) return "–";
    if (unit === "bytes") return (value / 2 ** 30).toFixed(value < 2 ** 33 ? 2 : 1) + " GiB";
    if (unit === "seconds") return Number(value.toPrecision(3)) + " s";
    const size = Math.abs(value);
    const short = Number(value.toPrecision(4));
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? short.toExponential() : String(short);
  }

  // Places of a curve to draw: those in the range and one on each side; of many, the extremes of each bucket of pixels.
  // Canvas takes its time for a stroke by its corners: without this, panning over 200,000 steps takes 40 ms a frame.
  function places(one, from, to, buckets) {
    const { steps, values } = one;
    let low = 0, high = steps.length;
    for (let gap = high; gap > 0; ) { // the first place at or after `from`
      const half = gap >> 1;
      if (steps[low + half] < from) { low += half + 1; gap -= half + 1; } else gap = half;
    }
    let begin = Math.max(0, low - 1), end = low;
    while (end < high && steps[end] <= to) end++;
    end = Math.min(high, end + 1);
    const found = [];
    if (end - begin <= 2 * buckets) {
      for (let i = begin; i < end; i++) found.push(i);
      return found;
    }
    for (let bucket = 0; bucket < buckets; bucket++) {
      const first = begin + Math.floor(((end - begin) * bucket) / buckets);
      const after = begin + Math.floor(((end - begin) * (bucket + 1)) / buckets);
      let least = -1, most = -1, gap = -1;
      for (let i = first; i < after; i++) {
        if (values[i] == null) gap = gap < 0 ? i : gap;
        else {
          if (least < 0 || values[i] < values[least]) least = i;
          if (most < 0 || values[i] > values[most]) most = i;
        }
      }
      found.push(...[...new Set([least, most, gap])].filter((i) => i >= 0).sort((a, b) => a - b));
    }
    return found;
  }

  // What uPlot draws of a chart. Curves have steps of their own: null is a NaN, and a gap; undefined a step of another.
  function windowed(spec, width) {
    const chosen = new Map(); // curves with the same steps are drawn at the same places
    const tables = spec.lines.map((line) => {
      const { series } = runs[line.run], one = series[line.key];
      const alike = series[line.key.replace(/^smoothed_/, "")] || one;
      if (!chosen.has(alike)) chosen.set(alike, places(alike, range[0], range[1], Math.max(50, width / 3)));
      const kept = chosen.get(alike);
      return [kept.map((i) => one.steps[i]), kept.map((i) => one.values[i])];
    });
    return tables.length === 1 ? tables[0] : uPlot.join(tables);
  }

  function band(u, spec, isLog) {
    const { ctx } = u;
    spec.lines.forEach((line, number) => {
      const one = runs[line.run].series[line.key];
      if (!one.stderr || !u.series[number + 1].show) return;
      const floor = isLog ? Math.max(u.scales.y.min, 1e-12) : -Infinity;
      const edges = [1.96, -1.96].map((z) =>
        one.steps.map((step, i) => [step, one.values[i] + z * (one.stderr[i] || 0)]).filter((_, i) => one.values[i] != null));
      const path = edges[0].concat(edges[1].reverse());
      if (!path.length) return;
      ctx.globalAlpha = 0.22;
      ctx.fillStyle = ctx.strokeStyle = colour(STYLES[line.style].stroke);
      ctx.lineWidth = 3;
      ctx.beginPath();
      path.forEach(([step, value], i) => {
        const x = u.valToPos(step, "x", true), y = u.valToPos(Math.max(value, floor), "y", true);
        i ? ctx.lineTo(x, y) : ctx.moveTo(x, y);
      });
      ctx.closePath();
      ctx.fill();
      if (path.length === 2) ctx.stroke(); // a single evaluation: its error is a bar
      ctx.globalAlpha = 1;
    });
  }

  function upright(u, step, name, dash) {
    const x = u.valToPos(step, "x", true);
    if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) return;
    u.ctx.strokeStyle = colour(name);
    u.ctx.setLineDash(dash);
    u.ctx.beginPath();
    u.ctx.moveTo(x, u.bbox.top);
    u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
    u.ctx.stroke();
  }

  function marks(u, spec, isLog) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    band(u, spec, isLog);
    ctx.lineWidth = devicePixelRatio;
    for (const run of runs) {
      run.resumed.forEach((step) => upright(u, step, "level", [4, 4]));
      run.non_finite.slice(0, 500).forEach((step) => upright(u, step, "bad", []));
    }
    ctx.font = 12 * devicePixelRatio + "px system-ui, sans-serif";
    ctx.textAlign = "right";
    for (const level of spec.levels) {
      const y = u.valToPos(level.value, "y", true);
      if (!(y >= bbox.top && y <= bbox.top + bbox.height)) continue;
      ctx.strokeStyle = ctx.fillStyle = colour("level");
      ctx.setLineDash([6, 4]);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      const isHigh = y - bbox.top < 18 * devicePixelRatio;
      ctx.fillText(level.label, bbox.left + bbox.width - 6, y + (isHigh ? 15 : -5) * devicePixelRatio);
    }
    ctx.restore();
  }

  function limits(spec, isLog) {
    return (u, low, high) => {
      if (low == null) return [isLog ? 0.1 : 0, 1];
      for (const line of spec.lines) { // with its band
        const one = runs[line.run].series[line.key];
        (one.stderr || []).forEach((error, i) => {
          if (one.values[i] == null || one.steps[i] < range[0] || one.steps[i] > range[1]) return;
          low = Math.min(low, isLog ? low : one.values[i] - 1.96 * error);
          high = Math.max(high, one.values[i] + 1.96 * error);
        });
      }
      if (isLog) return uPlot.rangeLog(low > 0 ? low : 1e-8, high > 0 ? high : 1, 10, false);
      for (const level of spec.levels) // a limit is shown if it is near, else it would flatten the curve
        if (level.value <= high * 2 && level.value >= low / 2) [low, high] = [Math.min(low, level.value), Math.max(high, level.value)];
      const padding = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
      return [low >= 0 ? Math.max(0, low - padding) : low - padding, high + padding];
    };
  }

  function options(element, spec, isLog) {
    const ink = colour("soft"), grid = { stroke: colour("faint"), width: 1 };
    const font = "12px system-ui, sans-serif";
    return {
      width: element.clientWidth,
      height: element.clientWidth < 500 ? 210 : 260,
      cursor: { sync: { key: "steps", setSeries: false }, drag: { x: true, y: false, setScale: false }, points: { size: 7 } },
      scales: { x: { time: false, range: () => range }, y: { distr: isLog ? 3 : 1, range: limits(spec, isLog) } },
      axes: [
        { stroke: ink, grid, ticks: grid, font, size: 34, values: (u, all) => all.map((v) => (Number.isInteger(v) ? v.toLocaleString("en") : "")) },
        { stroke: ink, grid, ticks: grid, font, size: 66, values: (u, all) => all.map((v) => (v == null ? "" : written(v, spec.unit))) },
      ],
      series: [
        { label: "step", value: (u, v) => (v == null ? "–" : v.toLocaleString("en")) },
        ...spec.lines.map((line) => ({
          label: line.label,
          stroke: colour(STYLES[line.style].stroke),
          width: isDense(line) ? 1 : STYLES[line.style].width,
          dash: STYLES[line.style].dash,
          points: { show: hasPoints(line), size: 7 },
          value: (u, v) => written(v, spec.unit),
        })),
      ],
      legend: { live: true },
      hooks: {
        draw: [(u) => marks(u, spec, isLog)],
        setSelect: [(u) => {
          if (u.select.width < 4) return;
          const from = u.posToVal(u.select.left, "x"), to = u.posToVal(u.select.left + u.select.width, "x");
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          show(from, to);
        }],
      },
    };
  }

  function build(element) {
    const chart = charts.get(element);
    if (chart.plot) chart.plot.destroy();
    chart.plot = new uPlot(options(element, chart.spec, chart.isLog), windowed(chart.spec, element.clientWidth), element);
    chart.plot.over.ondblclick = () => show(...whole);
    chart.isStale = false;
  }

  // The new range of all charts: in the next frame, however many events ask for one before it.
  function show(from, to) {
    const least = Math.min(2, whole[1]);
    const width = Math.min(whole[1] - whole[0], Math.max(least, to - from));
    const begin = Math.min(Math.max(whole[0], (from + to - width) / 2), whole[1] - width);
    range = [begin, begin + width];
    charts.forEach((chart) => (chart.isStale = true));
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      charts.forEach(refresh);
    });
  }

  function refresh(chart) {
    if (!chart.isStale || !chart.isVisible || !chart.plot) return;
    chart.isStale = false;
    chart.plot.batch(() => {
      chart.plot.setData(windowed(chart.spec, chart.plot.width), false);
      chart.plot.setScale("x", { min: range[0], max: range[1] });
    });
  }

  function move(what) {
    const width = range[1] - range[0], middle = (range[0] + range[1]) / 2;
    if (what === "in") show(middle - width / 4, middle + width / 4);
    if (what === "out") show(middle - width, middle + width);
    if (what === "left") show(range[0] - width / 5, range[1] - width / 5);
    if (what === "right") show(range[0] + width / 5, range[1] + width / 5);
    if (what === "all") show(...whole);
  }

  const KEYS = { ArrowLeft: "left", ArrowRight: "right", "+": "in", "=": "in", "-": "out", 0: "all" };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const chart = charts.get(entry.target);
      chart.isVisible = entry.isIntersecting;
      if (!entry.isIntersecting) continue;
      if (!chart.plot) build(entry.target);
      refresh(chart);
    }
  }, { rootMargin: "50px" });

  for (const element of plots) {
    const spec = JSON.parse(element.dataset.chart);
    charts.set(element, { spec, plot: null, isLog: false, isStale: true, isVisible: false });
    const tools = document.querySelector(`.tools[data-for="${spec.name}"]`);
    tools.hidden = false;
    tools.addEventListener("click", (event) => event.target.dataset.do && move(event.target.dataset.do));
    tools.addEventListener("change", (event) => {
      charts.get(element).isLog = event.target.checked;
      build(element);
    });
    element.addEventListener("keydown", (event) => {
      if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      move(KEYS[event.key]);
    });
    element.addEventListener("wheel", (event) => { // with Ctrl or Shift: without, the page scrolls
      if (!event.ctrlKey && !event.shiftKey) return;
      event.preventDefault();
      const width = range[1] - range[0], by = event.deltaY || event.deltaX;
      if (event.shiftKey) return show(range[0] + (width * by) / 1000, range[1] + (width * by) / 1000);
      const plot = charts.get(element).plot, box = plot.over.getBoundingClientRect();
      const at = range[0] + (width * (event.clientX - box.left)) / box.width, factor = by > 0 ? 1.25 : 0.8;
      show(at - (at - range[0]) * factor, at + (range[1] - at) * factor);
    }, { passive: false });
    watcher.observe(element);
  }

  // A page that is served while the run goes on (live.js): new points. Steps that are logged again replace the old ones.
  // Not taken where a curve is new, since its chart is not on the page: then the page is loaded again.
  addEventListener("solotune:curves", (event) => {
    const found = event.detail, run = runs[0], names = Object.keys(found.series);
    if (runs.length !== 1 || !charts.size || names.some((name) => !run.series[name])) return;
    event.preventDefault();
    for (const name of names.filter((name) => !name.startsWith("smoothed_"))) {
      const one = run.series[name], more = found.series[name], average = run.series["smoothed_" + name];
      let kept = one.steps.length;
      while (kept && one.steps[kept - 1] >= more.steps[0]) kept--;
      for (const key of Object.keys(more)) one[key].splice(kept, Infinity, ...more[key]);
      if (!average) continue;
      const weight = 2 / (Math.max(5, one.steps.length / 50) + 1); // as curves.py has it
      average.steps = one.steps.slice();
      average.values.length = kept;
      for (let i = kept; i < one.steps.length; i++) {
        const before = average.values[i - 1], now = one.values[i];
        average.values[i] = before == null ? now : now == null ? null : (1 - weight) * before + weight * now;
      }
    }
    run.resumed.push(...found.resumed);
    run.non_finite.push(...found.non_finite);
    const isWhole = range[1] >= whole[1];
    whole[1] = Math.max(whole[1], found.last_step + Math.max(1, found.last_step * 0.01));
    if (isWhole) range[1] = whole[1];
    show(...range);
  });

  const rebuild = () => charts.forEach((chart, element) => chart.plot && build(element));
  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(rebuild, 120);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuild);
  addEventListener("beforeprint", () => { // on paper: light, and every chart
    document.documentElement.classList.add("printing");
    plots.forEach(build);
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    rebuild();
  });
})();
