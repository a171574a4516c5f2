// A fight: every frame drawn from its state, both agents' decisions along the time, what they saw and said.
// Measures of the game come with the data; those below are only of the drawing.

const GROUND = 170;
const TALL = 188;
const FRAME_WIDE = 3; // pixels of a frame in the lanes

/** A fighter's state after `frame` frames, by the names of its fields. */
function fighterAt(columns, fields, frame) {
  return Object.fromEntries(fields.map((field, place) => [field, columns[place][frame]]));
}

/** Where an attack stands: "startup", "active" or "recovery"; "" for who does not attack. */
function phaseOf(fighter, rules) {
  if (fighter.mode !== rules.modes.attacking) return "";
  const move = rules.moves[fighter.move];
  if (fighter.time <= move.startup) return "startup";
  return fighter.time <= move.lastActive ? "active" : "recovery";
}

/** What a fighter does, in words. */
function doing(fighter, rules) {
  const modes = rules.modes;
  const guard = fighter.low ? "guard low" : "guard high";
  switch (fighter.mode) {
    case modes.attacking: {
      const words = { startup: "starting", active: "hitting", recovery: "recovering" };
      const move = rules.moves[fighter.move];
      return `${move.name}, ${words[phaseOf(fighter, rules)]} (${fighter.time} of ${move.lengths[fighter.touched]})`;
    }
    case modes.stunned:
    case modes.lying:
      return `${rules.doing[fighter.mode]}, ${fighter.time} more`;
    case modes.idle:
    case modes.retreating:
    case modes.blocking:
      return `${rules.doing[fighter.mode]}, ${guard}`;
    default:
      return rules.doing[fighter.mode];
  }
}

/** How far a limb is stretched, 0 to 1, in an attack. */
function stretch(fighter, rules) {
  const move = rules.moves[fighter.move];
  const phase = phaseOf(fighter, rules);
  if (phase === "active") return 1;
  if (phase === "startup") return 0.15 + (0.35 * fighter.time) / move.startup;
  const long = move.lengths[fighter.touched] - move.lastActive;
  return clamp(1 - (fighter.time - move.lastActive) / long, 0.15, 1);
}

/** A body that faces right, in pixels from the place it stands on, upwards; `strike` is the limb that attacks. */
function poseOf(fighter, rules, frame) {
  const modes = rules.modes;
  const pose = { hip: [-1, 30], neck: [2, 52], head: [5, 62], hands: [[15, 53], [12, 45]], feet: [[-10, 0], [11, 0]], strike: [] };
  const swing = 11 * Math.sin(frame * 0.4);
  switch (fighter.mode) {
    case modes.walking:
      return { ...pose, neck: [5, 52], head: [9, 61], feet: [[-swing, Math.max(0, -swing / 4)], [swing, Math.max(0, swing / 4)]] };
    case modes.retreating:
      return { ...pose, neck: [-3, 52], head: [-2, 62], hands: [[13, 54], [11, 46]], feet: [[swing - 3, 0], [-swing + 3, 0]] };
    case modes.jumping:
      if (fighter.height === 0) return { ...pose, hip: [-3, 20], neck: [3, 40], head: [7, 49], hands: [[-8, 30], [-12, 36]] };
      return { ...pose, hip: [0, 26], hands: [[16, 60], [-12, 58]], feet: [[-8, 8], [9, 12]] };
    case modes.stunned:
      return { ...pose, neck: [-7, 51], head: [-11, 60], hands: [[8, 30], [-16, 32]] };
    case modes.lying:
      return { ...pose, hip: [-2, 5], neck: [-22, 5], head: [-32, 6], hands: [[-14, 3], [-30, 3]], feet: [[18, 3], [22, 5]] };
    case modes.attacking:
      return striking(pose, fighter, rules);
    default:
      if (!fighter.low) return pose;
      return { ...pose, hip: [-5, 16], neck: [2, 35], head: [6, 44], hands: [[15, 27], [13, 20]] };
  }
}

/** The pose of an attack: where the limb goes follows from the move's level and reach. */
function striking(pose, fighter, rules) {
  const move = rules.moves[fighter.move];
  const far = stretch(fighter, rules);
  const reach = Math.max(move.reach - 8, 30);
  const leans = 6 * far;
  const neck = [2 + leans, 51];
  const head = [6 + leans, 61];
  const shoulder = [neck[0], neck[1] - 3];
  if (move.level === "low") {
    const hip = [-4, 20];
    return { ...pose, hip, neck: [-4, 42], head: [-3, 51], feet: [[-11, 0]], strike: [hip, [8 + (reach - 8) * far, 5]] };
  }
  if (move.level === "over") {
    const turn = Math.PI * (0.75 - 0.75 * far);
    const tip = [8 + (reach - 8) * far, 42 + 42 * Math.sin(turn)];
    return { ...pose, neck, head, hands: [[10, 44]], strike: [shoulder, tip] };
  }
  const rises = move.antiAir ? 62 : 45;
  const tip = [8 + (reach - 8) * far, 34 + (rises - 34) * far];
  const second = move.level === "throw" || move.reach === 0;
  return { ...pose, neck, head, hands: [second ? [tip[0] - 2, tip[1] - 8] : [10, 44]], strike: [shoulder, tip] };
}

