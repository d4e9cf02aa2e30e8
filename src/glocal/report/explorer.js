"use strict";
/* The page of `glocal explore`. Everything is in it: `about` says what there is, the blocks b0, b1 ... hold the numbers.

   For tests and the curious: `explorer.shown(layer, head)` returns what is drawn there at the moment,
   {query, sources, values}: the layer's query number, how many sources it has, and a number for each of them (NaN: not
   one that the softmax runs over; null instead of the array: nothing to show). `explorer.ready` is a promise, `explorer.took` the
   milliseconds of the last drawing, `explorer.ellipse(precision)` half axes and angle of a head's ellipse. */
const explorer = (() => {
  const STEP = 1.5 / 128, PARTS = 64, EMPTY = 255; // those of glocal.analysis.codes
  const MANY = 12; // heads beside one another
  const about = JSON.parse(document.getElementById("about").textContent);
  const layers = about.layers, pictures = about.pictures;
  const byId = (id) => document.getElementById(id);
  const state = { image: 0, v: 0.34, u: 0.34, token: -1, terms: "both", values: "softmax", ground: "bare", scale: "map", measure: "distance" };
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // Numbers.

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

  /* The slots of one row: Float64Array of what the switches ask for, NaN where the softmax does not run; null if the layer has no such term. */
  function slots(layer, image, head, query) {
    const rows = of(layer.rows, image), codes = rows.codes.values, scales = rows.scales.values;
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

  // What is measured of a map.

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

  // Colours.

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

  // The page.

  const cells = []; // [layer][head]: {figure, canvas, context, image, prefix..., caption, here}

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) value === null || made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function headColour(head, heads) {
    return `oklch(${dark.matches ? 0.78 : 0.58} 0.15 ${Math.round((360 * head) / heads + 25)})`;
  }

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
    api.took = performance.now() - started;
  }

  const short = (value) => (value === undefined || value !== value ? "" : value >= 100 ? value.toFixed(0) : value.toFixed(1));

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

  const finest = layers.reduce((best, layer) => (layer.queries.grid[0] * layer.queries.grid[1] > best[0] * best[1] ? layer.queries.grid : best), [1, 1]);
  const token = () => [Math.min(Math.floor(state.v * finest[0]), finest[0] - 1), Math.min(Math.floor(state.u * finest[1]), finest[1] - 1)];

  function place() {
    const [r, c] = token();
    byId("at").style.cssText = state.token >= 0 ? "display: none"
      : `left: ${(100 * c) / finest[1]}%; top: ${(100 * r) / finest[0]}%; width: ${100 / finest[1]}%; height: ${100 / finest[0]}%`;
    for (const button of byId("tokens").children) button.setAttribute("aria-pressed", String(+button.value === state.token));
  }

  function legend(most, overlaid) {
    const context = byId("ramp").getContext("2d"), data = context.createImageData(128, 1), out = new Uint32Array(data.data.buffer);
    for (let i = 0; i < 128; i++) out[i] = (overlaid ? more : up)[2 * i + 1];
    context.putImageData(data, 0, 0);
    const scores = state.values === "scores";
    byId("low").textContent = scores ? "lowest" : "0";
    byId("high").textContent = scores ? "highest" : state.scale === "all" && most > 0 ? most.toPrecision(2) : state.scale === "map" ? "largest of the map" : state.scale === "layer" ? "largest of the layer" : "largest";
  }

  const named = () => (state.token >= 0 ? tokenName(state.token) : `row ${token()[0] + 1}, column ${token()[1] + 1} of ${finest[0]}\u00a0×\u00a0${finest[1]}`);
  let pointed = null;

  function hover(layer, head, event) {
    const box = event.currentTarget.getBoundingClientRect(), [height, width] = layers[layer].sources.grid;
    if (!height) return;
    pointed = { layer, head, r: clamp(Math.floor(((event.clientY - box.top) / box.height) * height), height), c: clamp(Math.floor(((event.clientX - box.left) / box.width) * width), width) };
    tell();
  }

  const clamp = (i, n) => Math.max(0, Math.min(n - 1, i));

  /* What stands below the image: the query, and of the map below the pointer the value there. */
  function tell() {
    const parts = [element("b", {}, `Query: ${named()}`)];
    if (pointed && cells[pointed.layer].shown) {
      const { layer, head, r, c } = pointed, own = cells[layer], places = layers[layer].sources;
      const value = own.shown[head][places.prefix + r * places.grid[1] + c], { distance, entropy } = own.list[head].measured;
      parts.push(element("br"), `Layer ${layer + 1}, head ${head + 1}, row ${r + 1}, column ${c + 1}: `, element("b", {}, value === value ? number(value) : "not read"));
      if (distance === distance) parts.push(element("br"), `distance ${distance.toFixed(2)} tokens, entropy ${entropy.toFixed(2)} bits`);
    } else {
      const where = state.image === "mean" ? `mean of ${pictures.length} images` : pictures[state.image].name + (pictures[state.image].note ? `, ${pictures[state.image].note}` : "");
      parts.push(element("br"), where, element("br"), "Point at a map to read its numbers.");
    }
    byId("read").replaceChildren(...parts);
    clearTimeout(announcing);
    announcing = setTimeout(announce, 450);
  }

  const number = (value) => (value === 0 ? "0" : Math.abs(value) < 1e-3 || Math.abs(value) >= 1e4 ? value.toExponential(1) : value.toPrecision(3));

  let announcing, announced = -1;

  /* For screen readers, once the query rests. */
  function announce() {
    if (announced === version) return;
    announced = version;
    const lines = cells.map((own, i) => {
      if (!own.shown) return `Layer ${i + 1}: ${own.none.textContent}.`;
      own.list.forEach((cell, head) => cell.canvas.setAttribute("aria-label",
        `Layer ${i + 1}, head ${head + 1}` + (cell.measured.distance === cell.measured.distance ? `: mean distance ${cell.measured.distance.toFixed(1)} tokens` : "")));
      return `Layer ${i + 1}, mean distance by head: ${own.list.map((cell) => short(cell.measured.distance) || "none").join(", ")}.`;
    });
    byId("say").textContent = `Query ${named()}. ${lines.join(" ")}`;
  }

  // Choosing.

  const prefixes = Math.max(...layers.map((layer) => (layer.queries.grid[0] ? layer.queries.prefix : 0)));
  const tokenName = (k) => (prefixes === 1 ? "class token" : `token ${k + 1} in front`);

  function move(dr, dc) {
    const [r, c] = token();
    state.token = -1;
    state.v = (clamp(r + dr, finest[0]) + 0.5) / finest[0];
    state.u = (clamp(c + dc, finest[1]) + 0.5) / finest[1];
    draw();
  }

  function wire() {
    const ground = byId("ground");
    const point = (event) => {
      const box = ground.getBoundingClientRect();
      state.token = -1;
      state.u = Math.max(0, Math.min(0.99999, (event.clientX - box.left) / box.width));
      state.v = Math.max(0, Math.min(0.99999, (event.clientY - box.top) / box.height));
      draw();
    };
    ground.addEventListener("pointermove", point);
    ground.addEventListener("pointerdown", (event) => { point(event); ground.focus({ preventScroll: true }); });
    ground.addEventListener("keydown", (event) => {
      const far = event.shiftKey ? 4 : 1;
      const way = { ArrowUp: [-far, 0], ArrowDown: [far, 0], ArrowLeft: [0, -far], ArrowRight: [0, far], Home: [0, -1e6], End: [0, 1e6] }[event.key];
      if (!way || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      move(...way);
    });
    byId("switches").addEventListener("change", (event) => {
      state[event.target.name] = event.target.value;
      draw();
    });
    for (let k = 0; k < prefixes; k++) {
      const button = element("button", { type: "button", value: k, "aria-pressed": "false" }, tokenName(k));
      button.addEventListener("click", () => { state.token = state.token === k ? -1 : k; draw(); });
      byId("tokens").append(button);
    }
    byId("tokens").hidden = !prefixes;
    const thumbs = pictures.map((picture, i) => {
      const button = element("button", { type: "button", value: i, title: picture.name, "aria-label": `Image ${i + 1}: ${picture.name}` }, element("img", { src: picture.src, alt: "" }));
      button.addEventListener("click", () => choose(i));
      return button;
    });
    if (pictures.length > 1) {
      const mean = element("button", { type: "button", value: "mean", "aria-label": `Mean of all ${pictures.length} images` }, "mean");
      mean.addEventListener("click", () => choose("mean"));
      thumbs.push(mean);
    }
    byId("thumbs").append(...thumbs);
    byId("thumbs").hidden = pictures.length < 2;
    const scored = layers.filter((layer) => layer.kind === "scores");
    byId("terms").hidden = new Set(scored.flatMap((layer) => layer.terms)).size < 2;
    byId("values").hidden = !scored.length;
    for (const name of new Set(layers.flatMap((layer) => Object.keys(layer.shares)))) {
      byId("measures").append(element("label", {}, element("input", { type: "radio", name: "measure", value: name }), element("span", {}, name)));
    }
    if (matchMedia("(max-width: 52rem)").matches) byId("switches").open = false; // the maps come first on a phone
    dark.addEventListener("change", () => { colours(); draw(); if (byId("panels")) panels(); });
  }

  async function choose(image) {
    await Promise.all(image === "mean" ? pictures.map((_, i) => load(i)) : [load(image)]);
    state.image = image;
    picture();
    draw();
  }

  function picture() {
    const shown = pictures[state.image === "mean" ? 0 : state.image];
    byId("picture").src = shown.src;
    byId("picture").style.opacity = state.image === "mean" ? 0.25 : 1;
    byId("ground").setAttribute("aria-label", `Query on ${state.image === "mean" ? "the mean of all images" : shown.name}: move over the image, or use the arrow keys`);
    for (const button of byId("thumbs").children) button.setAttribute("aria-pressed", String(button.value === String(state.image)));
    grey(shown.src);
  }

  /* The image in faint grey, for maps to lie on. */
  function grey(src) {
    const image = new Image();
    image.onload = () => {
      const canvas = element("canvas", { width: image.naturalWidth, height: image.naturalHeight }), context = canvas.getContext("2d");
      context.filter = "grayscale(1) contrast(.75) brightness(1.1)";
      context.drawImage(image, 0, 0);
      document.body.style.setProperty("--under", `url("${canvas.toDataURL()}")`);
    };
    image.src = src;
  }

  // Centres and spreads.

  let epochs = null;
  const MASS = Math.sqrt(2 * Math.LN2); // of a normal distribution in the plane, half lies within so many deviations

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

  /* Half axes and angle of the ellipse of a precision matrix over (row, column); null where it has no end. */
  function ellipse([[a, b], [, c]]) {
    const middle = (a + c) / 2, apart = Math.hypot((a - c) / 2, b), [large, small] = [middle + apart, middle - apart];
    if (!(small > 1e-9)) return null;
    const angle = (Math.atan2(-2 * b, a - c) / 2) * (180 / Math.PI); // of the long axis from the column axis, x to the right and y down
    return { rx: MASS / Math.sqrt(small), ry: MASS / Math.sqrt(large), angle };
  }

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

  const api = {
    ellipse,
    took: 0, // milliseconds of the last drawing
    shown: (layer, head) => {
      const own = cells[layer];
      return { query: own.query ? own.query.number : -1, sources: count(layers[layer].sources), values: own.shown ? [...own.shown[head]] : null };
    },
  };
  api.ready = start().catch((error) => {
    byId("read").textContent = `This page cannot be drawn here (${error.message}); a newer browser can.`;
    throw error;
  });
  return api;
})();
