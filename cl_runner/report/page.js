"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { keys, metrics, groups } = data;
const $ = (id) => document.getElementById(id);
const esc = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
// A folder may lie below others: its slashes stay.
const link = (folder) => folder.split("/").map(encodeURIComponent).join("/");
const MOST_LINES = 10; // told apart by colour; more share the colours of one key's values
const MOST_KEYS = 5; // columns; more stand in one
const narrow = window.matchMedia("(max-width: 1080px)");
const state = { sort: null, down: false, text: "", chosen: {}, pinned: null, shown: null };

/* ---- numbers ------------------------------------------------------------------------------------------------- */

const fixed = (value, digits) => {
  const text = value.toFixed(digits);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
};
const told = (metric, value, signed) =>
  value === null ? "–" : (signed && value * metric.factor > 0 ? "+" : "") + fixed(value * metric.factor, metric.digits);
const interval = (metric, low, high) => `[${told(metric, low)}, ${told(metric, high)}]`;
const percent = (value, digits) => fixed(100 * value, digits);

// Matrices come as 16-bit integers in steps of 1/10000, the lowest one where nothing was measured.
function decode(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 2 }, (_, i) => {
    const value = view.getInt16(2 * i, true);
    return value === -32768 ? null : value / 10000;
  });
}

/* ---- the table ------------------------------------------------------------------------------------------------ */

// cell: [n, mean, std, sem, low, high, difference], difference: [pairs, mean, low, high] or null
const [N, MEAN, STD, SEM, LOW, HIGH, DIFFERENCE] = [0, 1, 2, 3, 4, 5, 6];
const columns = [
  ...keys.map((key, i) => ({ name: key.name, title: key.key, kind: "key", value: (g) => g.order[i] })),
  ...metrics.flatMap((metric, i) => [
    ...(i === 0 ? [{ name: "", note: "95 % interval", kind: "ranges", value: (g) => g.cells[0][MEAN] }] : []),
    { name: metric.name.replaceAll("_", " "), title: metric.name, note: metric.unit, kind: "metric", value: (g) => g.cells[i][MEAN] },
    ...(data.baseline
      ? [{ name: `Δ to ${data.baseline}`, note: metric.name.replaceAll("_", " "), kind: "metric more", value: (g) => g.cells[i][DIFFERENCE]?.[1] ?? null }]
      : []),
  ]),
  { name: "n", title: "seeds", kind: "metric more", value: (g) => g.n },
];

function range(cell) {
  const [from, to] = data.range;
  const place = (value) => (100 * (value - from)) / (to - from || 1);
  if (cell[MEAN] === null) return "";
  const bar = cell[LOW] === null ? "" : `<i style="left:${place(cell[LOW])}%;width:${place(cell[HIGH]) - place(cell[LOW])}%"></i>`;
  return `<div class="range" aria-hidden="true">${bar}<b style="left:${place(cell[MEAN])}%"></b></div>`;
}

function difference(metric, cell) {
  const own = cell[DIFFERENCE];
  if (!own) return ["", ""];
  const pairs = `(${own[0]})`;
  return [told(metric, own[1], true), own[2] === null ? pairs : `${interval(metric, own[2], own[3])} ${pairs}`];
}