/** The lines of a pose as an SVG path; y grows downwards there. Knees bend forwards, elbows down. */
function limbs({ hip, neck, hands, feet }) {
  const line = (from, to, bend, drop) =>
    `M${from[0]} ${-from[1]}Q${(from[0] + to[0]) / 2 + bend} ${-(from[1] + to[1]) / 2 + drop} ${to[0]} ${-to[1]}`;
  const shoulder = [neck[0], neck[1] - 3];
  return [line(hip, neck, 0, 0), ...feet.map((foot) => line(hip, foot, 5, 0)), ...hands.map((hand) => line(shoulder, hand, 0, 6))].join("");
}

/** Health that was lost within the last half second, and how long ago: [lost, frames]. */
function hurtAt(health, frame, within) {
  for (let ago = 0; ago < within && frame - ago > 0; ago++) {
    const lost = health[frame - ago - 1] - health[frame - ago];
    if (lost > 0) return [lost, ago];
  }
  return [0, 0];
}

/** The elements of a fighter and its bolt. */
function makeFighter(side) {
  const part = (name, kind) => drawn(name, { class: kind });
  const body = drawn("g");
  const parts = { limbs: part("path", "limbs"), head: drawn("circle", { class: "head", r: 8 }), guard: part("path", "guard") };
  Object.assign(parts, { strike: part("path", "strike"), fist: drawn("circle", { class: "fist", r: 5 }), reach: part("path", "reach") });
  body.append(...Object.values(parts));
  const above = { dizzy: part("text", "dizzy"), hurt: part("text", "hurt"), place: drawn("path", { class: "place", d: "M0 2l4 6h-8z" }) };
  const whole = drawn("g", {}, body, ...Object.values(above));
  const bolt = drawn("g", { class: `bolt k${side}` }, drawn("path", { d: "M-16 0H-6" }), drawn("circle", { r: 5 }));
  return { whole, body, bolt, ...parts, ...above };
}

/** Draw a fighter as its state says. */
function drawFighter(made, side, fighter, rules, frame, [lost, ago]) {
  const phase = phaseOf(fighter, rules);
  const { modes, pixel } = rules;
  const pose = poseOf(fighter, rules, frame);
  const x = fighter.x / pixel;
  const floor = GROUND - fighter.height;
  const blocking = fighter.mode === modes.blocking;
  made.whole.setAttribute("class", `fighter k${side} ${phase} ${blocking ? "blocking" : ""} ${fighter.safe > 0 ? "safe" : ""}`);
  made.body.setAttribute("transform", `translate(${x} ${floor}) scale(${fighter.facing} 1)`);
  made.limbs.setAttribute("d", limbs(pose));
  made.head.setAttribute("cx", pose.head[0]);
  made.head.setAttribute("cy", -pose.head[1]);
  const guards = blocking || fighter.mode === modes.idle || fighter.mode === modes.retreating;
  made.guard.setAttribute("d", !guards ? "" : fighter.low ? "M21 -36Q27 -18 21 -2" : "M21 -66Q27 -48 21 -30");
  const [from, tip] = pose.strike;
  made.strike.setAttribute("d", tip ? `M${from[0]} ${-from[1]}L${tip[0]} ${-tip[1]}` : "");
  made.fist.setAttribute("cx", tip ? tip[0] : 0);
  made.fist.setAttribute("cy", tip ? -tip[1] : 0);
  const reach = phase ? rules.moves[fighter.move].reach : 0;
  made.reach.setAttribute("d", reach ? `M0 5H${reach}M${reach} 1V9` : "");
  made.dizzy.textContent = fighter.mode === modes.stunned ? "✶ ✶" : "";
  made.hurt.textContent = lost ? `−${lost}` : "";
  for (const [name, up] of [["dizzy", 74], ["hurt", 86 + ago / 2]]) {
    made[name].setAttribute("x", clamp(x, 14, rules.stage - 14));
    made[name].setAttribute("y", Math.max(10, floor - up));
  }
  made.place.setAttribute("transform", `translate(${x} ${GROUND + 6})`);
  const flies = fighter.bolt_way !== 0;
  made.bolt.setAttribute("visibility", flies ? "visible" : "hidden");
  made.bolt.setAttribute("transform", `translate(${fighter.bolt_x / pixel} ${GROUND - 34}) scale(${fighter.bolt_way || 1} 1)`);
}

