// The lesson: what is chosen, what follows from it, and how that is shown and changed.

const ALPHAS = [0.1, 64]; // ends of the slider and of the chart
const EXACT = 46; // exp(-46) is 1e-20: less than double precision sees beside 1
const PACE = 120; // milliseconds for a query while it plays
const REACH = 6; // how far a centre can be moved, in pixels

const WORDS = JSON.parse(document.getElementById("words").textContent);
const at = (id) => document.getElementById(id);

const chosen = { picture: "ball", kernel: "sharpen", size: 3, border: "zeros", stride: 1, dilation: 1 };
const state = { ...chosen, alpha: EXACT, seed: 1, centres: [], head: 0, query: [0, 0], reached: -1, playing: false };
let language = "en";
let result; // what follows from the state, but for the query
let curve = []; // difference and gradient for many alphas
const later = {}; // timers

/** Words of the present language, with {names} filled in. */
const say = (key, values = {}) => WORDS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);

// What follows from the state

function compute() {
  const geometry = geometryOf(state);
  const kernel = kernelOf(state.kernel, state.size, state.seed);
  const weights = kernel.flat();
  const picture = PICTURES[state.picture];
  const convolved = convolve(picture, kernel, geometry);
  const { output: attended, gradient } = attend(picture, geometry, state.centres, weights, state.alpha);
  const errors = difference(attended, convolved);
  const [low, high] = [-largest(convolved.map((row) => row.map((value) => -value))), largest(convolved)];
  const strongest = Math.max(...weights.map(Math.abs));
  result = { geometry, kernel, weights, picture, convolved, attended, gradient, errors, low, high, strongest };
  result.error = largest(errors);
}

/** Difference and gradient for alphas from one end of the slider to the other. */
function computeCurve() {
  const { picture, geometry, weights, convolved } = result;
  curve = Array.from({ length: 41 }, (_, i) => {
    const alpha = ALPHAS[0] * (ALPHAS[1] / ALPHAS[0]) ** (i / 40);
    const { output, gradient } = attend(picture, geometry, state.centres, weights, alpha);
    return { alpha, error: largest(difference(output, convolved)), gradient, rate: Math.exp(-alpha) };
  });
}

/** The centres that make the heads read the kernel's cells. */
function cells() {
  const { taps } = geometryOf(state);
  return taps.flatMap((down) => taps.map((right) => [down, right]));
}

const moved = () => state.centres.some((centre, head) => String(centre) !== String(cells()[head]));
const place = (query) => query.map((each) => result.geometry.queries[each]);

// Drawing what follows

function show() {
  const { geometry, picture, weights, convolved, attended, errors, strongest } = result;
  const { query, head, centres, alpha, reached } = state;
  const here = place(query);
  const maps = centres.map((centre) => attentionMap(geometry.places, here, centre, alpha));
  const [first] = geometry.places;
  const together = (row, column) => sum(maps.map((map, h) => weights[h] * (map[row - first]?.[column - first] ?? 0)));
  const taps = cells().map(([down, right]) => [here[0] + down, here[1] + right]);
  const cell = (row, column) => sum(taps.map(([r, c], h) => (r === row && c === column ? weights[h] : 0)));
  const shared = { picture, geometry, strongest, query: here };
  const left = geometry.border === "none" ? "zeros" : geometry.border;
  drawSource(at("window"), { ...shared, shown: left, weights: cell, frames: taps, chosen: taps[head] });
  const rings = centres.map((centre, h) => ({ at: [here[0] + centre[0], here[1] + centre[1]], weight: weights[h] }));
  rings.push({ ...rings[head], front: true });
  drawSource(at("look"), { ...shared, shown: geometry.border, weights: together, rings });
  drawOutput(at("convolved"), convolved, { ...result, reached, query });
  drawOutput(at("attended"), attended, { ...result, reached, query });
  drawDifference(at("map"), errors, query);

  const reads = taps.map(([row, column]) => readAt(picture, row, column, left));
  drawTiles(at("taps"), state.size, weights, head, (pen, width, h) => {
    pen.fillStyle = reads[h] === null ? colour("rule") : grey(reads[h]);
    pen.fillRect(0, 0, width, width);
  });
  drawTiles(at("heads"), state.size, weights, head, (pen, width, h) =>
    paintHead(pen, width, picture, geometry, maps[h], here, centres[h], weights[h]),
  );
  showNumbers(reads, maps);
  const along = { places: geometry.places, query: here[1], centre: centres[head][1], alpha };
  drawBell(at("bell"), along, { offset: say("offset") });
  showPrice();
}