function row(group, index) {
  const sub = keys.slice(1).map((key, i) => [key.name, group.values[i + 1]]).filter(([, value]) => value !== "–");
  const said = [...sub.map(([name, value]) => `<span>${esc(`${name} ${value}`)}</span>`), `<span class="n">n ${group.n}</span>`].join(" ");
  const tags = [group.pick && "selected", group.baseline && "baseline"].filter(Boolean).map((tag) => `<span class="tag">${tag}</span>`).join("");
  const cells = metrics.map((metric, i) => {
    const cell = group.cells[i];
    const spread = cell[STD] === null ? "" : ` <span class="spread">± ${told(metric, cell[STD])}</span>`;
    const [change, detail] = difference(metric, cell);
    const few = cell[N] && cell[N] < group.n ? ` · n=${cell[N]}` : "";
    const under = (cell[LOW] === null ? "" : interval(metric, cell[LOW], cell[HIGH])) + few;
    const title = cell[SEM] === null ? "" : ` title="standard error ${told(metric, cell[SEM])}"`;
    return (
      (i === 0 ? `<td class="ranges">${range(cell)}</td>` : "") +
      `<td${title}>${told(metric, cell[MEAN])}${spread}<small>${under}</small>` +
      (data.baseline && change ? `<small class="also">Δ ${change}</small>` : "") + "</td>" +
      (data.baseline ? `<td class="more">${change}<small>${detail}</small></td>` : "")
    );
  });
  return (
    `<tr data-group="${index}"><th scope="row"><button type="button" aria-pressed="false" aria-label="${esc(group.label)}: show matrices and runs">${esc(group.values[0])}</button>` +
    `${tags}<small class="sub">${said}</small></th>` +
    keys.slice(1).map((_, i) => `<td class="key more">${esc(group.values[i + 1])}</td>`).join("") +
    `${cells.join("")}<td class="more">${group.n}</td></tr>`
  );
}

function drawTable() {
  const head = columns.map(({ name, title, note, kind }, i) => {
    const [shape, ...rest] = kind.split(" ");
    const classes = [shape === "key" ? "key" : shape === "ranges" ? "ranges" : "", ...rest, shape === "key" && i > 0 ? "more" : ""];
    const sub = note ? `<small>${esc(note)}</small>` : "";
    return shape === "ranges"
      ? `<th class="ranges"><button type="button" tabindex="-1" aria-hidden="true" data-column="${i}">${sub}</button></th>`
      : `<th scope="col" class="${classes.join(" ").trim()}" aria-sort="none"><button type="button" data-column="${i}" title="${esc(title ?? name)}"><span>${esc(name)}</span>${sub}</button></th>`;
  });
  const table = $("table");
  table.tHead.innerHTML = `<tr>${head.join("")}</tr>`;
  table.tBodies[0].innerHTML = groups.map(row).join("");
  table.classList.toggle("folded", keys.length > MOST_KEYS);
  $("results").classList.toggle("long", groups.length > 25);
  rows = [...table.tBodies[0].rows];
}
let rows = [];

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (Array.isArray(a)) {
    const i = a.findIndex((part, at) => part !== b[at]);
    return i < 0 ? 0 : a[i] < b[i] ? -1 : 1;
  }
  return a - b;
}

function sortBy(index) {
  const numbers = !columns[index].kind.startsWith("key");
  state.down = state.sort === index ? !state.down : numbers && columns[index].name !== "n";
  state.sort = index;
  const value = columns[index].value;
  const order = groups.map((_, i) => i).sort((a, b) => {
    const [x, y] = [value(groups[a]), value(groups[b])];
    const found = compare(x, y);
    return (x === null || y === null || !state.down ? found : -found) || a - b;
  });
  $("table").tBodies[0].append(...order.map((i) => rows[i]));
  document.querySelectorAll("thead th[aria-sort]").forEach((th) => {
    const own = Number(th.firstElementChild.dataset.column) === index;
    th.setAttribute("aria-sort", own ? (state.down ? "descending" : "ascending") : "none");
  });
}

/* ---- filters -------------------------------------------------------------------------------------------------- */

function drawFilters() {
  const selects = keys.map((key, i) => {
    const values = new Map(groups.map((g) => [g.values[i], g.order[i]]));
    if (values.size < 2 || values.size > 60) return "";
    const sorted = [...values].sort((a, b) => compare(a[1], b[1])).map(([value]) => value);
    const options = sorted.map((value) => `<option value="${esc(value)}">${esc(key.name)} ${esc(value)}</option>`);
    return `<select data-key="${i}" aria-label="${esc(key.key)}"><option value="">${esc(key.name)}: all</option>${options.join("")}</select>`;
  });
  $("choices").innerHTML = selects.join("");
}

