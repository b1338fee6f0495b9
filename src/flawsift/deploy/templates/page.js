"use strict";
const element = (id) => document.getElementById(id);

function show(result) {
  const box = document.createElement("section");
  const line = document.createElement("p");
  box.append(line);
  if (result.error) {
    line.textContent = `${result.name}: ${result.error.message}`;
    return box;
  }
  const numbers = [result.score, result.threshold, result.p_value].map((n) => n.toPrecision(4));
  line.textContent = `${result.name}: ${result.verdict}, score ${numbers[0]} (threshold ${numbers[1]}), p-value ${numbers[2]}`;
  line.className = result.verdict;
  const picture = document.createElement("img");
  picture.src = `data:image/png;base64,${result.map_png}`;
  picture.alt = `Heatmap of ${result.name}`;
  box.append(picture);
  return box;
}

const keyed = () => (element("key").value ? { "X-API-Key": element("key").value } : {});

async function offerProducts() {
  const answer = await fetch("v1", { headers: keyed() }).catch(() => null);
  if (!answer || !answer.ok) return; // without the key nobody is told
  const names = Object.keys((await answer.json()).products);
  element("products").replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.length && !names.includes(element("product").value)) element("product").value = names[0];
}

element("key").addEventListener("change", offerProducts);
offerProducts();

element("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const body = new FormData();
  for (const file of element("files").files) body.append("image", file);
  const headers = keyed();
  const results = element("results");
  results.textContent = "Inspecting …";
  try {
    const product = encodeURIComponent(element("product").value);
    const answer = await fetch(`v1/${product}/inspect?map=png`, { method: "POST", body, headers });
    const said = await answer.json();
    results.textContent = said.error ? said.error.message : "";
    for (const result of said.results || []) results.append(show(result));
  } catch (error) {
    results.textContent = `The server did not answer: ${error.message}`;
  }
});
