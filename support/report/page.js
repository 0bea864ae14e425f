"use strict";
// The script inside a page (page.py). It reads the two blocks of JSON beside it, and nothing else.
// What comes from data is set as text or as the value of an attribute, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const PICTURES = JSON.parse(document.getElementById("pictures").textContent);

// Elements ----------------------------------------------------------------------------------------
// make("p", {class: "facts"}, "text", otherElement); "svg:rect" is an element of SVG.
function make(name, attributes = {}, ...children) {
  const svg = name.startsWith("svg:");
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

function short(number) {
  return String(Number(number.toPrecision(4)));
}

// Tables: [name, text, head, rows] ----------------------------------------------------------------
function tableRow(name, cells) {
  return make("tr", {}, ...cells.map((cell) => make(name, {}, String(cell))));
}

function showTables() {
  for (const [name, text, head, rows] of DATA.tables) {
    const table = make("table", {}, tableRow("th", head), ...rows.map((row) => tableRow("td", row)));
    const wide = make("div", { class: "wide", tabindex: "0" }, table);
    byId("tables").append(make("p", {}, make("strong", {}, `${name}. `), text), wide);
  }
}

// Curves ------------------------------------------------------------------------------------------
// {title, x, y, series: [{name, style, faint, points: [[x, y] or [x, y, low, high]]}],
// healthy: [low, high] or null}
const BOX = { width: 360, height: 200, left: 44, right: 350, top: 8, bottom: 170 };

function ticks(low, high) {
  const rough = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const out = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) {
    out.push(n * step);
  }
  return out;
}

// From the lowest to the highest number, and some room where all are the same.
function range(numbers) {
  const low = Math.min(...numbers);
  const high = Math.max(...numbers);
  const room = (high - low) * 0.05 || Math.abs(high) * 0.1 || 0.1;
  return [low - room, high + room];
}

function chart(spec) {
  const points = spec.series.flatMap((series) => series.points);
  const xs = [...new Set(points.map((point) => point[0]))].sort((a, b) => a - b);
  const [left, right] = range(xs);
  const [low, high] = range(points.flatMap((point) => point.slice(1)));
  const toX = (x) => BOX.left + ((x - left) / (right - left)) * (BOX.right - BOX.left);
  const toY = (y) => BOX.bottom - ((y - low) / (high - low)) * (BOX.bottom - BOX.top);

  const svg = make("svg:svg", {
    viewBox: `0 0 ${BOX.width} ${BOX.height}`,
    role: "img",
    "aria-label": spec.title,
  });
  if (spec.healthy) svg.append(...healthyBand(spec.healthy, low, high, toY));
  const whole = xs.every(Number.isInteger);
  const xTicks = ticks(left, right).filter((x) => !whole || Number.isInteger(x));
  svg.append(...axes(spec, xTicks, ticks(low, high), toX, toY));
  for (const series of spec.series) svg.append(curve(spec, series, toX, toY));
  return make("figure", { class: "chart" }, make("h3", {}, spec.title), svg, keys(spec));
}

function healthyBand([from, to], low, high, toY) {
  const [bottom, top] = [Math.max(from, low), Math.min(to, high)];
  if (bottom >= top) return [];
  const size = { x: BOX.left, y: toY(top), width: BOX.right - BOX.left };
  return [make("svg:rect", { class: "healthy", ...size, height: toY(bottom) - toY(top) })];
}

function axes(spec, xTicks, yTicks, toX, toY) {
  const out = [];
  for (const y of yTicks) {
    const at = toY(y);
    out.push(make("svg:line", { class: "grid", x1: BOX.left, x2: BOX.right, y1: at, y2: at }));
    const place = { x: BOX.left - 5, y: at + 4, "text-anchor": "end" };
    out.push(make("svg:text", place, short(y)));
  }
  for (const x of xTicks) {
    const place = { x: toX(x), y: BOX.bottom + 14, "text-anchor": "middle" };
    out.push(make("svg:text", place, short(x)));
  }
  const place = { x: BOX.right, y: BOX.bottom + 27, "text-anchor": "end" };
  out.push(make("svg:text", place, spec.x));
  return out;
}

