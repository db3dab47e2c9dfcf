"use strict";
// The page: prompt, text and states; see also tokens.js.

const SLICE_MS = 12;        // computed at a time, so that the page stays responsive
const NUM_ALTERNATIVES = 6;

let model, tokenizer, special;
let isStopped = false;
let current = null;         // { state, logits, text, tail }: after the text shown
let origin = null;          // the kept state that the next prompt continues
const kept = [];

function load() {
  try {
    loadModel();
  } catch (error) {
    showError(error);
  }
}

function loadModel() {
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
  const from = origin;  // it may be changed meanwhile
  const ids = [...(from ? [] : [special.bos]), ...tokenizer.encode(prompt)];
  const state = from ? structuredClone(from.state) : model.initialState();
  let logits = from?.logits.slice();
  let numRead = 0;
  current = null;
  $("text").replaceChildren(span("prompt", (from?.text ?? "") + prompt));
  await inSlices((i) => {
    if (i >= ids.length) return false;
    logits = model.step(state, ids[i]).slice();
    numRead += 1;
  }, () => {});
  if (numRead < ids.length) return;  // stopped: the state is not that of the text
  const decoder = newDecoder();
  const bytes = prompt ? [] : [...(from?.tail ?? [])];
  let text = decoder.decode(Uint8Array.from(bytes), { stream: true });
  let pending = [], count = 0;
  const start = performance.now();
  await inSlices((i) => {
    if (i >= maxTokens) return false;
    const id = sample(logits, temperature, special.banned);
    if (id === special.eos) return false;
    const piece = decoder.decode(tokenizer.bytes[id], { stream: true });
    bytes.push(...tokenizer.bytes[id]);
    pending.push({ id, piece, likely: likeliest(logits, NUM_ALTERNATIVES) });  // not all logits: memory
    text += piece;
    count += 1;
    logits = model.step(state, id).slice();
  }, () => {
    addTokens(pending);
    pending = [];
    const rate = Math.round(count / Math.max(performance.now() - start, 1) * 1000);
    $("speed").textContent = `${count} ${count === 1 ? "token" : "tokens"}, ${rate} tokens/s`;
  });
  if (!logits) return;
  current = { state, logits, text: (from?.text ?? "") + prompt + text, tail: unfinished(bytes) };
}

// The bytes at the end that begin a character, which a decoder holds back.
function unfinished(bytes) {
  for (const n of [3, 2, 1]) {
    const tail = bytes.slice(-n);
    if (newDecoder().decode(Uint8Array.from(tail), { stream: true }) === "") return tail;
  }
  return [];
}

async function run() {
  isStopped = false;
  showAlternatives(null);
  setRunning(true);
  try {
    await generate();
  } catch (error) {
    showError(error);
  } finally {
    setRunning(false);
  }
}

function showError(error) {
  $("error").textContent = error.message;
  $("error").hidden = false;
}

function setRunning(isRunning) {
  $("generate").disabled = isRunning;
  $("stop").disabled = !isRunning;
  if (isRunning) $("error").hidden = true;
  $("after").hidden = isRunning || !current;
}

function addTokens(tokens) {
  appendTokens(tokens.map(({ id, piece, likely }) => [
    piece,
    () => likely.map(([other, p]) => [nameOf(other), p, other === id]),
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

function keep({ state, logits, text, tail }) {
  number += 1;
  const copy = { state: structuredClone(state), logits: logits.slice(), text, tail };
  kept.push({ name: `state ${number}`, ...copy });
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
