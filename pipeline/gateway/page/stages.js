// The picture: from this server through the stages and back, and what each of them does and proved.

import { element, find, say } from "./elements.js";
import { age, bytes, count, key, ms, percent, proof } from "./figures.js";

const NUM_HUES = 6;
const PARTS = ["compute", "crypto", "wire"];
const STATES = { ready: "ready", connecting: "connecting", down: "away" };

export class Picture {
  constructor() {
    this._cards = new Map();
    this._heads = new Map();
    this._home = null;
  }

  show(view) {
    const layout = view.stages.map((stage) => `${key(stage)}:${stage.layer_start}-${stage.layer_end}`).join();
    if (layout !== this._layout) this._build(view, layout);
    const slotTokens = view.engine.window || view.engine.max_seq_len;
    for (const stage of view.stages) this._cards.get(key(stage)).show(stage, slotTokens);
    for (const replica of view.replicas) this._heads.get(replica.replica)?.show(replica);
    for (const cell of find("ribbon").children) {
      const states = view.stages.filter((stage) => stage.stage_idx === Number(cell.dataset.at)).map((stage) => stage.state);
      cell.dataset.state = states.includes("ready") ? "ready" : states[0];
    }
    const isBusy = view.engine.num_running > 0 && view.is_ready;
    find("flow").dataset.busy = String(isBusy);
    this._home.show(view);
  }

  _build(view, layout) {
    this._layout = layout;
    const ribbon = find("ribbon");
    const first = view.stages.filter((stage) => stage.replica === 0);
    const total = first.at(-1)?.layer_end ?? 0;
    ribbon.replaceChildren();
    first.forEach((stage, at) => {
      const cell = element("span", { data: { at: String(at), hue: String(at % NUM_HUES) } });
      cell.style.flexGrow = String(stage.layer_end - stage.layer_start);
      ribbon.append(cell);
    });
    ribbon.setAttribute("aria-label", `${count(total, "layer")} over ${count(first.length, "stage")}`);
    this._home = new Home();
    const flow = find("flow");
    flow.replaceChildren(this._home.node);
    this._cards.clear();
    this._heads.clear();
    for (const { replica } of view.replicas) {
      if (view.replicas.length > 1) {
        const head = new Head(replica);
        this._heads.set(replica, head);
        flow.append(head.node);
      }
      for (const stage of view.stages.filter((each) => each.replica === replica)) {
        const card = new Card(stage, stage.stage_idx);
        this._cards.set(key(stage), card);
        flow.append(wire(), card.node);
      }
    }
    flow.append(wire(), element("li", { className: "card home end" }, element("p", {}, "Tokens come back to this server.")));
  }
}

const wire = () => element("li", { className: "link", "aria-hidden": "true" }, "encrypted");

// Whoever runs the server: the one place where prompts are in the clear.
class Home {
  constructor() {
    this._figures = element("p", { className: "muted" });
    this.node = element(
      "li",
      { className: "card home" },
      element("h3", {}, "This server"),
      element("p", {}, "Splits text, schedules, draws. Prompts are in the clear here."),
      this._figures,
      reachable(),
    );
  }

  show(view) {
    const engine = view.engine;
    const parts = [`running ${engine.num_running} of ${engine.max_batch}`, `waiting ${engine.num_waiting}`];
    if (engine.num_cached_tokens) parts.push(`${engine.num_cached_tokens} prompt tokens reused`);
    if (Object.keys(engine.home_times).length) parts.push("embedding and head here");
    parts.push(count(engine.num_failovers, "failover"));
    say(this._figures, parts.join(" · "));
  }
}

// One pipeline of several, above its stages.
class Head {
  constructor(replica) {
    this._state = element("span", { className: "pill" });
    this._figures = element("p", { className: "muted" });
    this.node = element(
      "li",
      { className: "head", data: { head: String(replica) } },
      element("div", { className: "row" }, element("h3", {}, `Replica ${replica}`), this._state),
      this._figures,
    );
  }

  show(replica) {
    this._state.dataset.state = replica.state;
    say(this._state, replica.state);
    say(this._figures, `running ${replica.num_running} · waiting ${replica.num_waiting}`);
  }
}