function curve(spec, series, toX, toY) {
  const group = make("svg:g", { class: `style${series.style}` });
  const line = (points) => points.map(([x, y]) => `${toX(x).toFixed(1)},${toY(y).toFixed(1)}`);
  const banded = series.points.filter((point) => point.length === 4);
  if (banded.length) {
    const there = line(banded.map(([x, , lower]) => [x, lower]));
    const back = line(banded.map(([x, , , upper]) => [x, upper])).reverse();
    group.append(make("svg:polygon", { class: "band", points: [...there, ...back].join(" ") }));
  }
  const name = series.faint ? "curve faint" : "curve";
  group.append(make("svg:polyline", { class: name, points: line(series.points).join(" ") }));
  const dot = series.points.length > 40 ? "dot unseen" : "dot";
  for (const [x, y, ...interval] of series.points) {
    const own = interval.length ? ` [${interval.map(short).join(", ")}]` : "";
    const words = `${series.name}, ${spec.x} ${short(x)}: ${short(y)}${own}`;
    const place = { class: dot, cx: toX(x), cy: toY(y), r: 3 };
    group.append(make("svg:circle", place, make("svg:title", {}, words)));
  }
  return group;
}

function keys(spec) {
  const list = make("ul", { class: "keys" });
  const add = (sign, words) => {
    const size = { viewBox: "0 0 30 10", "aria-hidden": "true" };
    list.append(make("li", {}, make("svg:svg", size, sign), words));
  };
  for (const series of spec.series.filter((series) => !series.faint)) {
    const line = make("svg:line", { class: "curve", x1: 0, x2: 30, y1: 5, y2: 5 });
    add(make("svg:g", { class: `style${series.style}` }, line), series.name);
  }
  if (spec.healthy) {
    const band = make("svg:rect", { class: "healthy", width: 30, height: 10 });
    add(band, `healthy: ${spec.healthy.join(" to ")}`);
  }
  return list;
}

function showCurves() {
  const section = byId("curves");
  for (const { heading, charts } of DATA.curves) {
    section.append(make("h2", {}, heading));
    section.append(make("div", { class: "charts" }, ...charts.map(chart)));
  }
}

// The state of the view, which the address keeps --------------------------------------------------
const START = {
  group: "", // a set of samples; empty: the first
  method: "", // the method that filters and order are about; empty: the group's own choice
  beside: "", // a second one; empty: none
  outcome: "",
  sort: "",
  search: "",
  id: "",
};
const state = { ...START };

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(START)) state[key] = given.get(key) ?? START[key];
}

function writeAddress() {
  const chosen = Object.entries(state).filter(([key, value]) => value !== START[key]);
  const address = "#" + new URLSearchParams(chosen);
  // Replaced: going back leads to the page before, not through every sample that was looked at
  if (address !== (location.hash || "#")) history.replaceState(null, "", address);
}

function change(values) {
  Object.assign(state, values);
  show();
}

function named(list, name) {
  return list.find((item) => item.name === name);
}

// What the state means, whatever an address says: {group, method, beside, rows}
function view() {
  const group = named(DATA.groups, state.group) ?? DATA.groups[0];
  const method = named(group.methods, state.method) ?? named(group.methods, group.shown);
  const beside = named(group.methods, state.beside);
  return { group, method, beside, rows: chosenRows(group, method) };
}

// Filters and order -------------------------------------------------------------------------------
function gain(line) {
  return line.gain ?? 0;
}

function firstIou(line) {
  return line.steps[0].iou ?? 0;
}

const ORDERS = {
  gain: ["largest gain first", (a, b) => gain(b.line) - gain(a.line)],
  loss: ["largest loss first", (a, b) => gain(a.line) - gain(b.line)],
  first: ["first IoU, lowest first", (a, b) => firstIou(a.line) - firstIou(b.line)],
};

function chosenRows(group, method) {
  const words = state.search.toLowerCase();
  const rows = group.samples.map((sample, i) => ({ sample, i, line: method.lines[i] }));
  const chosen = rows.filter(
    ({ sample, line }) =>
      (!state.outcome || line.outcome.includes(state.outcome)) &&
      (!words || sample.text.toLowerCase().includes(words)),
  );
  const order = Object.hasOwn(ORDERS, state.sort) ? ORDERS[state.sort] : null;
  return order ? chosen.sort(order[1]) : chosen;
}

// Controls ----------------------------------------------------------------------------------------
const fields = byId("controls").elements; // a key of the state -> its field