function passes(group) {
  const chosen = Object.entries(state.chosen).every(([i, value]) => group.values[i] === value);
  return chosen && state.text.split(/\s+/).every((word) => group.text.includes(word));
}

function filter() {
  let count = 0;
  groups.forEach((group, i) => {
    group.visible = passes(group);
    rows[i].hidden = !group.visible;
    count += group.visible;
  });
  $("count").textContent = count === groups.length ? `${count} groups` : `${count} of ${groups.length} groups`;
  $("empty").hidden = count > 0;
  $("clear").hidden = !state.text && !Object.keys(state.chosen).length;
  drawCharts();
}

/* ---- one group's matrices and runs ------------------------------------------------------------------------------ */

function mix(colours, share) {
  const at = Math.min(Math.max(share, 0), 1) * (colours.length - 1);
  const low = Math.min(Math.floor(at), colours.length - 2);
  const [one, other] = [colours[low], colours[low + 1]].map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
  return one.map((value, i) => Math.round(value + (other[i] - value) * (at - low)));
}

function isDark(rgb) {
  const linear = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  const light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  return 1.05 / (light + 0.05) > (light + 0.05) / 0.07;
}

function matrix(values, size, colours, [from, to], name) {
  const [width, left, bottom] = [340, 22, 18];
  const cell = Math.min((width - left) / size, 46);
  const height = Math.min(cell, 34);
  const digits = cell >= 33 ? 1 : 0;
  const font = Math.min(12.5, cell * (digits ? 0.32 : 0.5));
  let cells = "";
  values.forEach((value, at) => {
    if (value === null) return;
    const [i, j] = [Math.floor(at / size), at % size];
    const rgb = mix(colours, (value - from) / (to - from));
    const [x, y] = [left + j * cell, i * height];
    cells += `<g><title>after task ${i}, on task ${j}: ${percent(value, 2)} %</title><rect x="${x + 0.75}" y="${y + 0.75}" width="${Math.max(cell - 1.5, 1)}" height="${Math.max(height - 1.5, 1)}" rx="1.5" fill="rgb(${rgb})"/>`;
    if (cell >= 15) cells += `<text class="cell${isDark(rgb) ? " dark" : ""}" style="font-size:${font}px" x="${x + cell / 2}" y="${y + height / 2}">${percent(value, digits)}</text>`;
    cells += "</g>";
  });
  const every = Math.ceil(size / 20);
  for (let i = 0; i < size; i += every) {
    cells += `<text x="${left - 7}" y="${i * height + height / 2}" text-anchor="end" dominant-baseline="central">${i}</text>`;
    cells += `<text x="${left + i * cell + cell / 2}" y="${size * height + 13}" text-anchor="middle">${i}</text>`;
  }
  if (values.every((value) => value === null)) return '<p class="empty">undefined</p>';
  return `<svg viewBox="0 0 ${width} ${size * height + bottom}" role="img" aria-label="${esc(name)}">${cells}</svg>`;
}

const scaleBar = (colours, from, to) =>
  `<span class="bar" aria-hidden="true">${from}<i style="background:linear-gradient(90deg,${colours.join(",")})"></i>${to}</span>`;

function show(index) {
  if (state.shown !== null) rows[state.shown].classList.remove("shown");
  state.shown = index;
  rows[index].classList.add("shown");
  const group = groups[index];
  const heads = metrics.slice(0, 3).map((metric) => `<th scope="col">${esc(metric.name.replace("average_", "").replaceAll("_", " "))}</th>`);
  const runs = group.runs.map(([folder, seed, values]) => {
    const numbers = metrics.slice(0, 3).map((metric, i) => `<td>${told(metric, values[i])}</td>`);
    return `<tr><td><a href="../${link(folder)}/" title="${esc(folder)}">seed ${seed}</a></td>${numbers.join("")}</tr>`;
  });
  const size = group.tasks;
  $("detail").innerHTML =
    `<div class="top"><h2>${esc(group.label)}</h2><button id="close" type="button" aria-label="Close">×</button></div>` +
    `<h3><span>accuracy after each task, %</span>${scaleBar(data.colours.accuracy, 0, 100)}</h3>` +
    matrix(decode(group.accuracy), size, data.colours.accuracy, [0, 1], `Accuracy matrix of ${group.label}: row, after learning task; column, on task`) +
    `<h3><span>forgetting since the best, %</span>${scaleBar(data.colours.forgetting, "−100", 100)}</h3>` +
    matrix(decode(group.forgetting), size, data.colours.forgetting, [-1, 1], `Forgetting matrix of ${group.label}`) +
    `<table><thead><tr><th scope="col">run</th>${heads.join("")}</tr></thead><tbody>${runs.join("")}</tbody></table>`;
}