// How this page reaches the server: the one link that the pipeline's own encryption is not on.
function reachable() {
  const isLocal = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  if (location.protocol === "https:" || isLocal) return null;
  return element("p", { className: "trouble" }, "Between this browser and the server nothing is encrypted: it wants HTTPS.");
}

class Card {
  constructor(stage, at) {
    this._state = element("span", { className: "pill" });
    this._what = element("p", { className: "muted" });
    this._where = element("p", { className: "muted" });
    this._load = new Meter("Load");
    this._kv = new Meter("KV cache");
    this._step = new Split("A step");
    this._more = element("p", { className: "muted" });
    this._proof = element("summary");
    this._how = element("p");
    this._mark = element("code");
    this.node = element(
      "li",
      { className: "card", data: { hue: String(at % NUM_HUES), stage: String(stage.stage_idx), replica: String(stage.replica) } },
      element("div", { className: "row" }, element("h3", {}, `Stage ${stage.stage_idx}`), this._state),
      this._what,
      this._where,
      this._load.node,
      this._kv.node,
      this._step.node,
      this._more,
      element("details", { className: "proof" }, this._proof, this._how, this._mark),
    );
  }

  show(stage, slotTokens) {
    const { figures, rates } = stage;
    this.node.dataset.state = this._state.dataset.state = stage.state;
    say(this._state, STATES[stage.state] ?? stage.state);
    const last = stage.layer_end - 1;
    const layers = stage.layer_start === last ? `layer ${last}` : `layers ${stage.layer_start}–${last}`;
    say(this._what, [layers, stage.precision, stage.kernels && `${stage.kernels} kernels`].filter(Boolean).join(" · "));
    say(this._where, stage.address ? `at ${stage.address}` : "");
    this._where.hidden = !stage.address;
    this._load.show(rates && rates.load, rates && `${percent(rates.load)}, batch ${figures.last_batch}`);
    const room = figures ? figures.num_slots * slotTokens : 0;
    const share = room ? figures.kv_tokens / room : null;
    this._kv.show(share, figures && count(figures.kv_tokens.toLocaleString("en"), "token"));
    this._step.show(rates);
    const more = [];
    if (rates) more.push(`${bytes(rates.bytes_per_second)}/s`);
    if (figures) {
      const moved = bytes(figures.bytes_sent + figures.bytes_received);
      more.push(`${moved} in all`, `KV room ${bytes(figures.kv_bytes)}`);
    }
    say(this._more, more.join(" · "));
    const { grade, what, how, mark } = proof(stage);
    this._proof.parentNode.dataset.grade = grade;
    const since = stage.handshake_age_seconds;
    say(this._proof, since === null ? what : `${what}, ${age(since)} ago`);
    say(this._how, how);
    say(this._mark, mark ? `PCR0 ${mark}` : "");
    this._mark.hidden = !mark;
  }
}

class Meter {
  constructor(name) {
    this._bar = element("span", { className: "fill" });
    this._value = element("span", { className: "value" });
    this.node = element("div", { className: "meter" }, element("span", { className: "name" }, name),
      element("span", { className: "track", "aria-hidden": "true" }, this._bar), this._value);
  }

  show(share, text) {
    this._bar.style.width = `${100 * Math.min(1, Math.max(0, share ?? 0))}%`;
    say(this._value, text ?? "–");
  }
}

// What a step's time goes into.
class Split {
  constructor(name) {
    this._fills = PARTS.map((part) => element("span", { className: "fill", data: { part } }));
    this._value = element("span", { className: "value" });
    this._parts = PARTS.map(() => element("b"));
    const legend = PARTS.map((part, i) => element("span", { data: { part } }, `${part} `, this._parts[i]));
    this.node = element("div", { className: "meter split" }, element("span", { className: "name" }, name),
      element("span", { className: "track", "aria-hidden": "true" }, ...this._fills), this._value,
      element("span", { className: "legend" }, ...legend));
  }

  show(rates) {
    const times = PARTS.map((part) => rates?.[`${part}_ms`] ?? null);
    const sum = times.reduce((total, time) => total + (time ?? 0), 0);
    times.forEach((time, i) => {
      this._fills[i].style.width = `${sum ? (100 * (time ?? 0)) / sum : 0}%`;
      say(this._parts[i], time === null ? "–" : ms(time));
    });
    say(this._value, sum ? `${ms(sum)} ms` : "–");
  }
}
