// Two pictures, so that a person can judge them: side by side, one laid over the other, with the evidence. Rows come from
// the data of a page. Captions and keys are untrusted: they only ever become text nodes and attributes.
"use strict";

const SIGNALS = { bytes: "same bytes", pixels: "same pixels", pdq: "PDQ hash", copy: "local features", decision: "decided by a person" };
const CLASSES = { copy: "edited copy", "same-scene": "same scene", "look-alike": "look-alike" };
const TURNS = {
  r90: "turned 90° left", r180: "turned 180°", r270: "turned 90° right", m0: "mirrored",
  m90: "mirrored, turned 90° left", m180: "mirrored upside down", m270: "mirrored, turned 90° right",
};
// The same as CSS: the rightmost step comes first, and angles run clockwise.
const UNTURN = {
  r90: "rotate(-90deg)", r180: "rotate(180deg)", r270: "rotate(90deg)", m0: "scaleX(-1)",
  m90: "rotate(-90deg) scaleX(-1)", m180: "rotate(180deg) scaleX(-1)", m270: "rotate(90deg) scaleX(-1)",
};

let base = null; // where images are that are files of their own
let view = "difference"; // or "overlay": how one is laid over the other
let opacity = 0.5; // of the picture on top

function element(tag, className, ...content) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...content);
  return node;
}

function untrusted(className, text) {
  const node = element("p", className, text);
  node.title = text;
  node.dir = "auto";
  return node;
}

