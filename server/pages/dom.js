// Elements are made here and nowhere else, from text alone: labels and file names are never parsed as HTML.

export const find = (id) => document.getElementById(id);

export function make(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function makeSvg(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const NBSP = "\u00a0";

export const percent = (share, digits = 1) => (share == null ? "–" : `${(100 * share).toFixed(digits)}${NBSP}%`);
export const ms = (value) => (value == null ? "–" : `${number(value)}${NBSP}ms`);

/** Three digits at most, as many as a reader can use. */
export function number(value) {
  if (value == null) return "–";
  if (value === 0 || Math.abs(value) >= 100) return value.toFixed(0);
  return value.toFixed(Math.abs(value) >= 10 ? 1 : 2).replace(/\.?0+$/, "");
}
