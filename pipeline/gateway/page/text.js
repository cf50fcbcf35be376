// What a model or a user wrote, as elements: paragraphs, lists, headings, emphasis, code.
//
// Attack: a model says what its prompt, a page it was asked to sum up, or its makers want. Shown as
// HTML it would be a script with the API key at hand; as an image or link, an address that carries
// the conversation to whoever chose it. So this makes elements of a few harmless kinds, puts text
// into them as text, sets no attribute from it, and leaves links and images as they were written.
// And it takes time in proportion to the text, whatever that is made of.

import { element } from "./elements.js";

const ITEM = /^\s{0,3}(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const FENCE = /^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const MARKS = /(`+|\*\*|\*)/;

export function rendered(text) {
  const made = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let at = 0; at < lines.length; ) at = block(lines, at, made);
  return made;
}

function block(lines, at, into) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence, into);
  if (!line.trim()) return at + 1;
  const heading = HEADING.exec(line);
  if (heading) {
    // Below the page's own headings, whatever level a model thinks it writes at.
    into.append(element("h3", {}, ...inline(heading[2])));
    return at + 1;
  }
  if (ITEM.test(line)) return list(lines, at, into);
  const begin = at;
  while (at < lines.length && lines[at].trim() && !(at > begin && begins(lines[at]))) at += 1;
  into.append(element("p", {}, ...inline(lines.slice(begin, at).join("\n"))));
  return at;
}

const begins = (line) => FENCE.test(line) || HEADING.test(line) || ITEM.test(line);

function code(lines, at, [, marks, language], into) {
  const begin = at + 1;
  at = begin;
  while (at < lines.length && !lines[at].trimStart().startsWith(marks)) at += 1;
  const text = element("code", {}, lines.slice(begin, at).join("\n"));
  into.append(element("pre", { tabIndex: 0, "aria-label": language ? `Code, ${language}` : "Code" }, text));
  return at + 1; // one that is not closed yet is code up to the end
}

function list(lines, at, into) {
  const number = ITEM.exec(lines[at])[1];
  const made = element(number === undefined ? "ul" : "ol");
  if (number !== undefined) made.start = Number(number);
  for (; at < lines.length && lines[at].trim(); at += 1) {
    const item = ITEM.exec(lines[at]);
    if (item && (item[1] === undefined) !== (number === undefined)) break;
    if (item) made.append(element("li", {}, ...inline(item[2])));
    else if (FENCE.test(lines[at]) || HEADING.test(lines[at])) break;
    else made.lastChild.append("\n", ...inline(lines[at].trim()));
  }
  into.append(made);
  return at;
}

function inline(text) {
  const pieces = text.split(MARKS); // those at odd places are marks
  const next = [];
  const seen = new Map();
  for (let at = pieces.length - 2; at > 0; at -= 2) {
    next[at] = seen.get(pieces[at]);
    seen.set(pieces[at], at);
  }
  const parts = [];
  for (let at = 0; at < pieces.length; at += 1) {
    const mark = pieces[at];
    const end = at % 2 ? next[at] : undefined;
    if (end === undefined || !encloses(mark, pieces[at + 1], pieces[end - 1])) {
      if (mark) parts.push(mark);
      continue;
    }
    const tag = mark.startsWith("`") ? "code" : mark === "**" ? "strong" : "em";
    parts.push(element(tag, {}, pieces.slice(at + 1, end).join("")));
    at = end;
  }
  return parts;
}

// `2 * 3 * 4` is no emphasis.
const encloses = (mark, first, last) => mark.startsWith("`") || (/^\S/.test(first) && /\S$/.test(last));
