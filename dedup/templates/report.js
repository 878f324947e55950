// The gallery of a deduplication report. Data arrive as scripts that call `receive`, because a page opened from disk may
// not fetch. Captions and keys are untrusted: they only ever become text nodes and attributes.
"use strict";

const GROUPS_PER_PAGE = 20;
const MEMBERS_SHOWN = 12;
const CHUNKS_HELD = 40;
const SIGNALS = { bytes: "same bytes", pixels: "same pixels", pdq: "PDQ hash", copy: "local features" };
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

let index = null;
let shown = []; // numbers of the groups that pass the filters, in order
let page = 0;
let turn = 0; // grows with every change, so that a slow search knows that it is out of date
const chunks = new Map(); // chunk → promise of its groups
const waiting = new Map(); // chunk → resolve
const texts = []; // chunk → searchable text of its groups
let compared = null; // the button of the two images that the dialog shows
let view = "difference"; // or "overlay": how the dialog lays one over the other
let opacity = 0.5; // of the picture on top

function receive(name, value) {
  if (name === "index") start(value);
  else waiting.get(name)?.(value);
}

function loadChunk(number) {
  if (!chunks.has(number)) {
    if (chunks.size >= CHUNKS_HELD) chunks.delete(chunks.keys().next().value);
    chunks.set(number, new Promise((resolve, reject) => {
      const script = document.createElement("script");
      waiting.set(number, resolve);
      script.src = `data/${String(number).padStart(5, "0")}.js`;
      script.onerror = () => reject(new Error(`${script.src} cannot be read`));
      script.onload = () => script.remove();
      document.head.append(script);
    }));
  }
  return chunks.get(number);
}

function chunkOf(group) {
  let low = 0, high = index.starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (index.starts[middle] <= group) low = middle; else high = middle - 1;
  }
  return low;
}

function plain(text) {
  return text.normalize("NFKC").toLowerCase();
}

async function searchableText(number) {
  if (!texts[number]) {
    const groups = await loadChunk(number);
    const [key, caption] = ["key", "caption"].map((name) => index.fields.indexOf(name));
    texts[number] = groups.map((group) => plain(group.rows.map((row) => `${row[key]}\n${row[caption] || ""}`).join("\n")));
  }
  return texts[number];
}

async function applyFilters() {
  const mine = ++turn;
  const form = new FormData(document.getElementById("controls"));
  const kind = Number(form.get("kind"));
  const signal = form.get("signal") === "" ? 0 : 1 << Number(form.get("signal"));
  const source = form.get("source") === "" ? -1 : Number(form.get("source"));
  const [least, most] = form.get("size").split("-").map((text) => Number(text) || Infinity);
  const words = plain(form.get("query")).split(/\s+/).filter(Boolean);
  let found = [];
  for (let group = 0; group < index.size.length; group++) {
    if (!(index.kind[group] & kind)) continue;
    if (signal && !(index.signals[group] & signal)) continue;
    if (form.get("size") && (index.size[group] < least || index.size[group] > most)) continue;
    if (source >= 0 && !index.sources[group].includes(source)) continue;
    found.push(group);
  }
  if (words.length) {
    const matches = [];
    for (const group of found) {
      const number = chunkOf(group);
      if (!texts[number]) {
        say(`Searching… ${Math.round((100 * number) / index.starts.length)} %`);
        await searchableText(number);
        if (mine !== turn) return;
      }
      if (words.every((word) => texts[number][group - index.starts[number]].includes(word))) matches.push(group);
    }
    found = matches;
  }
  const by = {
    largest: (a, b) => index.size[b] - index.size[a] || a - b,
    smallest: (a, b) => index.size[a] - index.size[b] || a - b,
    weakest: (a, b) => index.weakest[a] - index.weakest[b] || a - b,
  };
  shown = found.sort(by[form.get("order")]);
  page = 0;
  await draw();
}

