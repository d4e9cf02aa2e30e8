// The controls: pointer, keys, sliders, buttons and languages; and the start.

/** Where a pointer is on a canvas of so many cells: row and column with fractions. */
function pointed(event, count) {
  const box = event.currentTarget.getBoundingClientRect();
  return [((event.clientY - box.top) / box.height) * count, ((event.clientX - box.left) / box.width) * count];
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** Arrow keys on a canvas call `move` with the step; Home and End with the way to a corner. */
function onArrows(canvas, move) {
  canvas.addEventListener("keydown", (event) => {
    const step = ARROWS[event.key] ?? { Home: [-99, -99], End: [99, 99] }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move(step);
  });
}

function onDrag(canvas, start, drag) {
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    start(event);
  });
  canvas.addEventListener("pointermove", (event) => canvas.hasPointerCapture(event.pointerId) && drag(event));
}

const onSource = (event) => {
  play(false);
  const places = pointed(event, result.geometry.extent).map((along) => along - result.geometry.before);
  moveQuery(...places.map((along) => Math.floor(along / state.stride)));
};
const onOutput = (event) => {
  play(false);
  moveQuery(...pointed(event, result.geometry.out).map(Math.floor));
};

function listen() {
  for (const id of ["window", "look"])
    onArrows(at(id), ([down, right]) => {
      play(false);
      moveQuery(state.query[0] + down, state.query[1] + right);
    });
  onDrag(at("window"), onSource, onSource);
  for (const id of ["convolved", "attended", "map"]) onDrag(at(id), onOutput, onOutput);

  let held = null; // the head whose centre is dragged
  const fromQuery = (event) => {
    const { extent, before } = result.geometry;
    const here = place(state.query);
    return pointed(event, extent).map((along, axis) => along - before - 0.5 - here[axis]);
  };
  const snapped = (offset) => (Math.abs(offset - Math.round(offset)) < 0.12 ? Math.round(offset) : offset);
  onDrag(
    at("look"),
    (event) => {
      const [row, column] = fromQuery(event);
      const away = state.centres.map(([down, right]) => Math.hypot(row - down, column - right));
      const nearest = away.indexOf(Math.min(...away));
      held = away[nearest] < 0.6 ? nearest : null;
      if (held === null) return onSource(event);
      play(false);
      state.head = held;
      show();
    },
    (event) => (held === null ? onSource(event) : moveCentre(held, fromQuery(event).map(snapped))),
  );
  for (const id of ["taps", "heads"]) {
    const choice = (event) => {
      const [row, column] = pointed(event, state.size).map((each) => Math.min(Math.floor(each), state.size - 1));
      state.head = row * state.size + column;
      show();
    };
    onDrag(at(id), choice, () => {});
    onArrows(at(id), (step) => {
      const cell = [Math.floor(state.head / state.size), state.head % state.size];
      const [row, column] = cell.map((each, axis) => Math.min(Math.max(each + step[axis], 0), state.size - 1));
      state.head = row * state.size + column;
      show();
      announce(() => `${at("head-name").textContent}, ${say("weight")} ${short(result.weights[state.head])}`);
    });
  }

  for (const name of Object.keys(chosen))
    at(name).addEventListener("change", ({ target }) =>
      choose({ [name]: typeof chosen[name] === "number" ? Number(target.value) : target.value }),
    );
  at("alpha").addEventListener("input", ({ target }) => setAlpha(EXACT * 10 ** (target.value / 100)));
  for (const [axis, id] of ["down", "right"].entries())
    at(id).addEventListener("input", ({ target }) =>
      moveCentre(state.head, state.centres[state.head].with(axis, Number(target.value))),
    );
  at("query").addEventListener("input", ({ target }) => {
    const asked = Number(target.value); // before anything is shown: that sets the slider
    play(false);
    moveQuery(Math.floor(asked / result.geometry.out), asked % result.geometry.out);
  });
  at("play").addEventListener("click", () => play(!state.playing));
  at("all").addEventListener("click", fillAll);
  at("another").addEventListener("click", () => choose({ seed: state.seed + 1 }));
  at("restore").addEventListener("click", () => choose({}, true));
  const tries = {
    exact: () => ({ alpha: EXACT, border: "zeros" }),
    soft: () => ({ alpha: 1, border: "zeros" }),
    edgeless: () => ({ alpha: EXACT, border: "none", size: Math.max(state.size, 3) }),
    apart: () => ({ alpha: 8, border: "zeros" }),
  };
  for (const [id, values] of Object.entries(tries))
    at(id).addEventListener("click", () => {
      play(false);
      choose(values(), true);
      fillAll();
      if (id === "apart") moveCentre(0, state.centres[0].map((offset) => offset + 0.5));
    });
  for (const seen of [matchMedia("(prefers-color-scheme: dark)"), matchMedia("print")])
    seen.addEventListener("change", () => (palette.clear(), show()));
  new ResizeObserver(() => (makeRoom(), show())).observe(at("window"));
  addEventListener("hashchange", speak);
}

function fillAll() {
  state.reached = result.geometry.out ** 2 - 1;
  show();
}

/** Shows the page in the language of the address (#en, #zh), else in the reader's. */
function speak() {
  const asked = location.hash.slice(1);
  language = Object.hasOwn(WORDS, asked) ? asked : navigator.language.startsWith("zh") ? "zh" : "en";
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  document.title = say("title");
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = say(element.dataset.word);
  for (const element of document.querySelectorAll("[data-label]")) element.ariaLabel = say(element.dataset.label);
  for (const link of document.querySelectorAll("[data-language]"))
    link.ariaCurrent = link.dataset.language === language ? "true" : null;
  makeRoom();
  show();
}

// The start
state.centres = cells();
compute();
computeCurve();
speak();
choose({});
listen();
if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
  moveQuery(5, 5);
  fillAll();
} else play(true);
clearTimeout(later.spoken); // nothing was done yet
