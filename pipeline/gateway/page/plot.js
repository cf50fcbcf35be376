// Tokens per second over the last two minutes, with a mark where a stage was lost.

import { find, say } from "./elements.js";

const SECONDS = 120;
const SAME_LOSS = 5; // seconds
const WIDTH = 600;
const HEIGHT = 150;
const NAMESPACE = "http://www.w3.org/2000/svg";

export class Plot {
  constructor() {
    this._points = []; // {at, rate}; a null rate is a gap
    this._marks = [];
    this._line = shape("path", "line");
    this._area = shape("path", "area");
    this._lost = shape("path", "lost");
    const svg = shape("svg");
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    svg.append(this._area, this._lost, this._line);
    this._most = document.createElement("span");
    this._most.className = "most";
    find("plot").append(svg, this._most);
  }

  add(at, rate, isLoss) {
    this._points.push({ at, rate });
    // Its end may be seen apart from its beginning, and is the same loss.
    if (isLoss && !(at - this._marks.at(-1) < SAME_LOSS)) this._marks.push(at);
    while (this._points[0].at < at - SECONDS) this._points.shift();
    while (this._marks.length && this._marks[0] < at - SECONDS) this._marks.shift();
    this._draw(at);
    const shown = rate === null ? "–" : rate.toFixed(rate < 10 ? 1 : 0);
    say(find("rate"), shown);
    find("plot").setAttribute("aria-label", `Tokens per second, the last two minutes: now ${shown}`);
  }

  _draw(now) {
    const most = scale(Math.max(...this._points.map((point) => point.rate ?? 0)));
    say(this._most, String(most));
    const x = (at) => (WIDTH * (1 - (now - at) / SECONDS)).toFixed(1);
    const y = (rate) => (HEIGHT * (1 - (0.96 * rate) / most)).toFixed(1);
    let line = "";
    let area = "";
    let begin = null;
    this._points.forEach(({ at, rate }, i) => {
      if (rate === null) return;
      const isFirst = i === 0 || this._points[i - 1].rate === null;
      line += `${isFirst ? "M" : "L"}${x(at)} ${y(rate)}`;
      if (isFirst) begin = x(at);
      area += `${isFirst ? `M${begin} ${HEIGHT}` : ""}L${x(at)} ${y(rate)}`;
      const isLast = i + 1 === this._points.length || this._points[i + 1].rate === null;
      if (isLast) area += `L${x(at)} ${HEIGHT}Z`;
    });
    this._line.setAttribute("d", line);
    this._area.setAttribute("d", area);
    this._lost.setAttribute("d", this._marks.map((at) => `M${x(at)} 0V${HEIGHT}`).join(""));
  }
}

// The least of 1, 2 and 5 times a power of ten that everything fits under.
function scale(most) {
  const power = 10 ** Math.floor(Math.log10(Math.max(most, 1)));
  return [1, 2, 5, 10].map((factor) => factor * power).find((top) => top >= most);
}

function shape(tag, name) {
  const made = document.createElementNS(NAMESPACE, tag);
  if (name) made.setAttribute("class", name);
  return made;
}
