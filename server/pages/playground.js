// The playground: what a visitor sets, what is sent, and the live numbers.

import { inWords, showAnswer, showRefusal } from "./answer.js";
import * as api from "./api.js";
import { Chart } from "./charts.js";
import { find, make, ms, number, percent } from "./dom.js";

const KEPT = 120; // ticks
const SETTLE_MS = 200; // after the last move of a slider
const MAX_OPEN = 4; // requests at once while sending goes on: a browser has six connections, one of them listens
const SHOW_EVERY_MS = 250; // while sending goes on
const ANSWERING_MS = 1000; // since the last answer that was shown, while sending goes on
const MAX_RETRY_S = 15;

let image = null; // a Blob
let widths = []; // of the card, the least accurate first; `level` is what a floor is compared with
let ticks = [];
let charts = [];
let sent = 0; // to tell an older answer from a newer one
let shown = 0;

// ---- the controls

const budgetMs = () => Number((10 ** (find("budget").value / 40)).toPrecision(2));
const floor = () => levels()[find("floor").value - 1] ?? null;
const levels = () => [...new Set(widths.map(({ level }) => level))];

function showControls() {
  find("budget-value").textContent = ms(budgetMs());
  find("budget").setAttribute("aria-valuetext", `${number(budgetMs())} milliseconds`);
  find("floor").max = levels().length;
  const least = floor() === null ? "none" : `${percent(floor())}, width ${widths.find(({ level }) => level >= floor()).width}`;
  find("floor-value").textContent = least;
  find("floor").setAttribute("aria-valuetext", least);
}

const foresee = settled(async () => {
  try {
    const quote = await api.quote(budgetMs());
    find("foresight").textContent = quote.admitted
      ? `Now ${ms(quote.budget_ms)} would get width ${quote.width}${accuracyOf(quote)}, in time with a chance of ${percent(quote.chance, 0)}.`
      : `Now ${ms(quote.budget_ms)} would be refused. ${quote.reason}`;
  } catch (refusal) {
    find("foresight").textContent = "";
    askForKey(refusal);
  }
});

const accuracyOf = ({ expected_accuracy: accuracy }) => (accuracy === null ? "" : ` (${percent(accuracy)})`);

const sendSettled = settled(() => image && !keeping && send());

/** `act`, once it has not been asked for during a moment. */
function settled(act) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, SETTLE_MS);
  };
}

for (const id of ["budget", "floor"]) {
  find(id).addEventListener("input", () => {
    showControls();
    foresee();
    sendSettled();
  });
}

/** An offer of the server: as much budget and as low a floor as its width needs. */
function take(offer) {
  const enough = Math.ceil(40 * Math.log10(1.5 * offer.latency_ms));
  find("budget").value = Math.max(find("budget").value, enough);
  if (floor() !== null && floor() > (offer.accuracy ?? offer.width)) {
    find("floor").value = levels().findIndex((level) => level >= (offer.accuracy ?? offer.width)) + 1;
  }
  showControls();
  foresee();
  find("budget").focus(); // the button goes away with the offer
  send();
}

// ---- the image

for (const id of ["file", "camera"]) {
  find(id).addEventListener("change", (event) => choose(event.target.files));
}
find("drop").addEventListener("dragover", () => find("drop").classList.add("over"));
for (const end of ["dragleave", "drop"]) {
  find("drop").addEventListener(end, () => find("drop").classList.remove("over"));
}
addEventListener("dragover", (event) => event.preventDefault()); // a miss must not make the browser leave the page
addEventListener("drop", (event) => {
  event.preventDefault();
  choose(event.dataTransfer.files);
});
addEventListener("paste", (event) => choose(event.clipboardData.files));

