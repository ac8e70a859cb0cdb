// What the model says of the image: classes, visual tokens, or classes of pixels.

function percent(value) {
  return value > 0 && value < 0.0005 ? "<0.1%" : `${(100 * value).toFixed(1)}%`;
}

function cell(text, name = "", share = null) {
  const element = make("td", {class: name}, text);
  if (share !== null) {
    element.classList.add("bar");
    element.style.setProperty("--share", share);
  }
  return element;
}

/** The squares of patches that were masked one after the other. */
class Regions {
  constructor(facts) {
    [this.gridRows, this.gridColumns] = facts.grid;
    Object.assign(this, facts.regions);
    this.count = this.rows * this.columns;
  }

  /** The number of the region that holds a patch's token. */
  of(token) {
    const row = Math.floor((token - 1) / this.gridColumns), column = (token - 1) % this.gridColumns;
    return Math.floor(row / this.side) * this.columns + Math.floor(column / this.side);
  }

  /** What is masked together with the chosen patch. */
  get words() {
    return this.side === 1 ? "the chosen patch" : `the square of ${this.side}×${this.side} patches that the chosen one is in`;
  }
}

/** Scores of classes, whole and with a region covered. */
class Classes {
  constructor(facts, arrays, regions) {
    Object.assign(this, facts.classes);
    this.values = arrays.class_values.values;
    this.regions = regions;
    this.first = this.best(0)[0];
    this.overlays = [["effect", `what masking does to “${this.names[this.first]}”`]];
    document.getElementById("classes").hidden = false;
    document.getElementById("classes-hint").textContent =
      `Masked: ${regions.words} is covered by the image's mean colour.`;
  }

  value(region, name) {
    return this.values[region * this.names.length + name];
  }

  /** The classes of a row of scores, the highest first; row 0 is the whole image, 1 + region the others. */
  best(row) {
    return this.names.map((_, i) => i).sort((a, b) => this.value(row, b) - this.value(row, a)).slice(0, 5);
  }

  shown(value) {
    return this.regression ? value.toPrecision(4) : percent(value);
  }

  show(token) {
    const row = token === 0 ? null : 1 + this.regions.of(token);
    const shown = new Set([...this.best(0), ...(row === null ? [] : this.best(row))]);
    const ordered = [...shown].sort((a, b) => this.value(0, b) - this.value(0, a));
    document.getElementById("classes-rows").replaceChildren(...ordered.map((i) => this.row(row, i)));
  }

  row(row, i) {
    const share = (value) => (this.regression ? null : value);
    const whole = this.value(0, i), masked = row === null ? null : this.value(row, i);
    return make("tr", {}, cell(this.names[i]), cell(this.shown(whole), "number", share(whole)),
      masked === null ? cell("–", "number") : cell(this.shown(masked), "number", share(masked)),
      masked === null ? cell("–", "number") : this.change(masked - whole));
  }

  /** A difference of scores, in percentage points; of values as it is. */
  change(difference) {
    const text = this.regression ? Math.abs(difference).toPrecision(3) : (100 * Math.abs(difference)).toFixed(1);
    const unit = this.regression ? "" : " pp";
    if (Number(text) === 0) return cell(text + unit, "number");
    return cell((difference > 0 ? "+" : "−") + text + unit, `number ${difference < 0 ? "less" : "more"}`);
  }

  said(token) {
    if (token === 0) return "";
    const row = 1 + this.regions.of(token), i = this.first;
    const then = this.best(row)[0];
    const name = then === i ? "" : `; the first class becomes “${this.names[then]}”`;
    return `Masked: “${this.names[i]}” goes from ${this.shown(this.value(0, i))} to ${this.shown(this.value(row, i))}${name}.`;
  }

  /** For each patch, what masking its region takes from the first class's score (red) or adds to it (blue). */
  paintOverlay(kind, canvas, patches, columns) {
    const lost = Float32Array.from({length: patches}, (_, i) =>
      this.value(0, this.first) - this.value(1 + this.regions.of(1 + i), this.first));
    paintSignedHeat(canvas, lost, columns);
  }
}

/** Visual tokens that are predicted where the image is masked. */
class Tokens {
  constructor(facts, arrays, regions) {
    Object.assign(this, facts.tokens);
    Object.assign(this, {arrays, regions, grid: facts.grid});
    this.top = arrays.token_best.shape[1];
    const most = Math.min(this.top, this.vocabulary);
    this.overlays = [["chance", this.own ? "probability of the image's own token" : "probability of the likeliest token"]];
    if (this.own_drawn) this.overlays.push(["own", "what the own tokens stand for"],
      ["predicted", "what the predicted tokens stand for"]);
    document.getElementById("tokens").hidden = false;
    document.getElementById("tokens-hint").textContent =
      `The ${most} likeliest of ${this.vocabulary} visual tokens of the chosen patch, while the mask token hides ${regions.words}.`;
    if (this.own_drawn) this.load();
  }

  async load() {
    this.images = {};
    for (const kind of ["own", "predicted"]) {
      this.images[kind] = new Image();
      this.images[kind].src = this[`${kind}_drawn`];
      await this.images[kind].decode();
    }
    document.getElementById("drawn").hidden = false;
    this.show(this.token ?? 0);
  }