/** The corners of a line over all frames, as points of an SVG polyline; it changes between two frames at once. */
function cornersOf(values, full) {
  const points = [];
  values.forEach((value, frame) => {
    const before = values[frame - 1];
    if (frame && value !== before) points.push(`${frame},${full - before}`);
    if (!frame || value !== before || frame === values.length - 1) points.push(`${frame},${full - value}`);
  });
  return points.join(" ");
}

/** One decision in the lanes. */
function laneOf(decision, top, last) {
  const x = (frame) => frame * FRAME_WIDE;
  const { asked, begins, ends } = decision;
  const lands = Math.min(decision.lands, last);
  const parts = [drawn("rect", { class: "thinking", x: x(asked), y: top, width: x(lands - asked), height: 11 })];
  parts.push(drawn("path", { class: "landed", d: `M${x(lands)} ${top}v11` }));
  if (begins === null) return drawn("g", {}, ...parts);
  if (begins > lands) parts.push(drawn("path", { class: "waiting", d: `M${x(lands)} ${top + 6}H${x(begins)}` }));
  const wide = x(ends - begins);
  const word = decision.move ?? "✗ invalid";
  const block = drawn("rect", { class: "move", x: x(begins) + 0.5, y: top + 14, width: Math.max(wide - 1, 1), height: 22, rx: 3 });
  parts.push(block, drawn("title", {}, word));
  const shown = word.length * 6 + 4 < wide ? word : decision.move === null ? "✗" : "";
  if (shown) parts.push(drawn("text", { x: x(begins) + 4, y: top + 29 }, shown));
  return drawn("g", { class: decision.move === null ? "invalid" : "" }, ...parts);
}

