"use strict";
// The page of the server. Everything that a model or a client has written is set as text, never as
// markup.

let abort = null;  // stops the running stream
let messages = [];  // the conversation, in chat mode
let isChat = false;

async function request(method, path, body, signal) {
  const headers = $("key").value ? { Authorization: "Bearer " + $("key").value } : {};
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new Error(answer?.error?.message ?? `The server answered ${response.status}.`);
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

// Streams

async function* frames(path, body) {
  const { signal } = abort;
  const response = await request("POST", path, { ...body, ...settings(), stream: true }, signal);
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
      yield frame.choices[0];
    }
    await new Promise((resolve) => setTimeout(resolve));  // or a fast model would block the page
  }
}

function settings() {
  const names = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
  return Object.fromEntries(
    names.filter((name) => $(name).value !== "").map((name) => [name, Number($(name).value)]));
}

async function generate() {
  abort = new AbortController();
  setRunning(true);
  const start = performance.now();
  let count = 0;
  try {
    for await (const added of isChat ? converse() : complete()) {
      count += added;
      const rate = Math.round(1000 * count / (performance.now() - start));
      $("speed").textContent = `${count} ${count === 1 ? "token" : "tokens"}, ${rate} tokens/s`;
    }
  } finally {
    setRunning(false);
  }
}

// Generate a text; yields numbers of tokens.
async function* complete() {
  const body = { prompt: $("prompt").value, logprobs: 5 };
  $("text").replaceChildren(span("prompt", body.prompt));
  for await (const choice of frames("v1/completions", body)) {
    addTokens(choice);
    yield choice.logprobs.tokens.length;
  }
}

function addTokens({ text, logprobs }) {
  const { text_offset: offsets, top_logprobs: tops, tokens, token_logprobs: values } = logprobs;
  const characters = [...text];
  appendTokens(offsets.map((offset, i) => {
    const alternatives = Object.entries({ ...tops[i], [tokens[i]]: values[i] }).sort((a, b) => b[1] - a[1]);
    return [
      characters.slice(offset - offsets[0], offsets[i + 1] && offsets[i + 1] - offsets[0]).join(""),
      () => alternatives.map(([name, value]) => [JSON.stringify(name), Math.exp(value), name === tokens[i]]),
    ];
  }));
}

// Ask the question and show its answer; yields numbers of tokens.
async function* converse() {
  const question = { role: "user", content: $("prompt").value };
  const answer = { role: "assistant", content: "" };
  const asked = [...messages, question];
  const nodes = [question, answer].map(addMessage);
  $("prompt").value = "";
  try {
    for await (const choice of frames("v1/chat/completions", { messages: asked, logprobs: true })) {
      answer.content += choice.delta.content ?? "";
      nodes[1].textContent = answer.content;
      yield choice.logprobs?.content.length ?? 0;
    }
  } finally {
    const isShown = nodes[0].isConnected;  // another conversation may have begun
    if (isShown && answer.content) {
      keep([...asked, answer]);
    } else if (isShown) {  // nothing was said: the question can be corrected
      $("prompt").value = question.content;
      for (const node of nodes) node.remove();
    }
  }
}

function addMessage(message) {
  const node = document.createElement("div");
  node.className = "message " + message.role;
  node.textContent = message.content;
  $("conversation").append(node);
  return node;
}

function newConversation() {
  abort?.abort();
  keep([]);
  $("conversation").replaceChildren();
  $("prompt").focus();
}

// Keep the conversation for a reload of the page.
function keep(conversation) {
  messages = conversation;
  history.replaceState(messages, "");
}

// The rest

function setRunning(isRunning) {
  $("generate").disabled = isRunning;
  $("stop").disabled = !isRunning;
}

function setMode(chat) {
  isChat = chat;
  $("mode-chat").setAttribute("aria-selected", chat);
  $("mode-text").setAttribute("aria-selected", !chat);
  $("prompt-label").textContent = chat ? "Message" : "Prompt";
  $("generate").textContent = chat ? "Send" : "Generate";
  for (const id of ["conversation", "anew"]) $(id).hidden = !chat;
  $("text").hidden = chat;
}

async function connect() {
  const { data } = await (await request("GET", "v1/models")).json();
  $("model").textContent = data[0].id;
  const info = await (await request("GET", "tokenizer_info")).json();
  $("modes").hidden = !info.chat_template;
  if (info.chat_template) {
    setMode(true);
    messages = history.state ?? [];
    $("conversation").replaceChildren();
    messages.forEach(addMessage);
  }
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
$("key").onchange = () => guarded(connect);
$("mode-text").onclick = () => setMode(false);
$("mode-chat").onclick = () => setMode(true);
guarded(connect);
