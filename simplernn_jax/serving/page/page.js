"use strict";
// The page of the server. Everything that a model or a client has written is set as text, never as
// markup.

let abort = null;        // stops the running stream
let shown = "";          // prompt and generated text, as shown
let origin = null;       // name of the state that the text continues
let messages = [];       // the conversation, in chat mode
let isChat = false;

function headers(more) {
  const key = $("key").value;
  return key ? { ...more, Authorization: "Bearer " + key } : { ...more };
}

async function request(method, path, body, signal) {
  const isJson = body !== undefined && !(body instanceof Blob);
  const response = await fetch(path, {
    method,
    headers: headers(isJson ? { "Content-Type": "application/json" } : {}),
    body: isJson ? JSON.stringify(body) : body,
    signal,
  });
  if (!response.ok) throw new Error(await errorOf(response));
  return response;
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

function showError(error) {
  $("error").textContent = error ? String(error.message ?? error) : "";
  $("error").hidden = !error;
}

async function guarded(action) {
  showError(null);
  try {
    await action();
  } catch (error) {
    if (error.name !== "AbortError") showError(error);
  }
}

// Streams

async function* frames(path, body) {
  abort = new AbortController();
  const { signal } = abort;
  const response = await request("POST", path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const frame = JSON.parse(data);
      if (frame.error) throw new Error(frame.error.message);
      signal.throwIfAborted();  // frames that have arrived belong to what is no longer shown
      yield frame;
    }
    await new Promise((resolve) => setTimeout(resolve));  // or a fast model would block the page
  }
}

function settings() {
  const chosen = {};
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    if ($(name).value !== "") chosen[name] = Number($(name).value);
  }
  return chosen;
}

async function generate() {
  setRunning(true);
  const start = performance.now();
  let count = 0;
  const counted = (added) => {
    count += added;
    const seconds = (performance.now() - start) / 1000;
    $("speed").textContent = `${count} ${count === 1 ? "token" : "tokens"}, ${Math.round(count / seconds)} tokens/s`;
  };
  try {
    await (isChat ? converse(counted) : complete(counted));
  } finally {
    setRunning(false);
  }
}

async function complete(counted) {
  const prompt = $("prompt").value;
  const body = { prompt, ...settings(), logprobs: 5 };
  if (origin) body.state = origin;
  shown = prompt;
  $("text").replaceChildren(span("prompt", prompt));
  for await (const frame of frames("v1/completions", body)) {
    const choice = frame.choices[0];
    addTokens(choice);
    counted(choice.logprobs.tokens.length);
  }
}

async function converse(counted) {
  const said = messages;  // of this conversation: another may begin while the answer streams
  said.push({ role: "user", content: $("prompt").value });
  $("prompt").value = "";
  const answer = { role: "assistant", content: "" };
  addMessage(said.at(-1));
  const node = addMessage(answer);
  const body = { messages: [...said], ...settings(), logprobs: true };
  try {
    for await (const frame of frames("v1/chat/completions", body)) {
      const choice = frame.choices[0];
      answer.content += choice.delta.content ?? "";
      node.textContent = answer.content;
      counted(choice.logprobs?.content.length ?? 0);
    }
  } catch (error) {
    if (!answer.content && said === messages) {  // nothing was said: the question can be corrected
      const question = said.pop().content;
      if (isChat) $("prompt").value = question;
      node.previousSibling.remove();
      node.remove();
    }
    throw error;
  } finally {
    if (answer.content) said.push(answer);
    keepConversation();
  }
}

function newConversation() {
  abort?.abort();
  messages = [];
  keepConversation();
  $("conversation").replaceChildren();
  $("prompt").focus();
}

// For a reload of the page.
function keepConversation() {
  stored((storage) => storage.setItem($("model").textContent, JSON.stringify(messages)));
}

function stored(access) {
  try {
    return access(sessionStorage);
  } catch {  // the browser blocks it, or it is full
    return null;
  }
}

function addMessage(message) {
  const node = document.createElement("div");
  node.className = "message " + message.role;
  node.textContent = message.content;
  $("conversation").append(node);
  return node;
}

function addTokens(choice) {
  const { text_offset: offsets, top_logprobs: tops, tokens, token_logprobs: values } = choice.logprobs;
  const characters = [...choice.text];
  const first = offsets.length ? offsets[0] : 0;
  appendTokens(offsets.map((offset, i) => {
    const end = i + 1 < offsets.length ? offsets[i + 1] - first : characters.length;
    const alternatives = Object.entries({ ...tops[i], [tokens[i]]: values[i] }).sort((a, b) => b[1] - a[1]);
    return [
      characters.slice(offset - first, end).join(""),
      () => alternatives.map(([name, value]) => [JSON.stringify(name), Math.exp(value), name === tokens[i]]),
    ];
  }));
  shown += choice.text;
}

