"use strict";
// The script inside a page (support/report/page.py). It reads the two blocks of JSON beside it, and nothing
// else. What comes from data is set as text or as the value of an attribute, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const PICTURES = JSON.parse(document.getElementById("pictures").textContent);

// ------------------------------------------------------------------------------------------------
// Elements
// ------------------------------------------------------------------------------------------------
// make("p", {class: "facts"}, "text", otherElement); "svg:rect" is an element of SVG.
function make(name, attributes = {}, ...children) {
  const svg = name.startsWith("svg:");
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

function short(number) {
  return String(Number(number.toPrecision(4)));
}

function signed(number) {
  return (number < 0 ? "" : "+") + number.toFixed(2);
}

// ------------------------------------------------------------------------------------------------
// Curves: {title, x, y, series: [{name, style, faint, points: [[x, y] or [x, y, low, high]]}],
// healthy: [low, high] or null, mark: an x or null}
// ------------------------------------------------------------------------------------------------
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
    tabindex: "0",
    "aria-label": `${spec.title}; left and right arrow read its points`,
  });
  if (spec.healthy) svg.append(...healthyBand(spec.healthy, low, high, toY));
  const whole = xs.every(Number.isInteger);
  const xTicks = ticks(left, right).filter((x) => !whole || Number.isInteger(x));
  svg.append(...axes(spec, xTicks, ticks(low, high), toX, toY));
  if (spec.mark !== null) svg.append(upright("guide", toX(spec.mark)));
  for (const series of spec.series) svg.append(curve(series, toX, toY));

  const figure = make("figure", { class: "chart" }, make("h3", {}, spec.title), svg);
  const readout = make("output");
  figure.append(keys(spec), readout);
  readPoints(svg, readout, spec, xs, toX);
  return figure;
}

function healthyBand([from, to], low, high, toY) {
  const [bottom, top] = [Math.max(from, low), Math.min(to, high)];
  if (bottom >= top) return [];
  const size = { x: BOX.left, y: toY(top), width: BOX.right - BOX.left };
  return [make("svg:rect", { class: "healthy", ...size, height: toY(bottom) - toY(top) })];
}

function upright(name, x) {
  return make("svg:line", { class: name, x1: x, x2: x, y1: BOX.top, y2: BOX.bottom });
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

function curve(series, toX, toY) {
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
  if (series.points.length <= 40) {
    for (const [x, y] of series.points) {
      group.append(make("svg:circle", { class: "dot", cx: toX(x), cy: toY(y), r: 2.5 }));
    }
  }
  return group;
}

function keys(spec) {
  const list = make("ul", { class: "keys" });
  for (const series of spec.series.filter((series) => !series.faint)) {
    const line = make("svg:line", { class: "curve", x1: 0, x2: 30, y1: 5, y2: 5 });
    const sign = make("svg:svg", { viewBox: "0 0 30 10", "aria-hidden": "true" });
    sign.append(make("svg:g", { class: `style${series.style}` }, line));
    list.append(make("li", {}, sign, series.name));
  }
  if (spec.healthy) {
    const sign = make("svg:svg", { viewBox: "0 0 30 10", "aria-hidden": "true" });
    sign.append(make("svg:rect", { class: "healthy", width: 30, height: 10 }));
    list.append(make("li", {}, sign, `healthy: ${spec.healthy[0]} to ${spec.healthy[1]}`));
  }
  return list;
}

// The pointer, or the arrow keys where the chart has the focus, choose an x; its values are read out.
function readPoints(svg, readout, spec, xs, toX) {
  const guide = upright("guide", toX(xs[0]));
  let at = -1;

  function read(index) {
    at = Math.max(0, Math.min(xs.length - 1, index));
    const parts = [];
    for (const series of spec.series) {
      const point = series.points.find(([x]) => x === xs[at]);
      if (!point) continue;
      const interval = point.length === 4 ? ` [${short(point[2])}, ${short(point[3])}]` : "";
      parts.push(`${series.name} ${short(point[1])}${interval}`);
    }
    readout.textContent = `${spec.x} ${short(xs[at])}: ${parts.join(", ")}`;
    guide.setAttribute("x1", toX(xs[at]));
    guide.setAttribute("x2", toX(xs[at]));
    svg.append(guide);
  }

  svg.addEventListener("pointermove", (event) => {
    const bounds = svg.getBoundingClientRect();
    const x = ((event.clientX - bounds.left) / bounds.width) * BOX.width;
    const distances = xs.map((value) => Math.abs(toX(value) - x));
    read(distances.indexOf(Math.min(...distances)));
  });
  svg.addEventListener("focus", () => read(at < 0 ? xs.length - 1 : at));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    read(at + step);
  });
}