async function draw() {
  const mine = turn;
  const at = page;
  const list = document.getElementById("list");
  const wanted = shown.slice(page * GROUPS_PER_PAGE, (page + 1) * GROUPS_PER_PAGE);
  const groups = await Promise.all(wanted.map(async (group) => {
    const number = chunkOf(group);
    return (await loadChunk(number))[group - index.starts[number]];
  }));
  if (mine !== turn || at !== page) return;
  list.replaceChildren(...groups.map(drawGroup));
  if (!groups.length) {
    list.append(element("p", "empty", index.size.length ? "No group fits these filters." : "No two images were found alike."));
  }
  const pages = Math.max(1, Math.ceil(shown.length / GROUPS_PER_PAGE));
  const many = (n) => n.toLocaleString("en");
  say(`${many(shown.length)} ${shown.length === 1 ? "group" : "groups"} · page ${many(page + 1)} of ${many(pages)}`);
  for (const button of document.querySelectorAll("[data-step]")) {
    const target = page + Number(button.dataset.step);
    button.disabled = target < 0 || target >= pages;
  }
}

function say(text) {
  document.getElementById("status").textContent = text;
}

function complain(error) {
  say(`${error.message}. Is the folder of this report complete?`);
}

function element(tag, className, ...content) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...content);
  return node;
}

function drawGroup(group) {
  const rows = group.rows.map((row) => Object.fromEntries(index.fields.map((field, i) => [field, row[i]])));
  const total = rows.length + group.hidden;
  const removed = group.removed;
  const alike = rows[0].role === "look-alike";
  const scene = alike && rows.some((row) => row.class === "same-scene");
  const title = alike ? `${total} ${scene ? "views of a scene, or look-alikes" : "look-alikes"}` : `One picture, ${total} times`;
  const article = element("article", "group", element("header", "", element("h3", "", title)));
  article.firstChild.append(element("p", "", alike ? "all kept" : `${removed} removed, ${total - removed} kept`));
  const members = element("ul", "members");
  article.append(members);
  const show = (some) => members.append(...some.map((row) => drawMember(row, rows)));
  show(rows.slice(0, MEMBERS_SHOWN));
  if (rows.length > MEMBERS_SHOWN) {
    const button = element("button", "more", `Show ${rows.length - MEMBERS_SHOWN} more`);
    button.type = "button";
    button.onclick = () => {
      show(rows.slice(MEMBERS_SHOWN));
      members.children[MEMBERS_SHOWN].tabIndex = -1;
      members.children[MEMBERS_SHOWN].focus({ preventScroll: true });
      button.remove();
      if (group.hidden) article.append(element("p", "note small", `${group.hidden} more are listed in ${alike ? "pairs.parquet" : "dropped.csv"}.`));
    };
    article.append(button);
  }
  return article;
}

function drawMember(row, rows) {
  const isFirst = row === rows[0];
  const listed = row.partner === null ? rows[0] : rows.find((other) => other.key === row.partner);
  const partner = listed || rows[0];
  if (!listed) row.transform = null; // it speaks of a picture that this page does not show
  const text = element("div", "", drawTag(row));
  if (row.caption === null) text.append(element("p", "same", "no caption"));
  else if (!isFirst && row.caption === rows[0].caption) text.append(element("p", "same", "same caption"));
  else text.append(untrusted("caption", row.caption));
  text.append(untrusted("key-line", row.key));
  text.append(element("p", "details", describeFile(row)));
  if (row.signal) text.append(element("p", "details", describeEvidence(row, partner)));
  if (row.partner) text.append(untrusted("details", `${row.role === "removed" ? "removed against" : "nearest to"} ${row.partner}`));
  const thumb = element(isFirst ? "div" : "button", "thumb", drawImage(row, thumbOf(row)));
  if (!isFirst) {
    thumb.type = "button";
    thumb.setAttribute("aria-label", `Compare ${row.key}`);
    thumb.onclick = () => compare(thumb, partner, row);
  }
  return element("li", `member ${isFirst && row.role === "keeper" ? "keeper" : ""}`, thumb, text);
}

