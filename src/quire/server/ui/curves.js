// Curves of the last minutes, made of differences between two answers of /engine/stats. Owns: the samples, what is
// computed from them, and the tiles above the map.

const $ = (id) => document.getElementById(id);
const SPAN_S = 180;
const SHORTEST_S = 30;
const SMOOTH_S = 10; // over which latencies are taken: those of the requests that ended
const NUMBER = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

const rate = (value) => (value >= 100 ? WHOLE.format(value) : NUMBER.format(value));
const count = (value) => WHOLE.format(value);
const percent = (value) => `${NUMBER.format(100 * value)} %`;
const time = (value) => (value >= 1 ? `${NUMBER.format(value)} s` : `${NUMBER.format(1000 * value)} ms`);

const CHARTS = {
  rate: { title: "Tokens/s", lines: ["made", "read"], show: rate },
  queue: { title: "Sequences", lines: ["running", "waiting"], show: count },
  ttft: { title: "Time to first token", lines: ["mean", "p95"], show: time },
  gap: { title: "Between tokens", lines: ["mean", "p95"], show: time },
  e2e: { title: "Whole request", lines: ["mean", "p95"], show: time },
  kv: { title: "KV blocks", lines: ["in use", "cached"], show: percent, top: 1 },
};

/** Mean and 95th percentile of what was observed between two states of a histogram; NaN where nothing was. */
function latency(now, before) {
  const counts = now.counts.map((value, i) => value - before.counts[i]);
  const total = counts.reduce((a, b) => a + b, 0);
  if (total <= 0) return [NaN, NaN];
  let left = 0.95 * total;
  let i = 0;
  while (i < counts.length - 1 && counts[i] < left) left -= counts[i++];
  const low = i ? now.bounds[i - 1] : 0;
  const high = now.bounds[Math.min(i, now.bounds.length - 1)];
  return [(now.sum - before.sum) / total, low + (high - low) * Math.min(1, left / Math.max(1, counts[i]))];
}

export class Curves {
  constructor() {
    this.samples = []; // raw answers
    this.points = []; // {time, rate: [a, b], ...}
    this.charts = Object.entries(CHARTS).map(([name, options]) => new Chart($(`chart-${name}`), name, options));
  }

  take(stats) {
    const last = this.samples.at(-1);
    if (!stats.engine) return;
    if (last && (stats.time <= last.time || stats.engine.received < last.engine.received)) {
      this.samples = []; // another server than before
      this.points = [];
    }
    this.samples.push(stats);
    this.samples = this.samples.filter((one) => one.time > stats.time - SPAN_S);
    this.points = this.points.filter((one) => one.time > stats.time - SPAN_S);
    this.tiles(stats, this.point(stats));
    this.repaint();
  }

  point(stats) {
    const e = stats.engine;
    const before = this.samples.at(-2) ?? stats;
    const older = this.samples.find((one) => one.time >= stats.time - SMOOTH_S);
    const seconds = Math.max(1e-3, stats.time - before.time);
    const per = (name) => Math.max(0, e[name] - before.engine[name]) / seconds;
    const spread = (name) => latency(stats.latencies[name], older.latencies[name]);
    const made = {
      time: stats.time,
      rate: [per("generation_tokens"), per("prompt_tokens")],
      queue: [e.running, e.waiting],
      ttft: spread("ttft"),
      gap: spread("inter_token"),
      e2e: spread("e2e"),
      kv: [e.blocks_used / e.blocks_total, e.blocks_cached / e.blocks_total],
    };
    this.points.push(made);
    return made;
  }

  tiles(stats, point) {
    const e = stats.engine;
    const values = {
      out: rate(point.rate[0]),
      in: rate(point.rate[1]),
      running: count(e.running),
      waiting: count(e.waiting),
      kv: percent(point.kv[0]),
      hits: e.prefix_queries ? percent(e.prefix_hits / e.prefix_queries) : "–",
      preempted: count(e.preemptions),
    };
    for (const [name, text] of Object.entries(values)) {
      const tile = $(`t-${name}`);
      if (tile.textContent !== text) tile.textContent = text;
    }
  }

