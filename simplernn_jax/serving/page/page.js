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
let isRunning = false;
let isChat = false;
let tree = newTree();  // versions of all messages of the conversation, in chat mode
let messages = [];  // those that are shown
let edited = null;  // where the next message becomes another version
const views = new WeakMap();  // elements of messages
const texts = [];  // versions in text mode: prompt, and nodes of the text

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
  if (history.state?.next) tree = history.state;
  show();
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

async function run(action) {
  abort = new AbortController();
  showAlternatives(null);
  setRunning(true);
  try {
    await action(abort.signal);
  } finally {
    setRunning(false);
  }
}

async function complete(signal) {
  const prompt = $("prompt").value;
  $("text").replaceChildren(element("span", "prompt", prompt));
  try {
    await write($("text"), source.complete(prompt, settings(), signal));
  } finally {
    const nodes = [...$("text").childNodes];
    if (nodes.length > 1) texts.chosen = texts.push({ prompt, nodes }) - 1;
  }
}

async function converse(signal) {
  const content = $("prompt").value.trim();
  if (!content) return;
  const place = edited;
  const { before, role } = place ?? { before: messages.at(-1) ?? tree, role: "user" };
  const message = add(before, role, content);
  edited = null;
  $("prompt").value = "";
  if (role === "user") await answer(message, signal).finally(() => {
    if (message.next.length || !messages.includes(message)) return;
    drop(before, message);  // nothing was said: the question can be corrected
    edited = place;
    $("prompt").value = content;
  });
}

// Answer a question once more.
async function answer(question, signal) {
  const reply = add(question, "assistant", "");
  show();
  const node = viewOf(reply);
  try {
    await write(node, source.answer(messages.slice(0, -1), settings(), signal));
  } finally {
    reply.content = node.textContent;
    if (!reply.content) drop(question, reply);
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

// Versions: each node of the tree has the versions of what follows it, one of which is shown

function newTree() {
  return { next: [], chosen: 0 };
}

function add(before, role, content) {
  const node = { role, content, ...newTree() };
  before.chosen = before.next.push(node) - 1;
  return node;
}

function drop(before, node) {
  before.next = before.next.filter((other) => other !== node);
  before.chosen = Math.max(0, before.next.length - 1);
}

function edit(before, { role, content }) {
  edited = { before, role, draft: edited?.draft ?? $("prompt").value };
  $("prompt").value = content;
  show();
  $("prompt").focus();
}

// Buttons below a text; choose(i) shows its version i.
function tools(versions, chosen, choose, actions) {
  const box = element("div", "tools", "");
  const button = (label, text, action) => {
    const node = element("button", "", text);
    node.type = "button";
    node.ariaLabel = label;
    node.onclick = () => {
      const place = [...document.querySelectorAll(".tools")].indexOf(box);
      edited = null;
      action();
      if (edited || box.isConnected) return;
      const now = document.querySelectorAll(".tools")[place];  // in place of this one
      now?.querySelector(`[aria-label="${label}"]`)?.focus();
    };
    box.append(node);
  };
  if (versions > 1) {
    button("Previous version", "‹", () => choose((chosen + versions - 1) % versions));
    box.append(`${chosen + 1}/${versions}`);
    button("Next version", "›", () => choose((chosen + 1) % versions));
  }
  for (const [name, action] of Object.entries(actions)) button(name, name, action);
  return box;
}

function newConversation() {
  abort?.abort();
  tree = newTree();
  edited = null;
  show();
  $("prompt").focus();
}

// Text

function element(name, kind, text) {
  const node = document.createElement(name);
  node.className = kind;
  node.textContent = text;
  return node;
}

function viewOf(message) {
  const { role, content } = message;
  if (!views.has(message)) views.set(message, element("div", "message " + role, content));
  return views.get(message);
}

// Show the chosen versions, up to the one that is edited, and keep them for a reload of the page.
function show() {
  if (!isRunning) history.replaceState(tree, "");  // else a reload would keep an empty answer
  messages = [];
  const nodes = [];
  for (let before = tree; before !== edited?.before && before.next.length; before = messages.at(-1)) {
    const node = before.next[before.chosen], at = before;
    messages.push(node);
    nodes.push(viewOf(node));
    if (!isRunning) nodes.push(tools(at.next.length, at.chosen, (i) => { at.chosen = i; show(); }, {
      Edit: () => edit(at, node),
      ...node.role === "assistant" && { Regenerate: () => guarded(() => run((signal) => answer(at, signal))) },
    }));
  }
  const box = $("conversation");
  box.replaceChildren(...nodes);
  box.scrollTop = box.scrollHeight;
  showVersion(texts.chosen);
}

function showVersion(i) {
  $("versions").replaceChildren();
  if (isRunning || !texts[i]) return;
  texts.chosen = i;
  const { nodes } = texts[i];
  if ($("text").firstChild !== nodes[0]) $("text").replaceChildren(...nodes);
  $("versions").append(tools(texts.length, i, (other) => {
    $("prompt").value = texts[other].prompt;
    showVersion(other);
  }, { Edit: () => {
    $("prompt").value = $("text").textContent;
    $("prompt").focus();
  } }));
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

function setRunning(running) {
  isRunning = running;
  show();
  $("generate").disabled = running;
  $("stop").disabled = !running;
}

function setMode(chat) {
  isChat = chat;
  $("mode-chat").setAttribute("aria-selected", chat);
  $("mode-text").setAttribute("aria-selected", !chat);
  $("prompt-label").textContent = chat ? "Message" : "Prompt";
  $("prompt").placeholder = chat ? "Enter sends, Shift+Enter begins a new line" : "";
  $("generate").textContent = chat ? "Send" : "Generate";
  for (const id of ["conversation", "anew"]) $(id).hidden = !chat;
  for (const id of ["text", "versions"]) $(id).hidden = chat;
}

$("form").onsubmit = (event) => { event.preventDefault(); guarded(() => run(isChat ? converse : complete)); };
$("prompt").onkeydown = (event) => {
  if (event.key === "Escape" && edited) {
    $("prompt").value = edited.draft;
    edited = null;
    show();
  }
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
