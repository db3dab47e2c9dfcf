"use strict";
// The server as the source of text of page.js.

async function request(method, path, body, signal) {
  const headers = $("key").value ? { Authorization: "Bearer " + $("key").value } : {};
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new Error(answer?.error?.message ?? `The server answered ${response.status}.`);
}

// The choices of a stream.
async function* choices(path, body, signal) {
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
      yield frame.choices[0];
    }
    await nextTask();  // or a fast model would block the page
  }
}

function piecesOf(text, { text_offset: offsets, top_logprobs: tops, tokens, token_logprobs: values }) {
  const characters = [...text];
  return offsets.map((offset, i) => {
    const alternatives = Object.entries({ ...tops[i], [tokens[i]]: values[i] }).sort((a, b) => b[1] - a[1]);
    return [
      characters.slice(offset - offsets[0], offsets[i + 1] && offsets[i + 1] - offsets[0]).join(""),
      () => alternatives.map(([name, value]) => [JSON.stringify(name), Math.exp(value), name === tokens[i]]),
    ];
  });
}

start({
  async connect() {
    const { data } = await (await request("GET", "v1/models")).json();
    const { chat_template } = await (await request("GET", "tokenizer_info")).json();
    return { name: data[0].id, facts: "served by simplernn_jax", hasChat: Boolean(chat_template) };
  },

  async *complete(prompt, settings, signal) {
    const body = { ...settings, prompt, logprobs: 5 };
    for await (const { text, logprobs } of choices("v1/completions", body, signal)) {
      yield { pieces: piecesOf(text, logprobs), count: logprobs.tokens.length };
    }
  },

  async *answer(messages, settings, signal) {
    const body = { ...settings, messages, logprobs: true };
    for await (const { delta, logprobs } of choices("v1/chat/completions", body, signal)) {
      yield { pieces: [[delta.content ?? ""]], count: logprobs?.content.length ?? 0 };
    }
  },
});