function showCurves() {
  const section = byId("curves");
  for (const { heading, charts } of DATA.curves) {
    section.append(make("h2", {}, heading));
    section.append(make("div", { class: "charts" }, ...charts.map(chart)));
  }
}

// ------------------------------------------------------------------------------------------------
// The state of the view, which the address keeps
// ------------------------------------------------------------------------------------------------
const START = {
  group: "", // a set of samples; empty: the first
  method: "", // the method that filters and order are about; empty: the group's own choice
  beside: "", // a second one; empty: none
  source: "",
  stratum: "",
  outcome: "",
  trace: "",
  sort: "",
  search: "",
  id: "",
  beyond: "", // "1": steps beyond the T of the tables too
  numbers: "", // "1": log-probability and cost
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

// ------------------------------------------------------------------------------------------------
// Filters and order
// ------------------------------------------------------------------------------------------------
function ends(line) {
  const first = line.steps[0].iou;
  const last = line.steps[line.last].iou;
  return first === undefined || last === undefined ? null : [first, last];
}

function gain(line) {
  const pair = ends(line);
  return pair ? pair[1] - pair[0] : 0;
}

function firstIou(line) {
  return line.steps[0].iou ?? 0;
}

const ORDERS = {
  gain: ["largest gain first", (a, b) => gain(b.line) - gain(a.line)],
  loss: ["largest loss first", (a, b) => gain(a.line) - gain(b.line)],
  first: ["first IoU, lowest first", (a, b) => firstIou(a.line) - firstIou(b.line)],
  id: ["id", (a, b) => a.sample.id.localeCompare(b.sample.id, "en", { numeric: true })],
};

// Whether the line's traces tell the truth, of the steps that were judged: "true", "false" or null
function judged(line) {
  const said = line.steps.slice(0, line.last + 1).map((step) => step.honest);
  if (said.includes(false)) return "false";
  return said.includes(true) ? "true" : null;
}

function chosenRows(group, method) {
  const words = state.search.toLowerCase();
  const rows = group.samples.map((sample, i) => ({ sample, i, line: method.lines[i] }));
  const chosen = rows.filter(
    ({ sample, line }) =>
      line &&
      (!state.source || sample.source === state.source) &&
      (!state.stratum || line.strata.includes(state.stratum)) &&
      (!state.outcome || line.outcome.includes(state.outcome)) &&
      (!state.trace || judged(line) === state.trace) &&
      (!words || sample.text.toLowerCase().includes(words)),
  );
  const order = Object.hasOwn(ORDERS, state.sort) ? ORDERS[state.sort] : null;
  return order ? chosen.sort(order[1]) : chosen;
}

// ------------------------------------------------------------------------------------------------
// Controls
// ------------------------------------------------------------------------------------------------
const fields = {}; // a key of the state -> its field

function field(label, key, element) {
  element.name = key;
  const isTick = element.type === "checkbox";
  element.addEventListener("input", () => {
    change({ [key]: isTick ? (element.checked ? "1" : "") : element.value });
  });
  fields[key] = element;
  const parts = isTick ? [element, label] : [label, element];
  byId("controls").append(make("label", { class: isTick ? "tick" : null }, ...parts));
}

function makeControls() {
  field("samples", "group", make("select"));
  field("method", "method", make("select"));
  field("beside it", "beside", make("select"));
  field("source", "source", make("select"));
  field("stratum", "stratum", make("select"));
  field("outcome", "outcome", make("select"));
  field("trace", "trace", make("select"));
  field("order", "sort", make("select"));
  field("search", "search", make("input", { type: "search" }));
  field("steps beyond T", "beyond", make("input", { type: "checkbox" }));
  field("log-probabilities", "numbers", make("input", { type: "checkbox" }));
  const clear = make("button", { type: "button" }, "clear filters");
  const filters = { source: "", stratum: "", outcome: "", trace: "", search: "" };
  clear.addEventListener("click", () => change(filters));
  byId("controls").append(clear);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
}

// Options as [value, words]; a field with nothing to choose from is hidden.
function fill(key, options, value) {
  const select = fields[key];
  // A choice that this method or group does not have stays in sight, and can be taken back
  if (value && !options.some(([own]) => own === value)) options = [...options, [value, value]];
  select.replaceChildren(...options.map(([value, words]) => make("option", { value }, words)));
  select.value = value;
  select.parentElement.hidden = options.length < 2;
}

function any(values) {
  const several = values.length > 1 ? values : [];
  return [["", "all"], ...several.map((value) => [value, value])];
}

function showControls({ group, method, beside }) {
  const names = group.methods.map(({ name }) => [name, name]);
  const lines = method.lines.filter((line) => line);
  const outcomes = new Set(lines.flatMap((line) => line.outcome));
  const traces = [["", "all"]];
  if (lines.some(judged)) traces.push(["true", "tells the truth"], ["false", "does not"]);
  fill("group", DATA.groups.map(({ name }) => [name, name]), group.name);
  fill("method", names, method.name);
  fill("beside", names.length < 2 ? [] : [["", "none"], ...names], beside ? beside.name : "");
  fill("source", any(group.sources), state.source);
  fill("stratum", any(method.strata), state.stratum);
  fill("outcome", any(DATA.outcomes.filter((name) => outcomes.has(name))), state.outcome);
  fill("trace", traces, state.trace);
  const orders = Object.entries(ORDERS).map(([key, [words]]) => [key, words]);
  fill("sort", [["", "as in the file"], ...orders], state.sort);
  if (fields.search.value !== state.search) fields.search.value = state.search;
  for (const key of ["beyond", "numbers"]) fields[key].checked = state[key] === "1";
  const longer = lines.some((line) => line.steps.length > line.last + 1);
  fields.beyond.parentElement.hidden = !longer;
}

// ------------------------------------------------------------------------------------------------
// Pictures: boxes are drawn over one picture, in the pixels of the sample's image
// ------------------------------------------------------------------------------------------------
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
  const address = PICTURES[sample.picture];
  const size = { width: sample.width, height: sample.height };
  if (!address) {
    inner.append(make("svg:rect", { class: "empty", ...size }));
    return svg;
  }
  const name = sample.width < 200 ? "small" : null;
  const image = { class: name, href: address, preserveAspectRatio: "none" };
  inner.append(make("svg:rect", { class: "paper", ...size })); // behind what is transparent
  inner.append(make("svg:image", { ...image, ...size }));
  return svg;
}

