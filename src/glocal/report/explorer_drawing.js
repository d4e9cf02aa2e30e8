// The drawing: colours, maps on canvases, the legend, and the ellipses of heads as SVG.

const dark = matchMedia("(prefers-color-scheme: dark)");

const RAMPS = {
  light: { up: ["#f7f8fa", "#cfdcf5", "#8fb0ea", "#4a79d8", "#2346b5", "#101f5c"], down: ["#f7f8fa", "#f9d9c3", "#f0a878", "#d8692f", "#a53a10", "#5c1c05"] },
  dark: { up: ["#191d22", "#1c3560", "#2757a6", "#4388dc", "#8bbcf7", "#eef6ff"], down: ["#191d22", "#4c2914", "#8a461b", "#cf6d2c", "#f5a970", "#fff1e6"] },
};
let up, down;
const more = new Uint32Array(256), less = new Uint32Array(256);

function ramp(stops) {
  const out = new Uint32Array(256), parts = stops.map((s) => [1, 3, 5].map((i) => parseInt(s.slice(i, i + 2), 16)));
  for (let i = 0; i < 256; i++) {
    const x = (i / 255) * (parts.length - 1), k = Math.min(Math.floor(x), parts.length - 2), f = x - k;
    const [r, g, b] = [0, 1, 2].map((c) => Math.round(parts[k][c] * (1 - f) + parts[k + 1][c] * f));
    out[i] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  return out;
}

function colours() {
  const chosen = RAMPS[dark.matches ? "dark" : "light"];
  up = ramp(chosen.up);
  down = ramp(chosen.down);
  for (const [ink, over] of [[0xff7a1f, more], [0x006aff, less]]) { // over a grey image, from nothing to full blue or orange
    for (let i = 0; i < 256; i++) over[i] = (Math.round(215 * (i / 255) ** 0.8) << 24) | ink;
  }
}

function paint(context, image, values, from, low, high, overlaid, signed) {
  const out = new Uint32Array(image.data.buffer), span = high > low ? 255 / (high - low) : 0;
  for (let j = 0; j < out.length; j++) {
    const value = values ? values[from + j] : NaN;
    if (value !== value) out[j] = 0;
    else if (signed) {
      const share = Math.min(255, Math.round(Math.abs(value) * (high > 0 ? 255 / high : 0)));
      out[j] = (value < 0 ? (overlaid ? less : down) : overlaid ? more : up)[share];
    } else out[j] = (overlaid ? more : up)[Math.max(0, Math.min(255, Math.round((value - low) * span)))];
  }
  context.putImageData(image, 0, 0);
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) value === null || made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function headColour(head, heads) {
  return `oklch(${dark.matches ? 0.78 : 0.58} 0.15 ${Math.round((360 * head) / heads + 25)})`;
}

function range(values, scores, signed) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    const size = signed ? Math.abs(value) : value;
    if (size < low) low = size;
    if (size > high) high = size;
  }
  return scores ? [low, high] : [0, high > 0 ? high : 0];
}

/* The query's token on a layer's grid of sources. */
function marker(layer, at) {
  const { grid: [height, width], origin, step } = layer.sources;
  if (!at || !height) return "display: none";
  const side = (place, start, each, n) => {
    const from = (place - 0.5 - start) / each + 0.5, size = 1 / each;
    return [Math.max(0, (100 * from) / n), Math.min(100, (100 * size) / n)];
  };
  const [y, h] = side(at[0], origin[0], step[0], height), [x, w] = side(at[1], origin[1], step[1], width);
  return `left: ${x}%; top: ${y}%; width: ${w}%; height: ${h}%`;
}

function legend(most, overlaid) {
  const context = byId("ramp").getContext("2d"), data = context.createImageData(128, 1), out = new Uint32Array(data.data.buffer);
  for (let i = 0; i < 128; i++) out[i] = (overlaid ? more : up)[2 * i + 1];
  context.putImageData(data, 0, 0);
  const scores = state.values === "scores";
  byId("low").textContent = scores ? "lowest" : "0";
  byId("high").textContent = scores ? "highest" : state.scale === "all" && most > 0 ? most.toPrecision(2) : state.scale === "map" ? "largest of the map" : state.scale === "layer" ? "largest of the layer" : "largest";
}

let epochs = null;

function ellipsesOf(layer) {
  if (!epochs) return layer.ellipses;
  return epochs[+byId("epoch").value].layers[layer.name] ?? null;
}

function panels() {
  const with_ = layers.filter((layer) => layer.ellipses);
  if (epochs) byId("epoch-now").textContent = epochs[+byId("epoch").value].epoch;
  const every = (epochs ? epochs.flatMap((e) => Object.values(e.layers)) : with_.map((l) => l.ellipses)).flatMap((e) => e.centers.flat().map(Math.abs)).sort((a, b) => a - b);
  const reach = Math.ceil((every[Math.floor(0.98 * (every.length - 1))] ?? 1) + 2);
  byId("reach").textContent = reach;
  byId("panels").replaceChildren(...with_.map((layer) => {
    const found = ellipsesOf(layer), unit = 100 / (2 * reach + 1);
    const lines = [];
    for (let i = -reach; i <= reach; i++) if (i % Math.max(1, Math.round(reach / 4)) === 0) {
      lines.push(`<path d="M${i * unit} -50V50M-50 ${i * unit}H50" stroke="var(--rule)" stroke-width=".35"/>`);
    }
    const heads = found ? found.centers.map(([row, column], head) => {
      const shape = ellipse(found.precision[head]), colour = headColour(head, found.centers.length);
      const around = shape ? `<ellipse rx="${Math.min(shape.rx * unit, 400).toFixed(2)}" ry="${Math.min(shape.ry * unit, 400).toFixed(2)}" transform="translate(${(column * unit).toFixed(2)} ${(row * unit).toFixed(2)}) rotate(${shape.angle.toFixed(1)})" fill="${colour}" fill-opacity=".13" stroke="${colour}" stroke-width=".9"/>` : "";
      return around + `<circle cx="${(column * unit).toFixed(2)}" cy="${(row * unit).toFixed(2)}" r="1.5" fill="${colour}"/>`;
    }) : [];
    const svg = `<svg viewBox="-50 -50 100 100" role="img" aria-label="Centres of ${heads.length} heads, ${reach} tokens to every side">${lines.join("")}${heads.join("")}<rect x="${-unit / 2}" y="${-unit / 2}" width="${unit}" height="${unit}" fill="none" stroke="var(--ink)" stroke-width="1"/></svg>`;
    const figure = element("figure");
    figure.innerHTML = svg; // numbers only
    figure.append(element("figcaption", {}, `${layers.indexOf(layer) + 1}  ${layer.name}`));
    return figure;
  }));
}
