"use strict";
// Names in the data come from files. They reach the page only as text nodes and attributes, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const MOST_BOXES = 300; // A layout of more takes longer than a second.
const KINDS = { "+": ["plus", "added"], "-": ["minus", "removed"], s: ["swap", "swapped"], "~": ["rewired", "changed"] };
const SHAPE_OPS = new Set(("view reshape transpose permute unsqueeze squeeze expand expand_as contiguous to _to_copy slice select t " +
  "numpy_T flatten unflatten detach alias clone view_as type_as lift_fresh_copy getitem split chunk unbind").split(" "));

function element(tag, set = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(set)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...inside.filter((each) => each !== null && each !== undefined));
  return made;
}
function drawn(tag, set = {}, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(set)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
function count(number) {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) if (number >= size) return +(number / size).toPrecision(3) + unit;
  return String(number);
}
function bytes(number) {
  for (const [size, unit] of [[2 ** 30, "GB"], [2 ** 20, "MB"], [2 ** 10, "kB"]]) if (number >= size) return +(number / size).toPrecision(3) + " " + unit;
  return number + " B";
}
function share(value) {
  if (value === null || value === undefined) return "";
  if (value === 0) return "0";
  if (value < 0.001) return value.toExponential(0);
  if (value >= 10) return +value.toPrecision(2) + "×";
  return (100 * value).toPrecision(2) * 1 + "%";
}
// Errors reach from 1e-7 (rounding) to 1, so bars are logarithmic: empty at 1e-6, full at 1.
const level = (value) => (value ? Math.max(0.04, Math.min(1, 1 + Math.log10(value) / 6)) : 0);

// ---- Data: items in preorder, so that those below an item are a range.
const items = [], ops = data.ops, opOf = new Map(), weightOf = new Map(), itemOf = new Map(), users = new Map();
(function number(item, parent) {
  Object.assign(item, { index: items.length, parent });
  items.push(item);
  for (const child of item.children) number(child, item);
  item.end = items.length;
})(data.root, null);
ops.forEach((op, index) => { op.index = index; opOf.set(op.id, op); users.set(op.id, []); });
for (const op of ops) for (const id of op.inputs) users.get(id)?.push(op);
for (const weight of data.weights) weightOf.set(weight.name, weight);
for (const item of items) for (const id of item.ops) itemOf.set(id, item);
const opsIn = (item) => ops.filter((op) => inside(item, op));
const inside = (item, op) => { const at = itemOf.get(op.id).index; return at >= item.index && at < item.end; };
const nameOf = (item) => item.path || item.name;
const runOf = (item) => (item.parent?.run ? item.parent : null);

let opened = data.root, chosen = null, start = 0, hidden = false;
const unfolded = new Set([data.root, ...data.root.children]);

// ---- Opening and choosing.
function open(item, choose = null, record = true) {
  if (item.run) item = item.children[0];
  opened = item;
  chosen = choose;
  start = 0;
  for (let above = item.parent; above; above = above.parent) unfolded.add(above);
  unfolded.add(item);
  if (choose?.id) {
    const at = boxesOf(item).findIndex((box) => box.ops.has(choose.id));
    if (at >= 0) start = MOST_BOXES * Math.floor(at / MOST_BOXES);
  }
  if (record) history.pushState(null, "", "#" + item.index);
  render();
  $("tree").querySelector(".row.open")?.scrollIntoView({ block: "nearest" });
}
function choose(thing) {
  chosen = thing;
  for (const box of $("graph").querySelectorAll(".box")) box.classList.toggle("chosen", box.thing === thing);
  details();
}
function goTo(op) { open(itemOf.get(op.id), op); }
function render() { tree(); strip(); crumbs(); graph(); details(); }

