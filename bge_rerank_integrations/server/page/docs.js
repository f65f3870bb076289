// Shows the server's OpenAPI document.

import { baseUrl, get, RequestError } from "./api.js";
import { curlFor } from "./code.js";
import { byId, element } from "./dom.js";
import { keepKey, readKey } from "./key.js";

const keyField = byId("key");

/** Return the type of a JSON schema in words, such as "array of string or object". */
function typeOf(schema) {
  if (schema.anyOf) return [...new Set(schema.anyOf.map(typeOf))].join(" or ");
  const types = [schema.type ?? "any"].flat();
  return types.map((type) => (type === "array" && schema.items ? `array of ${typeOf(schema.items)}` : type)).join(" or ");
}

function table(caption, headings, rows) {
  return element(
    "div",
    { class: "table" },
    element(
      "table",
      {},
      element("caption", { class: "visually-hidden" }, caption),
      element("thead", {}, element("tr", {}, ...headings.map((heading) => element("th", { scope: "col" }, heading)))),
      element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell))))),
    ),
  );
}

function format(path, schema, example, hasKey) {
  const required = new Set(schema.required);
  const fields = Object.entries(schema.properties).map(([name, field]) => [
    element("code", {}, name),
    typeOf(field),
    required.has(name) ? "required" : "",
    field.description ?? field.items?.description ?? "",
  ]);
  return element(
    "section",
    { class: "format" },
    element("h3", {}, schema.title),
    table(`Fields of ${schema.title}`, ["Field", "Type", "Required", "Meaning"], fields),
    ...(example
      ? [element("pre", { tabindex: "0", "aria-label": `Example of ${schema.title}` }, curlFor(path, example.value, { base: baseUrl(), hasKey }))]
      : []),
  );
}

function operation(path, method, { summary, requestBody, responses }, hasKey) {
  const body = requestBody?.content["application/json"];
  const schemas = body?.schema.anyOf ?? [];
  return element(
    "section",
    { class: "card operation", id: anchor(path, method), "aria-label": `${method} ${path}` },
    element("h2", {}, element("span", { class: `method ${method}` }, method.toUpperCase()), element("code", {}, path)),
    element("p", { class: "summary" }, summary),
    ...schemas.map((schema) => format(path, schema, body.examples?.[schema.title], hasKey)),
    element(
      "details",
      {},
      element("summary", {}, "Responses"),
      table(
        `Responses of ${method} ${path}`,
        ["Status", "Meaning"],
        Object.entries(responses).map(([status, { description }]) => [element("code", {}, status), description]),
      ),
    ),
  );
}

function anchor(path, method) {
  return `${method}${path.replaceAll("/", "-")}`;
}

function show(document, hasKey) {
  const operations = Object.entries(document.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, content]) => ({ path, method, content })),
  );
  byId("raw").hidden = hasKey; // a link cannot send the key
  byId("version").textContent = document.info.version;
  byId("contents").replaceChildren(
    element(
      "ol",
      {},
      ...operations.map(({ path, method }) =>
        element(
          "li",
          {},
          element("a", { href: `#${anchor(path, method)}` }, element("span", { class: `method ${method}` }, method.toUpperCase()), ` ${path}`),
        ),
      ),
    ),
  );
  byId("operations").replaceChildren(...operations.map(({ path, method, content }) => operation(path, method, content, hasKey)));
  // The sections did not exist when the browser looked for the one that the address names.
  if (location.hash) byId(location.hash.slice(1))?.scrollIntoView();
}

async function load() {
  byId("error").hidden = true;
  try {
    show(await get("openapi.json", { key: keyField.value }), keyField.value !== "");
    byId("key-form").hidden = true;
  } catch (error) {
    if (!(error instanceof RequestError)) throw error;
    const isLocked = error.status === 401;
    byId("key-form").hidden = !isLocked;
    byId("error").hidden = isLocked && !keyField.value;
    byId("error").textContent = error.message;
    if (isLocked) keyField.focus();
  }
}

keyField.value = readKey();
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(keyField.value);
  load();
});
load();
