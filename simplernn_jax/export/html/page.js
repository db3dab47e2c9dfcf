"use strict";
// The page: prompt, text, alternatives and states. What a model writes is set as text, never as
// markup.

const $ = (id) => document.getElementById(id);
const SLICE_MS = 12;        // computed at a time, so that the page stays responsive
const INSPECTED = 2000;     // newest tokens that are elements of their own
const NUM_ALTERNATIVES = 6;

let model, tokenizer, special;
let isStopped = false;
let current = null;         // { state, logits, text }: after the text shown
let origin = null;          // the kept state that the next prompt continues
const kept = [];

function load() {
  const data = JSON.parse($("model").textContent);
  const bytes = fromBase64($("weights").textContent);
  model = new LanguageModel(data.config, decodeWeights(data.arrays, bytes));
  tokenizer = new Tokenizer(data.tokenizer);
  special = data.special;
  $("weights").remove();
  $("status").textContent = "";
  $("generate").disabled = false;
}

const pause = () => new Promise((resolve) => setTimeout(resolve));

// Call step(0), step(1), ... until it returns false, and draw() between slices of time.
async function inSlices(step, draw) {
  for (let i = 0; ;) {
    const end = performance.now() + SLICE_MS;
    do {
      if (isStopped || step(i) === false) return draw();
      i += 1;
    } while (performance.now() < end);
    draw();
    await pause();
  }
}

async function generate() {
  const prompt = $("prompt").value;
  const temperature = Number($("temperature").value), maxTokens = Number($("max_tokens").value);
  const ids = [...(origin ? [] : [special.bos]), ...tokenizer.encode(prompt)];
  const state = origin ? model.copyState(origin.state) : model.initialState();
  let logits = origin?.logits.slice();
  current = null;
  $("text").replaceChildren(span("prompt", (origin?.text ?? "") + prompt));
  await inSlices((i) => {
    if (i >= ids.length) return false;
    logits = model.step(state, ids[i]).slice();
  }, () => {});
  const decoding = new TextDecoding();
  let text = "", pending = [], count = 0;
  const start = performance.now();
  await inSlices((i) => {
    if (i >= maxTokens) return false;
    const id = sample(logits, temperature, special.banned);
    if (id === special.eos) return false;
    const piece = decoding.feed(tokenizer.bytes[id]);
    pending.push({ id, piece, logits });
    text += piece;
    count += 1;
    logits = model.step(state, id).slice();
  }, () => {
    addTokens(pending);
    pending = [];
    const rate = Math.round(count / Math.max(performance.now() - start, 1) * 1000);
    $("speed").textContent = `${count} ${count === 1 ? "token" : "tokens"}, ${rate} tokens/s`;
  });
  if (logits) current = { state, logits, text: (origin?.text ?? "") + prompt + text };
}

async function run() {
  isStopped = false;
  showAlternatives(null);
  setRunning(true);
  try {
    await generate();
  } catch (error) {
    $("error").textContent = error.message;
    $("error").hidden = false;
  } finally {
    setRunning(false);
  }
}

function setRunning(isRunning) {
  $("generate").disabled = isRunning;
  $("stop").disabled = !isRunning;
  if (isRunning) $("error").hidden = true;
  $("after").hidden = isRunning || !current;
}

function span(kind, text) {
  const node = document.createElement("span");
  node.className = kind;
  node.textContent = text;
  return node;
}

function addTokens(tokens) {
  const box = $("text");
  const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 20;
  for (const token of tokens) {
    const node = span("token", token.piece);
    node.token = token;
    box.append(node);
  }
  const spans = box.querySelectorAll("span");
  if (spans.length > 2 * INSPECTED) {
    const old = [...spans].slice(0, -INSPECTED);
    const block = document.createElement("div");
    block.textContent = old.map((node) => node.textContent).join("");
    old[0].before(block);
    for (const node of old) node.remove();
  }
  if (atEnd) box.scrollTop = box.scrollHeight;
}

// Alternatives of a token, on hover and by the arrow keys

function nameOf(id) {
  if (id === special.eos) return "end";
  const bytes = tokenizer.bytes[id];
  const decoding = new TextDecoding();
  const text = decoding.feed(bytes);
  if (!bytes.length) return `token ${id}`;
  if (decoding.rest.length || text.includes("\ufffd")) {
    return Array.from(bytes, (byte) => "\\x" + byte.toString(16).padStart(2, "0")).join("");
  }
  return JSON.stringify(text);
}

function showAlternatives(node) {
  document.querySelector(".token.current")?.classList.remove("current");
  const box = $("alternatives");
  box.hidden = !node?.token;
  if (box.hidden) return;
  node.classList.add("current");
  const table = document.createElement("table");
  for (const [id, probability] of likeliest(node.token.logits, NUM_ALTERNATIVES)) {
    const row = table.insertRow();
    row.className = id === node.token.id ? "chosen" : "";
    row.insertCell().textContent = nameOf(id);
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

// States

let number = 0;

function keep({ state, logits, text }) {
  number += 1;
  kept.push({ name: `state ${number}`, state: model.copyState(state), logits: logits.slice(), text });
  listStates();
}

function listStates() {
  $("no-states").hidden = kept.length > 0;
  $("states").replaceChildren(...kept.map((one) => {
    const item = document.createElement("li"), box = document.createElement("div");
    box.className = "state";
    const name = document.createElement("b");
    name.textContent = one.name;
    const buttons = document.createElement("div");
    buttons.className = "buttons";
    buttons.append(
      button("Continue", one, () => continueFrom(one)),
      button("Fork", one, () => keep(one)),
      button("Delete", one, () => {
        kept.splice(kept.indexOf(one), 1);
        if (origin === one) continueFrom(null);
        listStates();
      }),
    );
    box.append(name, span("excerpt", "… " + one.text.slice(-60)), buttons);
    item.append(box);
    return item;
  }));
}

function button(label, state, action) {
  const node = document.createElement("button");
  node.type = "button";
  node.textContent = label;
  node.setAttribute("aria-label", `${label} ${state.name}`);
  node.onclick = action;
  return node;
}

function continueFrom(state) {
  origin = state;
  $("origin").hidden = !state;
  $("origin-name").textContent = state?.name ?? "";
  $("prompt").value = "";
  $("prompt").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("generate").disabled) run();
});
$("stop").onclick = () => { isStopped = true; };
$("keep").onclick = () => keep(current);
$("leave").onclick = () => continueFrom(null);
$("text").addEventListener("mouseover", (event) => showAlternatives(event.target));
$("text").addEventListener("mouseleave", () => showAlternatives(null));
$("text").addEventListener("keydown", moveToken);
setTimeout(load);  // after the first paint
