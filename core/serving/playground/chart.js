// A number of the last two minutes, as a line.

import { el, svg } from "./dom.js";

const POINTS = 120;
const [WIDTH, HEIGHT] = [240, 60];

export class Chart {
  constructor(name, unit, { top = null, format }) {
    [this.name, this.unit, this.top, this.format] = [name, unit, top, format];
    this.values = [];
    this.value = el("p", { class: "value" }, "–");
    this.line = svg("path", { class: "line" });
    this.fill = svg("path", { class: "fill" });
    this.picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${name}: no numbers yet` },
      svg("line", { class: "base", x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT }), this.fill, this.line);
    this.node = el("section", { class: "card" }, el("h2", {}, name), this.value, this.picture);
  }

  add(value) {
    this.values = [...this.values, value].slice(-POINTS);
    this.value.replaceChildren(this.format(value), el("small", {}, this.unit));
    const most = this.top ?? Math.max(1, ...this.values) * 1.15;
    const step = WIDTH / (POINTS - 1);
    const from = WIDTH - step * (this.values.length - 1);
    const points = this.values.map((one, i) => `${(from + i * step).toFixed(1)} ${(HEIGHT * (1 - Math.min(one / most, 1))).toFixed(1)}`);
    this.line.setAttribute("d", `M${points.join("L")}`);
    this.fill.setAttribute("d", `M${from.toFixed(1)} ${HEIGHT}L${points.join("L")}L${WIDTH} ${HEIGHT}Z`);
    this.picture.setAttribute("aria-label", `${this.name}: now ${this.format(value)} ${this.unit}, at most ${this.format(Math.max(...this.values))} in the last two minutes`);
  }
}
