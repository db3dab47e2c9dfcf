"""Chat completions of scripts/serve.py, by OpenAI's client."""

from simplernn_jax import load_model
from simplernn_jax.data.chat_template import ChatTemplate
from simplernn_jax.inference import Conversation

ASKED = {
    "model": "chat",
    "messages": [
        {"role": "developer", "content": "brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "hä"}, {"type": "text", "text": "?"}],
        },
    ],
    "seed": 3,
    "max_completion_tokens": 2000,
}


def test_streamed_and_not(client):
    whole = client.chat.completions.create(**ASKED, n=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) == 3
    for choice in whole.choices:
        assert choice.message.role == "assistant"
        assert "\x04" not in choice.message.content
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
        spelled = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        # The end of the turn may complete a broken character, and then belongs to the text.
        found = spelled.decode("utf-8", "replace").removesuffix("\x04")
        assert found == choice.message.content
    assert "stop" in {choice.finish_reason for choice in whole.choices}
    chunks = list(
        client.chat.completions.create(
            **ASKED, n=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    texts, roles = ["", "", ""], []
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 3
    # An answer can be sent back as it came.
    messages = [*ASKED["messages"], whole.choices[0].message, {"role": "user", "content": "more"}]
    client.chat.completions.create(**ASKED | {"messages": messages})


def test_greedy_answers_are_those_of_the_library(chat_workdir, server):
    model, tokenizer, config = load_model(str(chat_workdir))
    conversation = Conversation(model, tokenizer, ChatTemplate(config.data.template))
    messages = []
    for question in ("a", "bc"):
        messages.append({"role": "user", "content": question})
        answer = conversation.ask(question, max_new_tokens=20)
        body = {"messages": messages, "max_tokens": 20, "temperature": 0}
        _, _, found = server.send("POST", "/v1/chat/completions", body)
        assert found["choices"][0]["message"]["content"] == answer
        messages.append({"role": "assistant", "content": answer})


def test_a_conversation_continues_a_state(server):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asked = {"role": "user", "content": "c"}
    fields = {"max_tokens": 20, "seed": 1, "logprobs": True}
    text = server.send("GET", "/tokenizer_info")[2]["chat_template"]
    prompt = ChatTemplate(text).render(said)
    _, _, state = server.send("POST", "/v1/states", {"prompt": prompt, "name": "s"})
    assert state["tokens"] == 1 + len(prompt)
    bodies = [{"messages": [*said, asked]}, {"messages": [asked], "state": "s"}]
    answers = [server.send("POST", "/v1/chat/completions", body | fields)[2] for body in bodies]
    contents = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert contents[0] == contents[1]
