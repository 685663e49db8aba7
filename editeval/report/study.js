"use strict";
// Filters, sorting and single items of a page over many runs. Everything else is there without this script.
const SHORT = 120; // characters of a text that are shown before it is opened
const NAMES = ["model", "method", "dataset", "seed"];
const form = document.getElementById("filters");
const data = JSON.parse(document.getElementById("data").textContent);

function boxes(name) { return [...form.querySelectorAll(`input[name="${name}"]`)]; }

function chosen() {
  return Object.fromEntries(NAMES.map((name) => [name, new Set(boxes(name).filter((box) => box.checked).map((box) => box.value))]));
}

// A curve of all seeds is shown while every seed is chosen; else the chosen seeds' own curves are.
function visible(element, sets, allSeeds) {
  const of = element.dataset;
  const kept = NAMES.slice(0, 3).every((name) => !of[name] || sets[name].has(of[name]));
  if (!kept) return false;
  if (of.source === "published") return document.getElementById("published").checked;
  if (of.seed === undefined) return true;
  if (of.seed === "all") return allSeeds || !element.closest("svg").querySelector('.curve[data-seed]:not([data-seed="all"])');
  return element.tagName === "TR" ? sets.seed.has(of.seed) : !allSeeds && sets.seed.has(of.seed);
}

function apply() {
  const sets = chosen();
  const allSeeds = boxes("seed").every((box) => box.checked);
  let shownRuns = 0;
  for (const element of document.querySelectorAll(".curve[data-model], tr[data-model]")) {
    const shown = visible(element, sets, allSeeds);
    element.toggleAttribute("hidden", !shown);
    if (shown && element.closest("#run-table")) shownRuns += 1;
  }
  for (const figure of document.querySelectorAll("figure")) {
    figure.hidden = !figure.querySelector(".curve[data-model]:not([hidden])");
  }
  for (const chart of document.querySelectorAll(".chart")) chart.hidden = !chart.querySelector("figure:not([hidden])");
  for (const filter of form.querySelectorAll(".filter")) {
    const every = boxes(filter.dataset.name);
    const on = every.filter((box) => box.checked).length;
    filter.querySelector(".count").textContent = on === every.length ? "(all)" : `(${on} of ${every.length})`;
  }
  document.getElementById("state").textContent = `${shownRuns} of ${data.runs.length} runs shown`;
  remember(sets);
  listRuns(sets);
}

// The choice is part of the address, so that a view can be sent to someone.
function remember(sets) {
  const query = new URLSearchParams();
  for (const name of NAMES) if (boxes(name).some((box) => !box.checked)) query.set(name, [...sets[name]].join("|"));
  const fresh = query.toString() ? `?${query}` : location.pathname;
  try { history.replaceState(null, "", fresh + location.hash); } catch (error) { if (error.name !== "SecurityError") throw error; }
}

function recall() {
  const query = new URLSearchParams(location.search);
  for (const name of NAMES) {
    if (query.has(name)) {
      const wanted = new Set(query.get(name).split("|"));
      for (const box of boxes(name)) box.checked = wanted.has(box.value);
    }
  }
}

// -- single items

const runSelect = document.getElementById("run");
const whichSelect = document.getElementById("which");

function options(select, pairs) {
  const before = select.value;
  select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
  if (pairs.some(([value]) => String(value) === before)) select.value = before;
}

function listRuns(sets) {
  const kept = data.runs.map((run, place) => [place, run]).filter(([, run]) => NAMES.every((name) => sets[name].has(run[name])));
  options(runSelect, kept.map(([place, run]) => [place, run.name]));
  listBenchmarks();
}

function listBenchmarks() {
  const run = data.runs[runSelect.value];
  const names = run ? [...new Set(run.items.map((item) => item[0]))] : [];
  options(whichSelect, [["", "everything"], ...names.map((name) => [name, name])]);
  listItems();
}

function cell(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// A long text shows its beginning, and opens.
function textCell(text, className) {
  const made = cell("td", text.length > SHORT ? "" : text, className);
  if (text.length > SHORT) {
    const whole = document.createElement("details");
    whole.append(cell("summary", text.slice(0, SHORT).replace(/\s+\S*$/, "") + " …"), cell("div", text, "whole"));
    made.append(whole);
  }
  return made;
}

// Where the run did not keep the question, its name is all there is.
function questionCell(question, name) {
  const made = textCell(question || name);
  if (question) made.append(cell("small", name));
  return made;
}

function listItems() {
  const run = data.runs[runSelect.value];
  const items = run ? run.items.filter((item) => !whichSelect.value || item[0] === whichSelect.value) : [];
  const table = document.createElement("table");
  table.className = "text";
  const head = document.createElement("tr");
  for (const name of ["benchmark", "question", "expected", "unedited model", "edited model"]) head.append(cell("th", name));
  const body = document.createElement("tbody");
  for (const [benchmark, name, question, expected, before, after, passedBefore, passedAfter] of items) {
    const row = document.createElement("tr");
    row.append(cell("td", benchmark), questionCell(data.questions[question], name), textCell(expected));
    row.append(textCell(`${passedBefore ? "✓" : "✗"} ${before}`, passedBefore ? "yes" : "no"));
    row.append(textCell(`${passedAfter ? "✓" : "✗"} ${after}`, passedAfter ? "yes" : "no"));
    body.append(row);
  }
  const top = document.createElement("thead");
  top.append(head);
  table.append(top, body);
  document.getElementById("item-list").replaceChildren(items.length ? table : cell("p", "No items: none changed, or the run kept no samples.", "note"));
}

// -- sorting

// A cell with a number says it in data-sort; where that is empty there is none, and the row stays below in both directions.
function compare(a, b, direction) {
  const [one, other] = [a.dataset.sort, b.dataset.sort];
  if (one === undefined) return direction * a.textContent.localeCompare(b.textContent);
  if (one === "" || other === "") return (one === "") - (other === "");
  return direction * (Number(one) - Number(other));
}

function sortBy(button) {
  const table = button.closest("table");
  const head = button.closest("th");
  const place = [...head.parentElement.children].indexOf(head);
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows].sort((a, b) => compare(a.children[place], b.children[place], up ? 1 : -1));
  table.tBodies[0].append(...rows);
}

form.addEventListener("change", apply);
form.addEventListener("reset", () => setTimeout(apply));
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("click", (event) => {
  const all = event.target.classList.contains("all");
  if (!all && !event.target.classList.contains("none")) return;
  for (const box of event.target.closest("fieldset").querySelectorAll("input")) box.checked = all;
  apply();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const open = event.target.closest ? event.target.closest(".filter[open]") : null;
  if (open) { open.open = false; open.querySelector("summary").focus(); }
});
document.addEventListener("click", (event) => {
  for (const filter of form.querySelectorAll(".filter[open]")) if (!filter.contains(event.target)) filter.open = false;
});
runSelect.addEventListener("change", listBenchmarks);
whichSelect.addEventListener("change", listItems);
for (const button of document.querySelectorAll(".sort")) button.addEventListener("click", () => sortBy(button));
recall();
apply();
