// Before and after, side by side, with a line for each passage.

import { counted, element, svg } from "./dom.js";

const FIRST_ROWS = 30; // of a long list; a button shows the rest
const MAX_SNIPPET_CHARACTERS = 240;
const MAX_SHOWN_CHARACTERS = 20_000; // of a selected passage

function sigmoid(logit) {
  return 1 / (1 + Math.exp(-logit));
}

/** Return one row for each passage, best first, with the ranks before and after, which start at 1. */
export function toRows(passages, ranked) {
  return ranked.map(({ index, score, truncated, blank, windows }, at) => ({
    ...passages[index],
    before: index + 1,
    after: at + 1,
    logit: score,
    relevance: sigmoid(score),
    truncated,
    blank,
    windows,
  }));
}

/** Return a logit with its sign and two decimals. */
export function signed(logit) {
  return `${logit < 0 ? "\u2212" : "+"}${Math.abs(logit).toFixed(2)}`;
}

/** Return what a row is called: its name, or the beginning of its text. */
export function labelOf(row) {
  return row.name ?? (snippet(row) || "blank passage");
}

function snippet({ name, text }) {
  const start = name !== null && text.startsWith(`${name}: `) ? name.length + 2 : 0;
  return text.slice(start, start + MAX_SNIPPET_CHARACTERS).replace(/\s+/g, " ").trim();
}

function movement({ before, after }) {
  if (before === after) return { symbol: "=", words: "unchanged", name: "same" };
  const distance = Math.abs(before - after).toLocaleString("en");
  return after < before
    ? { symbol: `\u25b2 ${distance}`, words: `up ${distance}`, name: "up" }
    : { symbol: `\u25bc ${distance}`, words: `down ${distance}`, name: "down" };
}

function textOf(row) {
  const text = snippet(row) || "blank passage";
  return element(
    "span",
    { class: row.name === null ? "text unnamed" : "text" },
    row.name === null ? null : element("bdi", { class: "name" }, row.name),
    element("span", { class: "snippet", dir: "auto" }, text),
  );
}

function bar(kind, from, to) {
  const fill = element("span", { class: "fill" });
  fill.style.left = `${100 * from}%`;
  fill.style.width = `${100 * Math.max(to - from, 0.006)}%`;
  return element("span", { class: `track ${kind}` }, fill);
}

function scores(row, limit) {
  if (row.blank) return element("span", { class: "scores" }, element("span", { class: "note" }, "blank, not scored"));
  const at = (row.logit / limit + 1) / 2;
  const sign = row.logit < 0 ? "negative" : "positive";
  return element(
    "span",
    { class: "scores" },
    element("span", { class: "number" }, row.relevance.toFixed(3)),
    bar("relevance", 0, row.relevance),
    element("span", { class: "number" }, signed(row.logit)),
    bar(`logit ${sign}`, Math.min(at, 0.5), Math.max(at, 0.5)),
  );
}

function option(row, rank, label, ...children) {
  return element(
    "li",
    { role: "option", class: "row", "aria-selected": "false", "aria-label": label, tabindex: "-1", "data-passage": row.before },
    element("span", { class: "rank" }, rank.toLocaleString("en")),
    ...children,
  );
}

function beforeOption(row) {
  const first = row.score === null ? null : element("span", { class: "first-score" }, row.score.toFixed(2));
  const label = `${row.before}: ${labelOf(row)}. Now ${row.after}.`;
  return option(row, row.before, label, textOf(row), first);
}

function afterOption(row, limit) {
  const moved = movement(row);
  const scored = row.blank
    ? "Blank, not scored."
    : `Score ${row.relevance.toFixed(3)}, logit ${row.logit.toFixed(2)}.`;
  const label = `${row.after}: ${labelOf(row)}. Was ${row.before}, ${moved.words}. ${scored}${row.truncated ? " Truncated." : ""}`;
  return option(
    row,
    row.after,
    label,
    textOf(row),
    element(
      "span",
      { class: "marks" },
      element("span", { class: `move ${moved.name}` }, moved.symbol),
      row.truncated ? element("span", { class: "tag", title: "The model did not read the end of this passage" }, "truncated") : null,
    ),
    scores(row, limit),
  );
}

/** Draw a line for each row that is seen in a column. One that leads to a hidden row ends at the lower edge. */
function lines(rows, shown) {
  const y = (rank) => (rank <= shown ? rank - 0.5 : shown);
  const paths = rows
    .filter(({ before, after }) => Math.min(before, after) <= shown)
    .map((row) => {
      const kind = row.after < row.before ? "up" : "stay";
      const hidden = Math.max(row.before, row.after) > shown ? " hidden-end" : "";
      return svg("path", {
        class: `line ${kind}${row.after <= 3 ? " top" : ""}${hidden}`,
        d: `M0 ${y(row.before)} C45 ${y(row.before)} 55 ${y(row.after)} 100 ${y(row.after)}`,
        "data-passage": row.before,
      });
    });
  // Lines that matter most are drawn last, over the others.
  paths.sort((one, other) => one.classList.length - other.classList.length);
  return svg(
    "svg",
    { class: "lines", viewBox: `0 0 100 ${shown}`, preserveAspectRatio: "none", "aria-hidden": "true", focusable: "false" },
    ...paths,
  );
}

