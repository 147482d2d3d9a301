// Talks to the server that this page came from. Addresses are relative, so that a prefix before them does no harm.

const KEY = "scala-serve-key";

/** An answer that is none: a problem (RFC 9457) of the server, or status 0 where it could not be reached. */
export class Refusal extends Error {
  constructor(problem, retryAfterS = 0) {
    super(problem.detail);
    this.problem = problem;
    this.retryAfterS = retryAfterS;
  }

  get status() {
    return this.problem.status;
  }
}

export function rememberKey(key) {
  sessionStorage.setItem(KEY, key);
}

export const model = async () => (await ask("v1/model")).json();

export const quote = async (budgetMs) => (await ask(`v1/quote?budget_ms=${budgetMs}`)).json();

/** `image` is a Blob, sent as it is; `floor` a fraction, or null for none. */
export async function classify(image, budgetMs, floor) {
  const headers = { "X-Latency-Budget-Ms": String(budgetMs) };
  if (floor !== null) headers["X-Min-Accuracy"] = String(floor);
  const started = performance.now();
  const reply = await ask("v1/classify", { method: "POST", body: image, headers });
  const answer = await reply.json();
  return { ...answer, round_trip_ms: performance.now() - started };
}

/** Yields lists of ticks as they come in; ends when the server ends it. `EventSource` could not send a key. */
export async function* events() {
  const reply = await ask("v1/events");
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    yield whole.filter((event) => event.startsWith("data: ")).map((event) => JSON.parse(event.slice(6)));
  }
}

async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let reply;
  try {
    reply = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch {
    const detail = "The server cannot be reached: is it running, and is there a network?";
    throw new Refusal({ status: 0, title: "No connection", detail });
  }
  if (reply.ok) return reply;
  // The key was given while this was on its way: it must not be asked for again.
  if ([401, 403].includes(reply.status) && sessionStorage.getItem(KEY) !== key) return ask(path, options);
  throw new Refusal(await problemOf(reply), Number(reply.headers.get("Retry-After")) || 0);
}

/** What a proxy between us says is no problem object. */
async function problemOf(reply) {
  const text = await reply.text();
  try {
    const problem = JSON.parse(text);
    if (typeof problem.detail === "string") return { ...problem, status: reply.status };
  } catch {
    // not JSON
  }
  return { status: reply.status, title: reply.statusText || "Error", detail: text.slice(0, 300) || "No more is known." };
}
