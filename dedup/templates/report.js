// The gallery of a deduplication report. Data arrive as scripts that call `receive`, because a page opened from disk may
// not fetch. Captions and keys are untrusted: they only ever become text nodes and attributes.
"use strict";

const GROUPS_PER_PAGE = 20;
const MEMBERS_SHOWN = 12;
const CHUNKS_HELD = 40;

let index = null;
let shown = []; // numbers of the groups that pass the filters, in order
let page = 0;
let turn = 0; // grows with every change, so that a slow search knows that it is out of date
const chunks = new Map(); // chunk → promise of its groups
const waiting = new Map(); // chunk → resolve
const texts = []; // chunk → searchable text of its groups
let compared = null; // what the dialog shows: two rows, and the button that leads to them

function receive(name, value) {
  if (name === "index") start(value);
  else if (name === "marks") startMarks(value);
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
  const partner = rows[row.at ?? 0] || rows[0];
  row.apart = Boolean(row.at) && !rows[row.at];
  if (row.apart) row.transform = null; // it speaks of a picture that this page does not show
  const text = element("div", "", drawTag(row));
  if (!isFirst && !row.apart) {
    const tag = element("span");
    tag.pair = [partner, row];
    tellMark(tag);
    text.append(" ", tag);
  }
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

// Two images side by side, as large as they are at hand, and one laid over the other.
function compare(button, left, right) {
  compared = { button, left, right };
  const dialog = document.getElementById("compare");
  const question = right.class === "same-scene" ? "Is this more than the same scene?" : "What is the difference?";
  document.getElementById("compare-title").textContent = right.role === "removed" ? "Is this the same picture?" : question;
  document.getElementById("compare-evidence").textContent = describeEvidence(right, left);
  document.getElementById("compare-sides").replaceChildren(...drawSides(left, right));
  document.getElementById("note").value = markOf(left, right)?.note ?? "";
  document.getElementById("said").textContent = "";
  showMarks();
  if (!dialog.open) dialog.showModal();
}

function mark(verdict) {
  const { left, right } = compared;
  if (!canMark(left, right) || right.apart) return;
  setMark(left, right, verdict, verdict === "undecided" ? "" : document.getElementById("note").value);
  document.getElementById("said").textContent = `Marked: ${SAID[verdict]}`;
}

// Wherever a mark shows: the members that are listed, the two pictures that are compared, the line above the groups.
function showMarks() {
  for (const tag of document.querySelectorAll(".marked")) tellMark(tag);
  const count = countMarks();
  const total = count.copy + count["not-a-copy"];
  const parts = [];
  if (total) parts.push(`${total} ${total === 1 ? "pair" : "pairs"} marked: ${count.copy} copy, ${count["not-a-copy"]} not a copy.`);
  else parts.push(made.size ? "No pair is marked." : "No pair is marked yet.");
  if (made.size) parts.push(`${made.size} ${made.size === 1 ? "mark is" : "marks are"} not in the run yet.`);
  if (!kept) parts.push("This browser forgets marks when the page is closed: download them before.");
  document.getElementById("marked").textContent = parts.join(" ");
  document.getElementById("download").disabled = !total && !made.size;
  if (!compared) return;
  const { left, right } = compared;
  const verdict = verdictOf(left, right);
  const possible = canMark(left, right) && !right.apart;
  document.getElementById("verdict").hidden = !possible;
  document.getElementById("note").disabled = verdict === "undecided";
  for (const button of document.querySelectorAll("[data-verdict]")) {
    button.setAttribute("aria-pressed", button.dataset.verdict === verdict);
  }
}

function tellMark(tag) {
  const verdict = verdictOf(...tag.pair);
  tag.textContent = verdict === "undecided" ? "" : `you: ${SAID[verdict]}`;
  tag.className = { undecided: "marked", copy: "marked tag also-kept", "not-a-copy": "marked tag hit" }[verdict];
}

async function compareNext(step) {
  const buttons = () => [...document.querySelectorAll("button.thumb")];
  const next = buttons()[buttons().indexOf(compared.button) + step];
  if (next) return next.click();
  const turner = document.querySelector(`[data-step="${step}"]`);
  if (turner.disabled) return;
  page += step;
  await draw();
  buttons().at(step > 0 ? 0 : -1)?.click();
}

function start(value) {
  index = value;
  base = index.base;
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
    if (event.target.type === "text" || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && event.target.type !== "range") compareNext(step).catch(complain);
    const button = dialog.querySelector(`[aria-keyshortcuts="${CSS.escape(event.key.toLowerCase())}"]`);
    if (button) mark(button.dataset.verdict);
  });
  dialog.addEventListener("close", () => compared.button.focus());
  for (const button of dialog.querySelectorAll("[data-verdict]")) {
    button.addEventListener("click", () => mark(button.dataset.verdict));
  }
  document.getElementById("note").addEventListener("change", () => mark(verdictOf(compared.left, compared.right)));
  document.getElementById("download").addEventListener("click", () => downloadMarks("decisions.json"));
  document.addEventListener("marked", showMarks);
  showMarks();
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
