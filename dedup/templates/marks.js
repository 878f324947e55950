// What a reader says of pairs: kept by the browser, as far as it keeps anything for a page opened from disk, and downloaded
// as JSON (docs/architecture.md). A mark speaks of two pictures, so all rows with the same bytes show it.
"use strict";

const SAID = { copy: "copy", "not-a-copy": "not a copy", undecided: "undecided" };
const recorded = new Map(); // pair → mark that the run knows
const made = new Map(); // pair → mark that the run does not know, in the order in which they were made
let about = null; // store: the name under which the browser keeps marks; digest, decisions; review: of a sample
let kept = true; // whether the browser keeps them

function startMarks(value) {
  about = value;
  for (const mark of value.decisions) recorded.set(pairOf(mark.a, mark.b), mark);
  loadMarks();
  window.addEventListener("storage", () => { // another tab
    loadMarks();
    document.dispatchEvent(new Event("marked"));
  });
  window.addEventListener("beforeunload", (event) => { if (!kept && made.size) event.preventDefault(); });
}

function endOf(row) {
  return { sha256: row.sha256, shard: row.shard, key: row.key };
}

// Both digests, or, where these are equal, both places.
function pairOf(a, b) {
  const ends = [a, b].map((end) => [end.sha256, end.shard ?? "", end.key]);
  return JSON.stringify((a.sha256 === b.sha256 ? ends : ends.map(([sha256]) => sha256)).sort());
}

function canMark(a, b) {
  return Boolean(a.sha256 && b.sha256) && JSON.stringify(endOf(a)) !== JSON.stringify(endOf(b));
}

function markOf(a, b) {
  const pair = pairOf(a, b);
  return made.get(pair) ?? recorded.get(pair);
}

function verdictOf(a, b) {
  return markOf(a, b)?.verdict ?? "undecided";
}

function setMark(a, b, verdict, note) {
  const pair = pairOf(a, b);
  const mark = { a: endOf(a), b: endOf(b), verdict, ...(note && { note }) };
  const known = recorded.get(pair);
  const nothingNew = known ? sayTheSame(known, mark) : verdict === "undecided" && !about.review;
  made.delete(pair);
  if (!nothingNew) made.set(pair, mark);
  try {
    if (nothingNew) localStorage.removeItem(about.store + pair);
    else localStorage.setItem(about.store + pair, JSON.stringify(mark));
  } catch {
    kept = false; // switched off, or full
  }
  document.dispatchEvent(new Event("marked"));
}

function sayTheSame(one, other) {
  return one.verdict === other.verdict && (one.note ?? "") === (other.note ?? "");
}

// What lies in the store may have been written by any page on this disk.
function loadMarks() {
  try {
    const names = Array.from({ length: localStorage.length }, (_, i) => localStorage.key(i));
    const mine = names.filter((name) => name.startsWith(about.store)).sort();
    made.clear();
    for (const name of mine) {
      const mark = parseMark(localStorage.getItem(name));
      const pair = mark && pairOf(mark.a, mark.b);
      if (pair !== name.slice(about.store.length)) continue;
      if (recorded.has(pair) && sayTheSame(recorded.get(pair), mark)) localStorage.removeItem(name);
      else made.set(pair, mark);
    }
  } catch {
    kept = false;
  }
}

function parseMark(text) {
  try {
    const { a, b, verdict, note } = JSON.parse(text);
    const isText = [a.key, b.key, note ?? ""].every((value) => typeof value === "string");
    return isText && verdict in SAID ? { a: endOf(a), b: endOf(b), verdict, ...(note && { note }) } : null;
  } catch {
    return null;
  }
}

function allMarks() {
  return new Map([...recorded, ...made]);
}

function countMarks() {
  const count = { copy: 0, "not-a-copy": 0, undecided: 0 };
  for (const mark of allMarks().values()) count[mark.verdict]++;
  return count;
}

function downloadMarks(name) {
  const marks = allMarks();
  const decisions = [...marks.keys()].sort().map((pair) => marks.get(pair));
  const content = { version: 1, digest: about.digest, ...(about.review && { review: about.review }), decisions };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2), "\n"], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