// Options as [value, words]; a field with nothing to choose from is hidden.
function fill(key, options, value) {
  const select = fields[key];
  // A choice that this method or group does not have stays in sight, and can be taken back
  if (value && !options.some(([own]) => own === value)) options = [...options, [value, value]];
  select.replaceChildren(...options.map(([value, words]) => make("option", { value }, words)));
  select.value = value;
  select.parentElement.hidden = options.length < 2;
}

function showControls({ group, method, beside }) {
  const names = group.methods.map(({ name }) => [name, name]);
  const found = new Set(method.lines.flatMap((line) => line.outcome));
  const outcomes = DATA.outcomes.filter((name) => found.has(name)).map((name) => [name, name]);
  const orders = Object.entries(ORDERS).map(([key, [words]]) => [key, words]);
  fill("group", DATA.groups.map(({ name }) => [name, name]), group.name);
  fill("method", names, method.name);
  fill("beside", names.length < 2 ? [] : [["", "none"], ...names], beside?.name ?? "");
  fill("outcome", [["", "all"], ...outcomes], state.outcome);
  fill("sort", [["", "as in the file"], ...orders], state.sort);
  if (fields.search.value !== state.search) fields.search.value = state.search;
}

// Pictures: boxes are drawn over one picture, in the pixels of the sample's image -----------------
function rectangle(name, [x1, y1, x2, y2]) {
  return make("svg:rect", { class: name, x: x1, y: y1, width: x2 - x1, height: y2 - y1 });
}

// A box in 0..1000 -> pixels
function inPixels(sample, [x1, y1, x2, y2]) {
  const [kx, ky] = [sample.width / 1000, sample.height / 1000];
  return [x1 * kx, y1 * ky, x2 * kx, y2 * ky];
}

// view: the part of the image that is shown, in 0..1000. What is drawn goes into the svg within: it
// is clipped to the view, where the outer one shows more of the image if its height is limited.
function picture(sample, view = [0, 0, 1000, 1000]) {
  const [x, y, x2, y2] = inPixels(sample, view);
  const part = { viewBox: `${x} ${y} ${x2 - x} ${y2 - y}` };
  const svg = make("svg:svg", { class: "picture", ...part });
  const inner = make("svg:svg", { ...part, x, y, width: x2 - x, height: y2 - y });
  svg.append(inner);
  const size = { width: sample.width, height: sample.height };
  const name = sample.width < 200 ? "small" : "large";
  const image = { class: name, preserveAspectRatio: "none", ...size };
  const href = PICTURES[sample.picture];
  inner.append(make("svg:rect", { class: "paper", ...size })); // behind what is transparent
  if (href) inner.append(make("svg:image", { href, ...image }));
  return svg;
}

function draw(svg, name, box) {
  svg.firstChild.append(rectangle("edge", box), rectangle(name, box));
}

function thumbnail(sample, line) {
  const svg = picture(sample);
  svg.setAttribute("aria-hidden", "true");
  if (sample.bbox) draw(svg, "truth", sample.bbox);
  const last = line.steps.at(-1).box;
  if (last) svg.firstChild.append(rectangle("box", inPixels(sample, last)));
  return svg;
}

// The list of samples -----------------------------------------------------------------------------
function numbers(line) {
  const [first, last] = [line.steps[0].iou, line.steps.at(-1).iou];
  if (first === undefined) return "";
  const ends = line.gain === undefined ? [first] : [first, last];
  const ious = ends.map((iou) => iou.toFixed(2)).join(" → ");
  return [`IoU ${ious}`, ...line.outcome].join(", ");
}

function listRow({ sample, line }) {
  const words = make(
    "span",
    {},
    make("span", { class: "words" }, sample.text),
    make("span", { class: "numbers" }, numbers(line)),
  );
  const button = make("button", { type: "button" }, thumbnail(sample, line), words);
  button.addEventListener("click", () => change({ id: sample.id }));
  return make("li", {}, button);
}

let listed = ""; // what the list was made of

function showList({ group, method, rows }, at) {
  const wanted = JSON.stringify([group.name, method.name, rows.map((row) => row.i)]);
  const list = byId("list");
  if (wanted !== listed) list.replaceChildren(...rows.map(listRow));
  listed = wanted;
  list.querySelector('[aria-current="true"]')?.removeAttribute("aria-current");
  const button = list.children[at]?.firstChild;
  if (!button) return;
  button.setAttribute("aria-current", "true");
  // Only the list is scrolled; scrollIntoView would move the page
  const { offsetTop, offsetHeight } = button.parentElement;
  const lowest = offsetTop + offsetHeight - list.clientHeight;
  list.scrollTop = Math.min(offsetTop, Math.max(lowest, list.scrollTop));
}

