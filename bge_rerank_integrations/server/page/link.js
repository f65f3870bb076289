// The input in the fragment of a link. Browsers never send the fragment to a server.

/** A link whose fragment cannot be read. */
export class LinkError extends Error {}

const MAX_LINK_CHARACTERS = 1_000_000; // the shortest limit of the browsers
const MAX_INPUT_BYTES = 64 * 1024 * 1024; // a short link can unpack to much more than it shows

async function pipe(bytes, transform) {
  const stream = new Blob([bytes]).stream().pipeThrough(transform);
  const parts = [];
  let size = 0;
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    size += value.length;
    if (size > MAX_INPUT_BYTES) {
      await reader.cancel();
      throw new LinkError("The link holds more than 64 MiB.");
    }
    parts.push(value);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

function toBase64Url(bytes) {
  const parts = [];
  for (let at = 0; at < bytes.length; at += 8192) parts.push(String.fromCharCode(...bytes.subarray(at, at + 8192)));
  return btoa(parts.join("")).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function fromBase64Url(text) {
  return Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (character) => character.charCodeAt(0));
}

/**
 * Return the fragment for an input, with its `#`.
 *
 * The input is { query, example }, { query, text } or { query, source, passages }, as in main.js. An unchanged example
 * is named by its question, anything else is compressed whole.
 */
export async function writeLink(input) {
  if (input.example) return `#example=${encodeURIComponent(input.query)}`;
  const bytes = await pipe(new TextEncoder().encode(JSON.stringify(input)), new CompressionStream("deflate-raw"));
  const fragment = `#input=${toBase64Url(bytes)}`;
  if (fragment.length > MAX_LINK_CHARACTERS) {
    throw new LinkError("The input is too long for a link. Send the file instead.");
  }
  return fragment;
}

/** Return the input that a fragment holds, or null if it holds none. */
export async function readLink(fragment) {
  const [, kind, value] = /^#(example|input)=(.*)$/s.exec(fragment) ?? [];
  if (!kind) return null;
  try {
    if (kind === "example") return { query: decodeURIComponent(value), example: true };
    const bytes = await pipe(fromBase64Url(value), new DecompressionStream("deflate-raw"));
    return checked(JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes)));
  } catch (error) {
    throw error instanceof LinkError ? error : new LinkError("The link is damaged or incomplete.");
  }
}

/** Return the input with known fields of known types only, since anybody can write a link. */
function checked({ query, text, source, passages }) {
  if (typeof query !== "string") throw new TypeError("query");
  if (typeof text === "string") return { query, text };
  if (typeof source !== "string" || !Array.isArray(passages)) throw new TypeError("passages");
  return {
    query,
    source,
    passages: passages.map((each) => {
      if (typeof each.text !== "string") throw new TypeError("text");
      return {
        text: each.text,
        name: typeof each.name === "string" ? each.name : null,
        score: Number.isFinite(each.score) ? each.score : null,
      };
    }),
  };
}