// ---- Tree.
function tags(item) {
  // A module that has others gets dots, which leave room for its name.
  const found = [], dot = item.children.length > 0 || data.kind === "diff";
  const tag = (style, text, title) => found.push(element("span", dot ? { class: "dot " + style, title } : { class: "tag " + style, title }, dot ? "●" : text));
  for (const mark of item.marks || []) tag(data.quantizing.includes(mark) ? "quant" : "pass", mark, "by the pass " + mark);
  if (item.trainable && data.root.trainable < data.root.parameters) tag("train", "trains", count(item.trainable) + " parameters train");
  for (const [kind, [style, word]] of Object.entries(KINDS)) {
    const number = item.changes?.[kind];
    if (number) found.push(element("span", { class: "change " + style, title: `${number} ops and weights ${word}` }, ({ s: "⇄" }[kind] || kind).replace("-", "−") + number));
  }
  return found;
}
function meter(value) {
  if (value === null || value === undefined) return [];
  const bar = element("i");
  bar.style.width = 100 * level(value) + "%";
  return [element("span", { class: "meter", title: "values moved by " + share(value) + " of their scale (the bar is logarithmic)" }, bar), element("span", { class: "moved" }, share(value))];
}
const rows = [];
function tree() {
  rows.length = 0;
  const made = document.createDocumentFragment();
  (function add(item, depth) {
    rows.push(item);
    const folds = item.children.length > 0, is = unfolded.has(item);
    const fold = element("span", { class: "fold", "aria-hidden": "true" }, folds ? (is ? "▾" : "▸") : "");
    fold.addEventListener("click", (event) => { event.stopPropagation(); toggle(item); });
    const role = roleOf(item);
    const row = element("div", { class: "row" + (item === opened ? " open" : ""), role: "treeitem", "aria-level": depth + 1, title: `${nameOf(item)}  ${item.cls}`, ...(folds ? { "aria-expanded": is } : {}), "aria-selected": item === opened },
      fold, element("span", { class: "name" }, item.name), item.run ? element("span", { class: "times" }, "×" + item.children.length) : null,
      element("span", { class: "tags" }, role && data.kind === "view" ? element("span", { class: "tag role" }, role) : null, ...tags(item)),
      data.kind === "view" ? element("span", { class: "size" }, item.parameters ? count(item.parameters) : "") : null, ...(data.moved ? meter(item.moved) : []));
    row.style.paddingLeft = 6 + 13 * depth + "px";
    row.addEventListener("click", () => { if (item.run) toggle(item, true); open(item); });
    made.append(row);
    if (is) for (const child of item.children) add(child, depth + 1);
  })(data.root, 0);
  $("tree").replaceChildren(made);
}
function roleOf(item) { return item.run ? "" : [...new Set(item.ops.map((id) => opOf.get(id).role).filter(Boolean))].join(" "); }
function toggle(item, on = !unfolded.has(item)) {
  if (on) unfolded.add(item); else unfolded.delete(item);
  tree();
}
$("tree").addEventListener("keydown", (event) => {
  const at = rows.indexOf(opened);
  const moves = {
    ArrowDown: () => rows[at + 1] && step(rows, at, 1), ArrowUp: () => rows[at - 1] && step(rows, at, -1),
    ArrowRight: () => { if (opened.children.length) unfolded.has(opened) ? open(opened.children[0]) : toggle(opened, true); },
    ArrowLeft: () => { unfolded.has(opened) && opened.children.length ? toggle(opened, false) : opened.parent && open(runOf(opened)?.parent || opened.parent); },
    Home: () => open(data.root), Enter: () => toggle(opened), " ": () => toggle(opened),
  };
  if (!moves[event.key]) return;
  event.preventDefault();
  moves[event.key]();
});
function step(list, at, by) {
  // A folded run opens as its first module, which comes next in the list; go past the run's own row.
  let next = list[at + by];
  if (next.run && by < 0) next = list[at - 2] || next;
  if (next) open(next);
}

