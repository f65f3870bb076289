// Copying the request as code, and the input as a link.

import { baseUrl } from "./api.js";
import { codeFor, LANGUAGES } from "./code.js";
import { counted, element } from "./dom.js";
import { LinkError, writeLink } from "./link.js";

const LONG_LINK_CHARACTERS = 8000;

let language = Object.keys(LANGUAGES)[0]; // the choice outlives the results

/** Copy a text; false if the browser does not allow it. */
async function copy(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
  }
  // Without TLS there is no clipboard API, except on this machine.
  const field = element("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  const focused = document.activeElement;
  document.body.append(field);
  field.value = text;
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return isCopied;
}

/**
 * Return elements that copy the request as code and the input as a link.
 *
 * `input` is what a link holds, as in main.js, and `ranked` are its passages. `hasKey` says whether the server was asked
 * with an API key.
 */
export function sharing(input, ranked, hasKey) {
  const request = {
    query: input.query,
    texts: ranked.map(({ text }) => text),
    base: baseUrl(),
    hasKey,
  };
  const pre = element("pre", { tabindex: "0", "aria-label": "Code" }, element("code", { dir: "ltr" }));
  const said = element("span", { class: "hint", role: "status" });

  function choose(name) {
    language = name;
    pre.firstChild.textContent = codeFor(name, { ...request, isShort: true });
    said.textContent = "";
  }

  async function copyLink() {
    try {
      const fragment = await writeLink(input);
      history.replaceState(null, "", fragment);
      const isLong = fragment.length > LONG_LINK_CHARACTERS;
      const length = isLong ? `, ${counted(fragment.length, "character")}: some programs cut long links` : "";
      said.textContent = (await copy(location.href)) ? `Link copied${length}` : "The link is in the address bar";
    } catch (error) {
      if (!(error instanceof LinkError)) throw error;
      said.textContent = error.message;
    }
  }

  async function copyCode() {
    const code = codeFor(language, request);
    const isCopied = await copy(code);
    if (!isCopied) pre.firstChild.textContent = code; // whole, to be selected
    said.textContent = isCopied ? "Whole code copied" : "Copying is not allowed here; select the code";
  }

  const choices = Object.keys(LANGUAGES).map((name) => {
    const radio = element("input", { type: "radio", name: "language", value: name, checked: name === language, onchange: () => choose(name) });
    return element("label", {}, radio, element("span", {}, name));
  });
  choose(language);
  return [
    element(
      "div",
      { class: "share" },
      element("fieldset", { class: "segments" }, element("legend", { class: "visually-hidden" }, "Code for"), ...choices),
      element("button", { type: "button", class: "button", onclick: copyCode }, "Copy code"),
      element("button", { type: "button", class: "button", onclick: copyLink }, "Copy link"),
      said,
    ),
    pre,
  ];
}