// One sample, and what one or two methods do with it ----------------------------------------------
function panel(sample, step) {
  const svg = picture(sample, step.view);
  if (step.seen) svg.firstChild.append(rectangle("seen", inPixels(sample, step.seen)));
  if (sample.bbox) draw(svg, "truth", sample.bbox);
  if (step.box) draw(svg, "box", inPixels(sample, step.box));
  let words = step.name;
  if (step.box === null) words += ": no valid box";
  else if (step.iou !== undefined) words += `: IoU ${step.iou.toFixed(2)}`;
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", words);
  const caption = make("figcaption", {}, words);
  return make("figure", { class: "panel" }, svg, caption, ...trace(step.text));
}

// The reasoning and the answer apart, where the text has this form; else the text as it is
function trace(text) {
  const parts = /^\s*<think>((?:(?!<think>)[^])*)<\/think>([^]*)$/.exec(text);
  if (!parts) return [make("p", { class: "trace" }, text)];
  const [, reasoning, answer] = parts;
  return [
    make("p", { class: "trace" }, reasoning.trim()),
    make("p", { class: "answer" }, answer.trim()),
  ];
}

function methodStrip(sample, method, i) {
  const line = method.lines[i];
  const chips = [...line.outcome];
  if (line.gain !== undefined) {
    chips.push(`IoU ${line.gain < 0 ? "" : "+"}${line.gain.toFixed(2)}`);
  }
  for (const [name, value] of Object.entries(line.scores ?? {})) chips.push(`${name} ${value}`);
  const spans = chips.map((words) => make("span", { class: "chip" }, words));
  const panels = line.steps.map((step) => panel(sample, step));
  return make(
    "section",
    { class: "method" },
    make("h3", {}, method.name, ...spans),
    make("div", { class: "strip" }, ...panels),
  );
}

function showDetail({ group, method, beside, rows }, at) {
  const detail = byId("detail");
  byId("count").textContent = `${rows.length && at + 1} of ${rows.length}`;
  if (!rows.length) {
    detail.replaceChildren(make("p", {}, "No sample fits these filters."));
    return;
  }
  const { sample, i } = rows[at];
  const facts = [`id ${sample.id}`, sample.source, `${sample.width} x ${sample.height} pixels`];
  if (sample.answer !== undefined) facts.push(`true answer: ${sample.answer}`);
  const strips = [method, beside].filter((one) => one).map((one) => methodStrip(sample, one, i));
  detail.replaceChildren(
    make("p", { class: "expression" }, sample.text),
    make("p", { class: "facts" }, facts.filter((fact) => fact).join(" · ")),
    make("div", { class: beside ? "two" : "one" }, ...strips),
  );
}

// The page ----------------------------------------------------------------------------------------
function place(rows) {
  return Math.max(0, rows.findIndex(({ sample }) => sample.id === state.id));
}

function show() {
  const now = view();
  const at = place(now.rows);
  showControls(now);
  showList(now, at);
  showDetail(now, at);
  writeAddress();
}

// To the sample that is `step` places further in the list
function go(step) {
  const { rows } = view();
  const row = rows[place(rows) + step];
  if (row) change({ id: row.sample.id });
}

function onKey(event) {
  // In a field, and where something scrolls sideways, the keys have another meaning
  const taken = event.target.closest("input, select, .wide, .strip");
  if (taken || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  go(step);
}

function start() {
  showTables();
  showCurves();
  for (const button of byId("places").children) {
    const section = byId(button.dataset.place);
    button.hidden = !section.textContent.trim();
    button.addEventListener("click", () => section.scrollIntoView());
  }
  if (!DATA.groups.length) {
    byId("trajectories").hidden = true;
    return;
  }
  for (const field of fields) {
    field.addEventListener("input", () => change({ [field.name]: field.value }));
  }
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const button of byId("walk").querySelectorAll("button")) {
    button.addEventListener("click", () => go(Number(button.dataset.step)));
  }
  const sent = location.hash.length > 1; // somebody sent a view: go there
  readAddress();
  show();
  if (sent) byId("trajectories").scrollIntoView();
  window.addEventListener("hashchange", () => {
    readAddress();
    show();
  });
  document.addEventListener("keydown", onKey);
}

start();
