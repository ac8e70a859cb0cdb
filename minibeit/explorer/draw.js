// Maps and charts.

const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const BLUE_TO_RED = [[24, 92, 178], [120, 172, 226], [246, 246, 246], [236, 140, 110], [178, 24, 43]];
const HEAT = [[120, 10, 60], [230, 70, 20], [255, 180, 0], [255, 250, 170]];

/** The colour of 0 ... 1 on a ramp of colours. */
function onRamp(ramp, share) {
  const place = Math.min(Math.max(share, 0), 1) * (ramp.length - 1);
  const low = Math.min(Math.floor(place), ramp.length - 2), rest = place - low, first = ramp[low], next = ramp[low + 1];
  return [0, 1, 2].map((i) => first[i] + (next[i] - first[i]) * rest);
}

/** Fills a canvas with one pixel for each value; `colour` gives red, green, blue and perhaps opacity, 0 ... 255. */
function paint(canvas, values, columns, colour) {
  const rows = values.length / columns;
  canvas.width = columns;
  canvas.height = rows;
  const pixels = new ImageData(columns, rows), levels = pixels.data;
  for (let i = 0, at = 0; i < values.length; i++) {
    const [red, green, blue, opacity = 255] = colour(values[i]);
    levels[at++] = red;
    levels[at++] = green;
    levels[at++] = blue;
    levels[at++] = opacity;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** How far along its ramp a value is; `power` 0.5 brings out what is small. */
function shareOf(value, most, power = 1) {
  return most > 0 ? Math.sign(value) * (Math.abs(value) / most) ** power : 0;
}

/** Values of at least 0, the largest brightest. */
function paintShares(canvas, values, columns, power, most = largest(values)) {
  paint(canvas, values, columns, (value) => onRamp(VIRIDIS, shareOf(value, most, power)));
}

/** Values around 0: blue below, red above. */
function paintSigned(canvas, values, columns, power) {
  const most = largest(values);
  paint(canvas, values, columns, (value) => onRamp(BLUE_TO_RED, 0.5 + shareOf(value, most, power) / 2));
}

/** Values of at least 0 to lay over an image: the larger, the brighter and the less transparent. */
function paintHeat(canvas, values, columns) {
  const most = largest(values);
  paint(canvas, values, columns, (value) => {
    const share = shareOf(value, most);
    return [...onRamp(HEAT, share), 255 * Math.sqrt(share)];
  });
}

/** Values around 0 to lay over an image. */
function paintSignedHeat(canvas, values, columns) {
  const most = largest(values);
  paint(canvas, values, columns, (value) => {
    const share = shareOf(value, most);
    return [...(share < 0 ? BLUE_TO_RED[0] : BLUE_TO_RED[4]), 255 * Math.sqrt(Math.abs(share))];
  });
}

function largest(values) {
  return values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
}

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function drawn(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A figure with a canvas, to be painted, and a caption; a ring in its frame marks the query. */
function figure(caption, label) {
  const canvas = make("canvas", {role: "img", "aria-label": label});
  const frame = make("div", {class: "framed"}, canvas);
  return {canvas, element: make("figure", {}, frame, make("figcaption", {}, caption))};
}

/** The distances of every head by block, as an SVG; `chosen` is {block, head}. */
function distanceChart(facts, arrays, chosen) {
  const left = 44, top = 10, step = Math.max(34, Math.min(64, 700 / facts.depth)), height = 210;
  const width = left + step * facts.depth + 10;
  const series = ["distance_without", "distance"].filter((name) => name in arrays);
  const most = Math.max(...series.map((name) => largest(arrays[name].values))) * 1.05 || 1;
  const y = (value) => top + height * (1 - value / most);
  const svg = drawn("svg", {
    viewBox: `0 0 ${width} ${top + height + 40}`, width, role: "img",
    "aria-label": "Mean attention distance of every head by block; the numbers are below",
  });
  for (const value of ticks(most)) {
    svg.append(drawn("line", {class: "axis", x1: left, x2: width, y1: y(value), y2: y(value)}));
    svg.append(drawn("text", {x: left - 8, y: y(value) + 4, "text-anchor": "end"}, String(value)));
  }
  for (let block = 0; block < facts.depth; block++) {
    const middle = left + step * (block + 0.5);
    svg.append(drawn("text", {x: middle, y: top + height + 18, "text-anchor": "middle"}, String(block)));
    for (const name of series) {
      for (let head = 0; head < facts.heads; head++) {
        const value = arrays[name].values[block * facts.heads + head];
        const own = block === chosen.block && head === chosen.head;
        const x = middle + (name === "distance" ? -1 : 1) * (series.length - 1) * step * 0.16;
        const kind = name === "distance" ? "with" : "without";
        const text = `block ${block}, head ${head}: ${value.toFixed(2)} patches`;
        svg.append(drawn("circle", {class: kind, cx: x, cy: y(value), r: own ? 7 : 3.5}, drawn("title", {}, text)));
      }
    }
  }
  svg.append(drawn("text", {x: left + step * facts.depth / 2, y: top + height + 36, "text-anchor": "middle"}, "block"));
  const turned = `translate(12 ${top + height / 2}) rotate(-90)`;
  svg.append(drawn("text", {transform: turned, "text-anchor": "middle"}, "distance in patches"));
  return svg;
}

function ticks(most) {
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50].find((size) => most / size <= 6) ?? 100;
  return Array.from({length: Math.floor(most / step) + 1}, (_, i) => Number((i * step).toFixed(2)));
}