// ---- The bars above a difference: one for each block, in the order in which they run.
function strip() {
  if (!data.moved) return;
  const row = blocks();
  $("strip").hidden = row.length < 2;
  const bars = element("div", { class: "bars" }), marks = element("div", { class: "marks" });
  const first = row.find((item) => item.moved > 1e-6);
  for (const item of row) {
    const bar = element("i"), now = opened.index >= item.index && opened.index < item.end;
    bar.style.height = 100 * level(item.moved) + "%";
    bars.append(element("button", { type: "button", class: now ? "open" : "", title: `${nameOf(item)}: output moved by ${share(item.moved) || "not compared"}, most inside ${share(item.most)}`, "aria-label": `${nameOf(item)} ${share(item.moved)}`, onclick: () => open(item) }, bar));
    marks.append(element("span", {}, item.name.split(".").pop()));
  }
  const begins = first ? `The first to move is ${nameOf(first)} (${share(first.moved)}). ` : "No block moved. ";
  $("strip").replaceChildren(element("div", { class: "what" }, "How far the output of each block moved on the inputs, relative to its scale (logarithmic, 1e-6 to 1). " + begins), bars, marks);
}
function blocks() {
  let longest = null;
  for (const item of items) if (!item.run) {
    const flat = item.children.flatMap((child) => (child.run ? child.children : [child]));
    if (!longest || flat.length > longest.length) longest = flat;
  }
  return (longest || []).filter((item) => opsIn(item).length);
}

// ---- Path of the opened module, and its neighbours in a run.
function crumbs() {
  const path = [];
  for (let at = opened; at; at = at.parent) if (!at.run) path.unshift(at);
  const made = document.createDocumentFragment();
  path.forEach((item, place) => {
    if (place) made.append(" › ");
    made.append(item === opened ? element("b", {}, item.name) : element("a", { onclick: () => open(item) }, item.name));
  });
  const run = runOf(opened);
  if (run) {
    const at = run.children.indexOf(opened);
    made.append(`  (${at + 1} of ${run.children.length} equal blocks) `);
    made.append(element("button", { type: "button", title: "Previous block ([)", onclick: () => neighbour(-1) }, "‹"), " ", element("button", { type: "button", title: "Next block (])", onclick: () => neighbour(1) }, "›"));
  }
  $("crumbs").replaceChildren(made);
}
function neighbour(by) {
  // Deep inside a block, the same part of the next block is opened.
  const below = [];
  let at = opened;
  while (at && !runOf(at)) { below.unshift(at.name); at = at.parent; }
  if (!at) return;
  let next = runOf(at).children[runOf(at).children.indexOf(at) + by];
  if (!next) return;
  for (const name of below) next = next.children.find((child) => child.name === name) || next;
  open(next);
}

