// The map of KV blocks. Owns: which part of the pool is shown, the canvas, and the table of requests beside it.
// A cell stands for one block, or for several where the pool is large; then it fills from below.

const $ = (id) => document.getElementById(id);
const NUMBER = new Intl.NumberFormat("en");
const SMALLEST = 5; // px of a cell, with its gap
const LARGEST = 30;
const TALLEST = 260; // px of the map, as long as cells can be made smaller
const WINDOW = 1024; // blocks shown when looking closer, and at the least
const GOLDEN = 137.508;

/** The colour of a request: far from those of its neighbours. */
export function colour(number) {
  const style = getComputedStyle(document.documentElement);
  const lightness = Number(style.getPropertyValue("--held-lightness")) + [0, 0.07, -0.06][number % 3];
  const chroma = style.getPropertyValue("--held-chroma").trim();
  return `oklch(${lightness.toFixed(3)} ${chroma} ${((262 + number * GOLDEN) % 360).toFixed(1)})`;
}

export class BlockMap {
  constructor() {
    this.canvas = $("map");
    this.mine = ""; // the id of the playground's last answer
    this.blocks = null;
    this.cells = [];
    this.cursor = -1;
    this.focus = -1; // a request to point out
    this.window = null; // blocks that are looked at closely
    this.colours = new Map();
    this.rows = new Map();
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    const canvas = this.canvas;
    canvas.addEventListener("pointermove", (event) => this.point(this.at(event)));
    canvas.addEventListener("pointerleave", () => this.point(-1));
    canvas.addEventListener("click", (event) => this.closer(this.at(event)));
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => this.point(-1));
    $("map-view").addEventListener("change", () => this.look(null));
    $("map-back").addEventListener("click", () => this.look(null));
  }

  /** What to ask the server for. */
  get query() {
    if (this.window) return `first=${this.window.first}&count=${this.window.count}`;
    if ($("map-view").value === "all" || !this.blocks) return "first=0&count=0";
    let count = WINDOW;
    while (count <= this.blocks.last) count *= 2;
    return `first=0&count=${Math.min(count, this.blocks.total)}`;
  }

  take(blocks) {
    const before = this.cells;
    const same = this.blocks && this.blocks.first === blocks.first && this.blocks.per_cell === blocks.per_cell;
    this.blocks = blocks;
    this.cells = [];
    for (let i = 0; i < blocks.runs.length; i += 5) {
      const [length, held, cached, owner, holders] = blocks.runs.slice(i, i + 5);
      for (let j = 0; j < length; j++) this.cells.push({ held, cached, owner, holders, fresh: false });
    }
    if (same && before.length === this.cells.length) {
      this.cells.forEach((cell, i) => {
        cell.fresh = cell.held > before[i].held || (cell.held > 0 && cell.owner !== before[i].owner);
      });
    }
    this.summarize();
    this.list();
    this.draw();
    this.describe();
  }

  fail(text) {
    $("map-sub").textContent = text;
  }

  repaint() {
    this.colours.clear();
    this.rows.forEach(({ swatch }, number) => swatch.style.setProperty("--own", this.colour(number)));
    this.draw();
  }

  colour(number) {
    if (!this.colours.has(number)) {
      if (this.colours.size > 1000) this.colours.clear();
      this.colours.set(number, colour(number));
    }
    return this.colours.get(number);
  }

  // -- what is shown -------------------------------------------------------------------------------------------------

  look(window) {
    this.window = window;
    this.cursor = -1;
    $("map-back").hidden = !window;
  }

  closer(index) {
    const { per_cell: size, total, first } = this.blocks ?? {};
    if (index < 0 || !this.blocks || size === 1) return;
    const middle = first + index * size + (size >> 1);
    const count = Math.min(WINDOW, total);
    this.look({ first: Math.max(0, Math.min(middle - (count >> 1), total - count)), count });
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns };
    if (event.key in steps) {
      const next = this.cursor < 0 ? 0 : this.cursor + steps[event.key];
      if (next >= 0 && next < this.cells.length) this.point(next);
    } else if (event.key === "Home" || event.key === "End") {
      this.point(event.key === "Home" ? 0 : this.cells.length - 1);
    } else if (event.key === "Enter") {
      this.closer(this.cursor);
    } else if (event.key === "Escape") {
      this.look(null);
    } else {
      return;
    }
    event.preventDefault();
  }

  at(event) {
    const column = Math.floor(event.offsetX / this.size);
    const index = Math.floor(event.offsetY / this.size) * this.columns + column;
    return column < this.columns && index < this.cells.length ? index : -1;
  }

  point(index) {
    this.cursor = index;
    this.draw();
    this.describe();
  }

  // -- in words ------------------------------------------------------------------------------------------------------

  summarize() {
    const { total, first, count, per_cell: size, block_size } = this.blocks;
    const part = count === total ? `${NUMBER.format(total)} blocks` : `blocks ${NUMBER.format(first)} to ${NUMBER.format(first + count - 1)} of ${NUMBER.format(total)}`;
    const text = `${part} of ${block_size} tokens${size > 1 ? `, ${size} to a cell` : ""}`;
    if ($("map-sub").textContent !== text) $("map-sub").textContent = text;
  }

  describe() {
    const said = $("map-said");
    const cell = this.cells[this.cursor];
    let text = "Point at a cell to see whose it is.";
    if (cell) {
      const { first, per_cell: size, total } = this.blocks;
      const from = first + this.cursor * size;
      const upto = Math.min(from + size, first + this.blocks.count, total);
      const name = upto - from === 1 ? `Block ${NUMBER.format(from)}` : `Blocks ${NUMBER.format(from)} to ${NUMBER.format(upto - 1)}`;
      text = `${name}: ${this.words(cell, upto - from)}`;
    }
    if (said.textContent !== text) said.textContent = text;
  }

  words(cell, blocks) {
    const request = this.blocks.requests.find((one) => one.number === cell.owner);
    const who = request ? `request ${request.number} (${request.state})` : `request ${cell.owner}`;
    if (blocks === 1) {
      if (cell.cached) return "cached, held by nobody";
      if (!cell.held) return "free";
      return `held by ${who}${cell.holders > 1 ? ` and ${cell.holders - 1} more` : ""}`;
    }
    const free = blocks - cell.held - cell.cached;
    const first = cell.held ? `, the first of them by ${who}` : "";
    return `${cell.held} held${first}; ${cell.cached} cached, ${free} free${cell.held ? `; at most ${cell.holders} holders` : ""}`;
  }

  /** The table of requests: rows are kept as long as their request is there. */
  list() {
    const { requests, unlisted } = this.blocks;
    const body = $("holders");
    const gone = new Set(this.rows.keys());
    for (const one of requests) {
      gone.delete(one.number);
      if (!this.rows.has(one.number)) this.rows.set(one.number, this.row(one));
      const { row, cells } = this.rows.get(one.number);
      const values = [one.state, one.prompt_tokens, one.cached_tokens, one.output_tokens, one.blocks, one.shared, one.preemptions];
      values.forEach((value, i) => {
        const text = String(value);
        if (cells[i].textContent !== text) cells[i].textContent = text;
      });
      cells[0].className = `state-${one.state}`;
      row.firstChild.classList.toggle("mine", this.isMine(one));
      if (!row.isConnected) body.append(row);
    }
    for (const number of gone) {
      this.rows.get(number).row.remove();
      this.rows.delete(number);
      if (this.focus === number) this.focus = -1;
    }
    const none = $("holders-none");
    none.hidden = requests.length > 0 && !unlisted;
    none.textContent = unlisted ? `and ${NUMBER.format(unlisted)} more` : "No request is in the engine.";
  }

  isMine(one) {
    return this.mine !== "" && one.id.startsWith(this.mine);
  }

  row(one) {
    const row = document.createElement("tr");
    const name = document.createElement("td");
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.setProperty("--own", this.colour(one.number));
    name.append(swatch, this.isMine(one) ? `${one.number}, yours` : `${one.number}`);
    name.title = one.id;
    const cells = Array.from({ length: 7 }, (_, i) => {
      const cell = document.createElement("td");
      if (i) cell.className = "n";
      return cell;
    });
    row.append(name, ...cells);
    row.addEventListener("pointerenter", () => this.only(one.number));
    row.addEventListener("pointerleave", () => this.only(-1));
    return { row, cells, swatch };
  }

  only(number) {
    this.focus = number;
    this.draw();
  }

  // -- on the canvas -------------------------------------------------------------------------------------------------

  draw() {
    const { canvas, cells } = this;
    const width = canvas.clientWidth;
    if (!width || !cells.length) return;
    this.fit(width, cells.length);
    const height = Math.ceil(cells.length / this.columns) * this.size;
    if (canvas.clientHeight !== height) canvas.style.height = `${height}px`;
    const ratio = devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
    if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const style = getComputedStyle(document.documentElement);
    const ink = Object.fromEntries(
      ["free", "cached", "card", "ink", "mark", "accent"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]),
    );
    pen.font = `600 ${Math.min(12, Math.round(this.size * 0.6))}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    cells.forEach((cell, i) => this.cell(pen, ink, cell, i));
    canvas.dataset.held = String(cells.reduce((sum, cell) => sum + cell.held, 0));
    canvas.dataset.shared = String(cells.filter((cell) => cell.holders > 1).length);
    canvas.dataset.cached = String(cells.reduce((sum, cell) => sum + cell.cached, 0));
  }

  /** The largest cells with which all fit; the smallest where none do. */
  fit(width, count) {
    let size = LARGEST;
    while (size > SMALLEST && Math.ceil(count / Math.floor(width / size)) * size > TALLEST) size--;
    this.size = size;
    this.columns = Math.max(1, Math.floor(width / size));
  }

  cell(pen, ink, cell, i) {
    const gap = this.size > 9 ? 2 : 1;
    const side = this.size - gap;
    const x = (i % this.columns) * this.size;
    const y = Math.floor(i / this.columns) * this.size;
    const blocks = Math.min(this.blocks.per_cell, this.blocks.count - i * this.blocks.per_cell);
    const round = this.size > 9 ? 3 : 1;
    const box = (top, tall) => {
      pen.beginPath();
      pen.roundRect(x, y + top, side, tall, round);
      pen.fill();
    };
    const others = this.focus >= 0 && cell.owner !== this.focus && cell.holders < 2; // shared ones may be its own, too
    pen.globalAlpha = others ? 0.25 : 1;
    pen.fillStyle = ink.free;
    box(0, side);
    const held = (side * cell.held) / blocks;
    const cached = (side * cell.cached) / blocks;
    if (cell.cached) {
      pen.fillStyle = ink.cached;
      box(side - held - cached, cached);
      if (side > 8 && cell.cached === blocks) this.stroke(pen, ink.card, 1.5, [x + 2, y + side - 2, x + side - 2, y + 2]);
    }
    if (cell.held) {
      pen.fillStyle = this.colour(cell.owner);
      box(side - held, held);
    }
    if (cell.holders > 1) {
      pen.fillStyle = ink.mark;
      if (side > 10) pen.fillText(cell.holders > 99 ? "+" : String(cell.holders), x + side / 2, y + side / 2 + 0.5);
      else pen.fillRect(x + side / 2 - 1, y + side / 2 - 1, 2, 2);
    }
    if (cell.fresh && side > 3) {
      pen.strokeStyle = ink.ink;
      pen.lineWidth = 1.5;
      pen.strokeRect(x + 0.75, y + 0.75, side - 1.5, side - 1.5);
    }
    if (i === this.cursor) {
      pen.globalAlpha = 1;
      pen.strokeStyle = ink.accent;
      pen.lineWidth = 2;
      pen.strokeRect(x - 0.5, y - 0.5, side + 1, side + 1);
    }
    pen.globalAlpha = 1;
  }

  stroke(pen, style, width, [x0, y0, x1, y1]) {
    pen.strokeStyle = style;
    pen.lineWidth = width;
    pen.beginPath();
    pen.moveTo(x0, y0);
    pen.lineTo(x1, y1);
    pen.stroke();
  }
}
