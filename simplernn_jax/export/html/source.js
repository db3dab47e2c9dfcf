"use strict";
// The model in this file as the source of text of page.js.

const SLICE_MS = 12;        // computed at a time, so that the page stays responsive
const NUM_ALTERNATIVES = 6;

let model, tokenizer, special;
let chat = null;            // the text around messages, of a chat model
let known = {};             // a question of the conversation, and the state after it

let sliceEnd = 0;
const isSliceOver = () => performance.now() > sliceEnd;

// Let the browser do its own work.
async function rest(signal) {
  await nextTask();
  signal.throwIfAborted();
  sliceEnd = performance.now() + SLICE_MS;
}

// Process ids; return the logits after them.
async function prefill(state, ids, signal) {
  let logits;
  for (const id of ids) {
    if (isSliceOver()) await rest(signal);
    logits = model.step(state, id);
  }
  return logits;
}

// Generate up to the end of the text or, which is not shown, to `stop`.
async function* decode(state, logits, { temperature, max_tokens }, signal, stop = "") {
  // A character may begin in one token and end in another.
  const decoder = newDecoder();
  const numHeld = Math.max(0, stop.length - 1);  // characters that may begin `stop`
  let text = "", end = Infinity, pending = [];
  const take = (tokens) => {
    pending = pending.slice(tokens.length);
    const pieces = tokens.map(({ from, to, alternatives }) => [
      text.slice(from, Math.min(to, end)), alternatives]);
    return { pieces, count: pieces.length };
  };
  for (let count = 0; count < max_tokens; count++) {
    const id = sample(logits, temperature, special.banned);
    if (id === special.eos) break;
    const from = text.length;
    text += decoder.decode(tokenizer.bytes[id], { stream: true });
    const likely = likeliest(logits, NUM_ALTERNATIVES);  // not all logits: memory
    const alternatives = () => likely.map(([other, p]) => [nameOf(other), p, other === id]);
    pending.push({ from, to: text.length, alternatives });
    if (stop && text.includes(stop)) {
      end = text.indexOf(stop);
      break;
    }
    logits = model.step(state, id);
    if (isSliceOver()) {
      yield take(pending.filter(({ to }) => to <= text.length - numHeld));
      await rest(signal);
    }
  }
  yield take(pending);
}

const newDecoder = () => new TextDecoder("utf-8", { ignoreBOM: true });

function nameOf(id) {
  if (id === special.eos) return "end";
  const bytes = tokenizer.bytes[id];
  if (!bytes.length) return `token ${id}`;
  const text = newDecoder().decode(bytes);
  if (!text.includes("\ufffd")) return JSON.stringify(text);
  return Array.from(bytes, (byte) => "\\x" + byte.toString(16).padStart(2, "0")).join("");
}

start({
  async connect() {
    await nextTask();  // after the first paint
    const data = JSON.parse($("model").textContent);
    $("model").remove();
    model = new LanguageModel(data.config, decodeWeights(data.weights));
    tokenizer = new Tokenizer(data.tokenizer);
    ({ special, chat } = data);
    for (const id of ["top_p", "top_k", "seed", "key"]) $(id).parentNode.hidden = true;
    $("settings").open = true;
    $("temperature").value = chat ? 0 : 0.8;
    $("max_tokens").value = chat ? 1000 : 400;
    return { name: data.name, facts: data.facts, hasChat: chat !== null };
  },

  async *complete(prompt, settings, signal) {
    const state = model.initialState();
    const logits = await prefill(state, [special.bos, ...tokenizer.encode(prompt)], signal);
    yield* decode(state, logits, settings, signal);
  },

  async *answer(messages, settings, signal) {
    const numKnown = messages.indexOf(known.question) + 1;
    const state = numKnown ? structuredClone(known.state) : model.initialState();
    const texts = messages.map(({ role, content }, i) => (
      role === "user" ? (i ? chat.next : chat.first).join(content) : content + chat.end_of_turn));
    const ids = texts.slice(numKnown).flatMap((text) => tokenizer.encode(text));
    const logits = await prefill(state, numKnown ? ids : [special.bos, ...ids], signal);
    known = { question: messages.at(-1), state: structuredClone(state) };
    yield* decode(state, logits, settings, signal, chat.stop);
  },
});