// ---- Graph of the opened module: its own ops, and its children as boxes.
function boxesOf(item) {
  const found = [], add = (thing, members) => { if (members.length) found.push({ thing, ops: new Set(members.map((op) => op.id)), first: members[0].index }); };
  for (const child of item.children) add(child, opsIn(child));
  for (const id of item.ops) add(opOf.get(id), [opOf.get(id)]);
  return found.sort((a, b) => a.first - b.first);
}
function category(op) {
  if (op.by) return data.quantizing.includes(op.by) ? "quant" : "pass";
  if (op.role.includes("norm") || /norm/.test(op.op)) return "norm";
  if (op.role || /^(linear|conv\d|conv_|embedding|addmm|mm$|bmm)/.test(op.op)) return "weight";
  return SHAPE_OPS.has(op.op) ? "move" : "other";
}
function lines(box) {
  const thing = box.thing;
  if (box.outside) return [["name", box.title], ["sub", box.sub]];
  const text = [];
  // A module with one op is shown with the facts of that op.
  const only = thing.id ? thing : !thing.run && box.ops.size === 1 ? opOf.get([...box.ops][0]) : null;
  text.push(["name", thing.id ? thing.op : thing.name + (thing.run ? `  ×${thing.children.length}` : "")]);
  if (only) {
    const weight = only.weights.map((name) => weightOf.get(name)).find(Boolean);
    const parts = [thing.id ? "" : only.op, weight ? `${weight.shape}${weight.dtype === "float32" ? "" : " " + weight.dtype}` : "", only.shape && "→ " + only.shape].filter(Boolean);
    text.push(["sub", parts.join("  ")]);
    if (only.role) text.push(["role", only.role]);
    if (only.was) text.push(["sub", "was " + only.was]);
  } else {
    text.push(["sub", [thing.cls, thing.parameters ? count(thing.parameters) : ""].filter(Boolean).join(" · ")]);
    if (!thing.children.length && roleOf(thing)) text.push(["role", roleOf(thing)]);
  }
  const by = thing.id ? (thing.by ? [thing.by] : []) : thing.marks || [];
  if (by.length) text.push([by.every((each) => data.quantizing.includes(each)) ? "quant" : "pass", "by " + by.join(", ")]);
  if (data.moved && thing.moved > 0) text.push(["moved", "moved " + share(thing.moved)]);
  return text.map(([style, line]) => [style, line.length > 46 ? line.slice(0, 22) + "…" + line.slice(-22) : line]);
}
const ruler = document.createElement("canvas").getContext("2d");
function width(text, bold) { ruler.font = (bold ? "600 12px" : "11px") + ' system-ui, "Segoe UI", "DejaVu Sans", sans-serif'; return ruler.measureText(text).width; }

