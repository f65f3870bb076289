// The API key. The browser keeps it for this tab and this server only.

const NAME = `bge-rerank-key ${new URL(".", document.baseURI).pathname}`;

/** Return the key, or an empty string. */
export function readKey() {
  try {
    return sessionStorage.getItem(NAME) ?? "";
  } catch {
    return ""; // storage is switched off
  }
}

/** Keep the key; an empty one is forgotten. */
export function keepKey(key) {
  try {
    if (key) sessionStorage.setItem(NAME, key);
    else sessionStorage.removeItem(NAME);
  } catch {
    // Storage is switched off, so the key lives as long as its field.
  }
}
