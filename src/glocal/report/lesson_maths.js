"use strict";
// The computation: a convolution of one channel, and the attention heads that equal it. All in double precision.
// A picture is an array of rows. A place is a coordinate on the picture's grid, which padding extends beyond it.

const SIDE = 11; // pixels along each axis of a picture

const zeros = (rows, columns) => Array.from({ length: rows }, () => new Array(columns).fill(0));
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const table = (rows, columns, entry) =>
  Array.from({ length: rows }, (_, r) => Array.from({ length: columns }, (_, c) => entry(r, c)));

/** Where queries and taps stand along one axis, and which places the softmax runs over ("same" padding). */
function geometryOf({ size, stride, dilation, border }) {
  const span = dilation * (size - 1);
  const before = Math.floor(span / 2);
  const out = Math.floor((SIDE - 1) / stride) + 1;
  const [first, count] = border === "none" ? [0, SIDE] : [-before, SIDE + span];
  return {
    size, border, before, out,
    extent: SIDE + span, // of what is drawn: the picture and its border, whether heads see it or not
    queries: Array.from({ length: out }, (_, o) => o * stride),
    taps: Array.from({ length: size }, (_, t) => t * dilation - before),
    places: Array.from({ length: count }, (_, p) => first + p),
  };
}

/** Which pixel a place reads along one axis; -1: none. */
function sourceOf(place, border) {
  if (place >= 0 && place < SIDE) return place;
  if (border === "replicate") return Math.min(Math.max(place, 0), SIDE - 1);
  if (border === "reflect") return place < 0 ? -place : 2 * (SIDE - 1) - place;
  if (border === "circular") return (place + SIDE) % SIDE;
  return -1;
}

/** What stands at a place: a pixel, a copy of one, or null where there is nothing to read. */
function readAt(picture, row, column, border) {
  const [r, c] = [sourceOf(row, border), sourceOf(column, border)];
  return r < 0 || c < 0 ? null : picture[r][c];
}

/** The convolution, as every library computes it: kernel cells times pixels. */
function convolve(picture, kernel, { queries, taps, border, out }) {
  return table(out, out, (i, j) => {
    let total = 0;
    taps.forEach((down, t) =>
      taps.forEach((right, u) => {
        total += kernel[t][u] * (readAt(picture, queries[i] + down, queries[j] + right, border) ?? 0);
      }),
    );
    return total;
  });
}

/** Softmax of -alpha (place - query - centre)^2 over the places of one axis. */
function softmaxAlong(places, query, centre, alpha) {
  const scores = places.map((place) => -alpha * (place - query - centre) ** 2);
  const highest = Math.max(...scores);
  const raised = scores.map((score) => Math.exp(score - highest));
  const total = sum(raised);
  return raised.map((each) => each / total);
}

/** How these weights change with the centre. */
function slopeAlong(places, query, centre, alpha, weights) {
  const from = places.map((place) => place - query - centre);
  const mean = sum(from.map((distance, p) => distance * weights[p]));
  return weights.map((weight, p) => 2 * alpha * weight * (from[p] - mean));
}

/** A head's weights at one query. A squared distance is a sum over axes, so the softmax is a product over axes. */
function attentionMap(places, query, centre, alpha) {
  const down = softmaxAlong(places, query[0], centre[0], alpha);
  const right = softmaxAlong(places, query[1], centre[1], alpha);
  return down.map((row) => right.map((column) => row * column));
}

