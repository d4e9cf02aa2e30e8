"use strict";
// The numbers: what the page holds, read when it is needed, and what is computed of it for the query that is chosen.

const STEP = 1.5 / 128, PARTS = 64, EMPTY = 255; // those of glocal.analysis.codes
const about = JSON.parse(document.getElementById("about").textContent);
const layers = about.layers, pictures = about.pictures;
const byId = (id) => document.getElementById(id);
const state = { image: 0, v: 0.34, u: 0.34, token: -1, terms: "both", values: "softmax", ground: "bare", scale: "map", measure: "distance" };

const TYPES = { u1: Uint8Array, u2: Uint16Array, i2: Int16Array, i4: Int32Array, f4: Float32Array };

async function inflated(block) {
  const element = byId("b" + block), text = element.textContent.trim();
  let bytes;
  if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(text);
  else {
    const plain = atob(text);
    bytes = new Uint8Array(plain.length);
    for (let i = 0; i < plain.length; i++) bytes[i] = plain.charCodeAt(i);
  }
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function read(array) {
  if (!array.values) {
    array.reading ??= inflated(array.block).then((buffer) => { array.values = new TYPES[array.type](buffer); byId("b" + array.block).remove(); });
    await array.reading;
  }
}

const of = (list, image) => list[Math.min(image, list.length - 1)];

async function load(image) {
  const arrays = [];
  for (const layer of layers) {
    for (const rows of [of(layer.rows, image), ...(layer.table.length ? [of(layer.table, image)] : [])]) arrays.push(rows.codes, rows.scales);
    if (layer.index.length) arrays.push(of(layer.index, image));
  }
  await Promise.all(arrays.map(read));
}

/* Where a row begins in an array [heads|1, queries|1, entries]. */
function row(array, head, query) {
  const [heads, queries, entries] = array.shape;
  return (Math.min(head, heads - 1) * queries + Math.min(query, queries - 1)) * entries;
}

const level = new Float64Array(256);
/* What each code means: how far below the highest a score lies. */
function levels(spread) {
  const wide = spread / PARTS, narrow = Math.min(wide, STEP), knee = wide > narrow ? Math.log(wide / narrow) : 0;
  const at = narrow > 0 ? (1 - Math.exp(-knee)) / narrow : 0;
  for (let code = 0; code < EMPTY; code++) {
    level[code] = code < at ? -Math.log1p(-Math.min(code * narrow, 1 - 1e-9)) : knee + (code - at) * wide;
  }
}

/* Weights that are a mixture of two, or one of these alone. */
function mixed(layer, image, head, query) {
  const content = layer.shares["content share"][head], both = state.terms === "both", out = new Float64Array(count(layer.sources));
  [[layer.rows, both ? content : +(state.terms === layer.terms[0])], [layer.table, both ? 1 - content : +(state.terms === layer.terms[1])]].forEach(([part, share]) => {
    const { codes, scales } = of(part, image), start = row(codes, head, query), unit = share * scales.values[row(scales, head, query)];
    for (let k = 0; k < out.length; k++) out[k] += codes.values[start + k] * unit;
  });
  return out;
}

/* The slots of one row: Float64Array of what the switches ask for, NaN where the softmax does not run; null if the layer has no such term. */
function slots(layer, image, head, query) {
  const rows = of(layer.rows, image), codes = rows.codes.values, scales = rows.scales.values;
  if (layer.kind === "mixture") return mixed(layer, image, head, query);
  const entries = Math.max(rows.codes.shape[2], layer.table.length ? of(layer.table, image).codes.shape[2] : 0);
  const start = row(rows.codes, head, query), at = row(rows.scales, head, query), out = new Float64Array(entries);
  if (layer.kind !== "scores") {
    const middle = layer.kind === "signed" && rows.codes.type === "u1" ? 128 : 0;
    for (let k = 0; k < entries; k++) out[k] = (codes[start + k] - middle) * scales[at];
    return out;
  }
  const wanted = state.terms === "both" ? layer.terms : layer.terms.filter((term) => term === state.terms);
  if (!wanted.length) return null;
  const two = layer.terms.length > 1, first = wanted.includes(layer.terms[0]), second = two && wanted.includes(layer.terms[1]);
  let table = null, begin = 0, low = 0, step = 1;
  if (two) {
    const kept = of(layer.table, image);
    table = kept.codes.values;
    begin = row(kept.codes, head, query);
    if (kept.codes.type === "u2") {
      const own = 2 * Math.min(head, kept.scales.shape[0] - 1);
      low = kept.scales.values[own];
      step = kept.scales.values[own + 1];
    }
  }
  const highest = scales[at], sum = two ? scales[at + 3] : 0;
  if (first) levels(scales[at + 1]);
  for (let k = 0; k < entries; k++) {
    const code = codes[start + k];
    if (code === EMPTY) { out[k] = NaN; continue; }
    const other = two ? low + step * table[begin + k] : 0;
    out[k] = (first ? (two ? Math.min(highest, sum - other) : highest) - level[code] : 0) + (second ? other : 0);
  }
  if (state.values === "scores") return out;
  const denominator = scales[at + (first && second ? 4 : first ? 2 : 5)];
  for (let k = 0; k < entries; k++) out[k] = Math.exp(out[k] - denominator);
  return out;
}

/* The same by source. */
function sources(layer, image, head, query) {
  const values = slots(layer, image, head, query);
  if (!values || !layer.index.length) return values;
  const index = of(layer.index, image), begin = row(index, head, query), scores = state.values === "scores" && layer.kind === "scores";
  const out = new Float64Array(count(layer.sources)).fill(NaN), entries = Math.max(values.length, index.shape[2]);
  for (let k = 0; k < entries; k++) {
    const to = index.values[begin + Math.min(k, index.shape[2] - 1)], value = values[Math.min(k, values.length - 1)];
    if (to < 0 || value !== value) continue;
    out[to] = out[to] !== out[to] ? value : scores ? Math.max(out[to], value) : out[to] + value;
  }
  return out;
}

/* Of all images together. */
function averaged(layer, head, query) {
  const images = Math.max(layer.rows.length, layer.table.length, layer.index.length);
  const first = sources(layer, 0, head, query);
  if (!first || images === 1) return first;
  const sum = new Float64Array(first.length), seen = new Uint16Array(first.length);
  for (let image = 0; image < images; image++) {
    const values = image ? sources(layer, image, head, query) : first;
    for (let j = 0; j < sum.length; j++) if (values[j] === values[j]) { sum[j] += values[j]; seen[j]++; }
  }
  const scores = state.values === "scores" && layer.kind === "scores";
  return sum.map((value, j) => (seen[j] ? value / (scores ? seen[j] : images) : NaN));
}

const count = (places) => places.prefix + places.grid[0] * places.grid[1];

/* Which stored row of a layer belongs to the chosen place, and the token it is of; null: none. */
function queryOf(layer) {
  const { prefix, grid: [height, width] } = layer.queries;
  if (!height) return { row: Math.min(Math.max(state.token, 0), prefix - 1), number: Math.min(Math.max(state.token, 0), prefix - 1), at: null };
  if (state.token >= 0) return state.token < prefix ? { row: state.token, number: state.token, at: null } : null;
  const cell = (share, n) => {
    const kept = Math.ceil(n / layer.stride), i = Math.min(Math.floor(Math.floor(share * n) / layer.stride), kept - 1);
    return [i, Math.min(i * layer.stride + Math.floor(layer.stride / 2), n - 1), kept];
  };
  const [i, r] = cell(state.v, height), [j, c, across] = cell(state.u, width);
  return { row: prefix + i * across + j, number: prefix + r * width + c, at: [r, c] };
}

/* Distance of every source from the query, in tokens of the query grid. */
function distances(layer, at) {
  const { prefix, grid: [height, width], origin, step } = layer.sources, out = new Float64Array(count(layer.sources)).fill(NaN);
  if (!at) return out;
  for (let r = 0, j = prefix; r < height; r++) {
    for (let c = 0; c < width; c++, j++) out[j] = Math.hypot(origin[0] + step[0] * r - at[0], origin[1] + step[1] * c - at[1]);
  }
  return out;
}

function measured(values, away) {
  let total = 0, placed = 0, far = 0, bits = 0;
  for (let j = 0; j < values.length; j++) {
    const size = Math.abs(values[j]);
    if (!(size > 0)) continue;
    total += size;
    bits -= size * Math.log2(size);
    if (away[j] === away[j]) { placed += size; far += size * away[j]; }
  }
  return { distance: placed ? far / placed : NaN, entropy: total ? bits / total + Math.log2(total) : NaN };
}

const finest = layers.reduce((best, layer) => (layer.queries.grid[0] * layer.queries.grid[1] > best[0] * best[1] ? layer.queries.grid : best), [1, 1]);
const token = () => [Math.min(Math.floor(state.v * finest[0]), finest[0] - 1), Math.min(Math.floor(state.u * finest[1]), finest[1] - 1)];

const clamp = (i, n) => Math.max(0, Math.min(n - 1, i));

const MASS = Math.sqrt(2 * Math.LN2); // of a normal distribution in the plane, half lies within so many deviations

/* Half axes and angle of the ellipse of a precision matrix over (row, column); null where it has no end. */
function ellipse([[a, b], [, c]]) {
  const middle = (a + c) / 2, apart = Math.hypot((a - c) / 2, b), [large, small] = [middle + apart, middle - apart];
  if (!(small > 1e-9)) return null;
  const angle = (Math.atan2(-2 * b, a - c) / 2) * (180 / Math.PI); // of the long axis from the column axis, x to the right and y down
  return { rx: MASS / Math.sqrt(small), ry: MASS / Math.sqrt(large), angle };
}