function choose(files) {
  if (!files.length) return;
  image = files[0];
  const preview = find("preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(image);
  preview.hidden = false;
  const more = files.length > 1 ? `, the first of ${files.length}` : "";
  find("chosen").textContent = `${image.name}${more} (${number(image.size / 1024)} KiB)`;
  find("send").textContent = "Send again";
  find("send").disabled = find("keep").disabled = false;
  if (!keeping) send();
}
find("preview").addEventListener("error", () => (find("preview").hidden = true)); // the server may read it all the same

// ---- sending

find("send").addEventListener("click", () => send());

/** One request, shown and said when it has come back unless a newer one has. The refusal, if it was one. */
async function send({ quietly = false } = {}) {
  const turn = ++sent;
  const request = { budgetMs: budgetMs(), floor: floor() };
  try {
    const answer = await api.classify(image, request.budgetMs, request.floor);
    if (turn < shown || (quietly && !due())) return null;
    shown = turn;
    showAnswer(answer, request, widths, ticks.at(-1));
    if (!quietly) say(inWords(answer));
    return null;
  } catch (refusal) {
    if (!(refusal instanceof api.Refusal)) throw refusal;
    askForKey(refusal);
    // Of those sent on and on, a refusal for load comes at once and overtakes answers: it must not hide them.
    const passing = quietly && refusal.status === 429;
    if (turn >= shown && !(passing && performance.now() - shownAt < ANSWERING_MS)) {
      if (!passing) shown = turn;
      showRefusal(refusal, take, !quietly);
    }
    return refusal;
  } finally {
    if (!quietly) foresee();
  }
}

let shownAt = -Infinity; // when an answer was, while sending goes on

function due() {
  if (performance.now() - shownAt < SHOW_EVERY_MS) return false;
  shownAt = performance.now();
  return true;
}

function say(text) {
  find("said").textContent = text;
}

// ---- sending on and on

let keeping = null; // the timer
let open = 0;
let pausedUntil = 0;
let tally = {};

find("keep").addEventListener("click", () => (keeping ? stop() : start()));
find("rate").addEventListener("change", () => keeping && start());

function start() {
  clearInterval(keeping);
  tally = { sent: 0, answered: 0, refused: 0, failed: 0, skipped: 0 };
  pausedUntil = 0;
  keeping = setInterval(sendOne, 1000 / find("rate").value);
  find("keep").textContent = "Stop sending";
  find("keep").setAttribute("aria-pressed", "true");
  say("Sending.");
}

function stop() {
  clearInterval(keeping);
  keeping = null;
  find("keep").textContent = "Keep sending";
  find("keep").setAttribute("aria-pressed", "false");
  say(`Stopped. ${find("tally").textContent}`);
  foresee();
}

async function sendOne() {
  if (open >= MAX_OPEN || performance.now() < pausedUntil) {
    tally.skipped += 1;
    showTally();
    return;
  }
  open += 1;
  tally.sent += 1;
  const counted = tally;
  const refusal = await send({ quietly: true });
  open -= 1;
  if (!refusal) counted.answered += 1;
  else if (refusal.status === 429) counted.refused += 1;
  else counted.failed += 1;
  // Refusals for load do not stop it: they are what one wants to see. Where there is no server it waits.
  if (refusal?.status === 0 || refusal?.status === 503) pausedUntil = performance.now() + 1000;
  showTally();
  if (keeping && (refusal?.status === 401 || refusal?.status === 403)) stop();
}

function showTally() {
  const { sent, answered, refused, failed, skipped } = tally;
  const parts = [`${sent} sent`, `${answered} answered`, `${refused} refused for load`, `${failed} failed`];
  if (skipped) parts.push(`${skipped} left out, as ${MAX_OPEN} were open or nobody serves`);
  find("tally").textContent = `${parts.join(", ")}.`;
}

// ---- the key

/** For want of one, or because the one that was kept is no good any more. */
function askForKey({ status }) {
  if (![401, 403].includes(status) || !find("key-form").hidden) return;
  find("key-form").hidden = false;
  find("key").focus();
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.rememberKey(find("key").value);
  find("key").value = "";
  find("key-form").hidden = true;
  wake();
  if (image) send();
});

// ---- the live numbers

const share = (tick, width) => {
  const all = Object.values(tick.widths).reduce((sum, count) => sum + count, 0);
  return all ? countOf(tick, width) / all : null;
};
const countOf = ({ widths: counts }, width) => Object.entries(counts).find(([name]) => Number(name) === width)?.[1] ?? 0;
const rate = (...outcomes) => (tick) => rounded(outcomes.reduce((sum, outcome) => sum + tick.outcomes[outcome], 0) / tick.seconds);
const rounded = (value) => Math.round(10 * value) / 10;
const debt = (tick) => (tick.latency_ms === null ? null : tick.accuracy_debt_points);

