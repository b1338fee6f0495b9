// What the scripts of the review page share.

export const $ = (id) => document.getElementById(id);

export const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};

export const makeSvg = (tag, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};

export const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

export async function request(path, body) {
  const options = body === undefined ? {} :
    { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Start “flawsift review” again and open the address that it prints; "
      + "what was saved is there.");
  }
  const content = (answer.headers.get("Content-Type") || "").includes("json") ? await answer.json() : await answer.text();
  if (!answer.ok && answer.status !== 409) throw new Error(content.error || content);
  return content;
}