  show(token) {
    this.token = token;
    const rows = document.getElementById("tokens-rows");
    if (token === 0) rows.replaceChildren(make("tr", {}, cell("choose a patch"), cell(""), cell("")));
    else rows.replaceChildren(...this.entries(token).map(([number, chance, own]) => make("tr", {}, cell(String(number)),
      cell(percent(chance), "number", chance), cell(own ? "the image's own" : ""))));
    if (this.images?.predicted?.complete) this.showDrawn(token);
  }

  /** [token, probability, whether it is the image's own] of the likeliest tokens of a patch, and of its own. */
  entries(token) {
    const {token_best, token_chance, token_own, token_own_chance} = this.arrays, patch = token - 1;
    const own = this.own ? token_own.values[patch] : null;
    const entries = Array.from({length: Math.min(this.top, this.vocabulary)}, (_, i) => {
      const number = token_best.values[patch * this.top + i];
      return [number, token_chance.values[patch * this.top + i], number === own];
    });
    if (own !== null && !entries.some(([, , marked]) => marked)) entries.push([own, token_own_chance.values[patch], true]);
    return entries;
  }

  showDrawn(token) {
    const {own, predicted} = this.images;
    for (const id of ["own-drawn", "predicted-drawn"]) {
      const canvas = document.getElementById(id), context = canvas.getContext("2d");
      canvas.width = own.width;
      canvas.height = own.height;
      context.drawImage(own, 0, 0);
      if (token === 0 || id === "own-drawn") continue;
      const side = this.regions.side, region = this.regions.of(token);
      const height = own.height / this.grid[0], width = own.width / this.grid[1];
      const box = [(region % this.regions.columns) * side * width, Math.floor(region / this.regions.columns) * side * height,
        side * width, side * height];
      context.drawImage(predicted, ...box, ...box);
      context.strokeStyle = "#fff";
      context.strokeRect(box[0] + 0.5, box[1] + 0.5, box[2] - 1, box[3] - 1);
    }
  }

  said(token) {
    if (token === 0) return "";
    const [[number, chance, right]] = this.entries(token);
    const own = this.own ? (right ? ", the image's own" : `; the image's own is ${this.arrays.token_own.values[token - 1]}`) : "";
    return `Hidden: token ${number} is predicted with ${percent(chance)}${own}.`;
  }

  paintOverlay(kind, canvas, patches, columns) {
    if (kind === "chance") {
      const {token_chance, token_own_chance} = this.arrays;
      paintHeat(canvas, Float32Array.from({length: patches}, (_, i) =>
        (this.own ? token_own_chance.values[i] : token_chance.values[i * this.top])), columns);
      return;
    }
    const image = this.images?.[kind];
    if (!image?.complete || !image.width) return;
    canvas.width = image.width;
    canvas.height = image.height;
    canvas.getContext("2d").drawImage(image, 0, 0);
  }
}

/** A class for every pixel. */
class Segmentation {
  constructor(facts, arrays) {
    this.classes = facts.segmentation.classes;
    this.labels = arrays.labels;
    this.patch = facts.patch;
    this.columns = facts.grid[1];
    this.colours = Object.fromEntries(this.classes.map(({number, colour}) => [number, colour]));
    this.overlays = [["labels", "classes of pixels"]];
    document.getElementById("segmentation").hidden = false;
  }

  /** {class: share} of a patch's pixels. */
  shares(token) {
    const [height, width] = this.patch, across = this.labels.shape[1], shares = {};
    const top = Math.floor((token - 1) / this.columns) * height, left = ((token - 1) % this.columns) * width;
    for (let y = top; y < top + height; y++) {
      for (let x = left; x < left + width; x++) {
        const number = this.labels.values[y * across + x];
        shares[number] = (shares[number] ?? 0) + 1 / (height * width);
      }
    }
    return shares;
  }

  show(token) {
    const shares = token === 0 ? {} : this.shares(token);
    document.getElementById("segmentation-rows").replaceChildren(...this.classes.map(({number, name, colour, share}) => {
      const swatch = make("span", {class: "swatch"});
      swatch.style.background = `rgb(${colour})`;
      const first = cell("");
      first.append(swatch, name);
      const own = shares[number] ?? 0;
      return make("tr", {}, first, cell(percent(share), "number", share),
        token === 0 ? cell("–", "number") : cell(own ? percent(own) : "", "number", own));
    }));
  }

  said(token) {
    if (token === 0) return "";
    const [[number, share]] = Object.entries(this.shares(token)).sort(([, a], [, b]) => b - a);
    return `Most of its pixels: ${this.classes.find((one) => one.number === Number(number)).name} (${percent(share)}).`;
  }

  paintOverlay(kind, canvas) {
    paint(canvas, this.labels.values, this.labels.shape[1], (number) => this.colours[number]);
  }
}

function outcomeOf(facts, arrays, regions) {
  if (facts.classes) return new Classes(facts, arrays, regions);
  if (facts.tokens) return new Tokens(facts, arrays, regions);
  if (facts.segmentation) return new Segmentation(facts, arrays);
  return {overlays: [], show() {}, said: () => "", paintOverlay() {}};
}
