// Requests to the server that this page came from.

/** A request that got no result. `kind` is "unreachable", "refused" or "unusable". */
export class RequestError extends Error {
  constructor(kind, message, { status = 0, retryAfterS = null } = {}) {
    super(message);
    this.kind = kind;
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** Return the server's base URL, without a slash at the end. */
export function baseUrl() {
  return new URL(".", document.baseURI).href.replace(/\/$/, "");
}

async function send(path, key, options) {
  const headers = { accept: "application/json" };
  if (key) {
    if (!/^[!-~]+$/.test(key)) {
      throw new RequestError("refused", "The API key must be printable ASCII without spaces.", { status: 401 });
    }
    headers.authorization = `Bearer ${key}`;
  }
  let response;
  let text;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...options.headers }, cache: "no-store" });
    text = await response.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("unreachable", "The server does not answer. Is it still running?");
  }
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // A proxy may answer with something else.
  }
  if (response.ok && body !== null) return body;
  if (response.ok) throw new RequestError("unusable", "The answer is not JSON. Is this a bge-rerank server?");
  const retryAfter = Number.parseFloat(response.headers.get("retry-after") ?? "");
  const told = typeof body?.message === "string" && body.message ? body.message : `the server answered with status ${response.status}`;
  throw new RequestError("refused", `${told[0].toUpperCase()}${told.slice(1)}.`, {
    status: response.status,
    retryAfterS: Number.isFinite(retryAfter) ? retryAfter : null,
  });
}

/** Return the JSON at a path relative to this page. */
export function get(path, { key = "", signal } = {}) {
  return send(path, key, { signal });
}

/**
 * Rank passages.
 *
 * Returns the model's name, the passages in their new order with raw logits, the counts, and the milliseconds from
 * sending the request until the whole answer was read.
 */
export async function rank(query, texts, { key = "", signal } = {}) {
  const started = performance.now();
  const body = await send("v1/rank", key, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ requests: [[query, texts]] }),
    signal,
  });
  const milliseconds = performance.now() - started;
  const ranking = body.rankings?.[0];
  const isRanking = Array.isArray(ranking?.passages) && ranking.passages.every(({ index }) => index in texts) && ranking.counts;
  if (!isRanking || ranking.passages.length !== texts.length) {
    throw new RequestError("unusable", "The answer is not a ranking. Is this a bge-rerank server?");
  }
  return { model: body.model, passages: ranking.passages, counts: ranking.counts, milliseconds };
}