function detail(row) {
  const more = row.text.length - MAX_SHOWN_CHARACTERS;
  const facts = [
    `before ${row.before}, after ${row.after}`,
    ...(row.score === null ? [] : [`first stage ${row.score.toFixed(2)}`]),
    ...(row.blank ? ["blank, not scored"] : [`score ${row.relevance.toFixed(4)}`, `logit ${signed(row.logit)}`]),
    ...(row.windows > 1 ? [counted(row.windows, "window")] : []),
    ...(row.truncated ? ["truncated: the model did not read its end"] : []),
  ];
  return [
    element("h3", {}, element("bdi", {}, row.name ?? `Passage ${row.before}`)),
    element("p", { class: "facts" }, facts.join(" \u00b7 ")),
    element("p", { class: "full", dir: "auto", tabindex: "0", "aria-label": "Text of the passage" }, row.text.slice(0, MAX_SHOWN_CHARACTERS)),
    more > 0 ? element("p", { class: "hint" }, `${counted(more, "more character")}, not shown here`) : null,
  ].filter((node) => node !== null);
}

/**
 * Return the comparison as one element.
 *
 * `rows` are those of `toRows`, and `firstStage` names the order before. A passage that is selected in one column is
 * marked in both, and its text is shown.
 */
export function comparison(rows, firstStage) {
  const scored = rows.filter((row) => !row.blank);
  const limit = Math.max(1, ...scored.map((row) => Math.abs(row.logit)));
  const before = element("ol", { class: "column before", role: "listbox", "aria-label": "Before" });
  const after = element("ol", { class: "column after", role: "listbox", "aria-label": "After" });
  const drawing = element("div", { class: "drawing" });
  const panel = element("aside", { class: "detail", "aria-label": "Selected passage", hidden: true });
  const hasFirstScores = rows.some((row) => row.score !== null);
  const grid = element(
    "div",
    { class: `compare${hasFirstScores ? " with-first-scores" : ""}` },
    element("div", { class: "head before-head" }, element("h3", {}, "Before"), element("span", { class: "hint" }, firstStage)),
    element("div", { class: "head lines-head" }),
    element(
      "div",
      { class: "head after-head" },
      element("h3", {}, "After"),
      element(
        "span",
        { class: "scales" },
        element("span", {}, "score, 0 to 1"),
        element("span", {}, `logit, \u00b1${limit.toFixed(1)}`),
      ),
    ),
    before,
    drawing,
    after,
  );
  const byPassage = new Map(rows.map((row) => [String(row.before), row]));
  let selected = null;

  function mark(name, passage) {
    for (const node of grid.querySelectorAll(`.${name}`)) node.classList.remove(name);
    if (passage === null) return;
    for (const node of grid.querySelectorAll(`[data-passage="${passage}"]`)) {
      node.classList.add(name);
      if (node.tagName === "path") node.parentNode.append(node); // over the others
    }
  }

  function select(passage) {
    selected = passage;
    mark("selected", passage);
    for (const node of grid.querySelectorAll("[role=option]")) {
      node.setAttribute("aria-selected", String(node.dataset.passage === passage));
    }
    panel.hidden = passage === null;
    panel.replaceChildren(
      ...(passage === null ? [] : detail(byPassage.get(passage))),
      element("button", { type: "button", class: "link close", onclick: () => select(null) }, "Close"),
    );
  }

  function focus(list, node) {
    for (const other of list.children) other.tabIndex = -1;
    node.tabIndex = 0;
    node.focus({ preventScroll: false });
  }

  function onKey(event) {
    const list = event.currentTarget;
    const current = event.target.closest("[role=option]");
    const steps = {
      ArrowDown: () => current.nextElementSibling,
      ArrowUp: () => current.previousElementSibling,
      Home: () => list.firstElementChild,
      End: () => list.lastElementChild,
    };
    if (event.key in steps) {
      const next = steps[event.key]();
      if (next) {
        focus(list, next);
        select(next.dataset.passage);
      }
    } else if (event.key === "Enter" || event.key === " ") {
      select(current.dataset.passage);
    } else if (event.key === "Escape") {
      select(null);
    } else {
      return;
    }
    event.preventDefault();
  }

  for (const list of [before, after]) {
    list.addEventListener("keydown", onKey);
    list.addEventListener("click", (event) => {
      const node = event.target.closest("[role=option]");
      if (!node) return;
      focus(list, node);
      select(node.dataset.passage === selected ? null : node.dataset.passage);
    });
    list.addEventListener("pointerover", (event) => mark("pointed", event.target.closest("[role=option]")?.dataset.passage ?? null));
    list.addEventListener("pointerleave", () => mark("pointed", null));
  }

  function show(count) {
    const shown = Math.min(count, rows.length);
    const inputOrder = [...rows].sort((one, other) => one.before - other.before);
    before.replaceChildren(...inputOrder.slice(0, shown).map(beforeOption));
    after.replaceChildren(...rows.slice(0, shown).map((row) => afterOption(row, limit)));
    drawing.replaceChildren(lines(rows, shown));
    before.firstElementChild.tabIndex = after.firstElementChild.tabIndex = 0;
    more.hidden = shown === rows.length;
    select(selected);
  }

  const more = element(
    "button",
    {
      type: "button",
      class: "button more",
      onclick: () => {
        show(rows.length);
        focus(after, after.children[FIRST_ROWS]);
      },
    },
    `Show all ${counted(rows.length, "passage")}`,
  );
  show(FIRST_ROWS);
  return element("div", { class: "comparison" }, grid, more, panel);
}
