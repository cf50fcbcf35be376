// Looks at the server once a second, and shows what it sees.

import { ask } from "./api.js";
import { element, find, say } from "./elements.js";
import { changes, ms, trouble } from "./figures.js";
import { Plot } from "./plot.js";
import { Picture } from "./stages.js";

const PERIOD = 1000;
const MAX_EVENTS = 50;

export class Watch {
  // `onTrouble` hears what keeps answers waiting, "" if nothing does; `onKeyWanted` of a refusal.
  constructor(onTrouble, onKeyWanted) {
    this._onTrouble = onTrouble;
    this._onKeyWanted = onKeyWanted;
    this._picture = new Picture();
    this._plot = new Plot();
    this._before = null;
    this._at = 0;
    this._timer = 0;
    this._isReached = true;
    document.addEventListener("visibilitychange", () => this.look());
  }

  // Look now, and every second from now on while anybody can see it.
  async look() {
    clearTimeout(this._timer);
    if (document.hidden) return;
    const round = (this._round = {});
    let view = null;
    let problem = null;
    try {
      view = await (await ask("pipeline")).json();
    } catch (error) {
      problem = error;
    }
    if (round !== this._round) return; // somebody has looked since
    if (!problem?.wantsKey) this._timer = setTimeout(() => this.look(), PERIOD); // else once there is one
    if (view) this._show(view, performance.now() / 1000);
    else this._miss(problem);
  }

  _show(view, now) {
    if (!this._isReached) this._tell("good", "The server is there again.");
    this._isReached = true;
    const seconds = now - this._at;
    const before = this._before;
    this._before = view;
    this._at = now;
    state(view.is_ready ? "ready" : "waiting", view.is_ready ? "ready" : "not ready");
    this._picture.show(view);
    const told = changes(before, view, seconds);
    for (const { kind, text } of told) this._tell(kind, text);
    const made = before ? view.engine.num_tokens - before.engine.num_tokens : -1;
    // Marked once: when it is seen, or when it is over if that was between two looks.
    const isLoss = Boolean(before?.is_ready) && told.some(({ kind }) => kind !== "good");
    // A counter that goes back is another server's.
    this._plot.add(now, made < 0 ? null : made / seconds, isLoss);
    latencies(view.latency);
    this._onTrouble(trouble(view));
  }

  _miss(error) {
    state("lost", error.wantsKey ? "wants a key" : "out of reach");
    if (error.wantsKey) {
      this._onKeyWanted(error.message);
      return;
    }
    if (this._isReached) this._tell("poor", error.message);
    this._isReached = false;
    this._before = null;
    this._plot.add(performance.now() / 1000, null, false);
    this._onTrouble("The server is out of reach");
  }

  _tell(kind, text) {
    const now = new Date();
    const time = element("time", { dateTime: now.toISOString() }, now.toLocaleTimeString("en-GB"));
    const events = find("events");
    events.prepend(element("li", { data: { kind } }, time, ` ${text}`));
    while (events.children.length > MAX_EVENTS) events.lastChild.remove();
  }
}

function state(kind, text) {
  find("state").dataset.state = kind;
  say(find("state"), text);
}

function latencies(latency) {
  const shown = {
    "First token": [latency.ttft_p50_seconds, latency.ttft_p95_seconds],
    "Between tokens": [latency.inter_token_p50_seconds, latency.inter_token_p95_seconds],
  };
  const list = find("latency");
  if (!list.children.length) {
    for (const name of Object.keys(shown)) list.append(element("div", {}, element("dt", {}, name), element("dd")));
  }
  Object.values(shown).forEach(([half, most], i) => {
    const text = half === null ? "–" : `${ms(1000 * half)} ms, p95 ${ms(1000 * most)}`;
    say(list.children[i].lastChild, text);
  });
}
