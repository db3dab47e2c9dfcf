"use strict";
// The page: prompt and text; see also tokens.js.

const SLICE_MS = 12;        // computed at a time, so that the page stays responsive
const NUM_ALTERNATIVES = 6;

let model, tokenizer, special;
let chat = null;            // the text around messages, of a chat model
let isStopped = false;
let conversation = null;    // { state, shown }: what the next message continues

function load() {
  const data = JSON.parse($("model").textContent);
  $("model").remove();
  model = new LanguageModel(data.config, decodeWeights(data.weights));
  tokenizer = new Tokenizer(data.tokenizer);
  ({ special, chat } = data);
  $("status").textContent = "";
  $("generate").disabled = false;
}

// After each slice of time, call draw() and let the browser do its own work.
let sliceEnd = 0;
async function pause(draw) {
  if (performance.now() < sliceEnd) return;
  draw?.();
  await new Promise((resolve) => setTimeout(resolve));
  sliceEnd = performance.now() + SLICE_MS;
}

// Process ids; return the logits after them, or null if it was stopped.
async function prefill(state, ids) {
  let logits;
  for (const id of ids) {
    if (isStopped) return null;
    logits = model.step(state, id);
    await pause();
  }
  return logits.slice();
}

async function generate() {
  const prompt = chat ? $("prompt").value.trim() : $("prompt").value;
  const temperature = Number($("temperature").value), maxTokens = Number($("max_tokens").value);
  const read = chat ? (conversation ? chat.next : chat.first).join(prompt) : prompt;
  const ids = [...(conversation ? [] : [special.bos]), ...tokenizer.encode(read)];
  let state = conversation ? structuredClone(conversation.state) : model.initialState();
  const shown = [...(conversation?.shown ?? []), [chat ? "message user" : "prompt", prompt]];
  show(shown);
  if (chat) $("prompt").value = "";
  let logits = await prefill(state, ids);
  if (!logits) return;
  const asked = chat && structuredClone(state);

  const decoder = newDecoder(), begin = performance.now();
  const numHeld = chat ? chat.stop.length - 1 : 0;  // characters that may begin the end of the turn
  let text = "", count = 0, pending = [];
  const draw = () => {
    const ready = pending.filter(({ piece, start }) => start + piece.length <= text.length - numHeld);
    addTokens(ready);
    pending = pending.slice(ready.length);
    const rate = Math.round(count / Math.max(performance.now() - begin, 1) * 1000);
    $("speed").textContent = `${count} ${count === 1 ? "token" : "tokens"}, ${rate} tokens/s`;
  };
  while (count < maxTokens && !isStopped) {
    const id = sample(logits, temperature, special.banned);
    if (id === special.eos) break;
    const piece = decoder.decode(tokenizer.bytes[id], { stream: true });
    // Not all logits: memory.
    pending.push({ id, piece, start: text.length, likely: likeliest(logits, NUM_ALTERNATIVES) });
    text += piece;
    count += 1;
    if (chat && text.includes(chat.stop)) break;
    logits = model.step(state, id);
    await pause(draw);
  }
  if (chat) {
    text = (text + decoder.decode()).split(chat.stop)[0];
    for (const token of pending) token.piece = token.piece.slice(0, Math.max(0, text.length - token.start));
  }
  draw();
  addTokens(pending);
  if (chat) {
    // Not the state of the generation, which may have gone past the end of the turn.
    isStopped = false;
    state = asked;
    if (!await prefill(state, tokenizer.encode(text + chat.end_of_turn))) return;
    shown.push(["message assistant", text]);
    conversation = { state, shown };
  }
}

function show(parts) {
  $("text").replaceChildren(...parts.map(([kind, text]) => span(kind, text)));
  $("text").scrollTop = $("text").scrollHeight;
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
  if (!bytes.length) return `token ${id}`;
  const text = newDecoder().decode(bytes);
  if (!text.includes("\ufffd")) return JSON.stringify(text);
  return Array.from(bytes, (byte) => "\\x" + byte.toString(16).padStart(2, "0")).join("");
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
  if (chat) $("leave").disabled = isRunning;
  if (isRunning) $("error").hidden = true;
}

function leave() {
  conversation = null;
  show([]);
  $("prompt").value = "";
  $("prompt").focus();
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  run();
};
$("prompt").onkeydown = (event) => {
  const sends = chat ? !event.shiftKey && !event.isComposing : event.ctrlKey || event.metaKey;
  if (event.key !== "Enter" || !sends) return;
  event.preventDefault();
  if (!$("generate").disabled) run();
};
$("stop").onclick = () => { isStopped = true; };
if ($("leave")) $("leave").onclick = leave;
setTimeout(() => guarded(load));  // after the first paint
