// The page: what is chosen, and everything that follows from it.

const MODES = {
  with: ["with the position bias", "The probabilities of the chosen query, as the model has them, each map by its own largest."],
  without: ["without it", "softmax(q kᵀ / √d) of the same queries and keys, each map by its own largest: what content alone does."],
  difference: ["the difference", "Red: the bias adds probability. Blue: it takes some away."],
  bias: ["the bias itself", "The learned bias by offset, the same for every image: the middle is the patch itself, right of it " +
    "the patches to its right. Red: looks there more. Blue: less. Each map by its own largest."],
};

class App {
  constructor(facts, arrays) {
    Object.assign(this, {facts, arrays});
    [this.rows, this.columns] = facts.grid;
    this.attention = new Attention(facts, arrays);
    this.regions = facts.regions ? new Regions(facts) : null;
    this.outcome = outcomeOf(facts, arrays, this.regions);
    const middle = 1 + Math.floor(this.rows / 2) * this.columns + Math.floor(this.columns / 2);
    this.state = {token: middle, place: facts.blocks.length - 1, head: 0, mode: "with"};
    this.byId = (id) => document.getElementById(id);
  }

  start() {
    const {facts} = this, [height, width] = facts.grid.map((count, i) => count * facts.patch[i]);
    this.byId("title").textContent = facts.title;
    this.byId("lead").textContent = `${facts.task}, ${facts.depth} blocks of ${facts.heads} heads, width ${facts.width}, ` +
      `${this.rows}×${this.columns} patches of ${facts.patch.join("×")} pixels, ${facts.parameters.toLocaleString("en")} parameters`;
    this.byId("photo").src = facts.photo;
    this.byId("photo").classList.toggle("small", width < 200);
    this.byId("stage").style.aspectRatio = `${width} / ${height}`;
    this.makePatches();
    this.makeHeads();
    this.makeControls();
    this.makeFigures();
    this.writeNotes();
    this.byId("main").hidden = false;
    this.update();
  }

  // What is there once

  makePatches() {
    const {rows, columns} = this, cells = [];
    const element = this.byId("patches");
    element.style.gridTemplateRows = `repeat(${rows}, 1fr)`;
    for (let row = 0; row < rows; row++) {
      cells.push(Array.from({length: columns}, (_, column) => make("div", {"aria-label": `row ${row}, column ${column}`})));
      const line = make("div", {role: "row"}, ...cells[row]);
      line.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
      element.append(line);
    }
    this.patches = new Grid(cells, (row, column) => this.choose({token: 1 + row * columns + column}));
  }

  makeHeads() {
    const {facts} = this, element = this.byId("heads");
    const template = `52px repeat(${facts.heads}, minmax(30px, 84px))`;
    const line = (...children) => {
      const row = make("div", {role: "row"}, ...children);
      row.style.gridTemplateColumns = template;
      element.append(row);
    };
    const numbers = Array.from({length: facts.heads}, (_, head) => head);
    line(make("div", {role: "columnheader"}, "head"), ...numbers.map((head) => make("div", {role: "columnheader"}, String(head))));
    const cells = facts.blocks.map((block) => {
      const row = numbers.map((head) => make("div", {"aria-label": this.nameOf(block, head)}, make("canvas", {"aria-hidden": "true"})));
      line(make("div", {role: "rowheader"}, `block ${block}`), ...row);
      return row;
    });
    this.heads = new Grid(cells, (place, head) => this.choose({place, head}));
  }

  nameOf(block, head) {
    const far = this.arrays.distance.values[block * this.facts.heads + head];
    return `block ${block}, head ${head}, mean distance ${far.toFixed(1)} patches`;
  }

  makeControls() {
    const modes = this.attention.hasBias ? Object.keys(MODES) : ["with"];
    for (const mode of modes) {
      const input = make("input", {type: "radio", name: "mode", value: mode});
      input.checked = mode === this.state.mode;
      input.addEventListener("change", () => this.choose({mode}));
      this.byId("modes").append(make("label", {}, input, ` ${MODES[mode][0]}`));
    }
    this.byId("modes").hidden = modes.length === 1;
    this.byId("roots").addEventListener("change", () => this.update());
    const kinds = [["attention", "the chosen head"], ["mean", "the mean of the block's heads"], ["rollout", "rollout to the last block"],
      ...this.outcome.overlays, ["none", "none"]];
    const select = this.byId("overlay-kind");
    select.append(...kinds.map(([value, text]) => make("option", {value}, text)));
    if (this.facts.segmentation) select.value = "labels";
    select.addEventListener("change", () => this.paintOverlay());
    this.byId("opacity").addEventListener("input", () => this.paintOverlay());
    this.byId("hide").addEventListener("change", () => this.paintCover());
    this.byId("hide-label").hidden = !this.regions;
    this.byId("cls").addEventListener("click", () => this.choose({token: 0}));
  }

