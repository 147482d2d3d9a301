// What came back of a request, and why it is what it is.

import { find, make, ms, number, percent } from "./dom.js";

const HUES = { decode: "second", queue: "late", inference: "accent", rest: "other" };

/** `request`: {budgetMs, floor}; `widths`: those of the card, by accuracy, the worst first. */
export function showAnswer(answer, request, widths, tick) {
  find("predictions").replaceChildren(...answer.predictions.map(prediction));
  const used = find("used");
  used.replaceChildren(
    make("strong", {}, `Width ${answer.width}`),
    answer.expected_accuracy === null ? "" : `, right in ${percent(answer.expected_accuracy, 0)} of cases`,
    answer.batch_size > 1 ? `, in a batch of ${answer.batch_size}` : "",
  );
  showTime(answer);
  find("why").textContent = why(answer, request, widths, tick);
  find("widths").replaceChildren(...widths.map((width) => row(width, answer, request)).reverse());
  find("result").hidden = false;
  find("result").classList.remove("old");
  find("problem").hidden = find("empty").hidden = true;
}

/** `use(offer)` is called when somebody takes one of the offers; `loudly`: to be read out. */
export function showRefusal({ problem, retryAfterS }, use, loudly) {
  find("problem").setAttribute("aria-live", loudly ? "assertive" : "off");
  find("problem-title").textContent = problem.status ? `${problem.title} (${problem.status})` : problem.title;
  find("problem-detail").textContent = problem.detail;
  const notes = [];
  if (retryAfterS) notes.push(`Retry-After: ${retryAfterS} s`);
  if (problem.request_id) notes.push(`Request ${problem.request_id}`);
  find("problem-notes").textContent = notes.join(" · ");
  const offers = Array.isArray(problem.widths) ? problem.widths : [];
  find("offers").replaceChildren(...offers.map((offer) => offered(offer, use)));
  find("offers").hidden = !offers.length;
  find("problem").hidden = false;
  find("result").classList.add("old");
  find("empty").hidden = true;
}

/** One sentence for those who listen. */
export function inWords(answer) {
  const [best] = answer.predictions;
  return `${best.label}, ${percent(best.score, 0)}. Width ${answer.width}, ${ms(answer.timing_ms.total)}.`;
}

function prediction({ label, score }) {
  const bar = make("span");
  bar.style.width = `${100 * score}%`;
  return make(
    "li",
    {},
    make("span", { class: "label" }, label),
    make("span", { class: "score" }, percent(score)),
    make("div", { class: "bar", "aria-hidden": "true" }, bar),
  );
}

function showTime({ timing_ms: timing, budget_ms, budget_met, round_trip_ms }) {
  const rest = Math.max(0, timing.total - timing.decode - timing.queue - timing.inference);
  const parts = { decode: timing.decode, queue: timing.queue, inference: timing.inference, rest };
  const whole = Math.max(budget_ms, timing.total);
  find("time").replaceChildren(
    ...Object.entries(parts).map(([name, value]) => {
      const part = make("span", { "data-hue": HUES[name] });
      part.style.width = `${(100 * value) / whole}%`;
      return part;
    }),
  );
  find("time-parts").replaceChildren(
    ...Object.entries(parts).map(([name, value]) => make("li", { "data-hue": HUES[name] }, `${name} ${ms(value)}`)),
  );
  find("time-text").textContent =
    `${budget_met ? "In time" : "Late"}: ${ms(timing.total)} of ${ms(budget_ms)}; ${ms(round_trip_ms)} as this browser saw it.`;
}

/** What the facts say kept the server from a more accurate width. */
function why(answer, { budgetMs, floor }, widths, tick) {
  const place = widths.findIndex(({ width }) => width === answer.width);
  const wider = widths.slice(place + 1).find(({ dominated }) => !dominated);
  if (!wider) return `It is the most accurate there is, and ${ms(budgetMs)} were enough for it.`;
  if (floor !== null && widths[place].level === floor) {
    return `Floor: it is the narrowest that the floor of ${percent(floor)} allows, and ${ms(budgetMs)} or the load leave no room for a wider one.`;
  }
  const { total, inference, queue } = answer.timing_ms;
  const outside = total - inference - queue;
  const one = wider.latency_ms["1"];
  if (one === undefined) return `Width ${wider.width} is more accurate, but is still being warmed.`;
  if (one.p99 + outside > budgetMs) {
    return (
      `Budget: width ${wider.width}, the next more accurate, takes up to ${ms(one.p99)} here when nothing else runs, ` +
      `and everything around it took ${ms(outside)}. That is more than ${ms(budgetMs)}.`
    );
  }
  const slowdown = tick?.interference_ratio ?? 1;
  if (slowdown * one.p99 + outside > budgetMs) {
    return `Interference: batches take ${number(slowdown)} times as long as on an idle machine, and so would width ${wider.width}.`;
  }
  const demand = tick?.full_width_demand_ratio ?? 0;
  return (
    `Load: ${number(tick?.arrival_rate ?? 0)} images a second arrive, ${tick?.queue_depth ?? 0} wait, and all of them at full width ` +
    `would need ${number(demand)} times the device. Wider would have cost other requests more than it gains this one.`
  );
}

function row(width, answer, { budgetMs, floor }) {
  const one = width.latency_ms["1"];
  const used = width.width === answer.width;
  const below = floor !== null && width.level < floor;
  const slow = one !== undefined && one.p50 > budgetMs;
  const said = used ? "used" : below ? "below the floor" : slow ? "over the budget" : width.dominated ? "dominated" : "";
  const cells = [percent(width.accuracy), ms(one?.p50), ms(one?.p99), said];
  const attributes = used ? { "aria-current": "true" } : said ? { class: "out" } : {};
  return make("tr", attributes, make("th", { scope: "row" }, String(width.width)), ...cells.map((cell) => make("td", {}, cell)));
}

function offered(offer, use) {
  const button = make("button", { type: "button" }, "Ask for this");
  button.addEventListener("click", () => use(offer));
  const text = `Width ${offer.width}: ${percent(offer.accuracy)}, from ${ms(offer.latency_ms)}`;
  return make("li", {}, make("span", {}, text), button);
}
