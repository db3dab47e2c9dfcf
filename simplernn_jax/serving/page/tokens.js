"use strict";
// Text of tokens, each with its alternatives on hover and by the arrow keys; for the page of the
// server and the exported page. What a model writes is set as text, never as markup.

const $ = (id) => document.getElementById(id);
const INSPECTED = 2000;  // newest tokens that have their own elements; a long text is slow to lay out

function span(kind, text) {
  const node = document.createElement("span");
  node.className = kind;
  node.textContent = text;
  return node;
}

// Append [text, alternatives]; the latter is a function that returns [name, probability, isChosen].
function appendTokens(tokens) {
  const box = $("text");
  const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 20;
  for (const [text, alternatives] of tokens) {
    const node = span("token", text);
    node.alternatives = alternatives;
    box.append(node);
  }
  const spans = box.querySelectorAll(".token");
  if (spans.length > 2 * INSPECTED) {
    const old = [...spans].slice(0, -INSPECTED);
    const block = document.createElement("div");
    block.textContent = old.map((node) => node.textContent).join("");
    old[0].before(block);
    for (const node of old) node.remove();
  }
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function showAlternatives(node) {
  document.querySelector(".token.current")?.classList.remove("current");
  const box = $("alternatives");
  box.hidden = !node?.alternatives;
  if (box.hidden) return;
  node.classList.add("current");
  const table = document.createElement("table");
  for (const [name, probability, isChosen] of node.alternatives()) {
    const row = table.insertRow();
    row.className = isChosen ? "chosen" : "";
    row.insertCell().textContent = name;
    row.insertCell().textContent = (100 * probability).toFixed(1) + " %";
  }
  box.replaceChildren(table);
  const place = node.getBoundingClientRect();
  const left = Math.min(place.left, document.documentElement.clientWidth - box.offsetWidth - 8);
  box.style.left = Math.max(0, left) + scrollX + "px";
  box.style.top = place.bottom + scrollY + 4 + "px";
}

function moveToken(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") showAlternatives(null);
  if (!step) return;
  event.preventDefault();
  const tokens = [...document.querySelectorAll(".token")];
  const at = tokens.findIndex((token) => token.classList.contains("current"));
  const next = tokens[at < 0 ? (step > 0 ? 0 : tokens.length - 1) : at + step];
  if (next) showAlternatives(next);
}

$("text").onmouseover = (event) => showAlternatives(event.target.closest(".token"));
$("text").onmouseleave = () => showAlternatives(null);
$("text").onkeydown = moveToken;
$("text").onblur = () => showAlternatives(null);
