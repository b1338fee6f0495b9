// The review page: a virtualised grid, a large view, and decisions that are saved one by one.
// File names are only ever set as text, never as markup.
import { $, count, make, request } from "./common.js";
import { openRegion } from "./region.js";
import { endFlicker, isZoomed, look, pan, zoomKey } from "./zoom.js";

(() => {
  const CAPTION = 52; // pixels below a picture, as the style has it
  const OVERSCAN = 2; // rows above and below what is seen
  const FAST = 3; // pixels per millisecond of scrolling; above, pictures wait until it ends
  const REST = 90; // milliseconds without scrolling, after which they are loaded
  const POLL = 2500; // milliseconds between two looks at what other tabs decided
  const BORDERLINE = 24; // images whose probability of a defect is nearest to one half
  const MAX_UNDO = 500;
  const READING = 8000; // milliseconds that a message stays, however fast the next decisions are saved

  let data = null; // what the server knows of the images, by position
  let at = new Map(); // id -> position
  const decisions = new Map(); // id -> choice, as shown: what was just decided may still be on its way
  const types = new Map(); // id -> what its defect is called, likewise
  const known = new Map(); // id -> [choice, version, type] as the server sent it last
  let revision = -1;
  let doubt = []; // by position: how many images are more doubtful
  let view = []; // positions that are shown, in order
  let current = 0; // index into the view
  let anchor = 0; // the other end of a selection
  // how strong heatmaps are in the grid, and in the large view, where the picture under them matters
  const heat = { grid: { value: 1, last: 1, range: "opacity" }, stage: { value: 0.5, last: 0.5, range: "single-opacity" } };
  let tileSize = 190;
  let undoStack = [];
  let waiting = []; // steps on their way, the oldest first
  let queue = Promise.resolve();
  let alikeFor = null;
  let asked = new Map(); // id -> how soon its answer is wanted
  let nowKept = null; // by position: what is kept with the decisions, those that follow from them included

  // ---- messages -----------------------------------------------------------------------------------------------------

  let alertedAt = 0; // when
  function showAlert(text) {
    if (text) alertedAt = performance.now();
    $("alert").textContent = text;
    $("alert").hidden = !text;
  }

  function announce(text) { $("spoken").textContent = text; }

  function takeChanges(changes) {
    const elsewhere = new Set();
    for (const [key, [choice, version, type = ""]] of Object.entries(changes.decisions)) {
      const id = Number(key);
      const [before, seen, typeBefore] = knownOf(id);
      if (version < seen) continue; // asked before our own decision, answered after it
      if (revision >= 0 && (choice !== before || type !== typeBefore)) elsewhere.add(id);
      known.set(id, [choice, version, type]);
      put(id, choice, type);
    }
    if (elsewhere.size) forget(elsewhere); // undo takes back what was decided here, never what others decided
    revision = changes.revision;
    showRefit(changes.refit);
  }

  async function poll() {
    if (!waiting.length && !document.hidden) {
      try {
        const changes = await request(`decisions?since=${revision}`);
        if (!waiting.length) {
          takeChanges(changes);
          if (Object.keys(changes.decisions).length) { refresh(); showVerdict(); }
        }
        if ($("alert").dataset.kind === "lost") { $("alert").dataset.kind = ""; showAlert(""); }
      } catch (error) {
        $("alert").dataset.kind = "lost";
        showAlert(error.message);
      }
    }
    setTimeout(poll, $("refit").open ? 600 : POLL);
  }

  // ---- decisions ----------------------------------------------------------------------------------------------------

  const choiceOf = (id) => decisions.get(id) || "";
  const typeOf = (id) => types.get(id) || "";
  const knownOf = (id) => { const [choice, version, type = ""] = known.get(id) || ["", 0]; return [choice, version, type]; };
  const put = (id, choice, type) => { decisions.set(id, choice); types.set(id, type); };
  const stateOf = (p) => {
    const choice = choiceOf(data.ids[p]);
    return choice === "keep" ? 1 : choice === "remove" ? 0 : (nowKept || data.kept)[p];
  };

  // wanted: [id, choice, type]; without a type, the one that is there stays as long as the image is removed
  function decide(wanted, { undoing = false } = {}) {
    const full = wanted.map(([id, choice, type]) => [id, choice, choice === "remove" ? (type ?? typeOf(id)) : ""]);
    const news = full.filter(([id, choice, type]) => choiceOf(id) !== choice || typeOf(id) !== type);
    const step = { choices: new Map(news.map(([id, ...decision]) => [id, decision])), back: [] };
    if (!step.choices.size) return;
    step.back = [...step.choices.keys()].map((id) => [id, choiceOf(id), typeOf(id)]);
    for (const [id, choice, type] of news) put(id, choice, type);
    if (!undoing) remember(step.back);
    waiting.push(step);
    $("saved").textContent = "Saving…";
    refresh();
    queue = queue.then(() => send(step, undoing));
  }

  async function send(step, undoing) {
    let status;
    try {
      const changes = [...step.choices].map(([id, [choice, type]]) => ({ id, decision: choice, type, version: knownOf(id)[1] }));
      const answer = changes.length ? await request("decide", { changes }) : { written: {}, refused: {} };
      for (const [id, decision] of Object.entries({ ...answer.written, ...answer.refused })) known.set(Number(id), decision);
      const refused = Object.keys(answer.refused).map(Number);
      // what was decided on top of it had not seen the decision that stands there
      for (const later of waiting) if (later !== step) for (const id of refused) later.choices.delete(id);
      settle(step);
      if (refused.length) {
        forget(new Set(refused));
        const names = refused.slice(0, 3).map((id) => `${data.names[at.get(id)]} (${choiceOf(id) || "no decision"})`);
        showAlert(`Decided elsewhere meanwhile, and left as it is there: ${names.join(", ")}${refused.length > 3 ? ", …" : ""}. `
          + "Decide again to change it.");
      } else if ($("alert").dataset.kind !== "lost" && performance.now() - alertedAt > READING) {
        showAlert("");
      }
      status = refused.length || step.choices.size < step.back.length ? "Not all saved" : "Saved";
    } catch (error) {
      settle(step);
      if (undoing) remember([...step.choices].map(([id, decision]) => [id, ...decision]));
      else undoStack = undoStack.filter((other) => other !== step.back);
      store();
      showAlert(`Not saved: ${error.message}`);
      status = "Not saved";
    }
    $("saved").textContent = waiting.length ? "Saving…" : status;
    refresh();
    if (!waiting.length) showVerdict();
  }

  // What follows from the decisions: asked for once the last of them is saved, one request at a time.
  let judging = false;
  let judgedAt = -1;
  async function showVerdict() {
    if (judging) return;
    judging = true;
    try {
      const verdict = await request("verdict");
      if (verdict.revision !== judgedAt) takeVerdict(verdict);
    } catch { /* the poll tells that the server is gone */ }
    judging = false;
  }

  function takeVerdict(verdict) {
    const before = new Map([...$("verdict-facts").children].map((row) => [row.dataset.name, row.dataset.value]));
    judgedAt = verdict.revision;
    asked = new Map(verdict.ask.map((id, n) => [id, n]));
    nowKept = verdict.kept;
    $("verdict").hidden = !verdict.facts.length;
    $("verdict-warning").hidden = !verdict.warning;
    $("verdict-warning").textContent = verdict.warning || "";
    $("verdict-facts").replaceChildren(...verdict.facts.map(([name, value]) => {
      const row = make("div");
      row.dataset.name = name;
      row.dataset.value = value;
      const shown = make("dd", "", value);
      if (before.has(name) && before.get(name) !== value) shown.append(" ", make("del", "small", before.get(name)));
      row.append(make("dt", "", name), shown);
      return row;
    }));
    refresh();
  }

  function settle(step) { // shows what the server sent, unless something newer is on its way
    waiting = waiting.filter((other) => other !== step);
    for (const [id] of step.back) {
      if (waiting.some((later) => later.choices.has(id))) continue;
      const [choice, , type] = knownOf(id);
      put(id, choice, type);
    }
  }

  const undoKey = `undo ${location.pathname}`;
  function remember(step) {
    undoStack.push(step);
    undoStack = undoStack.slice(-MAX_UNDO);
    store();
  }
  function forget(ids) {
    const without = (step) => (step.some(([id]) => ids.has(id)) ? step.filter(([id]) => !ids.has(id)) : step);
    undoStack = undoStack.map(without).filter((step) => step.length);
    store();
  }
  function store() {
    try { sessionStorage.setItem(undoKey, JSON.stringify(undoStack)); } catch { /* a private window: undo ends with the page */ }
    $("undo").disabled = !undoStack.length;
  }
  function undo() {
    const step = undoStack.pop();
    store();
    if (!step) return;
    decide(step, { undoing: true });
    const index = view.indexOf(at.get(step[0][0]));
    if (index >= 0) moveTo(index);
    announce(`Undone: ${count(step.length, "image")}`);
  }

  function selected() {
    const [low, high] = anchor < current ? [anchor, current] : [current, anchor];
    return view.slice(low, high + 1);
  }
  function choose(choice) {
    if (!view.length) return;
    const several = selected();
    decide(several.map((p) => [data.ids[p], choice]));
    announce(several.length > 1 ? `${count(several.length, "image")}: ${choice || "cleared"}`
      : `${data.names[view[current]]}: ${choice || "cleared"}`);
    const end = Math.max(anchor, current);
    moveTo(choice === "" ? current : Math.min(end + 1, view.length - 1));
  }

  // ---- what is shown ------------------------------------------------------------------------------------------------

  function filterOf(name) {
    return {
      all: () => true,
      suspects: (p) => !data.kept[p],
      kept: (p) => data.kept[p],
      todo: (p) => !data.kept[p] && !choiceOf(data.ids[p]),
      borderline: (p) => doubt[p] < BORDERLINE,
      decided: (p) => choiceOf(data.ids[p]),
      keep: (p) => choiceOf(data.ids[p]) === "keep",
      remove: (p) => choiceOf(data.ids[p]) === "remove",
      unsure: (p) => choiceOf(data.ids[p]) === "unsure",
      changed: (p) => stateOf(p) !== data.kept[p],
    }[name];
  }
  const askedAt = (p) => (asked.has(data.ids[p]) ? asked.get(data.ids[p]) : Infinity);
  const ORDERS = {
    rank: (a, b) => data.rank[a] - data.rank[b],
    ask: (a, b) => (askedAt(a) === askedAt(b) ? data.rank[a] - data.rank[b] : askedAt(a) - askedAt(b)),
    ordinary: (a, b) => data.rank[b] - data.rank[a],
    votes: (a, b) => data.votes[a] - data.votes[b] || data.rank[a] - data.rank[b],
    name: (a, b) => (data.names[a] < data.names[b] ? -1 : 1),
  };

  // Decisions leave the view as it is, so that nothing jumps away below the hand; a new filter makes it anew.
  function makeView() {
    const keep = view[current];
    const test = filterOf($("filter").value);
    const part = $("search").value.toLowerCase();
    view = data.ids.map((_, p) => p).filter((p) => test(p) && (!part || data.names[p].toLowerCase().includes(part)));
    view.sort(ORDERS[$("sort").value]);
    const index = view.indexOf(keep);
    current = anchor = index < 0 ? 0 : index;
    for (const li of tiles.values()) li.remove();
    tiles.clear();
    layOut();
    $("count").textContent = count(view.length, "image");
    $("empty").hidden = view.length > 0;
  }

  const tiles = new Map(); // index -> li
  let columns = 1;
  let cell = 200;
  let moving = false;
  let lastY = 0;
  let lastTime = 0;
  let restTimer = 0;

  function layOut() {
    const width = $("grid").clientWidth;
    columns = Math.max(width < 500 && tileSize < 260 ? 2 : 1, Math.floor(width / (tileSize + 10)));
    cell = width / columns;
    $("grid").style.height = `${Math.ceil(view.length / columns) * rowHeight()}px`;
    for (const [index, li] of tiles) place(index, li);
    render();
  }
  const rowHeight = () => Math.round(cell) + CAPTION;

  function place(index, li) {
    li.style.width = `${cell}px`;
    li.style.height = `${rowHeight()}px`;
    li.style.transform = `translate(${(index % columns) * cell}px, ${Math.floor(index / columns) * rowHeight()}px)`;
    li.querySelector(".shown").style.height = `${Math.round(cell) - 12}px`;
  }

  function render() {
    const top = -$("grid").getBoundingClientRect().top;
    const first = Math.max(0, (Math.floor(top / rowHeight()) - OVERSCAN) * columns);
    const last = Math.min(view.length, (Math.ceil((top + innerHeight) / rowHeight()) + OVERSCAN) * columns);
    for (const [index, li] of tiles) {
      if ((index < first || index >= last) && index !== current) {
        for (const img of li.querySelectorAll("img")) img.removeAttribute("src"); // ends a request that nobody needs
        li.remove();
        tiles.delete(index);
      }
    }
    let following = null;
    for (let index = last - 1; index >= first; index -= 1) {
      let li = tiles.get(index);
      if (!li) {
        li = tile(index);
        tiles.set(index, li);
        $("grid").insertBefore(li, following);
      }
      following = li;
    }
    if (!moving) for (const [index, li] of tiles) load(index, li);
  }

  function tile(index) {
    const p = view[index];
    const li = make("li");
    li.setAttribute("aria-setsize", view.length);
    li.setAttribute("aria-posinset", index + 1);
    const button = make("button", "tile");
    button.type = "button";
    const shown = make("span", "shown");
    const line = make("span", "line");
    const rank = make("span", "rank");
    rank.append(make("span", "unseen", "Rank "), data.rank[p].toLocaleString("en"));
    line.append(rank, " ", make("span", "badge"));
    const name = make("bdi", "name", data.names[p]);
    button.title = data.names[p];
    button.append(shown, line, " ", name, " ", make("span", "unseen verdict"));
    button.addEventListener("click", (event) => {
      if (event.shiftKey) { moveTo(index, { extend: true }); return; }
      moveTo(index);
      openSingle();
    });
    button.addEventListener("focus", () => {
      if (current !== index) { current = index; anchor = index; markAll(); }
    });
    li.append(button);
    place(index, li);
    mark(index, li);
    return li;
  }

  function load(index, li) {
    const shown = li.querySelector(".shown");
    if (shown.firstChild) return;
    const id = data.ids[view[index]];
    const image = make("img");
    image.alt = "";
    image.decoding = "async";
    image.addEventListener("error", () => {
      if (image.hasAttribute("src")) shown.replaceChildren(make("span", "nothing", "no picture"));
    });
    image.src = `picture/thumb/${id}`;
    shown.append(image);
    if (data.has_maps) {
      const map = make("img", "map");
      map.alt = "";
      map.decoding = "async";
      map.addEventListener("error", () => map.remove());
      map.src = `picture/thumb-map/${id}`;
      shown.append(map);
    }
  }

  function mark(index, li) {
    const p = view[index];
    const choice = choiceOf(data.ids[p]);
    const button = li.firstChild;
    const state = data.kept[p] ? "kept" : "set aside";
    const badge = button.querySelector(".badge");
    const type = typeOf(data.ids[p]);
    badge.textContent = type || choice || state;
    badge.className = choice ? `badge decision ${choice}` : `badge ${data.kept[p] ? "kept" : "removed"}`;
    button.className = `tile ${choice}`;
    button.tabIndex = index === current ? 0 : -1;
    const [low, high] = anchor < current ? [anchor, current] : [current, anchor];
    if (low !== high && index >= low && index <= high) button.setAttribute("aria-pressed", "true");
    else button.removeAttribute("aria-pressed");
    button.querySelector(".verdict").textContent = choice
      ? `${type ? `${choice}, ` : ""}decided by hand, ${state} by the screening` : "undecided";
  }
  function markAll() { for (const [index, li] of tiles) mark(index, li); }

  function moveTo(index, { extend = false, focus = true } = {}) {
    current = Math.max(0, Math.min(view.length - 1, index));
    if (!extend) anchor = current;
    const top = Math.floor(current / columns) * rowHeight() + $("grid").getBoundingClientRect().top;
    const head = document.querySelector(".bar").offsetHeight;
    if (top < head) scrollBy(0, top - head - 8);
    else if (top + rowHeight() > innerHeight) scrollBy(0, top + rowHeight() - innerHeight + 8);
    render();
    markAll();
    if ($("single").open) showSingle();
    else if (focus && tiles.get(current)) tiles.get(current).firstChild.focus({ preventScroll: true });
  }

  function refresh() {
    markAll();
    const removed = data.ids.filter((_, p) => !data.kept[p]);
    const done = removed.filter((id) => choiceOf(id)).length;
    const all = [...decisions.values()].filter((choice) => choice).length;
    $("progress").max = Math.max(1, removed.length);
    $("progress").value = done;
    $("progress-text").textContent = removed.length
      ? `${done.toLocaleString("en")} of ${count(removed.length, "image")} set aside decided; ${all.toLocaleString("en")} in all`
      : `${count(all, "image")} decided`;
    if ($("single").open) showState();
    const kept = data.ids.filter((_, p) => stateOf(p)).length;
    const byHand = (wanted) => [...decisions].filter(([id, choice]) => choice === wanted && at.has(id)).length;
    $("refit-plan").textContent = `${count(kept, "image")} of ${data.ids.length.toLocaleString("en")} count as good: what `
      + `follows from the screening, with ${byHand("keep").toLocaleString("en")} kept and ${byHand("remove").toLocaleString("en")} removed by hand.`;
  }

  // ---- the large view -----------------------------------------------------------------------------------------------

  function openSingle() {
    if (!view.length) return;
    anchor = current; // a decision there is on the image that is seen
    lookedAt = null;
    if (!$("single").open) $("single").showModal();
    showSingle();
  }

  let lookedAt = null;
  let inSingle = 0; // index of the image in the large view
  function showSingle() {
    inSingle = current;
    const p = view[current];
    const id = data.ids[p];
    $("single-place").textContent = `${(current + 1).toLocaleString("en")} of ${view.length.toLocaleString("en")}`;
    $("single-name").replaceChildren(make("bdi", "", data.names[p]));
    $("single-image").alt = `Image ${data.names[p]}`;
    if (lookedAt !== id) look(id);
    lookedAt = id;
    $("single-image").src = `picture/preview/${id}`;
    $("single-map").hidden = !data.has_maps;
    if (data.has_maps) {
      $("single-map").src = `picture/preview-map/${id}`;
      $("single-map").alt = `Heatmap of ${data.names[p]}, ${data.peak_positions[p]}`;
    }
    $("single-caption").textContent = data.has_maps ? `Heatmap: ${data.peak_positions[p]}` : "";
    const facts = [
      ["Rank", `${data.rank[p].toLocaleString("en")} of ${data.ids.length.toLocaleString("en")}`],
      ["Consensus", data.consensus[p]],
      ["Probably defective", `${Math.round(100 * data.probability[p])} %`],
      ["Held-out score", data.held_out[p]],
      ...(data.voters ? [["Sub-models agreeing", `${data.votes[p]} of ${data.voters}`]] : []),
    ];
    $("single-facts").replaceChildren(...facts.map(([term, value]) => {
      const row = make("div");
      row.append(make("dt", "", term), make("dd", "", value));
      return row;
    }));
    $("previous").disabled = current === 0;
    $("next").disabled = current === view.length - 1;
    compareWith(null);
    showState();
    showAlike(id);
    for (const index of [current + 1, current - 1]) { // so that the next picture is there when it is asked for
      if (view[index] !== undefined) new Image().src = `picture/preview/${data.ids[view[index]]}`;
    }
  }

  // To name the defect of an image is to remove it; an empty name takes the name away, and the image stays as it is.
  function nameDefect() {
    const id = data.ids[view[inSingle]];
    const type = $("defect-type").value.trim().replace(/\s+/g, " ");
    if (type) decide([[id, "remove", type]]);
    else if (typeOf(id)) decide([[id, choiceOf(id), ""]]);
  }

  function showState() {
    const p = view[current];
    const choice = choiceOf(data.ids[p]);
    const badges = [make("span", `badge ${data.kept[p] ? "kept" : "removed"}`, data.kept[p] ? "kept" : "set aside"), " by the screening"];
    if (choice) badges.push(", you: ", make("span", `badge decision ${choice}`, choice));
    $("single-state").replaceChildren(...badges);
    if (document.activeElement !== $("defect-type")) $("defect-type").value = typeOf(data.ids[p]);
    const names = [...new Set([...types.values()].filter((type) => type))].sort();
    $("defect-types").replaceChildren(...names.map((name) => { const option = make("option"); option.value = name; return option; }));
    for (const button of document.querySelectorAll("[data-choice]")) {
      if (button.dataset.choice) button.setAttribute("aria-pressed", button.dataset.choice === choice);
      else button.disabled = !choice;
    }
  }

  async function showAlike(id) {
    alikeFor = id;
    let [ids, places] = [[], {}];
    try {
      [ids, places] = await Promise.all([request(`alike/${id}`), request(`nearest/${id}`)]);
    } catch { /* the poll tells that the server is gone */ }
    if (alikeFor !== id) return;
    $("alike").hidden = !ids.length;
    $("alike-list").replaceChildren(...ids.map((other) => comparison(other, `picture/thumb/${other}`, "Typical")));
    const nearest = places.nearest || [];
    $("nearest").hidden = !nearest.length;
    $("nearest-text").textContent = places.text || "";
    $("nearest-list").replaceChildren();
    if (!nearest.length) return;
    const own = make("li", "own");
    const image = make("img");
    image.alt = `The most unusual place of ${data.names[at.get(id)]}`;
    image.src = `picture/place/${id}/${places.place}`;
    own.append(image, make("span", "", "this one"));
    $("nearest-list").append(own, ...nearest.map((other) => {
      const li = comparison(other.id, `picture/place/${other.id}/${other.place}`, "Has a close place");
      li.append(make("span", "", other.distance));
      return li;
    }));
  }

  // a small picture of another image, which can be laid beside the one that is looked at
  function comparison(other, source, what) {
    const li = make("li");
    const button = make("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.title = data.names[at.get(other)];
    const image = make("img");
    image.alt = `Compare with ${data.names[at.get(other)]}`;
    image.src = source;
    button.append(image);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      for (const b of document.querySelectorAll(".alike-list button")) b.setAttribute("aria-pressed", b === button && on);
      compareWith(on ? other : null, what);
    });
    li.append(button);
    return li;
  }

  function compareWith(id, what) {
    endFlicker();
    $("compare").hidden = id === null;
    if (id === null) { $("compare-image").removeAttribute("src"); return; }
    $("compare-image").dataset.id = id;
    delete $("compare-image").dataset.full;
    $("compare-image").src = `picture/preview/${id}`;
    $("compare-image").alt = `${what}: ${data.names[at.get(id)]}`;
    $("compare-caption").replaceChildren(`${what}: `, make("bdi", "", data.names[at.get(id)]));
  }

  function setOpacity(where, value) {
    heat[where].value = value;
    if (value > 0) heat[where].last = value;
    if ($(heat[where].range)) $(heat[where].range).value = 100 * value;
    $(where).style.setProperty("--heat", value);
    $(where).classList.toggle("bare", value === 0);
  }

  // ---- refit --------------------------------------------------------------------------------------------------------

  // scores of another region of interest are other scores
  async function planRegion() {
    $("refit-region").textContent = "";
    try {
      const region = await request("region");
      if (region.problem) $("refit-region").textContent = `The region of interest cannot be used: ${region.problem}`;
      else if (region.is_new) {
        $("refit-region").textContent = "The region of interest is not that of this screening: the images are screened anew first, "
          + `which takes as long as it took before. The same from the command line: ${region.command}`;
      }
    } catch (error) { $("refit-region").textContent = error.message; }
  }

  // what a refit has changed: threshold and images
  function showChanges(status) {
    const digits = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : "none");
    const before = status.before || {};
    const rows = [["Threshold", `${digits(status.threshold)}${status.promise ? `: ${status.promise}` : ""}`, digits(before.threshold)],
      ["Count as good", `${count(status.n_kept, "image")}`, before.n_kept]];
    $("refit-facts").replaceChildren(...rows.map(([name, value, old]) => {
      const row = make("div");
      const shown = make("dd", "", value);
      if (typeof before.n_kept === "number") shown.append(make("span", "small", ` (before: ${old})`));
      row.append(make("dt", "", name), shown);
      return row;
    }));
    $("refit-moved").replaceChildren(...(status.moved || []).filter(({ n }) => n).map(({ to, n, names }) => {
      const details = make("details");
      const list = make("ul");
      for (const name of names) {
        const li = make("li");
        li.append(make("bdi", "", name));
        list.append(li);
      }
      if (n > names.length) list.append(make("li", "", `and ${(n - names.length).toLocaleString("en")} more`));
      details.append(make("summary", "", `${count(n, "image")} ${to}`), list);
      return details;
    }));
    if (!(status.moved || []).some(({ n }) => n)) $("refit-moved").textContent = "What the screening kept counts as good, and nothing else.";
    $("refit-warning").textContent = status.warning || "";
    $("refit-anew").textContent = status.screened_anew
      ? `The images were screened anew; this page shows the screening before. To see the new one, start: flawsift review ${status.out}` : "";
  }

  let refitState = "";
  let refitTold = "";
  function showRefit(status) {
    if (JSON.stringify(status) === refitTold) return; // a list that somebody opened stays open
    refitTold = JSON.stringify(status);
    const running = status.state === "running";
    $("start-refit").disabled = running;
    $("refit-progress").hidden = !running;
    $("open-refit").textContent = running ? "Refitting…" : "Refit";
    if (running) {
      const counted = status.total > 1; // of one step nothing is counted
      if (counted) $("refit-progress").value = status.done / status.total;
      else $("refit-progress").removeAttribute("value");
      const steps = counted ? `, ${status.done.toLocaleString("en")} of ${status.total.toLocaleString("en")}` : "";
      $("refit-status").textContent = `Running: ${status.stage}${steps}.`;
    } else if (status.state === "done") {
      $("refit-status").textContent = `Done in ${Math.round(status.seconds)} s: trained on ${count(status.n_kept, "image")}.`;
    } else if (status.state === "failed") {
      $("refit-status").textContent = `Failed: ${status.message}`;
    }
    $("refit-result").hidden = status.state !== "done";
    if (status.state === "done") showChanges(status);
    if (refitState === "running" && !running) announce($("refit-status").textContent);
    refitState = status.state;
  }

  // ---- keyboard, scrolling, start -----------------------------------------------------------------------------------

  function onKey(event) {
    if (document.querySelector("dialog[open]:not(#single)")) return; // the list of keys opens above the large view too
    if (event.ctrlKey || event.metaKey || event.altKey) {
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !typing(event)) { event.preventDefault(); undo(); }
      return;
    }
    const single = $("single").open;
    if (typing(event)) return;
    const inGrid = !single && (event.target === document.body || $("grid").contains(event.target));
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const extend = event.shiftKey;
    const page = columns * Math.max(1, Math.floor(innerHeight / rowHeight()) - 1);
    const moves = single ? { ArrowLeft: -1, ArrowRight: 1 }
      : { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -page, PageDown: page,
        Home: -view.length, End: view.length };
    if (single && extend && isZoomed() && key.startsWith("Arrow")) {
      event.preventDefault();
      pan((key === "ArrowRight") - (key === "ArrowLeft"), (key === "ArrowDown") - (key === "ArrowUp"));
    } else if (key in moves && (single || inGrid)) {
      event.preventDefault();
      const target = current + moves[key];
      const beyond = Math.abs(moves[key]) === columns && (target < 0 || target >= view.length);
      if (!beyond || columns === 1) moveTo(target, { extend: extend && !single });
    } else if (event.repeat && "kruxzf".includes(key)) { /* a key held down must not decide on dozens of images */
    } else if (key === "k") choose("keep");
    else if (key === "r") choose("remove");
    else if (key === "u") choose("unsure");
    else if (key === "x") choose("");
    else if (key === "z") undo();
    else if (key === "t" && single) $("defect-type").select();
    else if (key === "h" && data.has_maps) {
      const where = single ? "stage" : "grid";
      setOpacity(where, heat[where].value > 0 ? 0 : heat[where].last);
    } else if (single && zoomKey(key)) { /* done */
    } else if (key === "?") $("help").showModal();
    else if ((key === "Enter" || key === " ") && event.target === document.body) openSingle();
    else return;
    if (key !== "Enter") event.preventDefault();
  }
  const typing = (event) => event.target.matches("input[type=search], input[type=text], select") ||
    (event.target.matches("input") && event.key.startsWith("Arrow"));

  function onScroll(event) {
    const speed = Math.abs(scrollY - lastY) / Math.max(1, event.timeStamp - lastTime);
    [lastY, lastTime] = [scrollY, event.timeStamp];
    moving = speed > FAST;
    clearTimeout(restTimer);
    restTimer = setTimeout(() => { moving = false; render(); }, REST);
    requestAnimationFrame(render);
  }

  async function start() {
    try {
      data = await request("content");
    } catch (error) {
      showAlert(error.message);
      return;
    }
    at = new Map(data.ids.map((id, p) => [id, p]));
    const doubtful = data.ids.map((_, p) => p).sort((a, b) =>
      (data.rank[a] > data.ids.length / 2) - (data.rank[b] > data.ids.length / 2)
      || Math.abs(data.probability[a] - 0.5) - Math.abs(data.probability[b] - 0.5) || data.rank[a] - data.rank[b]);
    doubtful.forEach((p, n) => { doubt[p] = n; });
    try { undoStack = JSON.parse(sessionStorage.getItem(undoKey)) || []; } catch { undoStack = []; }
    store();
    takeChanges(data);
    if (data.kept.every((k) => k)) $("filter").value = "all";
    makeView();
    refresh();

    for (const id of ["filter", "sort"]) $(id).addEventListener("change", () => { makeView(); scrollTo(0, 0); });
    $("search").addEventListener("input", makeView);
    for (const [where, { value, range }] of Object.entries(heat)) {
      setOpacity(where, value);
      if ($(range)) $(range).addEventListener("input", (event) => setOpacity(where, event.target.value / 100));
    }
    $("size").addEventListener("input", (event) => { tileSize = Number(event.target.value); layOut(); });
    $("undo").addEventListener("click", undo);
    $("defect-type").addEventListener("change", nameDefect);
    $("defect-type").addEventListener("keydown", (event) => {
      if (event.key === "Escape") { // the name is as it was, and the large view stays
        event.preventDefault();
        $("defect-type").value = typeOf(data.ids[view[inSingle]]);
        $("single-name").focus();
      } else if (event.key === "Enter" && !event.isComposing) {
        $("single-name").focus(); // the change is taken when the field loses the focus
      }
    });
    document.querySelector(".tools").addEventListener("submit", (event) => event.preventDefault());
    for (const button of document.querySelectorAll("[data-choice]")) {
      button.addEventListener("click", () => choose(button.dataset.choice));
    }
    for (const button of document.querySelectorAll("[data-close]")) {
      button.addEventListener("click", () => button.closest("dialog").close());
    }
    $("close-single").addEventListener("click", () => $("single").close());
    // the browser gives the focus back to where it was before, which may be another image by now
    $("single").addEventListener("close", () => moveTo(inSingle));
    $("previous").addEventListener("click", () => moveTo(current - 1));
    $("next").addEventListener("click", () => moveTo(current + 1));
    $("open-region").addEventListener("click", openRegion);
    $("open-help").addEventListener("click", () => $("help").showModal());
    $("open-refit").addEventListener("click", () => { refresh(); planRegion(); $("refit").showModal(); });
    $("start-refit").addEventListener("click", async () => {
      $("start-refit").disabled = true;
      await queue; // what was decided so far is part of it
      try { showRefit(await request("refit", {})); } catch (error) { $("refit-status").textContent = error.message; $("start-refit").disabled = false; }
    });
    $("open-overview").addEventListener("click", async () => {
      await queue;
      try { $("overview-content").innerHTML = await request("overview"); } // markup of the server, names escaped by it
      catch (error) { $("overview-content").textContent = error.message; }
      $("overview").showModal();
    });
    addEventListener("keydown", onKey);
    addEventListener("scroll", onScroll, { passive: true });
    addEventListener("resize", () => requestAnimationFrame(layOut));
    document.body.dataset.ready = "yes";
    showVerdict();
    setTimeout(poll, POLL);
  }
  start();
})();
