"use strict";
// What a click does: colours of another format, pictures of another head, a line to copy, the data to keep.
// Everything else of the page stands in it and needs no script.
const report = JSON.parse(document.getElementById("data").textContent);
const { errors, pictures } = report.heads;
const steps = JSON.parse(document.getElementById("maps")?.dataset.steps ?? "[]");
const formatNow = () => document.querySelector('input[name="map"]:checked')?.value;

// Cells stand layer by layer, heads of a layer one after the other.
const places = new Map();
for (const grid of document.querySelectorAll("svg.grid")) {
  const [heads, layers] = [Number(grid.dataset.heads), grid.dataset.layers.split(" ")];
  [...grid.querySelectorAll(".cell")].forEach((cell, at) => {
    places.set(cell, { half: grid.dataset.half, layer: layers[Math.floor(at / heads)], head: at % heads, heads, grid, at });
    cell.setAttribute("role", "gridcell");
    cell.setAttribute("tabindex", at === 0 ? 0 : -1);
  });
}
const cells = [...places.keys()];

const valueOf = ({ half, layer, head }, format) => errors[format]?.[half]?.[layer]?.[head] ?? null;
const inWords = (value) => (value === null ? "not quantized" : `${(100 * value).toFixed(2)} %`);

function colour() {
  for (const [cell, place] of places) {
    const value = valueOf(place, formatNow());
    const step = value === null ? 0 : 1 + steps.filter((each) => value >= each).length;
    cell.setAttribute("class", `cell q${step}${cell.classList.contains("chosen") ? " chosen" : ""}`);
  }
}

function read(cell) {
  const { layer, head } = places.get(cell);
  const both = ["keys", "values"].map((half) => `${half} ${inWords(valueOf({ half, layer, head }, formatNow()))}`);
  const said = `layer ${layer}, head ${head}: ${both.join(", ")}`;
  cell.setAttribute("aria-label", said);
  document.getElementById("readout").textContent = said;
}

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const shade = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim().split(" ").map(Number);

async function show(layer, head) {
  for (const [cell, place] of places) {
    const here = Number(place.layer) === layer && place.head === head;
    cell.classList.toggle("chosen", here);
    cell.setAttribute("aria-selected", here);
  }
  document.getElementById("keys-title").textContent = `Keys of layer ${layer}, head ${head}`;
  const found = pictures.heads.find((each) => each.layer === layer && each.head === head);
  document.querySelector(".keys .pictures").style.visibility = found ? "visible" : "hidden";
  if (!found) {
    document.getElementById("keys-said").textContent = "This page has no room for every head's keys: those with the largest outliers have theirs.";
    return;
  }
  const named = found.outliers.map(([channel, times]) => `${channel} (${times.toFixed(1)} times)`).join(", ");
  document.getElementById("keys-said").textContent = named
    ? `Outlier channels, by how many times the head's median channel: ${named}.`
    : "No channel is more than four times the head's median one.";
  document.getElementById("keys-map").textContent = found.map_in_use
    ? "after the key map that is in use, rotated"
    : "after the key map that calibration would choose, rotated";
  const packed = await inflate(found.data);
  const [low, high] = [shade("--low"), shade("--high")];
  document.querySelectorAll(".keys canvas").forEach((canvas, stage) => {
    canvas.width = pictures.channels;
    canvas.height = pictures.tokens;
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const count = canvas.width * canvas.height;
    for (let at = 0; at < count; at++) {
      const number = stage * count + at;
      const level = ((packed[number >> 1] >> (number % 2 ? 4 : 0)) & 15) / 15;
      for (let part = 0; part < 3; part++) image.data[4 * at + part] = low[part] + level * (high[part] - low[part]);
      image.data[4 * at + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    canvas.closest("div").querySelector("output").textContent = `largest ${found.largest[stage]}`;
  });
}

function move(cell, event) {
  const [across, down] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key] ?? [];
  if (across === undefined) return;
  const { head, heads, grid, at } = places.get(cell);
  const next = head + down < 0 || head + down >= heads ? undefined : grid.querySelectorAll(".cell")[at + across * heads + down];
  if (!next) return;
  event.preventDefault();
  enter(next);
  next.focus();
}

function enter(cell) {
  for (const each of places.get(cell).grid.querySelectorAll(".cell")) each.setAttribute("tabindex", each === cell ? 0 : -1);
}

let shown = null;
function open(cell) {
  const { layer, head } = places.get(cell);
  shown = [Number(layer), head];
  enter(cell);
  show(...shown);
}

for (const cell of cells) {
  cell.addEventListener("click", () => open(cell));
  cell.addEventListener("focus", () => read(cell));
  cell.addEventListener("pointerenter", () => read(cell));
  cell.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      open(cell);
    } else move(cell, event);
  });
}
document.querySelectorAll('input[name="map"]').forEach((each) => each.addEventListener("change", colour));
const begin = document.querySelector(".keys");
if (begin && pictures.heads.length) {
  shown = [Number(begin.dataset.layer), Number(begin.dataset.head)];
  show(...shown);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(...shown));
}

const press = (id, what) => document.getElementById(id)?.addEventListener("click", what);
press("copy", async (event) => {
  const flag = document.querySelector(".flag");
  try {
    await navigator.clipboard.writeText(flag.textContent);
    event.target.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(flag);
    event.target.textContent = "selected";
  }
});
press("save", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(report, null, 1)], { type: "application/json" }));
  link.download = "report.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