/** All heads at all queries: the output, and the largest gradient of an output pixel by a head's centre. */
function attend(picture, { places, queries, border, out }, centres, values, alpha) {
  const extended = places.map((row) => places.map((column) => readAt(picture, row, column, border) ?? 0));
  const known = new Map(); // heads in one row or column of the kernel share an axis
  const along = (centre) => {
    if (!known.has(centre)) {
      const weights = queries.map((query) => softmaxAlong(places, query, centre, alpha));
      const slopes = queries.map((query, q) => slopeAlong(places, query, centre, alpha, weights[q]));
      known.set(centre, { weights, slopes, mixed: product(weights, extended), moved: product(slopes, extended) });
    }
    return known.get(centre);
  };
  const output = zeros(out, out);
  let gradient = 0;
  centres.forEach(([down, right], head) => {
    const { mixed, moved } = along(down);
    const { weights, slopes } = along(right);
    for (let i = 0; i < out; i++) {
      for (let j = 0; j < out; j++) {
        output[i][j] += values[head] * dot(mixed[i], weights[j]);
        const slope = Math.hypot(dot(moved[i], weights[j]), dot(mixed[i], slopes[j]));
        gradient = Math.max(gradient, Math.abs(values[head]) * slope);
      }
    }
  });
  return { output, gradient };
}

function dot(left, right) {
  let total = 0;
  for (let p = 0; p < left.length; p++) total += left[p] * right[p];
  return total;
}

function product(left, right) {
  const columns = right[0].map((_, c) => right.map((row) => row[c]));
  return left.map((row) => columns.map((column) => dot(row, column)));
}

/** |left - right| at every output pixel. */
const difference = (left, right) => left.map((row, i) => row.map((value, j) => Math.abs(value - right[i][j])));
const largest = (picture) => Math.max(...picture.map((row) => Math.max(...row)));

// Kernels. Those of one axis are multiplied: cell (t, u) is down[t] * right[u].

const SMOOTH = { 1: [1], 2: [1 / 2, 1 / 2], 3: [1 / 4, 1 / 2, 1 / 4], 5: [1 / 16, 1 / 4, 3 / 8, 1 / 4, 1 / 16] };
const SLOPE = { 2: [-1, 1], 3: [-1, 0, 1], 5: [-1 / 2, -1, 0, 1, 1 / 2] };

/** A kernel by its name: blur, sharpen, edge (not of size 1), shift or random. */
function kernelOf(name, size, seed) {
  const middle = (size - 1) >> 1;
  const one = (row, column) => table(size, size, (t, u) => Number(t === row && u === column));
  const blur = table(size, size, (t, u) => SMOOTH[size][t] * SMOOTH[size][u]);
  if (name === "blur") return blur;
  if (name === "sharpen") return one(middle, middle).map((row, t) => row.map((cell, u) => 2 * cell - blur[t][u]));
  if (name === "edge") return table(size, size, (t, u) => SMOOTH[size][t] * SLOPE[size][u]);
  if (name === "shift") return one(size - 1, size - 1);
  const random = randomNumbers(1000 * seed + size);
  return table(size, size, () => Math.round(100 * (2 * random() - 1)) / 100); // as many digits as are shown
}

/** A function that returns a number between 0 and 1, another one at each call, the same ones for a seed. */
function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x9e3779b9) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 16), 0x21f0aaad);
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97);
    return ((mixed ^ (mixed >>> 15)) >>> 0) / 2 ** 32;
  };
}

// Pictures, from 0 (black) to 1 (white).

const DIGIT = `
   #####
  ##   ##
       ##
       ##
    ####
       ##
       ##
  ##   ##
   #####`.split("\n");

const PICTURES = {
  ball: table(SIDE, SIDE, (r, c) => {
    const [down, right] = [(r - 5) / 4.45, (c - 5) / 4.45];
    const depth = Math.sqrt(Math.max(0, 1 - down ** 2 - right ** 2)); // lit from the upper left
    return depth ? 0.1 + 0.88 * Math.max(0, 0.66 * depth - 0.56 * down - 0.48 * right) : 0.3 - 0.015 * r;
  }),
  digit: table(SIDE, SIDE, (r, c) => ((DIGIT[r] ?? "")[c] === "#" ? 0.95 : 0.08)),
  texture: table(SIDE, SIDE, (r, c) => 0.12 + 0.03 * (r + c) + 0.09 * Math.sin(1.9 * r) * Math.cos(1.4 * c - 0.5 * r)),
};