function startFight() {
  const { rules, games, pieces } = JSON.parse(get("data").textContent);
  const fighters = [makeFighter(0), makeFighter(1)];
  const overviewCursor = drawn("path", { class: "cursor" });
  const laneCursor = drawn("path", { class: "cursor" });
  let game;
  let columns;
  let around = -Infinity; // the frame that the lanes are drawn around
  let lanesWide = 800;

  const posts = Array.from({ length: 7 }, (_, n) => drawn("path", { class: "post", d: `M${((n + 1) * rules.stage) / 8} ${GROUND}v4` }));
  const floor = drawn("path", { class: "floor", d: `M0 ${GROUND}H${rules.stage}` });
  get("stage").setAttribute("viewBox", `0 0 ${rules.stage} ${TALL}`);
  get("stage").append(floor, ...posts, ...fighters.map((made) => made.whole), ...fighters.map((made) => made.bolt));

  const inSeconds = (frames) => `${(frames / rules.rate).toFixed(2)} s`;

  function next(at, way) {
    const asked = game.decisions.flat().map((each) => each.asked).filter((each) => (way > 0 ? each > at : each < at));
    return way > 0 ? Math.min(...asked, game.frames) : Math.max(...asked, 0);
  }

  function showSide(side, frame) {
    const fighter = fighterAt(columns[side], rules.fields, frame);
    const health = columns[side][rules.fields.indexOf("health")];
    drawFighter(fighters[side], side, fighter, rules, frame, hurtAt(health, frame, rules.rate / 2));
    for (const what of ["health", "stamina"]) {
      get(what + side).style.width = `${(100 * clamp(fighter[what], 0, rules.full)) / rules.full}%`;
    }
    get(`doing${side}`).textContent = `${fighter.health} health, ${fighter.stamina} stamina: ${doing(fighter, rules)}`;
    const place = lastUpTo(game.decisions[side].map((each) => each.asked), frame);
    const stage = place < 0 ? "" : standing(game.decisions[side][place], frame);
    const card = get(`card${side}`);
    if (card.dataset.shown === `${place} ${stage}`) return;
    card.dataset.shown = `${place} ${stage}`;
    card.replaceChildren(...cardOf(side, place, stage));
  }

  function standing(decision, frame) {
    if (frame < decision.lands) return "thinking";
    if (decision.begins === null || frame < decision.begins) return "answered, waits until it is free";
    return frame < decision.ends ? "moving" : "done";
  }

  function cardOf(side, place, stage) {
    const turns = element("div", "turn", element("h3", "named", game.names[side]));
    if (place < 0) return [turns, element("p", "soft", "Not asked yet.")];
    const all = game.decisions[side];
    const decision = all[place];
    const buttons = [["‹", place - 1, "Its decision before"], ["›", place + 1, "Its next decision"]].map(([sign, to, label]) => {
      const button = element("button", "", sign);
      button.setAttribute("aria-label", label);
      button.disabled = !all[to];
      button.addEventListener("click", () => player.go(all[to].asked));
      return button;
    });
    turns.append(element("span", "soft", `decision ${place + 1} of ${all.length}`), element("span", "", ...buttons));
    const valid = decision.move !== null;
    const said = element("span", "", element("span", `badge ${valid ? "good" : "bad"}`, valid ? decision.move : "✗ not a valid answer"));
    return [
      turns,
      facts(
        "asked at", `${inSeconds(decision.asked)}, frame ${decision.asked}`,
        "took", `${decision.seconds.toFixed(3)} s, ${decision.lands - decision.asked} frames`,
        "began", decision.begins === null ? "never: the fight was over" : `frame ${decision.begins}`,
        "taken for", said,
        "now", stage,
      ),
      ...told("said", textOf(pieces, decision.said)),
      ...told("saw", textOf(pieces, decision.saw)),
    ];
  }

  function show(at) {
    const frame = Math.floor(at);
    showSide(0, frame);
    showSide(1, frame);
    get("clock").textContent = ((game.bell - frame) / rules.rate).toFixed(1);
    get("moment").textContent = `${inSeconds(frame)}, frame ${frame}`;
    overviewCursor.setAttribute("d", `M${frame} 0V${rules.full}`);
    if (Math.abs(frame - around) > lanesWide / FRAME_WIDE / 2) drawLanes(frame);
    const middle = frame * FRAME_WIDE;
    get("lanes").setAttribute("viewBox", `${middle - lanesWide / 2} 0 ${lanesWide} 122`);
    laneCursor.setAttribute("d", `M${middle} 0V122`);
  }

  const player = makePlayer({ rate: () => rules.rate, show, next, step: () => 1 });

  function open(place, from = 0) {
    game = games[place];
    columns = game.fighters.map((side) => side.map(unpack));
    get("title").textContent = game.names.join(" against ");
    get("result").textContent = `${game.result}; seed ${game.seed}`;
    game.names.forEach((name, side) => {
      get(`name${side}`).textContent = name;
      delete get(`card${side}`).dataset.shown;
    });
    drawOverview();
    around = -Infinity;
    player.open(game.frames, from);
  }

  function drawOverview() {
    const health = rules.fields.indexOf("health");
    const lines = columns.map((side, place) =>
      drawn("polyline", { class: `k${place}`, points: cornersOf(side[health], rules.full) }),
    );
    const invalid = game.decisions.flat().filter((each) => each.move === null);
    const ticks = invalid.map((each) => drawn("path", { class: "invalid", d: `M${each.asked} ${rules.full}v-120` }));
    get("overview").setAttribute("viewBox", `0 -20 ${game.frames} ${rules.full + 40}`);
    get("overview").replaceChildren(...lines, ...ticks, overviewCursor);
  }

  /** Draw the lanes for a width before and after what is shown: all of a long fight would be slow to move. */
  function drawLanes(frame) {
    around = frame;
    lanesWide = get("lanes").clientWidth || 800;
    const far = (1.5 * lanesWide) / FRAME_WIDE;
    const half = rules.rate / 2;
    const seconds = [];
    for (let at = Math.max(0, Math.ceil((frame - far) / half) * half); at <= Math.min(game.frames, frame + far); at += half) {
      const x = at * FRAME_WIDE;
      seconds.push(drawn("path", { class: "second", d: `M${x} 0V104` }), drawn("text", { class: "scale", x: x + 3, y: 117 }, `${at / rules.rate} s`));
    }
    const lanes = game.decisions.map((all, side) => {
      const near = all.filter((each) => each.asked < frame + far && (each.ends ?? game.frames) > frame - far);
      return drawn("g", { class: `k${side}` }, ...near.map((each) => laneOf(each, 8 + 50 * side, game.frames)));
    });
    get("lanes").replaceChildren(...seconds, ...lanes, laneCursor);
  }

  let held = 0;
  onDrag(get("overview"), (share) => player.go(share * game.frames));
  for (const [id, frames] of [["lanes", () => lanesWide / FRAME_WIDE], ["stage", () => 4 * rules.rate]]) {
    onDrag(get(id), (share, dragged, first) => {
      if (first) held = player.at();
      player.go(held + (id === "lanes" ? -dragged : dragged) * frames());
    });
  }
  addEventListener("resize", () => {
    around = -Infinity;
    player.redraw();
  });
  chooseGames(games.map((each, place) => `${place + 1}: ${each.names.join(" against ")}, seed ${each.seed}. ${each.result}`), open);
  open(0, Number(location.hash.slice(1)) || 0); // an address that ends in #350 begins at frame 350
}

if (typeof document !== "undefined") startFight();
