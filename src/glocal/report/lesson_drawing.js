// The drawing: grids of pixels on canvases, charts as SVG. Colours are the page's own, light or dark.

const palette = new Map(); // cleared when the scheme changes

function colour(name) {
  if (!palette.has(name))
    palette.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return palette.get(name);
}

const grey = (value) => `rgb(${[1, 1, 1].map(() => Math.round(255 * Math.min(1, Math.max(0, value)))).join(" ")})`;
const signed = (weight) => colour(weight === 0 ? "faint" : weight < 0 ? "c6" : "c1"); // below zero: red

/** A canvas, made sharp for its screen and higher than wide by `below`: its context in CSS pixels, and its width. */
function surface(canvas, below = 0) {
  const width = canvas.clientWidth;
  const sharp = window.devicePixelRatio || 1;
  canvas.style.aspectRatio = width / (width + below);
  canvas.width = Math.round(width * sharp);
  canvas.height = Math.round((width + below) * sharp);
  const pen = canvas.getContext("2d");
  pen.setTransform(sharp, 0, 0, sharp, 0, 0);
  return { pen, width };
}

/** Fills the square of a cell, to whole pixels so that no seams show. */
function fillCell(pen, side, row, column, fill, opacity = 1) {
  const [x, y] = [Math.round(column * side), Math.round(row * side)];
  pen.globalAlpha = opacity;
  pen.fillStyle = fill;
  pen.fillRect(x, y, Math.round((column + 1) * side) - x, Math.round((row + 1) * side) - y);
  pen.globalAlpha = 1;
}

function frameCell(pen, side, row, column, stroke, width, inset = 0) {
  pen.strokeStyle = stroke;
  pen.lineWidth = width;
  pen.strokeRect(column * side + inset, row * side + inset, side - 2 * inset, side - 2 * inset);
}

/** A frame that is seen on any grey: light and dark line. */
function markCell(pen, side, row, column, stroke) {
  frameCell(pen, side, row, column, colour("ground"), 4.5);
  frameCell(pen, side, row, column, stroke, 2.5);
}

/** A pixel that is not computed yet. */
function emptyCell(pen, side, row, column) {
  fillCell(pen, side, row, column, colour("ground"));
  pen.fillStyle = colour("rule");
  pen.fillRect((column + 0.5) * side - 1.5, (row + 0.5) * side - 1.5, 3, 3);
}

/** A circle at a centre; the one in front is thicker. */
function ring(pen, x, y, radius, stroke, front) {
  for (const [line, width] of [[colour("ground"), front ? 5.5 : 4], [stroke, front ? 3 : 1.75]]) {
    pen.beginPath();
    pen.arc(x, y, radius, 0, 2 * Math.PI);
    pen.strokeStyle = line;
    pen.lineWidth = width;
    pen.stroke();
  }
}

/** The picture with its border, and on it the weights with which pixels count for the query. */
function drawSource(canvas, { picture, geometry, shown, weights, strongest, query, frames = [], chosen, rings = [] }) {
  const { pen, width } = surface(canvas);
  const { extent, before } = geometry;
  const side = width / extent;
  for (let r = 0; r < extent; r++) {
    for (let c = 0; c < extent; c++) {
      const [row, column] = [r - before, c - before];
      const inside = row >= 0 && row < SIDE && column >= 0 && column < SIDE;
      const value = readAt(picture, row, column, shown);
      fillCell(pen, side, r, c, colour("ground"));
      if (value === null) fillCell(pen, side, r, c, colour("rule"), shown === "none" ? 0 : 0.55);
      else fillCell(pen, side, r, c, grey(value), inside ? 1 : 0.45);
      const weight = weights(row, column) / (strongest || 1);
      if (weight) fillCell(pen, side, r, c, signed(weight), 0.85 * Math.min(1, Math.abs(weight)) ** 0.6);
    }
  }
  pen.strokeStyle = colour("faint");
  pen.lineWidth = 1;
  pen.strokeRect(before * side, before * side, SIDE * side, SIDE * side);
  for (const [row, column] of frames) frameCell(pen, side, row + before, column + before, colour("ground"), 1, 0.5);
  markCell(pen, side, query[0] + before, query[1] + before, colour("c5"));
  if (chosen) markCell(pen, side, chosen[0] + before, chosen[1] + before, colour("ink"));
  for (const { at, weight, front } of rings) {
    const [y, x] = at.map((place) => (place + before + 0.5) * side);
    ring(pen, x, y, Math.max(3, side * 0.27), front ? colour("ink") : signed(weight), front);
  }
}