function showNumbers(reads, maps) {
  const { geometry, picture, weights, convolved, attended } = result;
  const { query, head, centres, alpha, size } = state;
  const [row, column] = query;
  const mean = sum(
    maps[head].map((line, r) =>
      dot(line, geometry.places.map((c) => readAt(picture, geometry.places[r], c, geometry.border) ?? 0)),
    ),
  );
  const read = reads[head] ?? 0;
  const write = (id, words) => (at(id).textContent = words);
  const four = (value) => signedNumber(value, 4);
  const timesWeight = (value) => `${four(weights[head])} × ${four(value)} = ${four(weights[head] * value)}`;
  const [down, right] = cells()[head].map((offset) => signedNumber(offset, 0));
  const count = size * size;
  for (const caption of document.querySelectorAll(".range"))
    caption.textContent = say("range", { low: signedNumber(result.low, 2), high: signedNumber(result.high, 2) });
  write("attention-title", say(count > 1 ? "attention" : "attention-one", { heads: count }));
  write("tap-name", say("tap", { down, right }));
  write("tap-read", reads[head] === null ? say("nothing") : read.toFixed(4));
  write("tap-product", timesWeight(read));
  write("tap-sum", signedNumber(convolved[row][column], 6));
  const [y, x] = centres[head].map((offset) => minus(String(offset)));
  write("head-name", say("head", { head: head + 1, down: y, right: x }));
  write("head-top", `${(100 * largest(maps[head])).toFixed(1)} %`);
  write("head-read", mean.toFixed(4));
  write("head-product", timesWeight(mean));
  write("head-sum", signedNumber(attended[row][column], 6));
  write("error", written(result.error));
  write("gradient", written(result.gradient));
  const [said, look] = told();
  write("said", say(said));
  at("said").style.borderColor = `var(--${look})`;
  const reaching = geometry.places.length ** 2;
  const [local, wide] = [size ** 2 * 64 * 64 + 64, size ** 2 * 3];
  for (const [id, number] of Object.entries({
    "count-heads": count, "count-weights": count, "count-own-weights": count, "count-centres": 2 * count,
    "count-alphas": count, "count-wide": local, "count-own-wide": local + wide,
    "count-reads": count, "count-own-reads": count * reaching,
  })) write(id, number.toLocaleString(language));
  write("alpha-shown", `α = ${alpha}`);
  write("error-shown", written(result.error));
  at("restore").disabled = !moved();
  for (const [axis, id] of ["down", "right"].entries()) {
    at(id).value = centres[head][axis];
    at(`${id}-shown`).textContent = signedNumber(centres[head][axis], 2);
  }
  const slider = at("alpha");
  slider.value = Math.round(100 * Math.log10(alpha / EXACT));
  slider.setAttribute("aria-valuetext", `α = ${alpha}`);
  const scrubber = at("query");
  scrubber.max = geometry.out ** 2 - 1;
  scrubber.value = row * geometry.out + column;
  scrubber.setAttribute("aria-valuetext", say("place", { row: row + 1, column: column + 1 }));
  at("query-shown").textContent = say("place", { row: row + 1, column: column + 1 });
  at("play").textContent = say(state.playing ? "pause" : "play");
  at("another").hidden = state.kernel !== "random";
}

/** Which sentence fits what is seen, and its colour. */
function told() {
  if (state.border === "none" && state.size > 1) return [inMiddle() < 1e-12 ? "said-none" : "said-both", "c6"];
  if (moved()) return ["said-moved", "c5"];
  if (result.error < 1e-12) return ["said-exact", "c3"];
  return result.error < 1e-3 ? ["said-near", "c3"] : ["said-soft", "c5"];
}

