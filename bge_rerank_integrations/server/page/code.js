// The same request as code.

// Characters that are invisible or change the direction of the text around them are written as escapes, so that
// what is shown is what runs.
const UNSEEN = /[\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

/** Return a text as a string literal, which JSON and Python read alike. */
function literal(text) {
  return JSON.stringify(text).replace(UNSEEN, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function pythonInput(query, texts) {
  return [`query = ${literal(query)}`, "passages = [", ...texts.map((text) => `    ${literal(text)},`), "]"];
}

function remoteScorer({ base, hasKey }) {
  const note = hasKey ? ["# RemoteScorer reads the API key from the environment variable BGE_RERANK_API_KEY."] : [];
  return [...note, `scorer = RemoteScorer(${literal(base)})`];
}

function langchain({ query, texts, ...server }) {
  return [
    '# pip install "bge-rerank-integrations[langchain,remote]"',
    "from langchain_core.documents import Document",
    "",
    "from bge_rerank_integrations import BGEReranker, RemoteScorer",
    "",
    ...pythonInput(query, texts),
    "",
    ...remoteScorer(server),
    "reranker = BGEReranker(scorer=scorer)",
    "documents = [Document(page_content=passage) for passage in passages]",
    "for document in reranker.compress_documents(documents, query):",
    "    print(f\"{document.metadata['relevance_score']:.3f}  {document.page_content}\")",
  ];
}

function llamaIndex({ query, texts, ...server }) {
  return [
    '# pip install "bge-rerank-integrations[llama-index,remote]"',
    "from llama_index.core.schema import NodeWithScore, TextNode",
    "",
    "from bge_rerank_integrations import BGERerankPostprocessor, RemoteScorer",
    "",
    ...pythonInput(query, texts),
    "",
    ...remoteScorer(server),
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

function curl({ query, texts, ...server }) {
  const documents = texts.map((text, at) => `  ${literal(text)}${at < texts.length - 1 ? "," : ""}`);
  return curlLines("/v1/rerank", [`{"query": ${literal(query)},`, ' "documents": [', ...documents, "]}"], server);
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
 * `base` is the server's URL and `hasKey` says whether it needs a key. The key itself is never in the code.
 */
export function codeFor(language, { query, texts, base, hasKey }) {
  return `${LANGUAGES[language]({ query, texts, base, hasKey }).join("\n")}\n`;
}
