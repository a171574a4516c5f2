// A day of trading: prices with events and trades, what each agent is worth, and its decisions, along the time.

const LEFT = 62; // pixels for the numbers beside a chart
const ROWS = 40; // decisions in the list at a time

/** A time of day; with hundredths where little time is shown. */
function clockOf(seconds, fine) {
  const hundredths = Math.round(seconds * 100);
  const whole = Math.floor(hundredths / 100);
  const two = (value) => String(value).padStart(2, "0");
  const text = `${two(Math.floor(whole / 3600))}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
  return fine ? `${text}.${two(hundredths % 100)}` : text;
}

/** About `count` round numbers between two others. */
function ticksOf(low, high, count) {
  const rough = (high - low) / count;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.max(0, Math.floor(high / step) - first + 1) }, (_, n) => (first + n) * step);
}

/** About `count` round times between two others, in seconds. */
function timesOf(low, high, count) {
  const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400];
  const step = steps.find((each) => (high - low) / each <= count) ?? 28800;
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.max(0, Math.floor(high / step) - first + 1) }, (_, n) => (first + n) * step);
}

/** A window of `wide` seconds around a time: the one before as long as the time stands well inside of it. */
function windowAt(at, wide, end, before) {
  if (wide >= end) return [0, end];
  const fits = before && Math.abs(before[1] - before[0] - wide) < 1e-9;
  if (fits && at >= before[0] + 0.08 * wide && at <= before[0] + 0.92 * wide) return before;
  const from = clamp(at - 0.3 * wide, 0, end - wide);
  return [from, from + wide];
}

/** The entries of a curve within a window, one more at each side; none without a value. */
function within(times, values, [from, to]) {
  const first = Math.max(0, lastUpTo(times, from));
  const last = Math.min(times.length - 1, lastUpTo(times, to) + 1);
  const found = [];
  for (let i = first; i <= last; i++) if (values[i] !== null) found.push([times[i], values[i]]);
  return found;
}

/** The corners of a curve: a value holds until the next one, unless `slopes(time)` says that it moves towards it. */
function cornersOf(points, slopes = () => false) {
  return points.flatMap((point, place) =>
    place === 0 || slopes(point[0]) ? [point] : [[point[0], points[place - 1][1]], point],
  );
}

/** A line through points as an SVG path. */
function pathOf(points, x, y) {
  return points.map(([time, value], place) => `${place ? "L" : "M"}${x(time)} ${y(value)}`).join("");
}

/** From values to pixels, with some room; by their logarithms where they span much. */
function scaleOf(values, high, low) {
  const least = Math.min(...values);
  const most = Math.max(...values);
  const log = least > 0 && most > 30 * least;
  const by = log ? Math.log10 : (value) => value;
  const room = (by(most) - by(least)) * 0.12 || Math.abs(by(most)) * 0.001 || 1;
  const [from, to] = [by(least) - room, by(most) + room];
  const y = (value) => low - ((by(value) - from) / (to - from)) * (low - high);
  const ticks = log ? ticksOf(from, to, 4).map((each) => 10 ** each) : ticksOf(from, to, 4);
  return { y: (value) => Math.round(y(value) * 100) / 100, ticks, log };
}

/** A number with no more digits than its neighbours need. */
function numberOf(value, step = 0) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 1e7) return value.toExponential(2);
  const digits = step > 0 ? clamp(-Math.floor(Math.log10(step)), 0, 6) : 2;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** An amount of something: whole, or as broken as it is. */
function amountOf(value) {
  return value === null ? "–" : value.toLocaleString("en", { maximumSignificantDigits: 6 });
}

function percentOf(share) {
  if (share === null) return "–";
  const percent = 100 * share;
  return `${percent < 0 ? "−" : "+"}${Math.abs(percent) >= 1e6 ? Math.abs(percent).toExponential(2) : Math.abs(percent).toFixed(2)} %`;
}

const kindOf = (agent) => `k${agent % 6}`;

/** The empty chart of a window: grid, times and numbers; `x` and `scale` place what comes into it. */
function frameOf(wide, high, bottom, [from, to], start, scale) {
  const x = (time) => Math.round((LEFT + ((time - from) / (to - from)) * (wide - LEFT)) * 100) / 100;
  const parts = [];
  const step = scale.ticks.length > 1 ? scale.ticks[1] - scale.ticks[0] : 0;
  for (const tick of scale.ticks) {
    const y = scale.y(tick);
    parts.push(drawn("path", { class: "grid", d: `M${LEFT} ${y}H${wide}` }));
    parts.push(drawn("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, numberOf(tick, scale.log ? 1 : step)));
  }
  const fine = to - from < 5;
  for (const time of timesOf(from, to, wide / 110)) {
    parts.push(drawn("path", { class: "grid", d: `M${x(time)} ${bottom}v4` }));
    parts.push(drawn("text", { x: x(time), y: high - 3, "text-anchor": x(time) > wide - 30 ? "end" : "middle" }, clockOf(start + time, fine)));
  }
  return [x, parts];
}

/** Triangles of trades: up for bought, down for sold. */
function trianglesOf(trades, x, y) {
  return trades.map(({ time, price, side }) => `M${x(time)} ${y(price) - 6 * side}l6 ${11 * side}h-12z`).join("");
}

function startMarket() {
  const { games, outcomes, pieces } = JSON.parse(get("data").textContent);
  let game;
  let end;
  let shown;
  let charts;
  let order; // decisions by the time of asking, as places in game.decisions
  let listed; // those of them that the list shows
  let asked; // their times
  let view = null;
  let rows = "";
  let chosen = null; // a decision that was picked from the list, as long as its time is shown

  const list = get("list");
  const isFine = () => view !== null && view[1] - view[0] < 600;
  const time = (at) => clockOf(game.start + at, isFine());

  function chartOf(label, high) {
    const picture = drawn("svg", { class: "drag", role: "img", "aria-label": label, height: high });
    const legend = element("span", "soft numbers");
    const box = element("section", "box chart", element("div", "head", element("h3", "", label), legend), picture);
    onDrag(picture, (share) => player.go(view[0] + ((share * picture.clientWidth - LEFT) / (picture.clientWidth - LEFT)) * (view[1] - view[0])));
    return { box, picture, legend, high, veil: drawn("rect", { class: "veil", y: 0, height: high }), cursor: drawn("path", { class: "cursor" }) };
  }

  /** `inside` is cut off at the edges of the chart, which an element of its own does. */
  function fillChart(chart, x, around, inside) {
    chart.x = x;
    const [wide, high] = [chart.wide - LEFT, chart.high];
    const plot = drawn("svg", { x: LEFT, y: 0, width: wide, height: high, viewBox: `${LEFT} 0 ${wide} ${high}` }, ...inside);
    chart.picture.setAttribute("viewBox", `0 0 ${chart.wide} ${high}`);
    chart.picture.replaceChildren(...around, plot, chart.veil, chart.cursor);
  }

  function drawPrices(chart, place) {
    const asset = game.assets[place];
    const wide = (chart.wide = chart.picture.clientWidth || 800);
    const told = asset.buySize.length > 0;
    const bottom = chart.high - (told ? 56 : 18);
    const [buy, sell] = [within(asset.times, asset.buy, view), within(asset.times, asset.sell, view)];
    const trades = game.trades.filter((each) => each.asset === place && shown[each.agent] && each.time >= view[0] && each.time <= view[1]);
    const scale = scaleOf([...buy, ...sell].map((each) => each[1]).concat(trades.map((each) => each.price)), 8, bottom);
    const [x, around] = frameOf(wide, chart.high, bottom, view, game.start, scale);
    // a drawn market moves between two points; only its jumps, which are marked, and recordings change at once
    const jumps = new Set(game.marks.filter((mark) => mark[1] === place).map((mark) => mark[0]));
    const slopes = (at) => game.mode === "synthetic" && !jumps.has(at);
    const [over, under] = [cornersOf(buy, slopes), cornersOf(sell, slopes)];
    const lines = [over, under].map((points) => pathOf(points, x, scale.y));
    const parts = [drawn("path", { class: "price", d: lines[0] })];
    if (lines[0] !== lines[1]) {
      const band = pathOf([...over, ...under.reverse()], x, scale.y);
      parts.push(drawn("path", { class: "price sell", d: lines[1] }), drawn("path", { class: "band", d: `${band}z` }));
    }
    if (told) {
      parts.push(...sizesOf(asset, x, bottom + 20));
      around.push(drawn("text", { x: LEFT - 6, y: bottom + 24, "text-anchor": "end" }, "displayed"));
    }
    parts.push(...marksOf(place, x, bottom), ...tradesOf(trades, x, scale.y), cutoffOf(x, bottom));
    fillChart(chart, x, around, parts);
  }

  function sizesOf(asset, x, middle) {
    const [buy, sell] = [within(asset.times, asset.buySize, view), within(asset.times, asset.sellSize, view)];
    const most = Math.max(1e-9, ...buy.map((each) => each[1]), ...sell.map((each) => each[1]));
    return [[buy, -14], [sell, 14]].map(([points, high]) => {
      const y = (value) => middle + (high * value) / most;
      const last = points.at(-1);
      return drawn("path", { class: "size", d: last ? `${pathOf(cornersOf(points), x, y)}V${middle}H${x(points[0][0])}z` : "" });
    });
  }

  function marksOf(place, x, bottom) {
    const marks = game.marks.filter(([at, asset]) => asset === place && at >= view[0] && at <= view[1]);
    return marks.flatMap(([at, , text]) => {
      const line = drawn("path", { class: "mark", d: `M${x(at)} 0V${bottom}` }, drawn("title", {}, text));
      return marks.length > 4 ? [line] : [line, drawn("text", { class: "markword", x: x(at) + 4, y: 12 }, text)];
    });
  }

  function tradesOf(trades, x, y) {
    return game.agents.flatMap((_, agent) => [true, false].map((own) => {
      const found = trades.filter((each) => each.agent === agent && (each.reason === "order") === own);
      return drawn("path", { class: `trade ${kindOf(agent)} ${own ? "" : "own-doing"}`, d: trianglesOf(found, x, y) });
    }));
  }

  function cutoffOf(x, bottom) {
    const seen = game.cutoff >= view[0] && game.cutoff < view[1];
    return drawn("path", { class: "cutoff", d: seen ? `M${x(game.cutoff)} 0V${bottom}` : "" });
  }

  function drawWorth(chart) {
    const wide = (chart.wide = chart.picture.clientWidth || 800);
    const bottom = chart.high - 18;
    const lines = game.equity.map((line) => within(line.times, line.values, view));
    const values = lines.flatMap((points, agent) => (shown[agent] ? points.map((each) => each[1]) : []));
    const scale = scaleOf(values.length ? values : [game.cash], 8, bottom);
    const [x, around] = frameOf(wide, chart.high, bottom, view, game.start, scale);
    const parts = [cutoffOf(x, bottom)];
    lines.forEach((points, agent) => {
      if (!shown[agent]) return;
      const past = points.length && points.at(-1)[0] < view[1] ? `H${x(view[1])}` : "";
      parts.push(drawn("path", { class: `worth ${kindOf(agent)}`, d: pathOf(cornersOf(points), x, scale.y) + past }));
    });
    chart.log = scale.log ? "; logarithmic" : "";
    fillChart(chart, x, around, parts);
  }

  function drawCharts() {
    charts.forEach((chart, place) => (place < game.assets.length ? drawPrices(chart, place) : drawWorth(chart)));
  }

  function legendOf(chart, place, at) {
    if (place === game.assets.length) {
      const worth = game.agents.map((name, agent) => {
        const line = game.equity[agent];
        return shown[agent] ? `${name} ${numberOf(line.values[Math.max(0, lastUpTo(line.times, at))])}` : "";
      });
      return worth.filter(Boolean).join(", ") + chart.log;
    }
    const asset = game.assets[place];
    const now = Math.max(0, lastUpTo(asset.times, at));
    const size = (sizes) => (sizes.length ? ` (${amountOf(sizes[now])} displayed)` : "");
    return `buy ${numberOf(asset.buy[now])}${size(asset.buySize)}, sell ${numberOf(asset.sell[now])}${size(asset.sellSize)}`;
  }

  function show(at) {
    const wanted = Number(get("zoom").value);
    const next = windowAt(at, wanted, end, view);
    if (!view || next[0] !== view[0] || next[1] !== view[1]) {
      view = next;
      drawCharts();
    }
    charts.forEach((chart, place) => {
      const x = chart.x(at);
      chart.cursor.setAttribute("d", `M${x} 0V${chart.high}`);
      chart.veil.setAttribute("x", x);
      chart.veil.setAttribute("width", Math.max(0, chart.wide - x));
      chart.legend.textContent = legendOf(chart, place, at);
    });
    get("moment").textContent = time(at);
    showList(at);
  }

  function choose() {
    const outcome = get("outcome").value;
    listed = order.filter((place) => {
      const each = game.decisions[place];
      return shown[each.agent] && (!outcome || each.outcome === outcome);
    });
    asked = listed.map((place) => game.decisions[place].asked);
    rows = "";
  }

  function showList(at) {
    const last = lastUpTo(asked, at);
    if (chosen !== null && (last < 0 || game.decisions[chosen].asked !== asked[last] || !listed.includes(chosen))) chosen = null;
    const current = chosen ?? listed[last] ?? null;
    const state = `${last} ${current} ${isFine()}`;
    if (rows === state) return;
    rows = state;
    const first = clamp(last - ROWS / 2, 0, Math.max(0, listed.length - ROWS));
    list.replaceChildren(...listed.slice(first, first + ROWS).map((place) => rowOf(place, place === current, game.decisions[place].asked > at)));
    if (!listed.length) list.append(element("li", "soft", "None."));
    const here = list.querySelector("[aria-current]");
    if (here) list.scrollTop = here.parentElement.offsetTop - list.offsetTop - list.clientHeight / 2;
    get("card").replaceChildren(...cardOf(current));
    get("card").className = current === null ? "box card" : `box card ${kindOf(game.decisions[current].agent)}`;
  }

  function rowOf(place, isCurrent, isLater) {
    const each = game.decisions[place];
    const said = textOf(pieces, each.said).trim() || "(nothing)";
    const button = element(
      "button", isLater ? "later" : "",
      element("span", "", time(each.asked)),
      element("span", `named ${kindOf(each.agent)}`, game.agents[each.agent]),
      element("span", "", said.slice(0, 200)),
      badgeOf(each.outcome),
    );
    if (isCurrent) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => {
      chosen = place;
      player.go(each.asked);
    });
    return element("li", "", button);
  }

  function badgeOf(outcome) {
    const tone = { traded: "good", passed: "" }[outcome] ?? "bad";
    return element("span", `badge ${tone}`, `${outcomes[outcome][0]} ${outcome}`);
  }

  function cardOf(place) {
    if (place === null) return [element("p", "soft", "Nobody was asked yet.")];
    const each = game.decisions[place];
    const trades = game.trades.filter((trade) => trade.decision === place).map((trade) => {
      const word = trade.side > 0 ? "bought" : "sold";
      return `${word} ${amountOf(trade.quantity)} ${game.assets[trade.asset].name} at ${numberOf(trade.price, 1e-4)}, ${clockOf(game.start + trade.time, true)}`;
    });
    return [
      element("h3", "named", game.agents[each.agent]),
      facts(
        "asked at", clockOf(game.start + each.asked, true),
        "took", `${each.seconds.toFixed(3)} s, until ${clockOf(game.start + each.asked + each.seconds, true)}`,
        "taken for", each.choice ?? "none of the valid answers",
        "outcome", element("span", "", badgeOf(each.outcome), ` ${outcomes[each.outcome][1]}`),
        ...(trades.length ? ["trades", trades.join("; ")] : []),
      ),
      ...told("said", textOf(pieces, each.said)),
      ...told("saw", textOf(pieces, each.saw)),
    ];
  }

  function nextDecision(at, way) {
    const place = way > 0 ? lastUpTo(asked, at) + 1 : lastUpTo(asked, at - 1e-9);
    return asked[place] ?? (way > 0 ? end : 0);
  }

  const player = makePlayer({ rate: () => 1, show, next: nextDecision, step: () => (view[1] - view[0]) / 100 });

  function showAgents() {
    const entries = game.agents.map((name, agent) => {
      const box = element("input");
      box.type = "checkbox";
      box.checked = true;
      box.addEventListener("change", () => {
        shown[agent] = box.checked;
        choose();
        view = null;
        player.redraw();
      });
      const line = drawn("svg", { viewBox: "0 0 32 12", class: "chart" }, drawn("path", { class: `worth ${kindOf(agent)}`, d: "M0 6H32" }));
      line.firstChild.setAttribute("stroke", "var(--own)");
      const own = game.decisions.filter((each) => each.agent === agent);
      const invalid = own.filter((each) => each.outcome === "invalid").length;
      const words = `${name}: ${percentOf(game.yields[agent])}, ${own.length} questions${invalid ? `, ✗ ${invalid} invalid answers` : ""}`;
      return element("label", kindOf(agent), box, line, words);
    });
    get("agents").replaceChildren(...entries);
  }

  function open(place) {
    game = games[place];
    end = Math.max(game.cutoff, ...game.assets.map((asset) => asset.times.at(-1)), ...game.equity.map((line) => line.times.at(-1)));
    shown = game.agents.map(() => true);
    order = game.decisions.map((_, n) => n).sort((a, b) => game.decisions[a].asked - game.decisions[b].asked || a - b);
    view = chosen = null;
    get("title").textContent = game.title;
    get("about").textContent = `${game.decisions.length} questions, ${game.trades.length} trades, ${clockOf(game.start, false)} to ${clockOf(game.start + game.cutoff, false)}, ${numberOf(game.cash)} in cash each`;
    get("notes").replaceChildren(...game.notes.map((note) => element("p", "soft", note)));
    get("rules").textContent = textOf(pieces, game.rules);
    charts = [...game.assets.map((asset) => chartOf(asset.name, asset.buySize.length ? 240 : 200)), chartOf("What each agent is worth", 160)];
    get("charts").replaceChildren(...charts.map((chart) => chart.box));
    const spans = [[3600, "1 hour"], [600, "10 minutes"], [60, "1 minute"], [20, "20 seconds"], [4, "4 seconds"]];
    get("zoom").replaceChildren(...[[end, "the whole day"], ...spans.filter(([seconds]) => seconds < end)].map(([seconds, word]) => new Option(word, seconds)));
    const found = Object.keys(outcomes).filter((each) => game.decisions.some((decision) => decision.outcome === each));
    get("outcome").replaceChildren(new Option("every outcome", ""), ...found.map((each) => new Option(`${outcomes[each][0]} ${each}: ${outcomes[each][1]}`, each)));
    showAgents();
    choose();
    player.open(end, Number(location.hash.slice(1)) || 0); // an address that ends in #350 begins 350 s into the day
  }

  get("zoom").addEventListener("change", player.redraw);
  get("outcome").addEventListener("change", () => {
    choose();
    player.redraw();
  });
  addEventListener("resize", () => {
    view = null;
    player.redraw();
  });
  chooseGames(games.map((each, place) => `${place + 1}: ${each.title} (${each.yields.map(percentOf).join(", ")})`), open);
  open(0);
}

if (typeof document !== "undefined") startMarket();
