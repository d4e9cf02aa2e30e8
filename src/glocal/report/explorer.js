/* The page of `glocal explore`. Everything is in it: `about` says what there is, the blocks b0, b1 ... hold the numbers.

   For tests and the curious: `explorer.shown(layer, head)` returns what is drawn there at the moment,
   {query, sources, values}: the layer's query number, how many sources it has, and a number for each of them (NaN: not
   one that the softmax runs over; null instead of the array: nothing to show). `explorer.ready` is a promise, `explorer.took` the
   milliseconds of the last drawing, `explorer.ellipse(precision)` half axes and angle of a head's ellipse. */

const MANY = 12; // heads beside one another
const cells = []; // [layer][head]: {figure, canvas, context, image, prefix..., caption, here}

function build() {
  layers.forEach((layer, i) => {
    const said = layer.error < 1e-15 ? "exactly" : "to " + layer.error.toExponential(0).replace("e-", "\u00a0×\u00a010⁻").replace(/\d+$/, (n) => n.replace(/\d/g, (d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]));
    const shares = Object.entries(layer.shares).map(([name, values]) => `, ${name} ${values.map((v) => v.toFixed(2)).join(" ")}`);
    const info = element("div", {}, element("h2", {}, `${i + 1}  ${layer.name}`), element("p", { class: "of" }, `${layer.operator}, ${grid(layer)}, rebuilt ${said}${shares.join("")}`));
    const heads = element("div", { class: "heads", style: `--n: ${Math.min(layer.heads, MANY)}` }), none = element("p", { class: "none", hidden: "" });
    const row = element("section", { class: "layer", "aria-label": `Layer ${i + 1}` }, info, none, heads);
    byId("layers").append(row);
    cells.push({ row, heads, none, list: [], data: null });
    extend(i, layer.heads <= 3 * MANY ? layer.heads : MANY);
  });
}

function grid(layer) {
  const size = ({ prefix, grid: [h, w] }) => (h ? `${h}\u00a0×\u00a0${w}` : "") + (prefix ? (h ? " + " : "") + prefix : "");
  const [from, to] = [size(layer.sources), size(layer.queries)];
  return from === to ? `${to} tokens` : `${from} tokens to ${to}`;
}

function extend(i, upto) {
  const layer = layers[i], own = cells[i], [height, width] = layer.sources.grid, prefix = layer.sources.prefix;
  own.heads.querySelector(".more")?.remove();
  for (let head = own.list.length; head < upto; head++) {
    const canvas = element("canvas", { width: width || 1, height: height || 1, role: "img", "aria-label": `Layer ${i + 1}, head ${head + 1}` });
    const map = element("div", { class: "map", style: `aspect-ratio: ${width || 1} / ${height || 1}` }, canvas, element("span", { class: "at" }));
    const here = element("b"), mean = element("span"), caption = element("figcaption");
    if (layer.ellipses) caption.append(element("span", { class: "dot", style: `background: ${headColour(head, layer.heads)}` }));
    caption.append(here, " ", mean);
    const figure = element("figure", { class: "head" }, map), cell = { figure, map, canvas, here, mean, at: map.lastChild, image: null, strip: null };
    cell.context = canvas.getContext("2d");
    if (prefix && prefix <= 16) {
      cell.strip = element("canvas", { class: "prefix", width: prefix, height: 1, "aria-hidden": "true", style: `width: ${Math.min(100, 14 * prefix)}%` });
      figure.append(cell.strip);
    }
    figure.append(caption);
    canvas.addEventListener("pointermove", (event) => hover(i, head, event));
    canvas.addEventListener("pointerleave", () => { pointed = null; tell(); });
    own.heads.append(figure);
    own.list.push(cell);
  }
  if (upto < layer.heads) {
    const more = element("button", { class: "more", type: "button" }, `${layer.heads - upto} more heads`);
    more.addEventListener("click", () => { extend(i, Math.min(layer.heads, upto + 128)); draw(); });
    own.heads.append(more);
  }
}

let drawn = false, waiting = false, version = 0;

function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; now(); });
}

function now() {
  const started = performance.now(), overlaid = state.ground === "image" && state.image !== "mean";
  document.body.classList.toggle("overlaid", overlaid);
  let most = 0, least = Infinity;
  layers.forEach((layer, i) => {
    const own = cells[i], query = queryOf(layer), scores = state.values === "scores" && layer.kind === "scores";
    own.query = query;
    own.shown = query && own.list.map((_, head) => (state.image === "mean" ? averaged(layer, head, query.row) : sources(layer, state.image, head, query.row)));
    const missing = !query ? "has no class token" : own.shown[0] ? "" : `has no ${state.terms} term`;
    own.none.hidden = !missing;
    own.none.textContent = missing;
    own.heads.hidden = !!missing;
    if (missing) { own.shown = null; return; }
    own.away = distances(layer, query.at);
    own.signed = layer.kind === "signed";
    own.ranges = own.shown.map((values) => range(values, scores, own.signed));
    own.high = Math.max(...own.ranges.map((r) => r[1]));
    own.low = Math.min(...own.ranges.map((r) => r[0]));
    if (!scores) most = Math.max(most, own.high);
    least = Math.min(least, own.low);
    own.scores = scores;
  });
  layers.forEach((layer, i) => {
    const own = cells[i], [height, width] = layer.sources.grid, prefix = layer.sources.prefix;
    if (!own.shown) return;
    const box = marker(layer, own.query.at);
    own.list.forEach((cell, head) => {
      const values = own.shown[head];
      let [low, high] = state.scale === "map" ? own.ranges[head] : [own.low, own.high];
      if (state.scale === "all" && !own.scores) high = most;
      if (height) {
        cell.image ??= cell.context.createImageData(width, height);
        paint(cell.context, cell.image, values, prefix, low, high, overlaid, own.signed);
      }
      if (cell.strip) {
        const context = cell.strip.getContext("2d");
        paint(context, context.createImageData(prefix, 1), values, 0, low, high, false, own.signed);
      }
      cell.at.style.cssText = box;
      const here = own.scores ? { distance: NaN, entropy: NaN } : measured(values, own.away), mean = layer[state.measure]?.[head] ?? layer.shares[state.measure]?.[head];
      cell.measured = here;
      cell.here.textContent = short(here[state.measure]);
      cell.mean.textContent = mean === null || mean === undefined ? "" : "⌀ " + short(mean);
    });
  });
  place();
  legend(most, overlaid);
  tell();
  version++;
  if (!drawn) {
    drawn = true;
    performance.mark("first map");
  }
  explorer.took = performance.now() - started;
}

const short = (value) => (value === undefined || value !== value ? "" : value >= 100 ? value.toFixed(0) : value.toFixed(1));

async function start() {
  colours();
  build();
  wire();
  picture();
  await load(0);
  now();
  if (about.epochs !== null) {
    epochs = JSON.parse(new TextDecoder().decode(await inflated(about.epochs)));
    byId("epoch").addEventListener("input", panels);
  }
  if (byId("panels")) panels();
}

const explorer = {
  ellipse,
  took: 0, // milliseconds of the last drawing
  shown: (layer, head) => {
    const own = cells[layer];
    return { query: own.query ? own.query.number : -1, sources: count(layers[layer].sources), values: own.shown ? [...own.shown[head]] : null };
  },
};
explorer.ready = start().catch((error) => {
  byId("read").textContent = `This page cannot be drawn here (${error.message}); a newer browser can.`;
  throw error;
});