function draw(svg, name, box) {
  svg.firstChild.append(rectangle("edge", box), rectangle(name, box));
}

function thumbnail(sample, line) {
  const svg = picture(sample);
  svg.setAttribute("aria-hidden", "true");
  if (sample.truth) draw(svg, "truth", sample.truth);
  const first = line.steps[0].box;
  const last = line.steps[line.last].box;
  if (first) svg.firstChild.append(rectangle("before", inPixels(sample, first)));
  if (last) svg.firstChild.append(rectangle("box", inPixels(sample, last)));
  return svg;
}

// ------------------------------------------------------------------------------------------------
// The list of samples
// ------------------------------------------------------------------------------------------------
function numbers(line) {
  const pair = ends(line) ?? [line.steps[0].iou];
  if (pair[0] === undefined) return "";
  const words = pair.length > 1 && line.last ? pair.map((v) => v.toFixed(2)).join(" → ") : pair[0].toFixed(2);
  return ["IoU " + words, ...line.outcome].join(", ");
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
  const row = list.children[at].getBoundingClientRect();
  const frame = list.getBoundingClientRect();
  if (row.top < frame.top) list.scrollTop -= frame.top - row.top;
  if (row.bottom > frame.bottom) list.scrollTop += row.bottom - frame.bottom;
}