function graph() {
  const all = boxesOf(opened), boxes = all.slice(start, start + MOST_BOXES), holder = new Map();
  pager(all.length);
  for (const box of boxes) for (const id of box.ops) holder.set(id, box);
  // Hidden ops pass their input on to their users; ops that a difference marks stay.
  const skips = (box) => hidden && box.thing.id && SHAPE_OPS.has(box.thing.op) && !box.thing.change && !box.thing.by && box.thing.inputs.length === 1;
  const shown = boxes.filter((box) => !skips(box));
  const edges = new Map(), outside = new Map();
  const source = (id) => { const box = holder.get(id); return box && skips(box) ? source(box.thing.inputs[0]) : box || id; };
  const link = (from, to, change) => { if (from !== to && !edges.get(from)?.has(to)) edges.set(from, (edges.get(from) || new Map()).set(to, change)); };
  const beyond = (key, thing, title, sub) => { if (!outside.has(key)) outside.set(key, { outside: true, thing, title, sub, ops: new Set() }); return outside.get(key); };
  for (const box of shown) for (const id of box.ops) {
    const op = opOf.get(id);
    for (const each of op.inputs) {
      let from = source(each);
      if (typeof from === "string") { const other = opOf.get(from); if (!other) continue; from = beyond("<" + from, other, other.target === other.op.slice(6) ? other.op : "from " + nameOf(itemOf.get(from)), (other.target === other.op.slice(6) ? "" : other.op + " ") + "→ " + other.shape); }
      link(from, box, op.change === "+" || op.change === "-" ? op.change : "");
    }
    for (const each of op.lost || []) if (holder.has(each)) link(holder.get(each), box, "-");
    const leaving = users.get(id).filter((user) => !holder.has(user.id));
    if (leaving.length) link(box, beyond(">" + id, leaving[0], "to " + nameOf(itemOf.get(leaving[0].id)), leaving[0].op + (leaving.length > 1 ? ` and ${leaving.length - 1} more` : "")), "");
  }
  if (hidden) for (const box of boxes.filter(skips)) for (const user of users.get(box.thing.id)) if (!holder.has(user.id)) {
    const from = source(box.thing.id);
    if (typeof from !== "string") link(from, beyond(">" + box.thing.id, user, "to " + nameOf(itemOf.get(user.id)), user.op), "");
  }
  draw([...shown, ...outside.values()], edges);
}
function draw(boxes, edges) {
  const laid = new dagre.graphlib.Graph();
  laid.setGraph({ rankdir: "TB", nodesep: 16, ranksep: 26, marginx: 12, marginy: 12 });
  laid.setDefaultEdgeLabel(() => ({}));
  boxes.forEach((box, place) => {
    box.key = "n" + place;
    box.lines = lines(box);
    box.width = Math.max(64, ...box.lines.map(([style, text]) => width(text, style === "name"))) + 22;
    box.height = 10 + 15 * box.lines.length;
    laid.setNode(box.key, { width: box.width, height: box.height });
  });
  const drawnEdges = [];
  for (const [from, targets] of edges) for (const [to, change] of targets) if (from.key && to.key) { laid.setEdge(from.key, to.key); drawnEdges.push([from, to, change]); }
  dagre.layout(laid);
  const svg = $("graph"), scene = drawn("g");
  const defs = drawn("defs"), arrow = drawn("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto-start-reverse" });
  arrow.append(drawn("path", { d: "M0 0 L8 4 L0 8 z" }));
  defs.append(arrow);
  for (const [from, to, change] of drawnEdges) {
    const points = laid.edge(from.key, to.key).points;
    let path = `M${points[0].x} ${points[0].y}`;
    for (let i = 1; i < points.length - 1; i++) path += ` Q${points[i].x} ${points[i].y} ${(points[i].x + points[i + 1].x) / 2} ${(points[i].y + points[i + 1].y) / 2}`;
    const last = points[points.length - 1];
    scene.append(drawn("path", { class: "edge " + (KINDS[change]?.[0] || ""), d: path + ` L${last.x} ${last.y}`, "marker-end": "url(#arrow)" }));
  }
  for (const box of boxes) scene.append(boxShape(box, laid.node(box.key)));
  svg.replaceChildren(defs, scene);
  const size = laid.graph();
  view.size = [Math.max(size.width || 0, 1), Math.max(size.height || 0, 1)];
  view.scene = scene;
  fit(true);
}
function boxShape(box, at) {
  const thing = box.thing, change = box.outside ? "" : thing.id ? thing.change : "";
  const made = drawn("g", { class: ["box", box.outside ? "outside" : thing.id ? "op" : "module", KINDS[change]?.[0] || "", !box.outside && thing.changes ? "touched" : "", thing === chosen ? "chosen" : ""].join(" "), transform: `translate(${at.x - box.width / 2} ${at.y - box.height / 2})` });
  made.thing = thing;
  made.append(drawn("rect", { class: "body", width: box.width, height: box.height, rx: 5 }));
  if (!box.outside) made.append(drawn("rect", { width: 4, height: box.height - 8, x: 3, y: 4, rx: 2, fill: `var(--${thing.id ? category(thing) : "module"})` }));
  box.lines.forEach(([style, text], line) => made.append(drawn("text", { class: style, x: 13, y: 17 + 15 * line }, text)));
  made.append(drawn("title", {}, thing.id ? `${thing.target}\n${thing.shape} ${thing.dtype}` : `${thing.path} ${thing.cls}\nclick to open`));
  made.addEventListener("click", () => {
    if (view.dragged) return;
    if (box.outside) goTo(thing);
    else if (thing.id) choose(thing);
    else open(thing);
  });
  return made;
}
function pager(total) {
  if (total <= MOST_BOXES) return $("pager").replaceChildren();
  const turn = (by) => () => { start = Math.max(0, Math.min(start + by, MOST_BOXES * Math.floor((total - 1) / MOST_BOXES))); render(); };
  $("pager").replaceChildren(element("button", { type: "button", onclick: turn(-MOST_BOXES) }, "‹"), `boxes ${start + 1}–${Math.min(start + MOST_BOXES, total)} of ${total}`, element("button", { type: "button", onclick: turn(MOST_BOXES) }, "›"));
}