function preview(index) {
  if (index !== state.shown) show(index);
  highlight(index);
}

function pin(index) {
  const again = state.pinned === index;
  if (state.pinned !== null) {
    rows[state.pinned].classList.remove("pinned");
    rows[state.pinned].querySelector("button").setAttribute("aria-pressed", "false");
  }
  state.pinned = again ? null : index;
  $("detail").classList.toggle("open", !again);
  highlight(state.pinned);
  if (again) return;
  rows[index].classList.add("pinned");
  rows[index].querySelector("button").setAttribute("aria-pressed", "true");
  show(index);
}

/* ---- curves --------------------------------------------------------------------------------------------------- */

const steps = (low, high, count) => {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) ticks.push(at);
  return [ticks, Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (step / power === 2.5 ? 1 : 0))];
};

// series: {name, colour, group, points: [[x, y, below, above]], level}; x in places of `xs`: [[place, label]]
function chart(box, series, xs, { bars = false, label = "", log = false } = {}) {
  const width = Math.max(box.clientWidth, 260);
  const [height, left, right, top, bottom] = [244, 44, 12, 10, 36];
  const points = series.flatMap((one) => one.points);
  const ys = points.flatMap(([, y, below, above]) => [y, below ?? y, above ?? y]);
  if (!ys.length) {
    box.innerHTML = '<p class="empty">Nothing to show.</p>';
    return;
  }
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  const air = (high - low || 1) * 0.06;
  [low, high] = [low - air, high + air];
  const warp = log ? Math.log10 : (x) => x;
  const places = xs.map(([place]) => warp(place));
  const [first, last] = [Math.min(...places), Math.max(...places)];
  const inset = bars ? 14 : 4;
  const X = (x) => left + inset + ((warp(x) - first) / (last - first || 1)) * (width - left - right - 2 * inset);
  const Y = (y) => top + ((high - y) / (high - low)) * (height - top - bottom);
  const [ticks, digits] = steps(low, high, 5);
  let out = ticks.map((at) => `<line class="grid" x1="${left}" x2="${width - right}" y1="${Y(at)}" y2="${Y(at)}"/><text x="${left - 8}" y="${Y(at)}" text-anchor="end" dominant-baseline="central">${fixed(at, digits)}</text>`).join("");
  let end = -Infinity;
  xs.forEach(([place, text]) => {
    const half = String(text).length * 3.3 + 5;
    if (X(place) - half < end) return;
    end = X(place) + half;
    out += `<text x="${X(place)}" y="${height - bottom + 17}" text-anchor="middle">${esc(text)}</text>`;
  });
  out += `<text x="${(left + width - right) / 2}" y="${height - 3}" text-anchor="middle">${esc(label)}</text>`;
  for (const one of series) {
    const line = one.points.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`);
    let marks = "";
    if (one.level) {
      marks = `<line class="line" stroke="${one.colour}" stroke-dasharray="5 4" x1="${left}" x2="${width - right}" y1="${Y(one.points[0][1])}" y2="${Y(one.points[0][1])}"/>`;
    } else {
      const spread = one.points.filter(([, , below]) => below !== null && below !== undefined);
      if (!bars && spread.length > 1) {
        const edge = [...spread.map(([x, , , above]) => [x, above]), ...spread.reverse().map(([x, , below]) => [x, below])];
        marks += `<polygon class="band" fill="${one.colour}" points="${edge.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" ")}"/>`;
      }
      marks += `<polyline class="line" stroke="${one.colour}" points="${line.join(" ")}"/>`;
      if (bars) {
        marks += spread.map(([x, , below, above]) => `<line class="error" stroke="${one.colour}" x1="${X(x)}" x2="${X(x)}" y1="${Y(below)}" y2="${Y(above)}"/>`).join("");
        marks += one.points.map(([x, y]) => `<circle r="3.25" fill="${one.colour}" cx="${X(x)}" cy="${Y(y)}"/>`).join("");
      }
    }
    out += `<g class="series" data-groups=" ${one.members.join(" ")} ">${marks}</g>`;
  }
  const many = series.length > 4 * MOST_LINES;
  const names = [...new Map(series.map((one) => [one.key, one.colour]))];
  const legend = names.slice(0, 14).map(([name, colour]) => `<span><i style="background:${colour}"></i>${esc(name)}</span>`);
  if (names.length > 14) legend.push(`<span>and ${names.length - 14} more</span>`);
  box.innerHTML = `<svg class="${many ? "many" : ""}" viewBox="0 0 ${width} ${height}" height="${height}" role="img" aria-label="${esc(names.map(([name]) => name).join(", "))}">${out}</svg><div class="keys">${legend.join("")}</div>`;
  follow(box, series, X, Y);
}

// The nearest point under the pointer is named, and its group shown.
function follow(box, series, X, Y) {
  const svg = box.querySelector("svg");
  const end = () => box.querySelector(".tip")?.remove();
  svg.onpointermove = svg.onpointerdown = (event) => {
    const area = svg.getBoundingClientRect();
    const [x, y] = [event.clientX - area.left, event.clientY - area.top];
    let best = { distance: 40 };
    for (const one of series) {
      one.points.forEach(([px, py], i) => {
        const distance = Math.hypot(one.level ? 0 : X(px) - x, Y(py) - y);
        if (distance < best.distance) best = { distance, one, i };
      });
    }
    end();
    if (!best.one) return;
    const [, value, below, above] = best.one.points[best.i];
    const tip = document.createElement("div");
    tip.className = "tip";
    const spread = below === null || below === undefined ? "" : ` ± ${fixed((above - below) / 2, 2)}`;
    tip.textContent = `${best.one.name}: ${fixed(value, 2)}${spread}`;
    box.append(tip);
    const host = box.parentElement.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(event.clientX - host.left + 12, host.width - tip.offsetWidth - 8))}px`;
    tip.style.top = `${event.clientY - host.top - tip.offsetHeight - 12}px`;
    const index = best.one.groups?.[best.i] ?? best.one.members[0];
    if (state.pinned === null && !narrow.matches) preview(index);
    else highlight(index);
  };
  svg.onpointerleave = () => { end(); highlight(state.pinned); };
}

