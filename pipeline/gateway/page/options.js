// What is asked for beside the text: the fields of "Prompt and sampling", as the API takes them.

import { find, say } from "./elements.js";

const NUMBERS = [
  "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed",
  "repetition_penalty", "presence_penalty", "frequency_penalty",
];

const chosen = find("composer");
const fields = chosen.elements;

export const mode = () => fields.mode.value;

// A request's body. `text`: what is to be gone on with, where that is no conversation.
export function wish(model, messages, text) {
  const body = { model, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) if (fields[name].value !== "") body[name] = Number(fields[name].value);
  const stop = fields.stop_strings.value.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop;
  if (text !== null) {
    // The API's own default is sixteen tokens.
    return { max_tokens: 256, ...body, prompt: text };
  }
  const system = fields.system.value.trim();
  return { ...body, messages: system ? [{ role: "system", content: system }, ...messages] : messages };
}

// Whether every field can be sent; the first that cannot is shown.
export function areValid() {
  if (chosen.checkValidity()) return true;
  find("options").open = true; // what is folded away could not be pointed at
  return chosen.reportValidity();
}

function summarise() {
  const isText = mode() === "text";
  fields.system.disabled = isText;
  find("prompt").placeholder = isText ? "Write the beginning of a text" : "Write a message";
  const told = NUMBERS.filter((name) => fields[name].value !== "");
  const parts = told.map((name) => `${name.replace("_penalty", "").replace("_", " ")} ${fields[name].value}`);
  if (isText) parts.unshift("goes on with a text");
  else if (fields.system.value.trim()) parts.unshift("system prompt");
  say(find("chosen"), parts.join(", "));
}

export function startOptions() {
  chosen.addEventListener("input", summarise);
  find("reset").addEventListener("click", () => {
    const text = find("prompt").value;
    chosen.reset();
    find("prompt").value = text;
    summarise();
  });
  summarise();
}
