"use strict";
// The page: prompt, text and states; see also tokens.js.

const SLICE_MS = 12;        // computed at a time, so that the page stays responsive
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
  const state = origin ? structuredClone(origin.state) : model.initialState();
  let logits = origin?.logits.slice();
  current = null;
  $("text").replaceChildren(span("prompt", (origin?.text ?? "") + prompt));
  await inSlices((i) => {
    if (i >= ids.length) return false;
    logits = model.step(state, ids[i]).slice();
  }, () => {});
  const decoder = newDecoder();
  let text = "", pending = [], count = 0;
  const start = performance.now();
  await inSlices((i) => {
    if (i >= maxTokens) return false;
    const id = sample(logits, temperature, special.banned);
    if (id === special.eos) return false;
    const piece = decoder.decode(tokenizer.bytes[id], { stream: true });
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

function addTokens(tokens) {
  appendTokens(tokens.map(({ id, piece, logits }) => [
    piece,
    () => likeliest(logits, NUM_ALTERNATIVES).map(([other, p]) => [nameOf(other), p, other === id]),
  ]));
}

// A character may begin in one token and end in another; a byte order mark is a character.
const newDecoder = () => new TextDecoder("utf-8", { ignoreBOM: true });

function nameOf(id) {
  if (id === special.eos) return "end";
  const bytes = tokenizer.bytes[id];
  const text = newDecoder().decode(bytes);
  if (!bytes.length) return `token ${id}`;
  if (text.includes("\ufffd")) {
    return Array.from(bytes, (byte) => "\\x" + byte.toString(16).padStart(2, "0")).join("");
  }
  return JSON.stringify(text);
}

// States

let number = 0;

function keep({ state, logits, text }) {
  number += 1;
  kept.push({ name: `state ${number}`, state: structuredClone(state), logits: logits.slice(), text });
  listStates();
}

function listStates() {
  $("no-states").hidden = kept.length > 0;
  $("states").replaceChildren(...kept.map((one) => {
    const item = document.createElement("li");
    const box = stateBox(one.name, "", one.text, [
      ["Continue", () => continueFrom(one)],
      ["Fork", () => keep(one)],
      ["Delete", () => {
        kept.splice(kept.indexOf(one), 1);
        if (origin === one) continueFrom(null);
        listStates();
      }],
    ]);
    item.append(box);
    return item;
  }));
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
setTimeout(load);  // after the first paint