function highlight(index) {
  document.querySelectorAll(".chart svg").forEach((svg) => {
    const all = [...svg.querySelectorAll(".series")];
    all.forEach((one) => one.classList.toggle("on", one.dataset.groups.includes(` ${index} `)));
    svg.classList.toggle("faded", index !== null && all.length > 1 && all.some((one) => one.classList.contains("on")));
  });
}

// A colour and a name for every line: its own, or, of many, that of a key whose values tell most of them apart.
function colours(members, names, without) {
  const palette = data.colours.lines;
  if (members.length <= MOST_LINES) return members.map((_, i) => ({ colour: palette[i % palette.length], key: names[i] }));
  const score = (i) => {
    const values = new Set(groups.map((group) => group.values[i]));
    const words = groups.every((group) => group.order[i][0] !== 1);
    return i === without || values.size > palette.length ? 0 : values.size + 100 * words;
  };
  const at = keys.reduce((best, _, i) => (score(i) > score(best) ? i : best), 0);
  const told = (group) => (at && group.values[at] !== "–" ? `${group.values[0]} ${keys[at].name}=${group.values[at]}` : group.values[0]);
  const all = [...new Set(groups.map(told))];
  return members.map((group) => ({ colour: palette[all.indexOf(told(group)) % palette.length], key: told(group) }));
}

