// The page: takes the input, asks the server, and shows what came of it.
//
// The input is one of
//   { query, example }             an unchanged example; `example` is { query, passages }
//   { query, text }                typed passages
//   { query, source, passages }    passages of a file, and its name

import { get, rank, RequestError } from "./api.js";
import { comparison, labelOf, toRows } from "./compare.js";
import { byId, counted, element } from "./dom.js";
import { keepKey, readKey } from "./key.js";
import { LinkError, readLink } from "./link.js";
import { FileError, joinText, readFile, splitText } from "./passages.js";
import { sharing } from "./share.js";

const LOADING_POLL_MS = 1000;

const form = byId("form");
const queryField = byId("query");
const textField = byId("passages");
const exampleField = byId("example");
const keyField = byId("key");
const runButton = byId("run");

let examples = [];
let loaded = null; // { source, passages } of a file or { example, source, passages }; null while text is typed
let running = null; // the AbortController of the request under way

// ---- Input

function passages() {
  return loaded?.passages ?? splitText(textField.value);
}

function currentInput() {
  const query = queryField.value.trim();
  if (!loaded) return { query, text: textField.value };
  if (loaded.example && query === loaded.example.query) return { query, example: loaded.example };
  return { query, source: loaded.source, passages: loaded.passages };
}

function show(input) {
  queryField.value = input.query;
  loaded = null;
  textField.value = input.text ?? "";
  if (input.example) loaded = { example: input.example, source: "the example, in BM25 order", passages: input.example.passages };
  if (input.passages) loaded = { source: input.source, passages: input.passages };
  exampleField.value = input.example ? input.query : "";
  showPassages();
}

function showPassages() {
  textField.hidden = loaded !== null;
  byId("text-hint").hidden = loaded !== null;
  byId("loaded").hidden = byId("loaded-hint").hidden = loaded === null;
  const found = passages();
  byId("loaded-source").textContent = loaded ? `${counted(found.length, "passage")} from ${loaded.source}` : "";
  byId("passages-count").textContent = loaded || !found.length ? "" : counted(found.length, "passage");
}

async function drop(files) {
  hideError();
  if (files.length > 1) return showError("Drop one file at a time.");
  const [file] = files;
  try {
    const { text, passages: read } = await readFile(file);
    exampleField.value = "";
    loaded = read ? { source: file.name, passages: read } : null;
    if (!read) textField.value = text;
    showPassages();
  } catch (error) {
    if (!(error instanceof FileError)) throw error;
    showError(`${file.name}: ${error.message}`);
  }
}

// ---- Errors

function showError(message, { retry = false } = {}) {
  const box = byId("error");
  box.hidden = false;
  box.replaceChildren(
    element("p", {}, message),
    ...(retry ? [element("button", { type: "button", class: "link", onclick: run }, "Try again")] : []),
  );
}

function hideError() {
  byId("error").hidden = true;
  byId("error").replaceChildren();
}

function showRequestError(error) {
  const wait = error.retryAfterS ? ` The server asks to wait ${counted(error.retryAfterS, "second")}.` : "";
  showError(`${error.message}${wait}`, { retry: error.kind === "unreachable" || [429, 503, 504].includes(error.status) });
  if (error.status === 401) {
    byId("key-details").open = true;
    keyField.focus();
  }
}

// ---- Ranking

async function run() {
  if (running) {
    running.abort();
    return;
  }
  hideError();
  const input = currentInput();
  const ranked = passages();
  const firstStage = loaded?.example ? "BM25 order" : "input order";
  if (!input.query) return missing(queryField, "Write a question first.");
  if (!ranked.length) return missing(textField, "Add at least one passage.");
  const own = (running = new AbortController());
  runButton.textContent = "Stop";
  setBusy(true);
  try {
    const texts = ranked.map(({ text }) => text);
    const answer = await rank(input.query, texts, { key: keyField.value, signal: own.signal });
    showServer(answer.model, "ready");
    showResults(input, ranked, firstStage, answer);
  } catch (error) {
    if (error instanceof RequestError) showRequestError(error);
    else if (error.name !== "AbortError") throw error;
  } finally {
    if (running === own) {
      running = null;
      runButton.textContent = "Rerank";
      setBusy(false);
    }
  }
}

function setBusy(isBusy) {
  if (isBusy) byId("results").setAttribute("aria-busy", "true");
  else byId("results").removeAttribute("aria-busy");
}

/** Run again with another input. */
function rerun() {
  running?.abort();
  running = null;
  run();
}

function missing(field, message) {
  showError(message);
  field.focus();
}

// ---- Results

