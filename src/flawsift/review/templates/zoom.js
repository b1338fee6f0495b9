// Zoom and pan of the large view: the picture, what lies over it and what stands beside it move together.
import { $, makeSvg, request } from "./common.js";

const STEP = 1.5; // of one key or one click
const WHEEL = 0.0015; // of the exponent, per pixel that a wheel scrolls
const MOST = 16; // pixels of the screen for one of the picture, where that is more than LEAST
const LEAST = 4; // to what scale any picture can be enlarged
const COARSE = 3; // from so many on, pixels are shown as squares
const PREVIEW = 1200; // pixels of the longer edge of a preview, as the server makes it
const PAN = 0.2; // of the frame, of one key

let shown = null; // id of the image
let size = null; // [width, height] of the image; null until the server has told
let scale = 1; // 1 fits the frame
let [x, y] = [0, 0]; // where the upper left corner of the frame's content lies, in pixels of the frame
const pointers = new Map(); // id -> [x, y]: fingers, or the mouse while it drags
let moved = false; // since the pointer went down

const frame = () => $("single-frame");
const canvases = () => document.querySelectorAll("#stage .canvas");
const fitted = () => (size ? Math.min(frame().clientWidth / size[0], frame().clientHeight / size[1]) : 1);
const oneToOne = () => 1 / (fitted() * (devicePixelRatio || 1)); // scale at which pixels are those of the screen

export const isZoomed = () => Math.abs(scale - 1) > 1e-3;

function apply() {
  const clamp = (at, edge) => (edge * scale <= edge ? (edge - edge * scale) / 2 : Math.min(0, Math.max(edge - edge * scale, at)));
  [x, y] = [clamp(x, frame().clientWidth), clamp(y, frame().clientHeight)];
  for (const canvas of canvases()) {
    canvas.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
    canvas.style.setProperty("--zoom", scale);
    canvas.classList.toggle("coarse", scale * fitted() >= COARSE);
  }
  $("single-outline").style.setProperty("--pixel", 1 / fitted());
  $("stage").classList.toggle("zoomed", isZoomed());
  $("zoom-level").textContent = size ? `${Math.round(100 * scale * fitted() * (devicePixelRatio || 1))} %` : "";
  if (scale > 1) sharpen();
}

// A preview is replaced by all the pixels there are, once somebody looks close.
function sharpen() {
  for (const image of document.querySelectorAll("#stage .canvas img[data-id]")) {
    const id = image.dataset.id;
    if (image.dataset.full === id || !image.src || Math.max(image.naturalWidth, image.naturalHeight) < PREVIEW) continue;
    image.dataset.full = id;
    const full = new Image();
    full.src = `picture/full/${id}`;
    full.decode().then(() => { if (image.dataset.id === id) image.src = full.src; }, () => { /* the preview stays */ });
  }
}

function zoomTo(wanted, at) {
  const most = Math.max(LEAST, MOST / fitted());
  const to = Math.min(most, Math.max(Math.min(1, oneToOne()), wanted));
  const [cx, cy] = at || [frame().clientWidth / 2, frame().clientHeight / 2];
  [x, y] = [cx - (cx - x) * (to / scale), cy - (cy - y) * (to / scale)];
  scale = to;
  apply();
}

export function fit() {
  scale = 1;
  apply();
}

// Keys of the large view; false where a key is none of them.
export function zoomKey(key) {
  if (key === "+" || key === "=") zoomTo(scale * STEP);
  else if (key === "-") zoomTo(scale / STEP);
  else if (key === "0") fit();
  else if (key === "1") zoomTo(oneToOne());
  else if (key === "f") flicker();
  else return false;
  return true;
}

export function pan(across, down) {
  x -= across * PAN * frame().clientWidth;
  y -= down * PAN * frame().clientHeight;
  apply();
}

// The picture as it was taken in place of what lies over it, or the picture that it is compared with; and back.
function flicker() {
  const stage = $("stage");
  const other = $("compare-image").getAttribute("src");
  const on = !stage.classList.contains("flicker");
  stage.classList.toggle("flicker", on);
  stage.classList.toggle("swapped", on && Boolean(other));
  $("flicker").setAttribute("aria-pressed", on);
  if (on && other) {
    $("single-other").src = $("compare-image").src;
    $("single-other").dataset.id = $("compare-image").dataset.id;
    if (scale > 1) sharpen();
  }
}

export function endFlicker() {
  $("stage").classList.remove("flicker", "swapped");
  $("flicker").setAttribute("aria-pressed", "false");
}

// Another image is looked at: all of it, with the outline of what is suspect.
export async function look(id) {
  shown = id;
  size = null;
  for (const image of document.querySelectorAll("#stage img")) delete image.dataset.full;
  $("single-image").dataset.id = id;
  $("single-regions").replaceChildren();
  $("single-outline").toggleAttribute("hidden", true);
  endFlicker();
  fit();
  let shape;
  try {
    shape = await request(`shape/${id}`);
  } catch { return; } // a picture that cannot be read is told where it should be
  if (shown !== id) return;
  size = shape.size;
  $("single-outline").setAttribute("viewBox", `0 0 ${size[0]} ${size[1]}`);
  $("single-regions").replaceChildren(...shape.outlines.map((points) => makeSvg("polygon", { points: points.join(" ") })));
  $("single-outline").toggleAttribute("hidden", false);
  apply();
}

function place(event) {
  const box = event.currentTarget.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

function onMove(event) {
  const before = pointers.get(event.pointerId);
  if (!before) return;
  const now = place(event);
  const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
  if (others.length) { // two fingers: the picture stays under both
    const apart = (a, b) => Math.max(1, Math.hypot(a[0] - b[0], a[1] - b[1]));
    const middle = [(now[0] + others[0][0]) / 2, (now[1] + others[0][1]) / 2];
    x += (now[0] - before[0]) / 2;
    y += (now[1] - before[1]) / 2;
    zoomTo(scale * apart(now, others[0]) / apart(before, others[0]), middle);
  } else {
    x += now[0] - before[0];
    y += now[1] - before[1];
    apply();
  }
  moved = true;
  pointers.set(event.pointerId, now);
}

for (const element of document.querySelectorAll("#stage .frame")) {
  element.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomTo(scale * Math.exp(-event.deltaY * (event.deltaMode ? 30 : 1) * WHEEL), place(event));
  }, { passive: false });
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    moved = false;
    element.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
  });
  element.addEventListener("pointermove", onMove);
  for (const end of ["pointerup", "pointercancel"]) {
    element.addEventListener(end, (event) => pointers.delete(event.pointerId));
  }
  element.addEventListener("dblclick", (event) => {
    if (moved) return;
    if (isZoomed()) fit();
    else zoomTo(Math.max(2, oneToOne()), place(event));
  });
}
for (const [id, key] of Object.entries({ "zoom-out": "-", "zoom-in": "+", "zoom-one": "1", "zoom-fit": "0", flicker: "f" })) {
  $(id).addEventListener("click", () => zoomKey(key));
}
addEventListener("resize", () => requestAnimationFrame(apply));