function drawCharts() {
  const visible = groups.filter((group) => group.visible);
  const many = visible.length > MOST_LINES;
  const styles = colours(visible, visible.map((group) => group.label));
  const longest = Math.max(0, ...visible.map((group) => group.tasks));
  const xs = Array.from({ length: longest }, (_, i) => [i, i]);
  const over = (name) => visible
    .map((group, i) => {
      const [mean, std] = group.over[name];
      const points = mean.map((y, x) => (y === null ? null : [x, 100 * y, ...(many || !std ? [null, null] : [100 * (y - std[x]), 100 * (y + std[x])])]));
      return { name: group.label, ...styles[i], points: points.filter(Boolean), members: [group.index] };
    })
    .filter((one) => one.points.length);
  const lines = { accuracy: over("accuracy"), forgetting: over("forgetting") };
  // Which figures there are decides how wide each is.
  for (const name in lines) $(name).hidden = !lines[name].length;
  for (const name in lines) if (lines[name].length) chart($(name).querySelector(".chart"), lines[name], xs, { label: "after learning task" });
  drawCurve(visible);
  highlight(state.pinned);
}

function sweepable() {
  return keys
    .map((key, i) => [i, new Set(groups.map((group) => group.values[i]).filter((value) => value !== "–"))])
    .filter(([i, values]) => i > 0 && values.size > 1)
    .map(([i]) => i);
}

function drawCurve(visible) {
  const figure = $("curve");
  if (figure.hidden) return;
  const [at, metric] = [Number($("curve-key").value), Number($("curve-metric").value)];
  const places = new Map();
  for (const group of visible) if (group.values[at] !== "–") places.set(group.values[at], group.order[at]);
  const sorted = [...places].sort((a, b) => compare(a[1], b[1]));
  const numeric = sorted.every(([, order]) => order[0] === 1);
  const numbers = sorted.map(([, order]) => order[1]);
  const log = numeric && numbers[0] > 0 && numbers.at(-1) / numbers[0] >= 20;
  // Where zero spoils a logarithmic axis, and between words, values stand one after another.
  const even = !numeric || (!log && numbers[0] === 0 && numbers.length > 2 && numbers.at(-1) / numbers[1] >= 20);
  const place = new Map(sorted.map(([value, order], i) => [value, even ? i : order[1]]));
  const lines = new Map();
  for (const group of visible) {
    const name = keys
      .map((key, i) => [i, key, group.values[i]])
      .filter(([i, , value]) => i !== at && value !== "–")
      .map(([i, key, value]) => (i ? `${key.name}=${value}` : value))
      .join(" ");
    if (!lines.has(name)) lines.set(name, []);
    lines.get(name).push(group);
  }
  const factor = metrics[metric].factor;
  const styles = colours([...lines.values()].map(([first]) => first), [...lines.keys()], at);
  const series = [...lines].map(([name, members], i) => {
    const known = members.filter((group) => group.cells[metric][MEAN] !== null);
    known.sort((a, b) => (place.get(a.values[at]) ?? 0) - (place.get(b.values[at]) ?? 0));
    const level = known.every((group) => !place.has(group.values[at]));
    const points = known.map((group) => {
      const [, mean, std] = group.cells[metric];
      const x = level ? (sorted.length ? place.get(sorted[0][0]) : 0) : place.get(group.values[at]);
      return [x, factor * mean, std === null ? null : factor * (mean - std), std === null ? null : factor * (mean + std)];
    });
    return { name: name || "all", ...styles[i], points, level, members: known.map((group) => group.index), groups: known.map((group) => group.index) };
  });
  const xs = sorted.length ? sorted.map(([value]) => [place.get(value), value]) : [[0, ""]];
  chart(figure.querySelector(".chart"), series.filter((one) => one.points.length), xs, { bars: true, label: `${keys[at].name} (bars: one standard deviation)`, log });
}