function showResults(input, ranked, firstStage, answer) {
  const rows = toRows(ranked, answer.passages);
  const { num_tokens: tokens, num_truncated: truncated, num_truncated_queries: cutQueries } = answer.counts;
  const first = rows[0];
  const was = first.before === 1 ? "as before" : `was ${first.before}`;
  const headline = `First: ${labelOf(first)}, ${was}`;
  const milliseconds = Math.max(1, Math.round(answer.milliseconds));
  const figures = [
    ["Passages", rows.length.toLocaleString("en")],
    ["Tokens", tokens.toLocaleString("en")],
    ["Milliseconds", milliseconds.toLocaleString("en")],
    ["Truncated", truncated.toLocaleString("en")],
  ];
  byId("output").replaceChildren(
    element(
      "div",
      { class: "card verdict" },
      element(
        "div",
        {},
        element("p", { class: "hint" }, first.before === 1 ? "First, as before" : `First now, was ${first.before}`),
        element("p", { class: "winner", dir: "auto" }, labelOf(first)),
      ),
      element("dl", { class: "figures" }, ...figures.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))),
    ),
    ...(cutQueries ? [element("p", { class: "notice" }, "The question is too long. The model did not read its end.")] : []),
    element("div", { class: "card" }, comparison(rows, firstStage)),
    element("div", { class: "card" }, ...sharing(input, ranked, keyField.value !== "")),
  );
  byId("summary").textContent =
    `${headline}. ${counted(rows.length, "passage")}, ${counted(tokens, "token")}, ${counted(milliseconds, "millisecond")}, ` +
    `${truncated.toLocaleString("en")} truncated.`;
}

// ---- Server

function showServer(model, state) {
  const names = { ready: "", loading: "loading the model…", locked: "needs an API key", gone: "does not answer" };
  byId("server").className = `server ${state}`;
  byId("server").textContent = [model, names[state]].filter(Boolean).join(" · ");
}

/** Wait until the model is loaded. Returns whether a ranking can work now. */
async function connect() {
  for (;;) {
    try {
      const { data } = await get("v1/models", { key: keyField.value });
      showServer(data?.[0]?.id ?? "", "ready");
      return true;
    } catch (error) {
      if (!(error instanceof RequestError)) throw error;
      if (error.status !== 503) {
        showServer("", error.status === 401 ? "locked" : "gone");
        byId("key-details").open ||= error.status === 401;
        return false;
      }
      showServer("", "loading");
      await new Promise((resolve) => setTimeout(resolve, LOADING_POLL_MS));
    }
  }
}

/** Show the input of the address, or else the first example. */
async function openAddress() {
  let input = null;
  try {
    input = await readLink(location.hash);
  } catch (error) {
    if (!(error instanceof LinkError)) throw error;
    showError(error.message);
  }
  if (input?.example && examples.length) {
    const example = examples.find(({ query }) => query === input.query);
    if (!example) showError("This server does not have the example of the link.");
    input = example ? { query: example.query, example } : null;
  }
  const hasError = !byId("error").hidden;
  if (input || examples.length) show(input ?? { query: examples[0].query, example: examples[0] });
  return !hasError;
}

async function start() {
  keyField.value = readKey();
  keyField.addEventListener("input", () => keepKey(keyField.value));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (event.submitter) run();
    else rerun(); // the Enter key, which never stops a ranking
    // On a narrow screen the results are below the form.
    if (byId("results").getBoundingClientRect().top > innerHeight) byId("results").scrollIntoView();
  });
  form.addEventListener("keydown", (event) => {
    const isAsked = event.ctrlKey || event.metaKey || (event.target === queryField && !event.shiftKey);
    if (event.key !== "Enter" || event.isComposing || !isAsked || event.target === runButton) return;
    event.preventDefault();
    form.requestSubmit();
  });
  exampleField.addEventListener("change", () => {
    const example = examples.find(({ query }) => query === exampleField.value);
    show(example ? { query: example.query, example } : { query: "", text: "" });
    hideError();
    if (example) rerun();
    else queryField.focus();
  });
  textField.addEventListener("input", () => {
    exampleField.value = "";
    showPassages();
  });
  queryField.addEventListener("input", () => {
    exampleField.value = loaded?.example?.query === queryField.value.trim() ? loaded.example.query : "";
  });
  byId("edit").addEventListener("click", () => {
    show({ query: queryField.value, text: joinText(loaded.passages) });
    textField.focus();
  });
  byId("clear").addEventListener("click", () => {
    show({ query: queryField.value, text: "" });
    textField.focus();
  });
  byId("file").addEventListener("change", (event) => {
    const files = [...event.target.files];
    event.target.value = ""; // so that the same file can be chosen again
    if (files.length) drop(files);
  });
  const target = byId("drop");
  // The whole page takes files, since a browser would open one that misses the field.
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    target.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) target.classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    const files = [...event.dataTransfer.files];
    target.classList.remove("over");
    if (!files.length) return;
    event.preventDefault();
    drop(files);
  });
  addEventListener("hashchange", async () => {
    hideError();
    if (await openAddress()) rerun();
  });

  let content;
  try {
    content = await get("page/examples.json");
  } catch (error) {
    if (!(error instanceof RequestError)) throw error;
    showServer("", "gone");
    showError(error.message);
    setBusy(false);
    return;
  }
  examples = content.examples;
  exampleField.append(...examples.map(({ query }) => element("option", { value: query }, query)));
  const license = element("a", { href: "page/python-license.txt" }, "license");
  byId("examples-source").append(`Examples: ${content.source}. ${content.copyright}, `, license, ".");
  const canRun = await openAddress();
  const isReady = await connect();
  if (running) return; // the user was faster
  if (isReady && canRun) await run();
  else setBusy(false);
}

start();
