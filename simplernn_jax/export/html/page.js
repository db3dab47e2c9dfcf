"use strict";
// The page: prompt, text and states; see also tokens.js.

const SLICE_MS = 12;        // computed at a time, so that the page stays responsive
const NUM_ALTERNATIVES = 6;

let model, tokenizer, special;
let chat = null;            // the text around messages, of a chat model
let isStopped = false;
let current = null;         // { state, logits, shown, tail }: after the text shown
let origin = null;          // what the next prompt continues: a kept state, or the conversation
const kept = [];

function load() {
  const data = JSON.parse($("model").textContent);
  const bytes = fromBase64($("weights").textContent);
  model = new LanguageModel(data.config, decodeWeights(data.arrays, bytes));
  tokenizer = new Tokenizer(data.tokenizer);
  special = data.special;
  chat = data.chat;
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
  const prompt = chat ? $("prompt").value.trim() : $("prompt").value;
  const temperature = Number($("temperature").value), maxTokens = Number($("max_tokens").value);
  const from = origin;  // it may be changed meanwhile
  const read = chat ? (from ? chat.next : chat.first).join(prompt) : prompt;
  const ids = [...(from ? [] : [special.bos]), ...tokenizer.encode(read)];
  let state = from ? structuredClone(from.state) : model.initialState();
  const shown = [...(from?.shown ?? []), [chat ? "message user" : "prompt", prompt]];
  current = null;
  show(shown);
  if (chat) $("prompt").value = "";
  let logits = await prefill(state, ids, from?.logits);
  if (!logits) return;  // stopped: the state is not that of the text
  const asked = chat && structuredClone(state);
  const numHeld = chat ? utf8(chat.stop).length : 0;  // tokens that may be the end of the turn
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
    // Not all logits: memory.
    pending.push({ id, piece, start: text.length, likely: likeliest(logits, NUM_ALTERNATIVES) });
    text += piece;
    count += 1;
    if (chat && text.includes(chat.stop)) return false;
    logits = model.step(state, id).slice();
  }, () => {
    addTokens(pending.splice(0, pending.length - numHeld));
    const rate = Math.round(count / Math.max(performance.now() - start, 1) * 1000);
    $("speed").textContent = `${count} ${count === 1 ? "token" : "tokens"}, ${rate} tokens/s`;
  });
  if (chat) {
    text = (text + decoder.decode()).split(chat.stop)[0];
    const shortened = ({ piece, start }) => piece.slice(0, Math.max(0, text.length - start));
    addTokens(pending.map((token) => ({ ...token, piece: shortened(token) })));
    // Not the state of the generation, which may have gone past the end of the turn.
    isStopped = false;
    state = asked;
    logits = await prefill(state, tokenizer.encode(text + chat.end_of_turn));
    if (!logits) return;
  }
  shown.push([chat ? "message assistant" : "prompt", text]);
  current = { state, logits, shown, tail: unfinished(bytes) };
  if (chat) origin = current;
}

// Process ids; return the logits after them, or null if it was stopped.
async function prefill(state, ids, logits) {
  let count = 0;
  await inSlices((i) => {
    if (i >= ids.length) return false;
    logits = model.step(state, ids[i]).slice();
    count += 1;
  }, () => {});
  return count < ids.length ? null : logits;
}

function show(parts) {
  $("text").replaceChildren(...parts.map(([kind, text]) => span(kind, text)));
  $("text").scrollTop = $("text").scrollHeight;
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
  if (chat && !$("prompt").value.trim()) return;
  isStopped = false;
  showAlternatives(null);
  setRunning(true);
  await guarded(generate);
  setRunning(false);
}

async function guarded(action) {
  try {
    await action();
  } catch (error) {
    $("error").textContent = error.message;
    $("error").hidden = false;
  }
}

function setRunning(isRunning) {
  $("generate").disabled = isRunning;
  $("stop").disabled = !isRunning;
  $("leave").disabled = $("states").inert = Boolean(chat) && isRunning;
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

function keep(one) {
  number += 1;
  kept.push({ ...structuredClone(one), name: `state ${number}` });
  listStates();
}

function listStates() {
  $("no-states").hidden = kept.length > 0;
  $("states").replaceChildren(...kept.map((one) => {
    const item = document.createElement("li");
    const box = stateBox(one.name, "", one.shown.map(([, text]) => text).join(chat ? " " : ""), [
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
  if (chat) {
    current = state;
    $("after").hidden = !state;
    show(state?.shown ?? []);
  }
  $("prompt").value = "";
  $("prompt").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("prompt").addEventListener("keydown", (event) => {
  const sends = chat ? !event.shiftKey && !event.isComposing : event.ctrlKey || event.metaKey;
  if (event.key !== "Enter" || !sends) return;
  event.preventDefault();
  if (!$("generate").disabled) run();
});
$("stop").onclick = () => { isStopped = true; };
$("keep").onclick = () => keep(current);
$("leave").onclick = () => continueFrom(null);
setTimeout(() => guarded(load));  // after the first paint
