// The controls: pointer, keys, switches and images; and what is said of the query and of the map below the pointer.

const named = () => (state.token >= 0 ? tokenName(state.token) : `row ${token()[0] + 1}, column ${token()[1] + 1} of ${finest[0]}\u00a0×\u00a0${finest[1]}`);
let pointed = null;
let announcing, announced = -1;
const prefixes = Math.max(...layers.map((layer) => (layer.queries.grid[0] ? layer.queries.prefix : 0)));
const tokenName = (k) => (prefixes === 1 ? "class token" : `token ${k + 1} in front`);

function place() {
  const [r, c] = token();
  byId("at").style.cssText = state.token >= 0 ? "display: none"
    : `left: ${(100 * c) / finest[1]}%; top: ${(100 * r) / finest[0]}%; width: ${100 / finest[1]}%; height: ${100 / finest[0]}%`;
  for (const button of byId("tokens").children) button.setAttribute("aria-pressed", String(+button.value === state.token));
}

function hover(layer, head, event) {
  const box = event.currentTarget.getBoundingClientRect(), [height, width] = layers[layer].sources.grid;
  if (!height) return;
  pointed = { layer, head, r: clamp(Math.floor(((event.clientY - box.top) / box.height) * height), height), c: clamp(Math.floor(((event.clientX - box.left) / box.width) * width), width) };
  tell();
}

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
  byId("terms").hidden = new Set(layers.flatMap((layer) => layer.terms)).size < 2;
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
