// The region of interest: polygons, clicked or set by keys, over the mean of the images.
import { $, count, make, makeSvg, request } from "./common.js";

const CLOSE = 10; // pixels of the screen: a click as near to the first point closes the polygon
const FEWEST = 3; // points of a polygon

let width = 1;
let height = 1;
let polygons = []; // those that are closed
let open = []; // points of the one that is drawn
let cursor = [0, 0]; // of the keyboard
let isKeyed = false; // the keyboard's cursor is shown
let isSaved = true;
let isReady = false; // what is on disk is shown: until then a click would be lost

const screenPixel = () => width / Math.max(1, $("region-svg").getBoundingClientRect().width);

export async function openRegion() {
  isReady = false;
  $("region-status").textContent = "Making the mean image…";
  $("region").showModal();
  try {
    const state = await request("region");
    [width, height] = state.size;
    $("region-svg").setAttribute("viewBox", `0 0 ${width} ${height}`);
    $("region-frame").style.aspectRatio = `${width} / ${height}`;
    $("region-frame").style.setProperty("--ratio", width / height);
    $("region-mean").src = "region/mean";
    $("region-screened").toggleAttribute("hidden", state.screened === null);
    if (state.screened !== null) $("region-screened").setAttribute("href", "region/layer");
    polygons = state.polygons;
    open = [];
    cursor = [width / 2, height / 2];
    isSaved = true;
    isReady = true;
    tell(state);
    draw();
  } catch (error) {
    $("region-status").textContent = error.message;
  }
}

function tell(state) {
  const percent = (share) => `${Math.round(100 * share)} %`;
  const before = state.screened === null ? "The screening looked at whole images."
    : `The screening looked at ${percent(state.screened)} of each image; the rest is dark.`;
  const now = state.problem ? `roi.json cannot be used: ${state.problem}`
    : state.is_new ? `Saved: ${percent(state.share)} of each image. Refit screens the images anew with it. From the command line:`
      : state.command ? "Saved: the region of the screening." : "No region is saved.";
  $("region-status").replaceChildren(`${before} ${now} `, ...(state.is_new ? [make("code", "", state.command)] : []));
}

function draw() {
  const pixel = screenPixel();
  const points = (polygon) => polygon.map((point) => point.join(",")).join(" ");
  const shapes = polygons.map((polygon) => makeSvg("polygon", { points: points(polygon), class: "closed" }));
  if (open.length) shapes.push(makeSvg("polyline", { points: points(open), class: "open" }));
  for (const [n, [x, y]] of open.entries()) {
    shapes.push(makeSvg("circle", { cx: x, cy: y, r: (n ? 3 : 5) * pixel, class: n ? "corner" : "corner first" }));
  }
  if (isKeyed) {
    const [x, y] = cursor;
    const arm = 9 * pixel;
    shapes.push(makeSvg("path", { d: `M${x - arm} ${y}H${x + arm}M${x} ${y - arm}V${y + arm}`, class: "cursor" }));
  }
  $("region-shapes").replaceChildren(...shapes);
  $("region-close").disabled = open.length < FEWEST;
  $("region-back").disabled = !open.length && !polygons.length;
  $("region-clear").disabled = !open.length && !polygons.length;
  $("region-save").disabled = isSaved || (open.length > 0 && open.length < FEWEST);
}

function announce() {
  const closed = count(polygons.length, "polygon");
  $("region-spoken").textContent = open.length ? `${count(open.length, "point")} of a new polygon, ${closed} closed` : `${closed} closed`;
}

function changed() {
  isSaved = false;
  draw();
  announce();
}

function add(x, y) {
  if (!isReady) return;
  const [first] = open;
  if (open.length >= FEWEST && Math.hypot(x - first[0], y - first[1]) <= CLOSE * screenPixel()) { close(); return; }
  open.push([x, y].map((at) => Math.round(at * 100) / 100));
  changed();
}

function close() {
  if (open.length < FEWEST) return;
  polygons.push(open);
  open = [];
  changed();
}

function back() { // takes the last point away, of the last polygon where none is open
  if (!open.length) open = polygons.pop() || [];
  open.pop();
  changed();
}

function clear() {
  [polygons, open] = [[], []];
  changed();
}

async function save() {
  close();
  $("region-save").disabled = true;
  try {
    tell(await request("region", { polygons }));
    isSaved = true;
  } catch (error) {
    $("region-status").textContent = `Not saved: ${error.message}`;
  }
  draw();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = screenPixel() * (event.shiftKey ? 20 : 4);
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  if (event.key in moves) {
    const [x, y] = moves[event.key];
    cursor = [Math.max(0, Math.min(width, cursor[0] + x)), Math.max(0, Math.min(height, cursor[1] + y))];
    isKeyed = true;
    draw();
    $("region-spoken").textContent = `${Math.round(100 * cursor[0] / width)} % from the left, ${Math.round(100 * cursor[1] / height)} % from the top`;
  } else if (event.key === "Enter" || event.key === " ") {
    isKeyed = true;
    add(...cursor);
  } else if (event.key.toLowerCase() === "c") close();
  else if (event.key === "Backspace") back();
  else return;
  event.preventDefault();
  event.stopPropagation();
}

$("region-svg").addEventListener("click", (event) => {
  const box = $("region-svg").getBoundingClientRect();
  isKeyed = false;
  add((event.clientX - box.left) / box.width * width, (event.clientY - box.top) / box.height * height);
});
$("region-svg").addEventListener("keydown", onKey);
$("region-svg").addEventListener("blur", () => { isKeyed = false; draw(); });
for (const [id, action] of Object.entries({ close, back, clear, save })) $(`region-${id}`).addEventListener("click", action);
