// Passages from typed text and from files. A passage is { text, name, score }; the last two may be null.

/** A file that cannot be read. The message says where and why. */
export class FileError extends Error {}

const MAX_FILE_BYTES = 64 * 1024 * 1024;
const BLANK_LINE = /\n[^\S\n]*\n/;

function passage(text, name = null, score = null) {
  return { text, name, score };
}

/** Split typed text at blank lines if it has any between passages, else at line breaks. */
export function splitText(text) {
  const lines = text.replace(/\r\n?/g, "\n").trim();
  const parts = BLANK_LINE.test(lines) ? lines.split(/\n(?:[^\S\n]*\n)+/) : lines.split("\n");
  return parts.map((part) => part.trim()).filter(Boolean).map((part) => passage(part));
}

/** Return passages as text that `splitText` splits again. Line breaks inside a passage become spaces. */
export function joinText(passages) {
  return passages.map(({ text }) => text.trim().replace(/\s*[\r\n]+\s*/g, " ")).filter(Boolean).join("\n");
}

/** Read a dropped file. Returns { text } for a .txt file, else { passages }. */
export async function readFile(file) {
  const ending = /\.(txt|jsonl|csv)$/i.exec(file.name)?.[1].toLowerCase();
  if (!ending) throw new FileError("The file must end in .txt, .jsonl or .csv.");
  if (file.size > MAX_FILE_BYTES) throw new FileError("The file is larger than 64 MiB.");
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch (error) {
    throw new FileError(error instanceof TypeError ? "The file is not UTF-8 text." : "The file cannot be read.");
  }
  if (text.includes("\0")) throw new FileError("The file is not text.");
  const result = ending === "txt" ? { text } : { passages: ending === "csv" ? parseCsv(text) : parseJsonl(text) };
  if (!(result.passages ?? splitText(text)).length) throw new FileError("The file contains no passages.");
  return result;
}

/** Read JSON lines: strings, or objects with `text` and perhaps `title`, `id` or `_id`, and `score`. */
export function parseJsonl(text) {
  const passages = [];
  text.split("\n").forEach((line, index) => {
    if (!line.trim()) return;
    let row;
    try {
      row = JSON.parse(line);
    } catch {
      throw new FileError(`Line ${index + 1} is not valid JSON.`);
    }
    if (typeof row === "string") passages.push(passage(row));
    else passages.push(fromFields(row, `Line ${index + 1}`));
  });
  return passages;
}

/** Read CSV with a header row that names the column `text`, and perhaps `title`, `id` or `_id`, and `score`. */
export function parseCsv(text) {
  const rows = csvRows(text);
  if (!rows.length) return [];
  const header = rows[0].cells.map((cell) => cell.trim().toLowerCase());
  if (!header.includes("text")) throw new FileError("The first row must name the columns, and one must be `text`.");
  return rows.slice(1).map(({ cells, line }) => {
    if (cells.length !== header.length) {
      throw new FileError(`The row at line ${line} has ${cells.length} columns; the first row has ${header.length}.`);
    }
    const fields = Object.fromEntries(header.map((name, at) => [name, cells[at]]));
    return fromFields({ ...fields, score: fields.score?.trim() ? Number(fields.score) : null }, `The row at line ${line}`);
  });
}

function fromFields(row, where) {
  if (typeof row?.text !== "string") throw new FileError(`${where} has no string \`text\`.`);
  const title = typeof row.title === "string" ? row.title : "";
  const name = row.id ?? row._id ?? null;
  // The title is scored with the text, as `bge-rerank rank` does.
  return passage(
    title ? `${title} ${row.text}`.trim() : row.text,
    ["string", "number"].includes(typeof name) && name !== "" ? String(name) : title || null,
    Number.isFinite(row.score) ? row.score : null,
  );
}

/** Split CSV (RFC 4180) into rows, each with the number of the line where it begins. */
function csvRows(text) {
  const rows = [];
  const plain = /[^,\r\n]*/y;
  let cells = [];
  let line = 1;
  let rowLine = 1;
  let at = 0;
  while (at < text.length) {
    let cell;
    if (text[at] === '"') {
      const parts = [];
      const cellLine = line;
      let end = text.indexOf('"', at + 1);
      while (end !== -1 && text[end + 1] === '"') {
        parts.push(text.slice(at + 1, end + 1));
        at = end + 1;
        end = text.indexOf('"', at + 1);
      }
      if (end === -1) throw new FileError(`The quotation mark at line ${cellLine} is never closed.`);
      parts.push(text.slice(at + 1, end));
      cell = parts.join("");
      line += cell.split("\n").length - 1;
      at = end + 1;
      if (at < text.length && !",\r\n".includes(text[at])) {
        throw new FileError(`Line ${line} has text after a closing quotation mark.`);
      }
    } else {
      plain.lastIndex = at;
      cell = plain.exec(text)[0];
      at += cell.length;
    }
    cells.push(cell);
    if (text[at] === ",") {
      at += 1;
      if (at < text.length && !"\r\n".includes(text[at])) continue;
      cells.push(""); // the row ends with an empty cell
    }
    if (text[at] === "\r" && text[at + 1] === "\n") at += 1;
    at += 1;
    if (cells.length > 1 || cells[0].trim()) rows.push({ cells, line: rowLine });
    cells = [];
    line += 1;
    rowLine = line;
  }
  return rows;
}