// ---- Pan and zoom.
const view = { x: 0, y: 0, scale: 1, size: [1, 1], scene: null, dragged: false };
function place() { view.scene?.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`); }
function fit(readable = false) {
  const { clientWidth: wide, clientHeight: high } = $("graph"), [w, h] = view.size;
  // A long graph is shown from its top at a size that can be read; the button "fit" shows all of it.
  const whole = Math.min(wide / w, high / h, 1.15);
  view.scale = readable ? Math.max(whole, Math.min(0.8, wide / w || 0.8)) : whole;
  if (readable && w * view.scale > wide) view.scale = Math.max(whole, Math.min(0.8, Math.max(wide / w, 0.55)));
  view.x = (wide - w * view.scale) / 2;
  view.y = h * view.scale > high ? 4 : Math.max(4, (high - h * view.scale) / 2);
  const picked = readable && chosen?.id ? $("graph").querySelector(".box.chosen") : null;
  if (picked) {
    const [, x, y] = /translate\(([-\d.e]+) ([-\d.e]+)\)/.exec(picked.getAttribute("transform"));
    if (y * view.scale > high - 60) view.y = high / 2 - y * view.scale;
    if (x * view.scale + view.x > wide - 60 || x * view.scale + view.x < 0) view.x = wide / 2 - x * view.scale;
  }
  place();
}
function zoom(by, x = $("graph").clientWidth / 2, y = $("graph").clientHeight / 2) {
  const scale = Math.max(0.03, Math.min(4, view.scale * by));
  view.x = x - ((x - view.x) * scale) / view.scale;
  view.y = y - ((y - view.y) * scale) / view.scale;
  view.scale = scale;
  place();
}
$("graph").addEventListener("wheel", (event) => { event.preventDefault(); zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY); }, { passive: false });
$("graph").addEventListener("pointerdown", (down) => {
  const from = [down.clientX - view.x, down.clientY - view.y];
  view.dragged = false;
  const move = (event) => {
    if (!view.dragged && Math.hypot(event.clientX - down.clientX, event.clientY - down.clientY) < 4) return;
    view.dragged = true;
    $("graph").classList.add("dragging");
    view.x = event.clientX - from[0];
    view.y = event.clientY - from[1];
    place();
  };
  const up = () => { removeEventListener("pointermove", move); removeEventListener("pointerup", up); $("graph").classList.remove("dragging"); };
  addEventListener("pointermove", move);
  addEventListener("pointerup", up);
});
new ResizeObserver(() => fit(true)).observe($("graph"));

// ---- Details of the chosen op, or of the opened module.
function facts(pairs) {
  const made = element("dl");
  for (const [name, value] of pairs) if (value !== "" && value !== null && value !== undefined) made.append(element("dt", {}, name), element("dd", {}, value));
  return made;
}
function weightsList(names) {
  const made = element("ul");
  for (const name of names) {
    const w = weightOf.get(name);
    if (!w) continue;
    const says = [`${w.shape} ${w.dtype}`, `${count(w.size)} values, ${bytes(w.bytes)}`, w.kind === "buffer" ? "buffer" : w.trains ? "trains" : "frozen"];
    if (w.tied.length) says.push("tied to " + w.tied.join(", "));
    if (w.by) says.push("by " + w.by);
    if (w.error !== undefined) says.push((data.kind === "diff" ? "differs by " : "error ") + share(w.error));
    if (w.change) says.push(KINDS[w.change][1] + (w.was ? ", was " + w.was : ""));
    made.append(element("li", {}, name, element("span", { class: "sub" }, says.join(" · "))));
  }
  return made;
}
function opsList(list, extra = () => "") {
  const made = element("ul");
  for (const op of list.slice(0, 40)) made.append(element("li", {}, element("a", { onclick: () => goTo(op) }, op.op), element("span", { class: "sub" }, [nameOf(itemOf.get(op.id)), op.shape, extra(op)].filter(Boolean).join(" · "))));
  if (list.length > 40) made.append(element("li", {}, `and ${list.length - 40} more`));
  return made;
}
function details() {
  const made = document.createDocumentFragment(), section = (title, list) => { if (list.children.length) made.append(element("h3", {}, title), list); };
  if (chosen?.id) {
    const op = chosen, item = itemOf.get(op.id);
    made.append(element("h2", {}, op.op), element("div", { class: "path" }, element("a", { onclick: () => open(item) }, nameOf(item))));
    made.append(facts([["change", op.change ? KINDS[op.change][1] : ""], ["was", op.was], ["by pass", op.by], ["at site", op.site], ["op", op.target], ["role", op.role], ["value", `${op.shape} ${op.dtype}`], ["moved by", op.moved === undefined ? "" : `${share(op.moved)} of its scale`], ["node", op.id]]));
    section("Weights", weightsList(op.weights));
    section("Reads", opsList(op.inputs.map((id) => opOf.get(id)).filter(Boolean)));
    section("Read by", opsList(users.get(op.id)));
  } else {
    const item = opened, below = opsIn(item), names = items.slice(item.index, item.end).flatMap((each) => each.weights);
    const held = names.map((name) => weightOf.get(name));
    const errors = held.filter((w) => w.error !== undefined).sort((a, b) => b.error - a.error);
    made.append(element("h2", {}, item.name), element("div", { class: "path" }, [item.cls, item.parent ? item.path : ""].filter(Boolean).join("  ")));
    made.append(facts([["parameters", item.parameters ? `${item.parameters.toLocaleString("en")}` : ""], ["trainable", item.parameters ? item.trainable.toLocaleString("en") : ""], ["in memory", item.bytes ? bytes(item.bytes) : ""], ["ops", below.length], ["passes", (item.marks || []).join(", ")],
      ["output moved", data.moved ? share(item.moved) || "not compared" : ""], ["most inside", data.moved ? share(item.most) : ""]]));
    if (!item.parent) made.append(facts(data.facts));
    const changed = below.filter((op) => op.change);
    section(`Changed ops (${changed.length})`, opsList(changed, (op) => [KINDS[op.change][1], op.by && "by " + op.by, op.was && "was " + op.was].filter(Boolean).join(", ")));
    if (data.moved) section("Values that moved most", opsList(below.filter((op) => op.moved > 0).sort((a, b) => b.moved - a.moved).slice(0, 8), (op) => share(op.moved)));
    section(data.kind === "diff" ? "Weights that differ most" : "Errors of weights", weightsList(errors.slice(0, 12).map((w) => w.name)));
    section("Weights of its own", weightsList(item.weights));
  }
  $("details").replaceChildren(made);
  $("details").scrollTop = 0;
}

// ---- Search.
const index = [];
for (const item of items) if (!item.run) index.push({ text: `${item.path || item.name} ${item.cls}`, name: nameOf(item), what: item.cls || "module", go: () => open(item) });
for (const op of ops) index.push({ text: `${op.id} ${op.target} ${op.role} ${op.module} ${op.by}`, name: `${op.op}  ${op.id}`, what: [nameOf(itemOf.get(op.id)), op.role].filter(Boolean).join(" · "), go: () => goTo(op) });
for (const item of items) for (const name of item.weights) index.push({ text: name, name, what: "weight", go: () => { const reader = ops.find((op) => op.weights.includes(name)); reader ? goTo(reader) : open(item); } });
for (const each of index) each.text = each.text.toLowerCase();
let hits = [], hit = 0;
function search() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  hits = words.length ? index.filter((each) => words.every((word) => each.text.includes(word))) : [];
  hit = 0;
  list(words.length > 0);
}
function list(asked) {
  const made = hits.slice(0, 60).map((each, place) => element("li", { role: "option", "aria-selected": place === hit, onmousedown: (event) => { event.preventDefault(); found(place); } }, element("span", { class: "name" }, each.name), element("span", { class: "what" }, each.what)));
  if (asked && !hits.length) made.push(element("li", { class: "none" }, "nothing of this name"));
  if (hits.length > 60) made.push(element("li", { class: "none" }, `and ${hits.length - 60} more`));
  $("results").replaceChildren(...made);
  $("results").hidden = !made.length;
  $("results").children[hit]?.scrollIntoView({ block: "nearest" });
}
function found(place) {
  if (!hits[place]) return;
  hits[place].go();
  $("results").hidden = true;
  $("search").blur();
  $("tree").focus({ preventScroll: true });
}
$("search").addEventListener("input", search);
$("search").addEventListener("focus", search);
$("search").addEventListener("blur", () => { $("results").hidden = true; });
$("search").addEventListener("keydown", (event) => {
  event.stopPropagation();
  if (event.key === "Escape") { $("search").value = ""; $("search").blur(); }
  if (event.key === "Enter") found(hit);
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    hit = Math.max(0, Math.min(Math.min(hits.length, 60) - 1, hit + (event.key === "ArrowDown" ? 1 : -1)));
    list(true);
  }
});

// ---- Theme, keys, start.
function dark(on) { document.documentElement.dataset.theme = on ? "dark" : "light"; }
const prefers = matchMedia("(prefers-color-scheme: dark)");
dark(prefers.matches);
prefers.addEventListener("change", (event) => dark(event.matches));
const keys = {
  "/": ["search", () => { $("search").focus(); $("search").select(); }], f: ["fit the graph", () => fit()], s: ["hide or show shape ops", shapes],
  t: ["light or dark", () => dark(document.documentElement.dataset.theme !== "dark")], u: ["open the module above", () => { const up = runOf(opened) ? opened.parent.parent : opened.parent; if (up) open(up); }],
  "[": ["previous equal block", () => neighbour(-1)], "]": ["next equal block", () => neighbour(1)], "+": ["larger", () => zoom(1.25)], "-": ["smaller", () => zoom(0.8)], "?": ["these keys", () => $("keys").showModal()],
};
function shapes() { hidden = !hidden; $("shapes").setAttribute("aria-pressed", hidden); graph(); }
$("shapes").addEventListener("click", shapes);
$("fit").addEventListener("click", () => fit());
$("plus").addEventListener("click", keys["+"][1]);
$("minus").addEventListener("click", keys["-"][1]);
$("theme").addEventListener("click", keys.t[1]);
$("help").addEventListener("click", keys["?"][1]);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key][1]();
});
const listed = element("dl");
for (const [key, [what]] of Object.entries(keys)) listed.append(element("dt", {}, element("kbd", {}, key)), element("dd", {}, what));
listed.append(element("dt", {}, element("kbd", {}, "↑ ↓ ← →")), element("dd", {}, "move in the tree, fold and unfold"));
$("keys").append(element("b", {}, "Keys"), listed, element("form", { method: "dialog" }, element("button", {}, "close")));
for (const [name, text] of [["module", "module"], ["weight", "weight op"], ["norm", "norm"], ["move", "shape op"], ["other", "other op"], ["pass", "by a pass"], ["quant", "quantized"], ...(data.kind === "diff" ? [["plus", "added"], ["minus", "removed"], ["swap", "swapped"], ["rewired", "other inputs"]] : [])]) {
  const mark = element("span", {}, text);
  mark.style.setProperty("--c", `var(--${name})`);
  $("legend").append(mark);
}
document.title = data.title;
$("title").textContent = data.title;
$("title").title = data.title;
$("summary").textContent = data.summary;
const named = () => items[Number(location.hash.slice(1))];
addEventListener("popstate", () => open(named() || data.root, null, false));
// A model that is one module inside of a wrapper is opened one level down.
let begin = data.root;
while (begin.children.length === 1 && !begin.children[0].run && begin.children[0].children.length) { begin = begin.children[0]; }
open(named() || begin, null, false);