function bytes(n) {
  const units = ["bytes", "kB", "MB", "GB"];
  const power = n < 1000 ? 0 : Math.min(3, Math.floor(Math.log10(n) / 3));
  const value = n / 1000 ** power;
  return `${power && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

function percent(share) {
  return `${100 * share}%`;
}

function drawTag(row) {
  const [label, tone] = {
    keeper: ["kept", "kept"], removed: ["removed", ""], "also-kept": [`${TURNS[row.orientation] || "copy"} · kept`, "also-kept"],
    trained: ["training image", "kept"], generated: ["generated", ""],
    "look-alike": [row.class === "same-scene" ? "same scene · kept" : "kept", "also-kept"],
  }[row.role];
  return element("span", `tag ${tone}`, label);
}

function describeFile(row) {
  return `${row.width} × ${row.height} ${row.format || ""} · ${bytes(row.size)}${row.shard === null ? "" : ` · ${row.shard}`}`;
}

function describeEvidence(row, partner) {
  const parts = [SIGNALS[row.signal] || row.signal];
  if (row.inliers !== null) {
    const agree = `${row.inliers} local features agree`;
    parts[0] = row.signal === "copy" ? `${CLASSES[row.class]}: ${agree}` : `${parts[0]} · ${agree}`;
    if (row.overlap !== null) parts[0] += `, overlap ${Math.round(100 * row.overlap)}\u00a0%`;
    if (row.cosine !== null) parts.push(`cosine ${row.cosine.toFixed(2)}`);
  }
  if (row.signal !== "bytes") {
    if (row.hamming !== null) parts.push(`${row.hamming} bits`);
    if (row.residual !== null) parts.push(`colour ${row.residual.toFixed(3)}`);
    if (row.worst_tile !== null) parts.push(`worst tile ${row.worst_tile.toFixed(3)}`);
    if (row.score !== null) parts.push(`score ${row.score.toFixed(3)}`);
    if (row.role !== "also-kept" && TURNS[row.orientation]) parts.push(TURNS[row.orientation]);
  }
  if (row.role === "removed" && row.width * row.height > partner.width * partner.height) parts.push("enlarged: no more detail");
  if (row.class === "same-scene" && row.signal !== "copy") parts.unshift("same scene");
  if (row.reason === "policy" || row.reason === "external") parts.unshift(`removed by ${row.reason}`);
  return parts.join(" · ");
}

// Both pictures as large as they are at hand, and the one laid over the other; the right one was found by the left one.
function drawSides(left, right) {
  const matrices = right.transform && [right.transform, invert(right.transform)];
  const regions = matrices?.map((matrix, i) => (i ? findRegion(matrix, right, left) : findRegion(matrix, left, right)));
  const sides = [left, right].map((row, i) => {
    const picture = drawLarge(row);
    Object.assign(picture.style, { width: percent(widthOf(row)), height: percent(heightOf(row)) });
    const link = element("a", "side", picture);
    if (regions) link.append(drawOutline(row, regions[i]));
    if (fileOf(row)) Object.assign(link, { href: fileOf(row), target: "_blank" });
    const caption = untrusted("caption", row.caption ?? "no caption");
    const about = element("figcaption", "", drawTag(row), untrusted("key-line", row.key), element("p", "details", describeFile(row)), caption);
    return element("figure", "", link, about);
  });
  return [...sides, element("figure", "", ...(matrices ? layOver(left, right, matrices, regions) : subtract(left, right)))];
}

function drawLarge(row) {
  return drawImage(row, fileOf(row), thumbOf(row));
}

// Found by hash: the one turned onto the other, both stretched to a square, and subtracted.
function subtract(left, right) {
  const [below, above] = [left, right].map(drawLarge);
  below.style.transform = UNTURN[right.orientation] || "";
  const note = element("p", "details", "Difference, four times as bright: black where both agree.");
  return [element("div", "side difference", below, above), element("figcaption", "", note)];
}

// Found by local features: in the frame of the one that is covered more, the other one, carried there.
function layOver(left, right, [onto, back], regions) {
  const share = [left, right].map((row, i) => areaOf(regions[i]) / (widthOf(row) * heightOf(row)));
  const first = share[0] >= share[1];
  const [frame, laid, matrix, region] = first ? [left, right, back, regions[0]] : [right, left, onto, regions[1]];
  const [width, height] = [widthOf(frame), heightOf(frame)];
  const above = drawLarge(laid);
  const layers = element("div", "layers", drawLarge(frame), above);
  Object.assign(layers.style, { width: percent(width), height: percent(height) });
  Object.assign(above.style, { width: percent(widthOf(laid) / width), height: percent(heightOf(laid) / height) });
  new ResizeObserver(([entry]) => {
    const side = entry.contentRect.width / width; // pixels of the longer side
    const [a, b, c, d, e, f, g, h, i] = matrix;
    above.style.transform = `matrix3d(${[a, d, 0, g / side, b, e, 0, h / side, 0, 0, 1, 0, c * side, f * side, 0, i]})`;
  }).observe(layers);
  const corners = region.map(([x, y]) => `${percent(x / width)} ${percent(y / height)}`);
  const slider = Object.assign(element("input"), { type: "range", min: 0, max: 1, step: 0.05, value: opacity });
  slider.setAttribute("aria-label", "Opacity of the picture on top");
  const note = element("p", "details");
  const buttons = ["difference", "overlay"].map((name) => {
    const button = element("button", "", name === "overlay" ? "Overlay" : "Difference");
    button.type = "button";
    button.onclick = () => show(name);
    return button;
  });
  function show(name) {
    view = name;
    opacity = Number(slider.value);
    const subtracted = name === "difference";
    layers.classList.toggle("difference", subtracted);
    layers.style.clipPath = subtracted ? `polygon(${corners})` : "";
    above.style.opacity = subtracted ? "" : opacity;
    slider.hidden = subtracted;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", subtracted === (i === 0)));
    const which = first ? "second over the first" : "first over the second";
    note.textContent = subtracted ? "Where they overlap, difference twice as bright: black where both agree." : `The ${which}.`;
  }
  slider.oninput = () => show("overlay");
  show(view);
  return [element("div", "side", layers), element("figcaption", "", element("div", "views", ...buttons, slider), note)];
}

// Sizes and positions are in units of the picture's longer side, 3 × 3 matrices by rows.
function widthOf(row) {
  return row.width / Math.max(row.width, row.height);
}

function heightOf(row) {
  return row.height / Math.max(row.width, row.height);
}

function invert([a, b, c, d, e, f, g, h, i]) {
  const adjugate = [e * i - f * h, c * h - b * i, b * f - c * e, f * g - d * i, a * i - c * g, c * d - a * f, d * h - e * g, b * g - a * h, a * e - b * d];
  const determinant = a * adjugate[0] + b * adjugate[3] + c * adjugate[6];
  const last = adjugate[8] / determinant;
  return adjugate.map((value) => value / determinant / last);
}

// The part of `from` that `matrix` carries onto `to`: its rectangle, cut along the edges of the other one.
function findRegion([a, b, c, d, e, f, g, h, i], from, to) {
  const [width, height] = [widthOf(to), heightOf(to)];
  const edges = [[a, b, c], [width * g - a, width * h - b, width * i - c], [d, e, f], [height * g - d, height * h - e, height * i - f]];
  const [right, bottom] = [widthOf(from), heightOf(from)];
  let polygon = [[0, 0], [right, 0], [right, bottom], [0, bottom]];
  for (const [p, q, r] of edges) {
    const inside = polygon.map(([x, y]) => p * x + q * y + r);
    polygon = polygon.flatMap(([x, y], n) => {
      const next = (n + 1) % inside.length;
      const part = inside[n] / (inside[n] - inside[next]);
      const crossing = [x + part * (polygon[next][0] - x), y + part * (polygon[next][1] - y)];
      return [...(inside[n] >= 0 ? [[x, y]] : []), ...(inside[n] >= 0 !== inside[next] >= 0 ? [crossing] : [])];
    });
  }
  return polygon;
}

function areaOf(polygon) {
  const twice = polygon.reduce((sum, [x, y], n) => {
    const [nextX, nextY] = polygon[(n + 1) % polygon.length];
    return sum + x * nextY - y * nextX;
  }, 0);
  return Math.abs(twice) / 2;
}

function drawOutline(row, region) {
  const make = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
    return node;
  };
  const svg = make("svg", { viewBox: `0 0 ${widthOf(row)} ${heightOf(row)}`, class: "outline", role: "img", "aria-label": "matched region" });
  const points = region.map((point) => point.join()).join(" ");
  svg.append(make("polygon", { points, class: "halo" }), make("polygon", { points }));
  return svg;
}

// Where an image of its own lies: its key says so, or its shard when a table gives it another key.
// `%XX` in a path stands for a byte, as it does in an address.
function fileOf(row) {
  if (!base || /\.(tar|tar\.gz|tgz|parquet|parquet#.*|arrow)$/is.test(row.shard || "")) return null;
  const parts = (row.shard === null ? row.key : row.shard).split(/(%[0-9a-f]{2})/i);
  return base + parts.map((part, i) => (i % 2 ? part : encodeURIComponent(part).replaceAll("%2F", "/"))).join("");
}

function thumbOf(row) {
  return /^([0-9a-f]{20}|[0-9a-f]{24})$/.test(row.thumb || "") ? `thumbs/${row.thumb.slice(0, 2)}/${row.thumb}.jpg` : null;
}

// The first of the addresses that can be read and shown.
function drawImage(row, ...addresses) {
  const left = addresses.filter(Boolean);
  if (!left.length) return element("span", "", "no thumbnail");
  const image = element("img");
  image.loading = "lazy";
  image.alt = row.caption || row.key;
  image.onerror = () => { if (left.length) image.src = left.shift(); };
  image.src = left.shift();
  return image;
}