function makeCharts() {
  const byWidth = widths.map(({ width }, i) => ({
    name: String(width),
    hue: "width",
    share: widths.length > 1 ? i / (widths.length - 1) : 1,
    value: (tick) => share(tick, width),
  }));
  charts = [
    new Chart({
      title: "Requests",
      note: "a second",
      bars: true,
      series: [
        { name: "in time", hue: "good", value: rate("met") },
        { name: "late", hue: "late", value: rate("missed", "expired") },
        { name: "refused", hue: "bad", value: rate("shed") },
        { name: "other", hue: "other", value: rate("impossible", "cancelled") },
      ],
    }),
    new Chart({ title: "Width mix", note: "share of images", bars: true, ratio: true, fixed: true, series: byWidth }),
    new Chart({
      title: "Latency",
      note: "of the last ten seconds' answers",
      unit: " ms",
      series: [
        { name: "p50", hue: "accent", value: (tick) => tick.latency_ms?.p50 ?? null },
        { name: "p99", hue: "second", value: (tick) => tick.latency_ms?.p99 ?? null },
      ],
    }),
    new Chart({
      title: "Attainment",
      note: "answered in time, ten seconds",
      ratio: true,
      fixed: true,
      series: [{ name: "in time", hue: "good", value: (tick) => tick.attainment }],
    }),
    new Chart({
      title: "Accuracy given away",
      note: "for load and budgets",
      unit: " points",
      series: [{ name: "debt", hue: "late", value: debt }],
    }),
    new Chart({
      title: "Load",
      note: "1 is the whole device",
      mark: 1,
      series: [
        { name: "demand at full width", hue: "second", value: (tick) => tick.full_width_demand_ratio },
        { name: "busy", hue: "accent", value: (tick) => tick.engine_busy_ratio },
      ],
    }),
  ];
  find("charts").replaceChildren(...charts.map(({ figure }) => figure));
}

function draw() {
  const tick = ticks.at(-1);
  if (!tick) return;
  const tiles = {
    "Arriving": [tick.arrival_rate.toFixed(1), "images/s"],
    "Waiting": [String(tick.queue_depth), "images"],
    "Engine busy": [percent(tick.engine_busy_ratio, 0), ""],
    "Interference": [`× ${number(tick.interference_ratio)}`, ""],
    "Expected accuracy": [percent(tick.expected_accuracy_ratio), ""],
  };
  find("tiles").replaceChildren(
    ...Object.entries(tiles).map(([name, [value, unit]]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, `${value} `, make("small", {}, unit))),
    ),
  );
  for (const chart of charts) chart.draw(ticks);
  const rows = charts.flatMap((chart) => chart.rows());
  find("numbers").replaceChildren(
    ...rows.map(([name, ...cells]) =>
      make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => make("td", {}, cell))),
    ),
  );
}

function showState(text, kind) {
  const state = find("state");
  if (state.textContent === text) return; // it is read out at each change
  state.textContent = text;
  state.dataset.kind = kind;
}

async function loadModel() {
  const card = await api.model();
  const known = widths.map(({ width }) => width).join();
  widths = card.widths.map((width) => ({ ...width, level: width.accuracy ?? width.width }));
  widths.sort((one, other) => one.level - other.level);
  find("model").textContent = `${card.name} · ${card.classes.length} classes · ${card.image_size} px`;
  if (widths.map(({ width }) => width).join() !== known) makeCharts();
  showControls();
  foresee();
}

const isWarm = () => widths.every(({ latency_ms }) => "1" in latency_ms);

/** Listen until the server ends it or is gone. The first events are the last two minutes. */
async function listen() {
  await loadModel();
  ticks = [];
  for await (const more of api.events()) {
    ticks = [...ticks, ...more].slice(-KEPT);
    const tick = ticks.at(-1);
    if (!tick) continue;
    if (tick.state === "ready" && !isWarm()) await loadModel();
    showState(tick.state === "ready" ? "Ready" : sentence(tick.state), tick.state === "ready" ? "ready" : "wait");
    requestAnimationFrame(draw);
  }
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

let wake = () => {};

/** Until the page is left: listen, and when that ends try again, ever less often. */
async function keepListening() {
  for (let waitS = 1; ; waitS = Math.min(2 * waitS, MAX_RETRY_S)) {
    try {
      const before = performance.now();
      await listen();
      if (performance.now() - before > 5000) waitS = 0.5;
      showState("The server ended the connection", "lost");
    } catch (error) {
      if (error instanceof api.Refusal) askForKey(error);
      else if (!(error instanceof TypeError)) throw error; // what a stream that breaks off ends with
      showState(error.status ? error.message : "Connection lost", "lost");
      if ([401, 403].includes(error.status)) waitS = MAX_RETRY_S;
    }
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, 1000 * waitS);
    });
  }
}

showControls();
keepListening();
