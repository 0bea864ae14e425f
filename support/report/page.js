"use strict";
// The script inside a page (page.py): trajectories as pictures with boxes, and what chooses them.
// What comes from data is set as text or as the value of an attribute, never as markup.

const byId = (id) => document.getElementById(id);
const named = (list, name) => list.find((item) => item.name === name);
const { groups, pictures } = JSON.parse(byId("data").textContent);
const fields = byId("controls").elements;
let rows = []; // of the list: {sample, i, line}
let at = 0; // the one whose steps are shown

// make("p", {class: "trace"}, "text", otherElement); "svg:rect" is an element of SVG.
function make(name, attributes, ...children) {
  const element = name.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Pictures ----------------------------------------------------------------------------------------
// The image, or the view of it that the model saw, with boxes on it. Boxes and views are in 0..1000
// of the image, whatever its proportions. size: of the longer side, in pixels.
function picture(sample, { view = [0, 0, 1000, 1000], seen, box }, size) {
  const [x, y] = view;
  const [width, height] = [view[2] - x, view[3] - y];
  const [w, h] = [width * sample.width, height * sample.height];
  const svg = make("svg:svg", {
    class: "picture",
    viewBox: `${x} ${y} ${width} ${height}`,
    preserveAspectRatio: "none",
    width: (size * w) / Math.max(w, h),
    height: (size * h) / Math.max(w, h),
    "aria-hidden": "true", // its caption says it
  });
  const all = { width: 1000, height: 1000, preserveAspectRatio: "none" };
  svg.append(make("svg:image", { href: pictures[sample.image], ...all }));
  for (const [name, own] of Object.entries({ seen, truth: sample.truth, box })) {
    if (!own) continue;
    const place = { x: own[0], y: own[1], width: own[2] - own[0], height: own[3] - own[1] };
    if (name !== "seen") svg.append(make("svg:rect", { class: "edge", ...place }));
    svg.append(make("svg:rect", { class: name, ...place }));
  }
  return svg;
}

// From the first box that was fed back to the last box
function card({ sample, line }, choose) {
  const seen = line.steps.find((step) => step.seen)?.seen;
  const box = line.steps.findLast((step) => step.box)?.box;
  const words = make("b", {}, line.words);
  const button = make("button", {}, picture(sample, { seen, box }, 170), words, sample.text);
  button.addEventListener("click", () => {
    choose();
    byId("detail").scrollIntoView({ block: "nearest" }); // its words too, where there is room
  });
  return button;
}

function trajectory(sample, method, i) {
  const line = method.lines[i];
  const panels = line.steps.map((step) => {
    const words = [make("figcaption", {}, step.name), make("p", {}, step.text)];
    return make("figure", { class: "panel" }, picture(sample, step, 280), ...words);
  });
  const head = make("h3", {}, `${method.name} `, make("span", { class: "quiet" }, line.words));
  return [head, make("div", { class: "strip", tabindex: 0 }, ...panels)];
}

// The view: what the controls say, and the sample -------------------------------------------------
function fill(select, names, value, otherwise = names[0]) {
  select.replaceChildren(...names.map((name) => make("option", { value: name }, name || "none")));
  select.value = names.includes(value) ? value : otherwise;
  select.parentElement.hidden = names.length < 2;
}

const ORDERS = {
  gain: (a, b) => (b.line.gain ?? 0) - (a.line.gain ?? 0),
  loss: (a, b) => (a.line.gain ?? 0) - (b.line.gain ?? 0),
  first: (a, b) => a.line.first - b.line.first,
};

function rowsOf(group, method) {
  return group.samples.map((sample, i) => ({ sample, i, line: method.lines[i] }));
}

function browse(view) {
  fill(fields.group, groups.map(({ name }) => name), view.group);
  const group = named(groups, fields.group.value);
  const methods = group.methods.map(({ name }) => name);
  fill(fields.method, methods, view.method, group.shown);
  const others = methods.filter((name) => name !== fields.method.value);
  fill(fields.beside, ["", ...others], view.beside);
  for (const key of ["outcome", "order", "search"]) fields[key].value = view[key] ?? "";
  const words = fields.search.value.toLowerCase();
  const outcome = fields.outcome.value;
  rows = rowsOf(group, named(group.methods, fields.method.value)).filter(
    ({ sample, line }) =>
      (!outcome || line.outcome.includes(outcome)) && sample.text.toLowerCase().includes(words),
  );
  if (fields.order.value) rows.sort(ORDERS[fields.order.value]);
  byId("list").replaceChildren(...rows.map((row, place) => card(row, () => show(place))));
  show(Math.max(0, rows.findIndex(({ sample }) => sample.id === view.id)));
}

function show(place) {
  at = place;
  const list = byId("list");
  list.querySelector("[aria-current]")?.removeAttribute("aria-current");
  byId("count").textContent =
    `${rows.length && at + 1} of ${rows.length} samples (${fields.group.value}).`;
  byId("detail").replaceChildren();
  if (!rows.length) return;
  const { sample, i } = rows[at];
  list.children[at].setAttribute("aria-current", "true");
  list.scrollLeft = list.children[at].offsetLeft - list.offsetLeft - 200; // not the page
  const { methods } = named(groups, fields.group.value);
  const chosen = [fields.method, fields.beside].map(({ value }) => named(methods, value));
  byId("detail").append(
    make("h3", {}, sample.text),
    make("p", { class: "quiet" }, sample.facts),
    ...chosen.filter(Boolean).flatMap((method) => trajectory(sample, method, i)),
  );
}

// The largest gains and losses of what is shown first
function showChanges() {
  const method = named(groups[0].methods, groups[0].shown);
  const all = rowsOf(groups[0], method).sort(ORDERS.gain);
  const gains = all.filter(({ line }) => line.gain > 0).slice(0, 3);
  const losses = all.filter(({ line }) => line.gain < 0).slice(-3);
  const section = byId("changes");
  section.hidden = !gains.length && !losses.length;
  section.querySelector("span").textContent = method.name;
  for (const row of [...gains, ...losses.reverse()]) {
    section.querySelector(".strip").append(card(row, () => browse({ id: row.sample.id })));
  }
}

function onKey(event) {
  // In a field, and where something scrolls sideways, the keys have another meaning
  const taken = event.target.closest("input, select, .wide, .strip:focus");
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (taken || !step || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  if (rows[at + step]) show(at + step);
}

showChanges();
browse({});
document.addEventListener("keydown", onKey);
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("controls").addEventListener("input", () =>
  browse({ ...Object.fromEntries(new FormData(byId("controls"))), id: rows[at]?.sample.id }),
);