  repaint() {
    this.charts.forEach((chart) => chart.draw(this.points));
  }
}

class Chart {
  constructor(figure, name, options) {
    this.name = name;
    this.options = options;
    this.points = [];
    this.span = SPAN_S;
    this.x = null; // where somebody points, 0 to 1
    const caption = document.createElement("figcaption");
    const list = document.createElement("ul");
    this.values = options.lines.map((line) => {
      const item = document.createElement("li");
      const value = document.createElement("b");
      item.append(`${line} `, value);
      list.append(item);
      return value;
    });
    caption.append(options.title, list);
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    figure.append(caption, this.canvas);
    this.canvas.addEventListener("pointermove", (event) => {
      this.x = event.offsetX / this.canvas.clientWidth;
      this.draw(this.points);
    });
    this.canvas.addEventListener("pointerleave", () => {
      this.x = null;
      this.draw(this.points);
    });
    new ResizeObserver(() => this.draw(this.points)).observe(this.canvas);
  }

  draw(points) {
    this.points = points;
    const { canvas, name, options } = this;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (!width) return;
    const ratio = devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
    if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const style = getComputedStyle(document.documentElement);
    const ink = (key) => style.getPropertyValue(`--${key}`).trim();
    const all = points.flatMap((point) => point[name]).filter((value) => Number.isFinite(value));
    const top = options.top ?? nice(Math.max(...all, 0));
    const end = points.at(-1)?.time ?? 0;
    this.span = Math.min(SPAN_S, Math.max(SHORTEST_S, end - (points[0]?.time ?? end)));
    const x = (point) => width * (1 - (end - point.time) / this.span);
    const y = (value) => height - 3 - (height - 16) * (value / top);
    this.grid(pen, ink, width, height, top, y);
    options.lines.forEach((_, i) => this.line(pen, points, i, x, y, ink(`curve-${i + 1}`), i === 1));
    this.tell(points, pen, x, height, ink("soft"));
  }

  grid(pen, ink, width, height, top, y) {
    pen.strokeStyle = ink("line");
    pen.lineWidth = 1;
    for (const part of [0, 0.5, 1]) {
      const at = Math.round(y(top * part)) + 0.5;
      pen.beginPath();
      pen.moveTo(0, at);
      pen.lineTo(width, at);
      pen.stroke();
    }
    pen.fillStyle = ink("soft");
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "bottom";
    pen.fillText(this.options.show(top), 0, y(top) - 1);
  }

  line(pen, points, i, x, y, ink, dashed) {
    pen.strokeStyle = pen.fillStyle = ink;
    pen.lineWidth = 1.75;
    pen.lineJoin = "round";
    pen.setLineDash(dashed ? [5, 3] : []);
    pen.beginPath();
    let drawing = false;
    points.forEach((point) => {
      const value = point[this.name][i];
      if (!Number.isFinite(value)) {
        drawing = false;
        return;
      }
      if (drawing) pen.lineTo(x(point), y(value));
      else pen.moveTo(x(point), y(value));
      drawing = true;
    });
    pen.stroke();
    pen.setLineDash([]);
  }

  /** The values at the end, or where somebody points, in words. */
  tell(points, pen, x, height, ink) {
    let point = points.at(-1);
    if (this.x !== null && point) {
      const time = point.time - this.span * (1 - this.x);
      point = points.reduce((best, one) => (Math.abs(one.time - time) < Math.abs(best.time - time) ? one : best));
      pen.strokeStyle = ink;
      pen.lineWidth = 1;
      pen.beginPath();
      pen.moveTo(x(point), 12);
      pen.lineTo(x(point), height);
      pen.stroke();
    }
    const words = this.options.lines.map((line, i) => {
      const value = point ? point[this.name][i] : NaN;
      const text = Number.isFinite(value) ? this.options.show(value) : "–";
      if (this.values[i].textContent !== text) this.values[i].textContent = text;
      return `${line} ${text}`;
    });
    this.canvas.setAttribute("aria-label", `${this.options.title}: ${words.join(", ")}`);
  }
}

/** The next round number. */
function nice(value) {
  if (!(value > 0)) return 1;
  const scale = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * scale).find((step) => step >= value);
}