  makeFigures() {
    const maps = [["with", "with the position bias"], ["without", "without it"], ["bias", "the bias by offset"]];
    this.maps = {};
    for (const [name, label] of this.attention.hasBias ? maps : [["with", "probabilities"]]) {
      this.maps[name] = figure("", label);
      this.maps[name].element.firstChild.classList.toggle("framed", name !== "bias");
      this.byId("head-maps").append(this.maps[name].element);
    }
    this.rollouts = this.facts.rollout_blocks.map((block) => {
      const one = figure(`block ${block}`, `Rollout to block ${block}`);
      this.byId("rollouts").append(one.element);
      return one.canvas;
    });
    if (this.attention.hasBias) {
      this.byId("distance-key").append(make("i", {class: "dot with"}), "with the position bias",
        make("i", {class: "dot without"}), "without it");
    }
    this.byId("distance-table").append(this.distanceTable());
  }

  distanceTable() {
    const {facts, arrays} = this, table = make("table");
    const head = make("tr", {}, make("th", {scope: "col"}, "block"));
    for (let i = 0; i < facts.heads; i++) head.append(make("th", {scope: "col", class: "number"}, `head ${i}`));
    table.append(make("caption", {}, arrays.distance_without ? "With the position bias / without it, in patches" : "In patches"),
      make("thead", {}, head));
    const body = make("tbody");
    for (let block = 0; block < facts.depth; block++) {
      const row = make("tr", {}, make("th", {scope: "row"}, String(block)));
      for (let i = 0; i < facts.heads; i++) {
        const texts = ["distance", "distance_without"].filter((name) => name in arrays)
          .map((name) => arrays[name].values[block * facts.heads + i].toFixed(2));
        row.append(cell(texts.join(" / "), "number"));
      }
      body.append(row);
    }
    table.append(body);
    return table;
  }

  writeNotes() {
    const {facts} = this, notes = [
      "Blocks, heads, rows and columns are counted from 0. A query is the token that looks: a patch, or [CLS], which has no place.",
      `Queries and keys are kept with ${facts.bits} bits each, and this page computes probabilities from them. Of those compared ` +
        `with the model's, the largest difference is ${facts.difference.toPrecision(2)}.`,
      "Attention rollout is kept as square roots of 8 bits; its sums of paths treat values as if they were only mixed " +
        "(Abnar and Zuidema 2020).",
      "“Without the position bias” changes one softmax at a time: the queries and keys are those of the whole model, in which " +
        "the bias of earlier blocks has had its effect.",
      "A head that looks somewhere need not use what it finds there; masking shows what the answer depends on.",
    ];
    if (facts.blocks.length < facts.depth) {
      notes.push(`To keep the page small, of ${facts.depth} blocks only ${facts.blocks.join(", ")} can be looked into.`);
    }
    if (this.regions?.side > 1) {
      notes.push(`Masked are ${this.regions.count} squares of ${this.regions.side}×${this.regions.side} patches, one after the other; ` +
        "every patch of a square shows the same result. --mask-side 1 masks every patch by itself.");
    }
    notes.push(`Made by ${facts.made}.`);
    this.byId("about").append(...notes.map((note) => make("li", {}, note)));
  }

  // What follows from a choice

  choose(changes) {
    Object.assign(this.state, changes);
    this.update();
  }

  update() {
    const {token, place, head} = this.state;
    this.patches.mark(...(token === 0 ? [null] : this.attention.place(token)));
    this.heads.mark(place, head);
    this.markQuery();
    this.byId("cls").setAttribute("aria-pressed", String(token === 0));
    this.byId("mode-hint").textContent = this.attention.hasBias ? MODES[this.state.mode][1] : "This model has no position bias in its attention.";
    this.looks = new Map();
    this.paintHeads();
    this.showHead();
    this.showRollout();
    this.byId("distance-chart").replaceChildren(
      distanceChart(this.facts, this.arrays, {block: this.facts.blocks[place], head}));
    this.outcome.show(token);
    this.paintOverlay();
    this.paintCover();
    this.byId("said").textContent = `${this.queryName()}. ${this.outcome.said(token)}`;
  }

  /** Tells the style where in each map the query is. */
  markQuery() {
    const {token, mode} = this.state, main = this.byId("main");
    main.classList.toggle("query", token !== 0);
    main.classList.toggle("by-offset", mode === "bias");
    if (token === 0) return;
    const [row, column] = this.attention.place(token);
    main.style.setProperty("--x", (column + 0.5) / this.columns);
    main.style.setProperty("--y", (row + 0.5) / this.rows);
  }

  /** "Patch in row 3, column 5", or "[CLS]". */
  queryName() {
    if (this.state.token === 0) return "Looking from [CLS]";
    const [row, column] = this.attention.place(this.state.token);
    return `Patch in row ${row}, column ${column}`;
  }

  /** Probabilities of the chosen query in a head, computed once for each choice. */
  look(place, head, withBias) {
    const key = `${place} ${head} ${withBias}`;
    if (!this.looks.has(key)) this.looks.set(key, this.attention.probabilities(place, head, this.state.token, withBias));
    return this.looks.get(key);
  }

  power() {
    return this.byId("roots").checked ? 0.5 : 1;
  }

  paintHeads() {
    this.heads.rows.forEach((cells, place) => cells.forEach((element, head) => {
      this.paintMap(element.firstChild, place, head, this.state.mode);
    }));
  }

