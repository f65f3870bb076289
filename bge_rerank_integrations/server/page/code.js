// The same request as code.

const NUM_SHOWN = 4;
const MAX_SHOWN_CHARACTERS = 160;

// Characters that are invisible or change the direction of the text around them are written as escapes, so that
// what is shown is what runs.
const UNSEEN = /[\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

/** Return a text as a string literal, which JSON and Python read alike. */
function literal(text) {
  return JSON.stringify(text).replace(UNSEEN, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** Return the lines of a list of texts. A short one has the beginnings of the first texts only. */
function listed(texts, isShort, { indent, lastComma, comment }) {
  const shown = isShort ? texts.slice(0, NUM_SHOWN).map(beginning) : texts;
  const lines = shown.map((text, at) => `${indent}${literal(text)}${lastComma || at < texts.length - 1 ? "," : ""}`);
  return shown.length < texts.length ? [...lines, `${indent}${comment}… and ${texts.length - shown.length} more`] : lines;
}

function beginning(text) {
  return text.length > MAX_SHOWN_CHARACTERS ? `${text.slice(0, MAX_SHOWN_CHARACTERS)}…` : text;
}

function pythonInput({ query, texts, isShort }) {
  const list = listed(texts, isShort, { indent: "    ", lastComma: true, comment: "# " });
  return [`query = ${literal(isShort ? beginning(query) : query)}`, "passages = [", ...list, "]"];
}

function remoteScorer({ base, hasKey }) {
  const note = hasKey ? ["# RemoteScorer reads the API key from the environment variable BGE_RERANK_API_KEY."] : [];
  return [...note, `scorer = RemoteScorer(${literal(base)})`];
}

function langchain(request) {
  return [
    '# pip install "bge-rerank-integrations[langchain,remote]"',
    "from langchain_core.documents import Document",
    "",
    "from bge_rerank_integrations import BGEReranker, RemoteScorer",
    "",
    ...pythonInput(request),
    "",
    ...remoteScorer(request),
    "reranker = BGEReranker(scorer=scorer)",
    "documents = [Document(page_content=passage) for passage in passages]",
    "for document in reranker.compress_documents(documents, query):",
    "    print(f\"{document.metadata['relevance_score']:.3f}  {document.page_content}\")",
  ];
}

function llamaIndex(request) {
  return [
    '# pip install "bge-rerank-integrations[llama-index,remote]"',
    "from llama_index.core.schema import NodeWithScore, TextNode",
    "",
    "from bge_rerank_integrations import BGERerankPostprocessor, RemoteScorer",
    "",
    ...pythonInput(request),
    "",
    ...remoteScorer(request),
    "reranker = BGERerankPostprocessor(scorer=scorer)",
    "nodes = [NodeWithScore(node=TextNode(text=passage)) for passage in passages]",
    "for node in reranker.postprocess_nodes(nodes, query_str=query):",
    '    print(f"{node.score:.3f}  {node.node.get_content()}")',
  ];
}

function curlLines(path, lines, { base, hasKey }) {
  const key = hasKey ? ['  -H "Authorization: Bearer $BGE_RERANK_API_KEY" \\'] : [];
  // The body comes from standard input, because a single argument is limited to 128 KiB on Linux.
  return [
    `curl '${base.replaceAll("'", "%27")}${path}' \\`,
    ...key,
    "  -H 'Content-Type: application/json' --data-binary @- <<'JSON'",
    ...lines,
    "JSON",
  ];
}

function curl({ query, texts, isShort, ...server }) {
  const documents = listed(texts, isShort, { indent: "  ", lastComma: false, comment: "" });
  const first = `{"query": ${literal(isShort ? beginning(query) : query)},`;
  return curlLines("/v1/rerank", [first, ' "documents": [', ...documents, "]}"], server);
}

/** Return a curl command that posts a JSON body. */
export function curlFor(path, body, server) {
  return `${curlLines(path, [JSON.stringify(body)], server).join("\n")}\n`;
}

/** Names of the languages and functions that write the code. */
export const LANGUAGES = { LangChain: langchain, LlamaIndex: llamaIndex, curl };

/**
 * Return code that ranks the same passages.
 *
 * `base` is the server's URL and `hasKey` says whether it needs a key. The key itself is never in the code. With
 * `isShort` the texts are cut, so that the code can be read but not run.
 */
export function codeFor(language, { query, texts, base, hasKey, isShort = false }) {
  return `${LANGUAGES[language]({ query, texts, base, hasKey, isShort }).join("\n")}\n`;
}