/* ---- everything else on the page -------------------------------------------------------------------------------- */

function drawFrame() {
  $("title").textContent = data.title;
  $("summary").textContent = data.summary;
  $("notice").textContent = data.warnings.join("\n");
  $("notice").hidden = !data.warnings.length;
  $("legend").textContent = data.legend;
  $("files").innerHTML = `Files: ${data.files.map((name) => `<a href="${encodeURIComponent(name)}">${esc(name)}</a>`).join(" · ")}`;
  $("out").hidden = !data.out.length;
  $("out").querySelector("h2").textContent = `${data.out.length} not in the table`;
  $("out").querySelector("ul").innerHTML = data.out
    .map(([folder, at, why, there]) => {
      const name = there ? `<a href="../${link(folder)}/">${esc(folder)}</a>` : esc(folder);
      return `<li><span class="state">${esc(at)}</span>${name}${why ? ` <small>${esc(why)}</small>` : ""}</li>`;
    })
    .join("");
  const sweeps = sweepable();
  $("curve").hidden = !sweeps.length;
  $("curve-key").innerHTML = sweeps.map((i) => `<option value="${i}">${esc(keys[i].name)}</option>`).join("");
  $("curve-metric").innerHTML = metrics.map((metric, i) => `<option value="${i}">${esc(metric.name)}${metric.unit ? `, ${metric.unit}` : ""}</option>`).join("");
  const numeric = sweeps.find((i) => groups.filter((group) => group.order[i][0] === 1).length > 1);
  const wanted = data.curve ?? numeric ?? sweeps[0];
  if (wanted !== undefined) $("curve-key").value = String(wanted);
}

function listen() {
  const body = $("table").tBodies[0];
  const rowOf = (event) => event.target.closest("tr[data-group]");
  $("table").tHead.onclick = (event) => {
    const button = event.target.closest("button");
    if (button) sortBy(Number(button.dataset.column));
  };
  body.onclick = (event) => {
    const tr = rowOf(event);
    if (tr && !window.getSelection().toString()) pin(Number(tr.dataset.group));
  };
  const look = (event) => {
    const tr = rowOf(event);
    if (tr && state.pinned === null && !narrow.matches) preview(Number(tr.dataset.group));
  };
  body.onpointerover = look;
  body.addEventListener("focusin", look);
  body.onpointerleave = () => highlight(state.pinned);
  $("detail").onclick = (event) => {
    if (event.target.id === "close" && state.pinned !== null) pin(state.pinned);
  };
  document.onkeydown = (event) => {
    if (event.key === "Escape" && state.pinned !== null) {
      const button = rows[state.pinned].querySelector("button");
      pin(state.pinned);
      button.focus();
    }
  };
  $("filters").onsubmit = (event) => event.preventDefault();
  $("search").oninput = (event) => {
    state.text = event.target.value.trim().toLowerCase();
    filter();
  };
  $("choices").onchange = ({ target }) => {
    if (target.value) state.chosen[target.dataset.key] = target.value;
    else delete state.chosen[target.dataset.key];
    target.classList.toggle("on", Boolean(target.value));
    filter();
  };
  $("clear").onclick = () => {
    Object.assign(state, { text: "", chosen: {} });
    $("search").value = "";
    $("choices").querySelectorAll("select").forEach((select) => { select.value = ""; select.classList.remove("on"); });
    filter();
    $("search").focus();
  };
  $("curve-key").onchange = $("curve-metric").onchange = drawCharts;
  let late;
  window.onresize = () => { clearTimeout(late); late = setTimeout(drawCharts, 120); };
  $("theme").onclick = () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* a file may have no storage */ }
  };
}

try { const kept = localStorage.getItem("theme"); if (kept) document.documentElement.dataset.theme = kept; } catch { /* as above */ }
groups.forEach((group, index) => Object.assign(group, { index, text: [group.label, ...group.values].join(" ").toLowerCase() }));
drawFrame();
drawTable();
drawFilters();
listen();
filter();
if (!narrow.matches) show(data.first);