/** Room for the longest sentence, so that nothing moves under a finger when another one is said. */
function makeRoom() {
  const box = at("said");
  box.style.minHeight = 0;
  const heights = Object.keys(WORDS[language])
    .filter((key) => key.startsWith("said-"))
    .map((key) => ((box.textContent = say(key)), box.getBoundingClientRect().height));
  box.style.minHeight = `${Math.max(...heights)}px`;
}

/** The largest difference where the window lies in the picture. */
function inMiddle() {
  const { queries, taps } = result.geometry;
  const within = (o) => queries[o] + taps[0] >= 0 && queries[o] + taps.at(-1) < SIDE;
  return Math.max(...result.errors.flatMap((line, i) => line.filter((_, j) => within(i) && within(j))));
}

function showPrice() {
  const now = { alpha: state.alpha, error: result.error, gradient: result.gradient };
  drawPrice(at("price"), curve, now, { alpha: say("price-alpha") });
}

/** For those who listen: what the last action changed, once the hand rests. */
function announce(words = present) {
  clearTimeout(later.spoken);
  later.spoken = setTimeout(() => (at("spoken").textContent = words()), 400);
}

function present() {
  const [row, column] = state.query;
  return say("spoken", {
    row: row + 1, column: column + 1,
    convolution: signedNumber(result.convolved[row][column], 4),
    attention: signedNumber(result.attended[row][column], 4),
    alpha: state.alpha, error: result.error.toExponential(1), gradient: result.gradient.toExponential(1),
  });
}

// Changing the state

/** After a change of anything but the query; the chart follows when the hand rests, unless only alpha moved. */
function changed({ curves = true } = {}) {
  compute();
  if (curves) {
    clearTimeout(later.curve);
    later.curve = setTimeout(() => (computeCurve(), showPrice()), curve.length ? 60 : 0);
  }
  show();
  announce();
}

function setAlpha(alpha) {
  state.alpha = Number(alpha.toPrecision(3));
  changed({ curves: false });
}

/** A choice. Where it moves the kernel's cells, or `again`, the heads go to them; the query stays on the grid. */
function choose(values, again = false) {
  const before = String(cells());
  const whole = state.reached >= geometryOf(state).out ** 2 - 1;
  Object.assign(state, values);
  if (state.kernel === "edge" && state.size === 1) state.kernel = "blur"; // one pixel has no neighbours to compare
  for (const name of Object.keys(chosen)) at(name).value = state[name];
  at("kernel").querySelector("[value=edge]").disabled = state.size === 1;
  if (again || String(cells()) !== before) state.centres = cells();
  state.head = Math.min(state.head, state.centres.length - 1);
  const { out } = geometryOf(state);
  state.query = state.query.map((each) => Math.min(each, out - 1));
  state.reached = whole ? out ** 2 - 1 : Math.max(state.query[0] * out + state.query[1], 0);
  changed();
}

function moveQuery(row, column) {
  const { out } = result.geometry;
  state.query = [row, column].map((each) => Math.min(Math.max(each, 0), out - 1));
  state.reached = Math.max(state.reached, state.query[0] * out + state.query[1]);
  show();
  if (!state.playing) announce();
}

function moveCentre(head, centre) {
  state.head = head;
  state.centres[head] = centre.map((offset) => Math.min(Math.max(Number(offset.toFixed(2)), -REACH), REACH));
  changed();
}

function play(playing) {
  cancelAnimationFrame(later.frame);
  state.playing = playing;
  const { out } = result.geometry;
  if (playing && state.query[0] * out + state.query[1] >= out ** 2 - 1) {
    state.query = [0, 0];
    state.reached = 0;
  }
  let last = performance.now();
  const step = (now) => {
    const next = state.query[0] * result.geometry.out + state.query[1] + 1;
    if (now - last >= PACE) {
      last = now;
      if (next >= result.geometry.out ** 2) return play(false);
      moveQuery(Math.floor(next / result.geometry.out), next % result.geometry.out);
    }
    later.frame = requestAnimationFrame(step);
  };
  if (playing) later.frame = requestAnimationFrame(step);
  show();
}