// ------------------------------------------------------------------------------------------------
// One sample, and what one or two methods do with it
// ------------------------------------------------------------------------------------------------
function panel(sample, step, t, method, last) {
  const svg = picture(sample, step.view);
  if (step.seen) svg.firstChild.append(rectangle("seen", inPixels(sample, step.seen)));
  if (sample.truth) draw(svg, "truth", sample.truth);
  if (step.box) draw(svg, "box", inPixels(sample, step.box));
  let words = step.name ?? `${method.word} ${t}`;
  if (step.box === null) words += ": no valid box";
  else if (step.iou !== undefined) words += `: IoU ${step.iou.toFixed(2)}`;
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", words);
  const name = t > last ? "panel beyond" : "panel";
  const figure = make("figure", { class: name }, svg, make("figcaption", {}, words));
  figure.append(...trace(step.text));
  if (step.honest === true) figure.append(make("p", { class: "more" }, "✓ tells the truth"));
  if (step.honest === false) figure.append(make("p", { class: "more" }, "✗ does not tell the truth"));
  if (state.numbers === "1") figure.append(make("p", { class: "more" }, cost(step)));
  return figure;
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

function cost(step) {
  const parts = [];
  if (step.logprob !== undefined) parts.push(`log-probability ${step.logprob.toFixed(2)}`);
  if (step.read !== undefined) parts.push(`${step.read} tokens read`);
  return parts.join(", ") || "not logged";
}

function methodStrip(sample, method, i) {
  const line = method.lines[i];
  const head = make("h3", {}, method.name);
  const section = make("section", { class: "method" }, head);
  if (!line) {
    section.append(make("p", {}, "has no line of this sample"));
    return section;
  }
  for (const name of line.outcome) head.append(make("span", { class: "chip" }, name));
  if (method.refines && ends(line)) {
    head.append(make("span", { class: "chip" }, `IoU ${signed(gain(line))}`));
  }
  for (const [name, value] of Object.entries(line.scores ?? {})) {
    head.append(make("span", { class: "chip" }, `${name} ${value}`));
  }
  const count = state.beyond === "1" ? line.steps.length : line.last + 1;
  const steps = line.steps.slice(0, count);
  const panels = steps.map((step, t) => panel(sample, step, t, method, line.last));
  section.append(make("div", { class: "strip" }, ...panels));
  return section;
}

function showDetail({ group, method, beside, rows }, at) {
  const detail = byId("detail");
  byId("count").textContent = `${rows.length && at + 1} of ${rows.length}`;
  if (!rows.length) {
    detail.replaceChildren(make("p", {}, "No sample fits these filters."));
    return;
  }
  const { sample, i, line } = rows[at];
  const facts = [`id ${sample.id}`, sample.source, ...line.strata].filter((word) => word);
  facts.push(`${sample.width} x ${sample.height} pixels`);
  const strips = [method, beside].filter((one) => one).map((one) => methodStrip(sample, one, i));
  const parts = [
    make("p", { class: "expression" }, sample.text),
    make("p", { class: "facts" }, facts.join(" · ")),
    sample.answer === undefined ? null : make("p", {}, `true answer: ${sample.answer}`),
    make("div", { class: beside ? "methods two" : "methods" }, ...strips),
  ];
  detail.replaceChildren(...parts.filter((part) => part));
}

// ------------------------------------------------------------------------------------------------
// The page
// ------------------------------------------------------------------------------------------------
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
  const inList = byId("list").contains(event.target);
  // In a field, and where something scrolls sideways, the keys have another meaning
  const taken = event.target.closest("input, select, .wide, .strip");
  if (taken || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  let step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (inList) step ??= { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  go(step);
  if (inList) byId("list").querySelector('[aria-current="true"]')?.focus({ preventScroll: true });
}

function start() {
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
  makeControls();
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
