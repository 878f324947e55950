// One pair after the other, labelled by one key each. What is drawn of a pair is in pair.js, what becomes of labels in
// marks.js. Captions and keys are untrusted: they only ever become text nodes and attributes.
"use strict";

const WORDS = { copy: "same picture", "not-a-copy": "different", undecided: "unsure" };
let pairs = []; // [kept row, removed row] in the order of the sample
let place = 0; // of the pair that is shown

function receive(name, value) {
  if (name === "marks") startMarks(value);
  else start(value);
}

function labelOf(number) {
  return markOf(...pairs[number])?.verdict;
}

function show(number) {
  place = number;
  const pair = pairs[place];
  document.getElementById("sides").replaceChildren(...drawSides(...pair));
  for (const row of pairs[place + 1] ?? []) new Image().src = fileOf(row) ?? thumbOf(row) ?? "data:,"; // ready when it is its turn
  showLabels();
}

function label(verdict) {
  if (!canMark(...pairs[place])) return;
  setMark(...pairs[place], verdict);
  document.getElementById("said").textContent = `${place + 1}: ${WORDS[verdict]}`;
  const order = pairs.map((_, i) => (place + 1 + i) % pairs.length);
  const next = order.find((number) => !labelOf(number));
  if (next !== undefined) show(next);
}

function showLabels() {
  const labels = pairs.map((_, number) => labelOf(number));
  const done = labels.filter(Boolean).length;
  const many = (verdict) => labels.filter((each) => each === verdict).length;
  const parts = [`Pair ${place + 1} of ${pairs.length}. ${done} labelled`];
  if (done) parts[0] += `: ${many("copy")} same, ${many("not-a-copy")} different, ${many("undecided")} unsure`;
  parts[0] += ".";
  if (done === pairs.length) parts.push("That is all: download the labels.");
  if (!kept) parts.push("This browser forgets labels when the page is closed: download them before.");
  document.getElementById("status").textContent = parts.join(" ");
  document.getElementById("bar").value = done;
  document.getElementById("download").disabled = !done;
  for (const button of document.querySelectorAll("[data-verdict]")) {
    button.setAttribute("aria-pressed", button.dataset.verdict === labels[place]);
  }
  for (const button of document.querySelectorAll("[data-step]")) {
    button.disabled = !pairs[place + Number(button.dataset.step)];
  }
}

function step(by) {
  if (pairs[place + by]) show(place + by);
}

function start(value) {
  base = value.base;
  const nameFields = (row) => Object.fromEntries(value.fields.map((field, i) => [field, row[i]]));
  pairs = value.pairs.map((pair) => pair.map(nameFields));
  document.getElementById("bar").max = pairs.length;
  for (const button of document.querySelectorAll("[data-verdict]")) {
    button.addEventListener("click", () => label(button.dataset.verdict));
  }
  for (const button of document.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => step(Number(button.dataset.step)));
  }
  document.getElementById("download").addEventListener("click", () => downloadMarks("labels.json"));
  document.addEventListener("marked", showLabels);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && event.target.type !== "range") step(by);
    const button = document.querySelector(`[aria-keyshortcuts="${CSS.escape(event.key.toLowerCase())}"]`);
    if (button) label(button.dataset.verdict);
    if (event.key.toLowerCase() === "o") document.querySelector(".views button[aria-pressed=false]")?.click();
  });
  const first = pairs.findIndex((_, number) => !labelOf(number));
  show(Math.max(first, 0));
}
