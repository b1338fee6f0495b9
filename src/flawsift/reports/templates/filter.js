"use strict";
// Shows the images that were asked for: the flagged ones, or all, whose name has a text in it.
const form = document.getElementById("filter");
const shown = document.getElementById("shown");
const items = [...document.querySelectorAll("[data-flagged]")].map((element) => ({
  element,
  flagged: element.dataset.flagged === "1",
  name: element.querySelector("bdi").textContent.toLowerCase(),
}));
const groups = [...document.querySelectorAll("[data-group]")];

function apply() {
  const text = form.elements.name.value.trim().toLowerCase();
  const all = form.elements.which.value === "all";
  let count = 0;
  for (const item of items) {
    const show = (all || item.flagged) && item.name.includes(text);
    item.element.hidden = !show;
    count += show;
  }
  for (const group of groups) {
    group.hidden = !group.querySelector("[data-flagged]:not([hidden])");
  }
  shown.textContent = `${count.toLocaleString("en")} of ${items.length.toLocaleString("en")} shown`;
}

form.hidden = false;
form.addEventListener("input", apply);
form.addEventListener("submit", (event) => event.preventDefault());
apply();
