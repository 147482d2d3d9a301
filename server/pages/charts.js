// Small charts of the last two minutes, in SVG. The plot is stretched to the width that there is; its words are HTML.

import { make, makeSvg, number, percent } from "./dom.js";

const SPAN_S = 120;
const HEIGHT = 100;
const GAP_S = 3; // without a tick for longer, a line is broken

/**
 * One chart. `series`: `{name, hue, share, value(tick)}`, where `value` is null for nothing to show.
 * `bars` stacks them, in columns as wide as their ticks; else they are lines. `unit` is said after numbers;
 * a `ratio` is said in percent. `fixed`: the plot ends at `top`. `top`: least value at the top of the plot, `mark`: value of a dashed line.
 */
export class Chart {
  constructor({ title, note = "", series, bars = false, unit = "", ratio = false, top = 1, mark = null, fixed = false }) {
    Object.assign(this, { title, series, bars, unit, ratio, top, mark, fixed });
    this.ticks = [];
    this.svg = makeSvg("svg", { viewBox: `0 0 ${SPAN_S} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.axis = make("div", { class: "axis", "aria-hidden": "true" });
    this.values = series.map(() => make("b", {}, "–"));
    const legend = make("ul", { class: "legend" });
    series.forEach((each, i) => legend.append(hued(make("li", {}, make("span", {}, each.name), this.values[i]), each)));
    const when = make("div", { class: "when", "aria-hidden": "true" }, make("span", {}, "2 min ago"), make("span", {}, "now"));
    this.figure = make(
      "figure",
      {},
      make("figcaption", {}, `${title} `, make("span", { class: "quiet" }, note)),
      legend,
      make("div", { class: "plot" }, this.svg, this.axis, when),
    );
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.draw(this.ticks));
  }

  draw(ticks) {
    this.ticks = ticks;
    const rows = this.series.map((each) => ticks.map(each.value));
    const largest = Math.max(this.top, ...(this.bars ? sums(rows) : rows.flat()));
    const top = this.fixed ? this.top : roundedUp(largest);
    const y = (value) => HEIGHT * (1 - Math.min(value, top) / top);
    const levels = [top, top / 2, 0];
    const shapes = levels.slice(0, 2).map((level) => across("grid", y(level)));
    const paths = this.bars ? columns(ticks, rows, y) : rows.map((row) => line(ticks, row, y));
    paths.forEach((d, i) => shapes.push(hued(makeSvg("path", { class: this.bars ? "area" : "line", d }), this.series[i])));
    if (this.mark !== null && this.mark <= top) shapes.push(across("mark", y(this.mark)));
    this.svg.replaceChildren(...shapes);
    this.svg.setAttribute("aria-label", this.#inWords());
    this.axis.replaceChildren(...levels.map((level) => make("span", {}, this.ratio ? percent(level, 0) : number(level))));
    this.#show(ticks.length - 1);
  }

  #show(i) {
    this.series.forEach((each, s) => {
      this.values[s].textContent = this.#said(i >= 0 ? each.value(this.ticks[i]) : null);
    });
  }

  /** The values at the pointer take the place of the newest, and a line shows where it is. */
  #point(event) {
    if (!this.ticks.length) return;
    const { left, width } = this.svg.getBoundingClientRect();
    const at = this.ticks.at(-1).at - SPAN_S * (1 - (event.clientX - left) / width);
    const found = this.ticks.findIndex((tick) => tick.at >= at);
    const i = found < 0 ? this.ticks.length - 1 : found;
    const x = place(this.ticks, i);
    this.svg.querySelector(".cursor")?.remove();
    this.svg.append(makeSvg("line", { class: "cursor", x1: x, x2: x, y1: 0, y2: HEIGHT }));
    this.#show(i);
  }

  #said(value) {
    if (value == null) return "–";
    return this.ratio ? percent(value, value === 0 || value === 1 ? 0 : 1) : `${number(value)}${this.unit}`;
  }

  /** Rows of a table: name, newest, least, most. */
  rows() {
    return this.series.map((each) => {
      const seen = this.ticks.map(each.value).filter((value) => value !== null);
      const newest = this.ticks.length ? each.value(this.ticks.at(-1)) : null;
      const ends = seen.length ? [Math.min(...seen), Math.max(...seen)] : [null, null];
      return [`${this.title}: ${each.name}`, ...[newest, ...ends].map((value) => this.#said(value))];
    });
  }

  #inWords() {
    const told = this.rows().map(([name, now, least, most]) => `${name.slice(this.title.length + 2)} ${now}, from ${least} to ${most}`);
    return `${this.title} in the last two minutes. ${told.join("; ")}.`;
  }
}

function hued(element, { hue, share }) {
  element.dataset.hue = hue;
  if (share !== undefined) element.style.setProperty("--share", `${100 * share}%`);
  return element;
}

const place = (ticks, i) => SPAN_S - (ticks.at(-1).at - ticks[i].at);
const across = (kind, y) => makeSvg("line", { class: kind, x1: 0, x2: SPAN_S, y1: y, y2: y });
const sums = (rows) => (rows[0] ?? []).map((_, i) => rows.reduce((sum, row) => sum + (row[i] ?? 0), 0));

/** 1, 2 or 5 times a power of ten: the next that is not smaller. */
function roundedUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * 0.9999);
}

function columns(ticks, rows, y) {
  const below = ticks.map(() => 0);
  return rows.map((row) => {
    let d = "";
    row.forEach((value, i) => {
      if (!value) return;
      const [right, bottom, top] = [place(ticks, i), y(below[i]), y((below[i] += value))];
      const left = Math.max(0, right - Math.min(ticks[i].seconds, GAP_S));
      if (right > 0) d += `M${left.toFixed(2)} ${bottom.toFixed(2)}V${top.toFixed(2)}H${right.toFixed(2)}V${bottom.toFixed(2)}Z`;
    });
    return d;
  });
}

function line(ticks, row, y) {
  let [d, before] = ["", -Infinity];
  row.forEach((value, i) => {
    const x = place(ticks, i);
    if (value === null || x < 0) return;
    const point = `${x.toFixed(2)} ${y(value).toFixed(2)}`;
    d += ticks[i].at - before > GAP_S ? `M${point}h0` : `L${point}`;
    before = ticks[i].at;
  });
  return d;
}
