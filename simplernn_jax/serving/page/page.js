"use strict";
// The page of the server, and the exported page. What a model or a client writes is set as text,
// never as markup.
//
// Another script calls start(source). A source has
//   connect()                            return { name, facts, hasChat } of the model
//   complete(prompt, settings, signal)   generate a text
//   answer(messages, settings, signal)   answer the last message of a conversation
// The last two yield { pieces, count }: additions to the text, and how many tokens these are. A
// piece is [text, alternatives]; the latter, if any, is a function that returns the
// [name, probability, isChosen] of the likeliest tokens. An error ends the stream.

const $ = (id) => document.getElementById(id);
const nextTask = () => new Promise((resolve) => setTimeout(resolve));
const INSPECTED = 2000;  // newest tokens that have their own elements; a long text is slow to lay out

let source;
let abort = null;  // stops the running stream
let messages = [];  // the conversation, in chat mode
let isChat = false;

function start(newSource) {
  source = newSource;
  guarded(connect);
}

async function connect() {
  const { name, facts, hasChat } = await source.connect();
  document.title = $("name").textContent = name;
  $("facts").textContent = facts;
  $("modes").hidden = !hasChat;
  if (!hasChat) return;
  setMode(true);
  messages = history.state ?? [];
  show(messages);
}

async function guarded(action) {
  $("error").hidden = true;
  try {
    await action();
  } catch (error) {
    $("error").textContent = error.message;
    $("error").hidden = error.name === "AbortError";
  }
}

// Generation

async function generate() {
  const prompt = isChat ? $("prompt").value.trim() : $("prompt").value;
  if (isChat && !prompt) return;
  abort = new AbortController();
  showAlternatives(null);
  setRunning(true);
  try {
    await (isChat ? converse : complete)(prompt, abort.signal);
  } finally {
    setRunning(false);
  }
}

async function complete(prompt, signal) {
  $("text").replaceChildren(element("span", "prompt", prompt));
  await write($("text"), source.complete(prompt, settings(), signal));
}

async function converse(content, signal) {
  const asked = [...messages, { role: "user", content }];
  const answer = { role: "assistant", content: "" };
  show([...asked, answer]);
  const node = $("conversation").lastChild;
  $("prompt").value = "";
  try {
    await write(node, source.answer(asked, settings(), signal));
  } finally {
    answer.content = node.textContent;
    const isShown = node.isConnected;  // another conversation may have begun
    if (isShown && answer.content) {
      keep([...asked, answer]);
    } else if (isShown) {  // nothing was said: the question can be corrected
      $("prompt").value = content;
      show(messages);
    }
  }
}

// Append what a stream yields.
async function write(node, stream) {
  const begin = performance.now();
  let total = 0;
  for await (const { pieces, count } of stream) {
    append(node, pieces);
    total += count;
    const rate = Math.round(1000 * total / (performance.now() - begin));
    $("speed").textContent = `${total} ${total === 1 ? "token" : "tokens"}, ${rate} tokens/s`;
  }
}

function settings() {
  const inputs = [...document.querySelectorAll(".settings [type=number]")].filter(({ value }) => value);
  return Object.fromEntries(inputs.map(({ id, valueAsNumber }) => [id, valueAsNumber]));
}

// Keep the conversation for a reload of the page.
function keep(conversation) {
  messages = conversation;
  history.replaceState(messages, "");
}

function newConversation() {
  abort?.abort();
  keep([]);
  show([]);
  $("prompt").focus();
}

// Text

function element(name, kind, text) {
  const node = document.createElement(name);
  node.className = kind;
  node.textContent = text;
  return node;
}

function show(conversation) {
  const box = $("conversation");
  box.replaceChildren(
    ...conversation.map(({ role, content }) => element("div", "message " + role, content)));
  box.scrollTop = box.scrollHeight;
}

function append(node, pieces) {
  const box = node.closest(".output");
  const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 20;
  for (const [text, alternatives] of pieces) {
    node.append(alternatives ? Object.assign(element("span", "token", text), { alternatives }) : text);
  }
  const tokens = node.querySelectorAll(".token");
  if (tokens.length > 2 * INSPECTED) {
    const old = [...tokens].slice(0, -INSPECTED);
    old[0].before(element("div", "", old.map((token) => token.textContent).join("")));
    for (const token of old) token.remove();
  }
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function showAlternatives(token) {
  document.querySelector(".token.current")?.classList.remove("current");
  const box = $("alternatives");
  box.hidden = !token;
  if (!token) return;
  token.classList.add("current");
  const table = document.createElement("table");
  for (const [name, probability, isChosen] of token.alternatives()) {
    const row = table.insertRow();
    row.className = isChosen ? "chosen" : "";
    row.insertCell().textContent = name;
    row.insertCell().textContent = (100 * probability).toFixed(1) + " %";
  }
  box.replaceChildren(table);
  const place = token.getBoundingClientRect();
  const left = Math.min(place.left, document.documentElement.clientWidth - box.offsetWidth - 8);
  box.style.left = Math.max(0, left) + scrollX + "px";
  box.style.top = place.bottom + scrollY + 4 + "px";
}

function moveToken(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") showAlternatives(null);
  if (!step) return;
  event.preventDefault();
  const tokens = [...event.currentTarget.querySelectorAll(".token")];
  const at = tokens.findIndex((token) => token.classList.contains("current"));
  const next = tokens[at < 0 ? (step > 0 ? 0 : tokens.length - 1) : at + step];
  if (next) showAlternatives(next);
}

// The form

function setRunning(isRunning) {
  $("generate").disabled = isRunning;
  $("stop").disabled = !isRunning;
}

function setMode(chat) {
  isChat = chat;
  $("mode-chat").setAttribute("aria-selected", chat);
  $("mode-text").setAttribute("aria-selected", !chat);
  $("prompt-label").textContent = chat ? "Message" : "Prompt";
  $("prompt").placeholder = chat ? "Enter sends, Shift+Enter begins a new line" : "";
  $("generate").textContent = chat ? "Send" : "Generate";
  for (const id of ["conversation", "anew"]) $(id).hidden = !chat;
  $("text").hidden = chat;
}

$("form").onsubmit = (event) => { event.preventDefault(); guarded(generate); };
$("prompt").onkeydown = (event) => {
  const sends = isChat ? !event.shiftKey : event.ctrlKey || event.metaKey;
  if (event.key !== "Enter" || event.isComposing || !sends) return;
  event.preventDefault();
  $("generate").click();
};
$("stop").onclick = () => abort?.abort();
$("anew").onclick = newConversation;
$("key").onchange = () => guarded(connect);
$("mode-text").onclick = () => setMode(false);
$("mode-chat").onclick = () => setMode(true);
for (const box of document.querySelectorAll(".output")) {
  box.onmouseover = (event) => showAlternatives(event.target.closest(".token"));
  box.onmouseleave = box.onblur = () => showAlternatives(null);
  box.onkeydown = moveToken;
}