// States

async function saveState() {
  const body = { prompt: shown };
  if (origin) body.parent = origin;
  if ($("name").value) body.name = $("name").value;
  await request("POST", "v1/states", body);
  $("name").value = "";
  await listStates();
}

async function listStates() {
  const { data } = await (await request("GET", "v1/states")).json();
  const byParent = Map.groupBy(data, (state) =>
    data.some((other) => other.id === state.parent) ? state.parent : null);
  const listed = new Set();
  const items = (parent) => (byParent.get(parent) ?? []).filter((state) => !listed.has(state.id)).map((state) => {
    listed.add(state.id);
    return stateItem(state, items);
  });
  // Uploaded states may name each other as parents.
  const roots = [...items(null), ...data.flatMap((state) => items(state.parent))];
  $("states").replaceChildren(...roots);
  $("no-states").hidden = data.length > 0;
}

function stateItem(state, items) {
  const item = document.createElement("li");
  const details = `${state.tokens ?? "?"} tokens, ${Math.round(state.bytes / 1000)} kB`;
  const buttons = [
    ["Continue", () => continueFrom(state.id)],
    ["Fork", async () => { await request("POST", `v1/states/${state.id}/fork`, {}); await listStates(); }],
    ["Download", () => download(state.id)],
    ["Delete", async () => { await request("DELETE", `v1/states/${state.id}`); if (origin === state.id) continueFrom(null); await listStates(); }],
  ].map(([label, action]) => [label, () => guarded(action)]);
  const box = stateBox(state.id, details, state.text, buttons);
  item.append(box);
  const children = items(state.id);
  if (children.length) {
    const list = document.createElement("ul");
    list.append(...children);
    item.append(list);
  }
  return item;
}

function continueFrom(name) {
  abort?.abort();
  origin = name;
  $("origin").hidden = !name;
  $("origin-name").textContent = name ?? "";
  $("prompt").value = "";
  shown = "";
  $("text").replaceChildren();
  if (name) setMode(false);
  $("prompt").focus();
}

async function download(name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await (await request("GET", `v1/states/${name}/file`)).blob());
  link.download = name + ".safetensors";
  link.click();
  URL.revokeObjectURL(link.href);
}

async function upload() {
  const file = $("upload").files[0];
  if (!file) return;
  const name = file.name.replace(/\.safetensors$/, "").replace(/[^A-Za-z0-9._-]|^\./g, "-").slice(0, 64);
  $("upload").value = "";
  await request("PUT", `v1/states/${name}/file`, file);
  await listStates();
}

// The rest

function setRunning(isRunning) {
  $("generate").disabled = isRunning;
  $("stop").disabled = !isRunning;
  $("after").hidden = isRunning || isChat || !shown;
}

function setMode(chat) {
  isChat = chat;
  $("mode-chat").setAttribute("aria-selected", chat);
  $("mode-text").setAttribute("aria-selected", !chat);
  $("prompt-label").textContent = chat ? "Message" : "Prompt";
  $("generate").textContent = chat ? "Send" : "Generate";
  $("conversation").hidden = !chat;
  $("anew").hidden = !chat;
  $("text").hidden = chat;
  $("after").hidden = chat || !shown;
}

async function connect() {
  const { data } = await (await request("GET", "v1/models")).json();
  $("model").textContent = data[0].id;
  const info = await (await request("GET", "tokenizer_info")).json();
  $("modes").hidden = !info.chat_template;
  if (info.chat_template) {
    setMode(true);
    messages = JSON.parse(stored((storage) => storage.getItem(data[0].id)) ?? "[]");
    $("conversation").replaceChildren(...messages.map(addMessage));
  }
  await listStates();
}

$("form").onsubmit = (event) => { event.preventDefault(); guarded(generate); };
$("prompt").onkeydown = (event) => {
  const sends = isChat ? !event.shiftKey : event.ctrlKey || event.metaKey;
  if (event.key !== "Enter" || event.isComposing || !sends) return;
  event.preventDefault();
  if (!$("generate").disabled && $("prompt").value) guarded(generate);
};
$("stop").onclick = () => abort?.abort();
$("anew").onclick = newConversation;
$("save").onclick = () => guarded(saveState);
$("leave").onclick = () => continueFrom(null);
$("upload").onchange = () => guarded(upload);
$("key").onchange = () => guarded(connect);
$("mode-text").onclick = () => setMode(false);
$("mode-chat").onclick = () => { if (!isChat) { continueFrom(null); setMode(true); } };
guarded(connect);