/** What has been computed so far; later pixels are empty. */
function drawOutput(canvas, values, { low, high, reached, query }) {
  const { pen, width } = surface(canvas);
  const side = width / values.length;
  values.forEach((row, r) =>
    row.forEach((value, c) => {
      if (r * values.length + c > reached) emptyCell(pen, side, r, c);
      else fillCell(pen, side, r, c, grey((value - low) / (high - low)));
    }),
  );
  markCell(pen, side, query[0], query[1], colour("c5"));
}

const FLOOR = 1e-16; // of the map of differences: what rounding leaves

/** Where the outputs differ, on a logarithmic scale from rounding to 1. */
function drawDifference(canvas, errors, query) {
  const { pen, width } = surface(canvas);
  const side = width / errors.length;
  errors.forEach((row, r) =>
    row.forEach((error, c) => {
      fillCell(pen, side, r, c, colour("ground"));
      const share = error > FLOOR ? Math.log10(error / FLOOR) / 16 : 0;
      fillCell(pen, side, r, c, colour("c6"), Math.min(1, share));
    }),
  );
  pen.strokeStyle = colour("rule");
  pen.strokeRect(0.5, 0.5, width - 1, width - 1);
  markCell(pen, side, query[0], query[1], colour("c5"));
}

/** Tiles in the order of the kernel's cells, each with a number below; `paint` fills the square of one. */
function drawTiles(canvas, size, weights, chosen, paint) {
  const label = size > 3 ? 14 : 20;
  const { pen, width } = surface(canvas, size * label);
  const gap = size > 3 ? 4 : 8;
  const tile = (width - gap * (size - 1)) / size;
  weights.forEach((weight, head) => {
    pen.save();
    pen.translate((head % size) * (tile + gap), Math.floor(head / size) * (tile + gap + label) + 1);
    paint(pen, tile, head);
    pen.strokeStyle = colour(head === chosen ? "ink" : "rule");
    pen.lineWidth = head === chosen ? 2.5 : 1;
    pen.strokeRect(pen.lineWidth / 2, pen.lineWidth / 2, tile - pen.lineWidth, tile - pen.lineWidth);
    pen.fillStyle = signed(weight);
    pen.font = `600 ${Math.min(13, Math.max(8.5, tile / 4.6))}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillText(`${tile > 60 ? "× " : ""}${short(weight)}`, tile / 2, tile + label * 0.52);
    pen.restore();
  });
}

/** One head's attention on its own scale: the picture, faint, the weights, the query and the centre. */
function paintHead(pen, width, picture, { places, before, extent }, weights, query, centre, weight) {
  const side = width / extent;
  const strongest = largest(weights);
  pen.fillStyle = colour("ground");
  pen.fillRect(0, 0, width, width);
  picture.forEach((row, r) =>
    row.forEach((value, c) => fillCell(pen, side, r + before, c + before, grey(value), 0.22)),
  );
  places.forEach((row, r) =>
    places.forEach((column, c) => {
      const share = weights[r][c] / strongest;
      if (share > 0.004) fillCell(pen, side, row + before, column + before, signed(weight), share);
    }),
  );
  pen.strokeStyle = colour("faint");
  pen.lineWidth = 0.75;
  pen.strokeRect(before * side, before * side, SIDE * side, SIDE * side);
  fillCell(pen, side, query[0] + before, query[1] + before, colour("c5"), 0.9);
  const [y, x] = centre.map((offset, axis) => (query[axis] + offset + before + 0.5) * side);
  pen.beginPath();
  pen.arc(x, y, Math.max(4, side * 1.25), 0, 2 * Math.PI);
  pen.strokeStyle = colour("ink");
  pen.lineWidth = 1.25;
  pen.stroke();
}

// Charts

function shape(name, attributes, words) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (words !== undefined) made.textContent = words;
  return made;
}

const LINES = [
  { name: "error", look: { class: "s6", "stroke-width": 2.5 } },
  { name: "gradient", look: { class: "s1", "stroke-width": 2.5 } },
  { name: "rate", look: { class: "axis", "stroke-width": 1.5, "stroke-dasharray": "2 5" } },
];

/** Difference and gradient against alpha, both logarithmic; `now` is the present alpha with its two values. */
function drawPrice(svg, curve, now, words) {
  const [left, right, top, bottom] = [56, 468, 12, 218];
  const [lowest, highest] = [-20, 2];
  const x = (alpha) => left + ((right - left) * Math.log(alpha / ALPHAS[0])) / Math.log(ALPHAS[1] / ALPHAS[0]);
  const y = (value) => bottom - ((bottom - top) * (Math.log10(value) - lowest)) / (highest - lowest);
  const parts = [];
  for (let power = lowest; power <= 0; power += 4) {
    parts.push(shape("line", { class: "grid", x1: left, x2: right, y1: y(10 ** power), y2: y(10 ** power) }));
    const name = power === 0 ? "1" : `10${raised(power)}`;
    parts.push(shape("text", { x: left - 7, y: y(10 ** power) + 4, "text-anchor": "end" }, name));
  }
  parts.push(shape("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  for (const alpha of [0.1, 0.3, 1, 3, 10, 30])
    parts.push(shape("text", { x: x(alpha), y: bottom + 18, "text-anchor": "middle" }, String(alpha)));
  parts.push(shape("text", { x: (left + right) / 2, y: bottom + 37, "text-anchor": "middle" }, words.alpha));
  const [wide, high] = [right - left, bottom - top];
  const plot = shape("svg", { x: left, y: top, width: wide, height: high, viewBox: `${left} ${top} ${wide} ${high}` });
  for (const { name, look } of [...LINES].reverse()) { // what is below the chart is cut off
    const points = curve.map((point) => `${x(point.alpha).toFixed(1)},${y(point[name] || 1e-40).toFixed(1)}`);
    plot.append(shape("polyline", { fill: "none", "stroke-linejoin": "round", points: points.join(" "), ...look }));
  }
  parts.push(plot);
  parts.push(shape("line", { class: "front now", x1: x(now.alpha), x2: x(now.alpha), y1: top, y2: bottom }));
  for (const [name, fill] of [["gradient", "f1"], ["error", "f6"]])
    parts.push(
      shape("circle", {
        class: `${fill} halo ${name}`, "stroke-width": 2, r: 5.5, cx: x(now.alpha),
        cy: Math.min(bottom, y(now[name])),
      }),
    );
  svg.replaceChildren(...parts);
}

/** Along one axis: the shares of whole pixels as bars, and exp(score) as a line. */
function drawBell(svg, { places, query, centre, alpha }, words) {
  const [left, right, top, bottom, reach] = [14, 306, 12, 128, 4];
  const step = (right - left) / (2 * reach + 1);
  const nearest = Math.round(centre);
  const x = (offset) => left + step * (offset - nearest + reach + 0.5);
  const offsets = Array.from({ length: 2 * reach + 1 }, (_, i) => nearest + i - reach);
  const weights = softmaxAlong(places, query, centre, alpha);
  const shares = new Map(places.map((place, p) => [place - query, weights[p]]));
  const y = (weight) => bottom - (bottom - top) * weight;
  const parts = [shape("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom })];
  offsets.forEach((offset) => {
    const share = shares.get(offset) ?? 0; // beyond the border there is no place
    const tall = { x: x(offset) - step * 0.36, width: step * 0.72, y: y(share), height: bottom - y(share) };
    parts.push(shape("rect", { class: "f1", opacity: 0.75, ...tall }));
    const name = offset < 0 ? `−${-offset}` : offset;
    parts.push(shape("text", { x: x(offset), y: bottom + 17, "text-anchor": "middle" }, name));
  });
  const points = Array.from({ length: 361 }, (_, i) => {
    const offset = nearest + (i / 180 - 1) * (reach + 0.45);
    return `${x(offset).toFixed(1)},${y(Math.exp(-alpha * (offset - centre) ** 2)).toFixed(1)}`;
  });
  parts.push(shape("polyline", { class: "front", fill: "none", "stroke-width": 1.5, points: points.join(" ") }));
  parts.push(shape("text", { x: (left + right) / 2, y: bottom + 36, "text-anchor": "middle" }, words.offset));
  svg.replaceChildren(...parts);
}

// Numbers

const raised = (power) => String(power).replace(/./g, (sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);
const minus = (text) => text.replace("-", "−");

/** So many digits; what rounds to 0 has no sign. */
const signedNumber = (value, digits) => minus(value.toFixed(digits)).replace(/^−(?=[0.]+$)/, "");

/** A kernel's weight. */
const short = (weight) => {
  const exact = Math.abs(weight - weight.toFixed(2)) < 1e-9;
  return minus(weight.toFixed(exact || Math.abs(weight) >= 0.0995 ? 2 : 3));
};

/** A number of any size: 0.0123, 3.1 × 10⁻¹⁶. */
function written(value) {
  if (value === 0) return "0";
  if (Math.abs(value) >= 0.001) return minus(value.toFixed(4));
  const [digits, power] = value.toExponential(1).split("e");
  return minus(`${digits} × 10`) + raised(Number(power));
}