function drawTag(row) {
  const [label, tone] = {
    keeper: ["kept", "kept"], removed: ["removed", ""], "also-kept": [`${TURNS[row.orientation] || "copy"} · kept`, "also-kept"],
    "look-alike": [row.class === "same-scene" ? "same scene · kept" : "kept", "also-kept"],
  }[row.role];
  return element("span", `tag ${tone}`, label);
}

function describeFile(row) {
  return `${row.width} × ${row.height} ${row.format || ""} · ${bytes(row.size)}${row.shard === null ? "" : ` · ${row.shard}`}`;
}

// Two images side by side, as large as they are at hand, and one laid over the other.
function compare(button, left, right) {
  compared = button;
  const dialog = document.getElementById("compare");
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
  sides.push(element("figure", "", ...(matrices ? layOver(left, right, matrices, regions) : subtract(left, right))));
  const question = right.class === "same-scene" ? "Is this more than the same scene?" : "What is the difference?";
  document.getElementById("compare-title").textContent = right.role === "removed" ? "Is this the same picture?" : question;
  document.getElementById("compare-evidence").textContent = describeEvidence(right, left);
  document.getElementById("compare-sides").replaceChildren(...sides);
  if (!dialog.open) dialog.showModal();
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

function percent(share) {
  return `${100 * share}%`;
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

async function compareNext(step) {
  const buttons = () => [...document.querySelectorAll("button.thumb")];
  const next = buttons()[buttons().indexOf(compared) + step];
  if (next) return next.click();
  const turner = document.querySelector(`[data-step="${step}"]`);
  if (turner.disabled) return;
  page += step;
  await draw();
  buttons().at(step > 0 ? 0 : -1)?.click();
}

// Where an image of its own lies: its key says so, or its shard when a table gives it another key.
// `%XX` in a path stands for a byte, as it does in an address.
function fileOf(row) {
  if (!index.base || /\.(tar|tar\.gz|tgz|parquet|parquet#.*|arrow)$/is.test(row.shard || "")) return null;
  const parts = (row.shard === null ? row.key : row.shard).split(/(%[0-9a-f]{2})/i);
  return index.base + parts.map((part, i) => (i % 2 ? part : encodeURIComponent(part).replaceAll("%2F", "/"))).join("");
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

function untrusted(className, text) {
  const node = element("p", className, text);
  node.title = text;
  node.dir = "auto";
  return node;
}

function describeEvidence(row, partner) {
  const parts = [SIGNALS[row.signal] || row.signal];
  if (row.signal === "copy") {
    parts[0] = `${CLASSES[row.class]}: ${row.inliers} local features agree, overlap ${Math.round(100 * row.overlap)}\u00a0%`;
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

function bytes(n) {
  const units = ["bytes", "kB", "MB", "GB"];
  const power = n < 1000 ? 0 : Math.min(3, Math.floor(Math.log10(n) / 3));
  const value = n / 1000 ** power;
  return `${power && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

function start(value) {
  index = value;
  const form = document.getElementById("controls");
  const fill = (select, names) => names.forEach((name, i) => select.append(new Option(name, i)));
  fill(form.elements.signal, index.signal_names.map((name) => SIGNALS[name] || name));
  fill(form.elements.source, index.source_names);
  let timer = 0;
  form.addEventListener("input", (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => applyFilters().catch(complain), event.target.name === "query" ? 150 : 0);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => {
      page += Number(button.dataset.step);
      draw().then(() => document.getElementById("groups").scrollIntoView(), complain);
    });
  }
  const dialog = document.getElementById("compare");
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && event.target.type !== "range") compareNext(step).catch(complain);
  });
  dialog.addEventListener("close", () => compared.focus());
  for (const button of dialog.querySelectorAll("[data-compare]")) {
    const step = Number(button.dataset.compare);
    button.addEventListener("click", () => (step ? compareNext(step).catch(complain) : dialog.close()));
  }
  for (const button of document.querySelectorAll("[data-source]")) {
    button.addEventListener("click", () => {
      form.elements.source.value = index.source_names.indexOf(button.dataset.source);
      applyFilters().then(() => document.getElementById("groups").scrollIntoView(), complain);
    });
  }
  applyFilters().catch(complain);
}