  paintMap(canvas, place, head, mode) {
    const power = this.power();
    if (mode === "bias") {
      paintSigned(canvas, this.attention.biasMap(place, head), this.attention.offsets.columns, power);
    } else if (mode === "difference") {
      const without = this.look(place, head, false);
      paintSigned(canvas, this.look(place, head, true).map((p, i) => p - without[i]).subarray(1), this.columns, power);
    } else {
      paintShares(canvas, this.look(place, head, mode === "with").subarray(1), this.columns, power);
    }
  }

  showHead() {
    const {place, head} = this.state, block = this.facts.blocks[place], at = block * this.facts.heads + head;
    const shown = this.look(place, head, true);
    this.byId("head-title").textContent = `Block ${block}, head ${head}`;
    const best = [...shown.keys()].slice(1).sort((a, b) => shown[b] - shown[a]).slice(0, 3);
    const named = best.map((token) => `row ${this.attention.place(token)[0]}, column ${this.attention.place(token)[1]} (${percent(shown[token])})`);
    const own = this.state.token === 0 ? "[CLS] itself" : "[CLS]";
    this.byId("head-facts").textContent =
      `${this.queryName()} gives ${percent(shown[0])} to ${own} and looks most at ${named.join("; ")}. On average over patches: ` +
      `distance ${this.arrays.distance.values[at].toFixed(2)} patches, ${percent(this.arrays.to_cls.values[at])} to [CLS]` +
      (this.attention.hasBias ? `; without the bias ${this.arrays.distance_without.values[at].toFixed(2)} patches, ` +
        `${percent(this.arrays.to_cls_without.values[at])} to [CLS].` : ".");
    for (const [name, {canvas, element}] of Object.entries(this.maps)) {
      this.paintMap(canvas, place, head, name);
      element.lastChild.textContent = this.captionOf(name, place, head);
    }
  }

  captionOf(name, place, head) {
    if (name === "bias") {
      const values = this.attention.biasMap(place, head), {toCls, fromCls, itself} = this.attention.clsBias(place, head);
      const [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
      return `the bias by offset, ${low.toFixed(2)} to ${high.toFixed(2)}; patch to [CLS] ${toCls.toFixed(2)}, ` +
        `[CLS] to patch ${fromCls.toFixed(2)}, to itself ${itself.toFixed(2)}`;
    }
    const most = largest(this.look(place, head, name === "with").subarray(1));
    const words = this.attention.hasBias ? (name === "with" ? "with the position bias" : "without it") : "probabilities";
    return `${words}, up to ${percent(most)} for a patch`;
  }

  showRollout() {
    const {token} = this.state;
    this.byId("rollout-hint").textContent =
      `How much of each patch of the input has come to ${token === 0 ? "[CLS]" : "the chosen patch"} after each block, by ` +
      "mixing alone; the share of the token itself is left out of the colours.";
    this.rollouts.forEach((canvas, place) => {
      const shares = this.attention.rollout(place, token).subarray(1);
      const others = token === 0 ? shares : shares.filter((_, i) => i !== token - 1);
      paintShares(canvas, shares, this.columns, this.power(), largest(others));
    });
  }

  paintOverlay() {
    const kind = this.byId("overlay-kind").value, canvas = this.byId("overlay");
    canvas.hidden = kind === "none";
    canvas.style.opacity = this.byId("opacity").value / 100;
    const {place, head, token} = this.state, patches = this.rows * this.columns;
    if (kind === "attention") {
      paintHeat(canvas, this.look(place, head, this.state.mode !== "without").subarray(1), this.columns);
    } else if (kind === "mean") {
      const mean = new Float32Array(patches);
      for (let h = 0; h < this.facts.heads; h++) this.look(place, h, true).subarray(1).forEach((p, i) => { mean[i] += p; });
      paintHeat(canvas, mean, this.columns);
    } else if (kind === "rollout") {
      const shares = this.attention.rollout(this.rollouts.length - 1, token).slice(1);
      if (token !== 0) shares[token - 1] = 0;
      paintHeat(canvas, shares, this.columns);
    } else if (kind !== "none") {
      this.outcome.paintOverlay(kind, canvas, patches, this.columns);
    }
  }

  /** Covers what is masked, if that is wished. */
  paintCover() {
    const {token} = this.state, canvas = this.byId("cover");
    canvas.hidden = !this.byId("hide").checked || token === 0;
    if (canvas.hidden || !this.regions) return;
    const region = this.regions.of(token);
    const inside = Array.from({length: this.rows * this.columns}, (_, i) => this.regions.of(1 + i) === region);
    paint(canvas, inside, this.columns, (covered) => [128, 128, 128, covered ? 255 : 0]);
  }
}

async function begin() {
  try {
    if (!("DecompressionStream" in window)) throw new Error("it needs a browser of 2023 or later");
    const facts = JSON.parse(document.getElementById("facts").textContent);
    window.app = new App(facts, await readArrays());
    window.app.start();
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    const lead = document.getElementById("lead");
    lead.textContent = `This page could not be shown: ${error.message}.`;
    lead.className = "failed";
    throw error;
  }
}

begin();
