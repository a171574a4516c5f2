"use strict";
// What both replays share: reading the data, making elements, and the clock with its controls.
// Texts of agents and files become text nodes only, so that nothing they say is markup.

/** Integers from runs of equal steps: a step, how often, the next step ... */
function unpack(runs) {
  const values = [];
  let value = 0;
  for (let i = 0; i < runs.length; i += 2) {
    for (let n = 0; n < runs[i + 1]; n++) values.push((value += runs[i]));
  }
  return values;
}

/** A text from places in a list of pieces. */
function textOf(pieces, places) {
  return places.map((place) => pieces[place]).join("");
}

/** The last place in increasing values that is not above a limit; -1 where all are. */
function lastUpTo(values, limit) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= limit) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

function get(id) {
  return document.getElementById(id);
}

function element(name, className = "", ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A list of facts, as term, value, term, value ... */
function facts(...entries) {
  const list = element("dl", "facts numbers");
  entries.forEach((entry, place) => list.append(element(place % 2 ? "dd" : "dt", "", entry)));
  return list;
}

/** What somebody saw or said, under its label. */
function told(label, text) {
  return [element("p", "label", label), element("pre", "told", text || "(nothing)")];
}

/** Fill the list of games, and open whichever is chosen. */
function chooseGames(titles, open) {
  const list = get("game");
  list.append(...titles.map((title, place) => new Option(title, place)));
  list.hidden = titles.length < 2;
  list.addEventListener("change", () => open(Number(list.value)));
}

/**
 * The clock of a replay, from 0 to its length: `show(at)` draws a moment, `next(at, way)` names the neighbouring
 * decision, `step(way)` is how far an arrow key goes.
 */
function makePlayer({ rate, show, next, step }) {
  const range = get("at");
  const button = get("play");
  let at = 0;
  let length = 0;
  let running = false;
  let before = 0;

  function seek(to) {
    at = clamp(to, 0, length);
    range.value = at;
    show(at);
    range.setAttribute("aria-valuetext", get("moment").textContent);
  }
  function run(on) {
    running = on;
    button.textContent = on ? "Pause" : "Play";
    if (!on) return;
    if (at >= length) seek(0);
    before = performance.now();
    requestAnimationFrame(tick);
  }
  function tick(now) {
    if (!running) return;
    seek(at + (Math.max(0, now - before) / 1000) * rate() * Number(get("speed").value));
    before = now;
    if (at >= length) run(false);
    else requestAnimationFrame(tick);
  }
  function go(to) {
    run(false);
    seek(to);
  }
  function open(long, from = 0) {
    length = long;
    range.max = long;
    go(from);
  }
  const moves = {
    " ": () => run(!running),
    ArrowLeft: (far) => go(far ? next(at, -1) : at - step()),
    ArrowRight: (far) => go(far ? next(at, 1) : at + step()),
    Home: () => go(0),
    End: () => go(length),
  };
  document.addEventListener("keydown", (event) => {
    const busy = event.target.closest("select, pre") || (event.key === " " && event.target.closest("button, summary, input"));
    if (busy || event.ctrlKey || event.altKey || event.metaKey || !moves[event.key]) return;
    event.preventDefault();
    moves[event.key](event.shiftKey);
  });
  range.addEventListener("input", () => go(Number(range.value)));
  button.addEventListener("click", moves[" "]);
  get("back").addEventListener("click", () => moves.ArrowLeft(false));
  get("on").addEventListener("click", () => moves.ArrowRight(false));
  get("before").addEventListener("click", () => moves.ArrowLeft(true));
  get("after").addEventListener("click", () => moves.ArrowRight(true));
  return { go, open, redraw: () => show(at), at: () => at };
}

/** Let a finger or a mouse move along an element: `move(share, dragged)` in widths, from its left and since it began. */
function onDrag(target, move) {
  let from = null;
  const tell = (event) => {
    const box = target.getBoundingClientRect();
    move((event.clientX - box.left) / box.width, (event.clientX - from) / box.width, event.type === "pointerdown");
  };
  target.addEventListener("pointerdown", (event) => {
    from = event.clientX;
    target.setPointerCapture(event.pointerId);
    tell(event);
  });
  target.addEventListener("pointermove", (event) => from !== null && tell(event));
  for (const end of ["pointerup", "pointercancel"]) target.addEventListener(end, () => (from = null));
}
