// The conversation: what is sent, how its answer comes, and how that is stopped.

import { ask, events, ServerError } from "./api.js";
import { element, find, say } from "./elements.js";
import { areValid, mode, wish } from "./options.js";
import { rendered } from "./text.js";

const IDEAS = [
  "Why is the sky blue? Answer in two sentences.",
  "Write a short poem about a lighthouse.",
  "What should I pack for three days of hiking?",
];
const NEAR_END = 60; // pixels within which a reader is taken to follow

const log = find("log");
const prompt = find("prompt");

// How the server says it is; what an answer that stands still is waiting for.
let trouble = "";

export class Chat {
  constructor(onKeyWanted) {
    this.model = "";
    this._onKeyWanted = onKeyWanted;
    this._messages = [];
    this._last = "";
    this._abort = null;
    this._turn = null;
    find("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(prompt.value);
    });
    find("stop").addEventListener("click", () => this.stop());
    find("new-chat").addEventListener("click", () => this.forget());
    prompt.addEventListener("input", grow);
    prompt.addEventListener("keydown", (event) => this._key(event));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this._abort && !document.querySelector("dialog[open]")) this.stop();
    });
    for (const idea of IDEAS) {
      const button = element("button", { type: "button" }, idea);
      button.addEventListener("click", () => this.send(idea));
      find("ideas").append(element("li", {}, button));
    }
  }

  get isAnswering() {
    return this._abort !== null;
  }

  // Hear how the pipeline is; "" where nothing is wrong with it.
  hear(text) {
    trouble = text;
    if (this._turn) this._turn.wait();
  }

  async send(text) {
    if (this._abort || !text.trim() || !areValid()) return;
    this._last = text;
    prompt.value = "";
    grow();
    find("welcome").hidden = true;
    const isText = mode() === "text";
    if (isText) this._messages = []; // what follows a text is no conversation
    if (this._messages.at(-1)?.role === "user") this._messages.pop(); // nothing came of it
    this._messages.push({ role: "user", content: text });
    for (const each of log.querySelectorAll(".again")) each.remove(); // only the last can be had anew
    log.append(bubble("user", isText ? "Text" : "You", element("div", { className: "said" }, text)));
    await this._answer(isText ? text : null);
  }

  stop() {
    this._abort?.abort();
  }

  forget() {
    this.stop();
    this._messages = [];
    for (const each of log.querySelectorAll("article")) each.remove();
    find("welcome").hidden = false;
    find("new-chat").hidden = true;
    prompt.focus();
  }

  async _again(turn) {
    if (this._abort) return;
    turn.remove();
    if (this._messages.at(-1)?.role === "assistant") this._messages.pop();
    await this._answer(mode() === "text" ? this._messages.at(-1).content : null);
  }

  async _answer(text) {
    const messages = this._messages;
    const turn = (this._turn = new Turn(text !== null, (ended) => this._again(ended)));
    this._abort = new AbortController();
    this._show();
    try {
      const body = wish(this.model, messages, text);
      const path = text === null ? "v1/chat/completions" : "v1/completions";
      const response = await ask(path, { body, signal: this._abort.signal });
      for await (const event of events(response)) turn.take(event);
      turn.end(turn.finish === "length" ? "ended by its length" : "");
    } catch (error) {
      this._failed(error, turn);
    } finally {
      // A conversation goes on with what came of an answer, if anything did.
      if (turn.text && messages === this._messages) messages.push({ role: "assistant", content: turn.text });
      this._abort = this._turn = null;
      this._show();
    }
  }

  _failed(error, turn) {
    if (error.name === "AbortError") turn.end("stopped");
    else if (error instanceof ServerError) turn.end(error.message, true);
    else {
      turn.end("This page failed.", true);
      throw error;
    }
    if (error.wantsKey) this._onKeyWanted(error.message);
  }

  _show() {
    const hadFocus = [find("stop"), find("send"), document.body].includes(document.activeElement);
    find("send").hidden = this.isAnswering;
    find("stop").hidden = !this.isAnswering;
    find("new-chat").hidden = false;
    log.setAttribute("aria-busy", String(this.isAnswering));
    if (hadFocus && matchMedia("(pointer: fine)").matches) prompt.focus(); // no keyboard over a phone's answer
  }

  _key(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.send(prompt.value);
    } else if (event.key === "ArrowUp" && !prompt.value && this._last) {
      event.preventDefault();
      prompt.value = this._last;
      grow();
    }
  }
}

// One answer while it comes, and once it has.
class Turn {
  constructor(isText, onAgain) {
    this.text = "";
    this.finish = null;
    this._usage = null;
    this._begun = performance.now();
    this._first = null;
    this._lastPiece = this._begun;
    this._isDrawn = true;
    this._said = element("div", { className: "said" });
    this._note = element("p", { className: "note" }, "waiting for the first token");
    this._onAgain = onAgain;
    this._node = bubble("assistant", isText ? "What follows" : "Model", this._said, this._note);
    this._node.dataset.state = "coming";
    follow(() => log.append(this._node), true);
  }

  take(event) {
    const choice = event.choices[0];
    if (event.usage) this._usage = event.usage;
    if (!choice) return;
    const piece = choice.text ?? choice.delta?.content ?? "";
    this.finish = choice.finish_reason ?? this.finish;
    if (!piece) return;
    this._lastPiece = performance.now();
    this._first ??= this._lastPiece;
    this.text += piece;
    if (this._isDrawn) {
      this._isDrawn = false;
      requestAnimationFrame(() => this._draw());
    }
  }

  // Say what the answer waits for, if it stands still.
  wait() {
    if (this._node.dataset.state !== "coming") return;
    const still = performance.now() - this._lastPiece > 700;
    const waits = this._first === null ? "waiting for the first token" : "";
    say(this._note, still && trouble ? `${trouble}; this answer goes on when it is back` : waits);
    this._note.classList.toggle("trouble", Boolean(still && trouble));
  }

  end(why, isProblem = false) {
    this._node.dataset.state = isProblem ? "failed" : "ended";
    this._draw();
    this._note.classList.toggle("trouble", isProblem);
    if (isProblem) this._note.setAttribute("role", "alert");
    follow(() => {
      say(this._note, [this._figures(), why].filter(Boolean).join(" · "));
      this._node.append(this._tools());
    });
    say(find("spoken"), isProblem ? why : `Answer ${why || "finished"}.`);
  }

  remove() {
    this._node.remove();
  }

  _draw() {
    this._isDrawn = true;
    follow(() => this._said.replaceChildren(rendered(this.text)));
    this.wait();
  }

  _figures() {
    if (this._first === null) return "";
    const first = this._first - this._begun;
    const parts = [`first after ${first < 1000 ? `${first.toFixed(0)} ms` : `${(first / 1000).toFixed(1)} s`}`];
    if (this._usage) {
      const seconds = (this._lastPiece - this._first) / 1000;
      const count = this._usage.completion_tokens;
      parts.unshift(`${count} tokens`);
      if (seconds > 0 && count > 1) parts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
    }
    return parts.join(" · ");
  }

  _tools() {
    const again = element("button", { type: "button", className: "again" }, "Try again");
    again.addEventListener("click", () => this._onAgain(this));
    const copy = element("button", { type: "button" }, "Copy");
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(this.text);
      say(copy, "Copied");
    });
    copy.hidden = !this.text || !navigator.clipboard; // which browsers have for HTTPS and loopback
    return element("div", { className: "actions" }, copy, again);
  }
}

function bubble(role, name, ...content) {
  return element("article", { "aria-label": name, data: { role } }, element("h3", { className: "who" }, name), ...content);
}

// Change the conversation; a reader who was at its end stays there.
function follow(change, always = false) {
  const isNear = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END;
  change();
  if (isNear || always) log.scrollTop = log.scrollHeight;
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight + 2, innerHeight / 3)}px`;
}
