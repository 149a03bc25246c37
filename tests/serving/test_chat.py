"""Answers over HTTP: OpenAI's own client, and many at once."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from served import CLIENTS, body, expected, serving


def test_chat_is_the_answer_of_ask(served):
    reply = expected(served)
    found = served.openai().chat.completions.create(**body())
    assert found.choices[0].message.content == reply.answer
    assert [(source["id"], source["text"]) for source in found.sources] == [
        (source.id, source.text) for source in reply.sources
    ]
    assert found.object == "chat.completion" and found.model == "tiny"
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 6
    assert found.usage.total_tokens == found.usage.prompt_tokens + 6


def test_usage_counts_the_prompt_that_the_model_reads(served):
    lengths = []

    def counted(model, args, kwargs):
        lengths.append((args[0] if args else kwargs["input_ids"]).shape[1])

    hook = served.service.model.register_forward_pre_hook(counted, with_kwargs=True)
    try:
        usage = served.openai().chat.completions.create(**body()).usage
    finally:
        hook.remove()
    assert usage.prompt_tokens == lengths[0] and lengths[1:] == [1] * 5


def test_a_stream_is_the_same_answer(served):
    client = served.openai()
    whole = client.chat.completions.create(**body(max_tokens=24))
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**body(max_tokens=24, stream=True, stream_options=options)))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece for piece in pieces if piece) == whole.choices[0].message.content
    assert sum(1 for piece in pieces if piece) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-2].sources == whole.sources
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1


def test_memory_fields_choose_what_is_read(served):
    client = served.openai()

    def ids(**memory):
        found = client.chat.completions.create(**body(), extra_body={"memory": memory})
        return {source["id"] for source in found.sources}

    assert ids(namespaces=["food"]) == {"honey"}
    assert ids(namespaces="*") == {"seine", "nile", "honey"}
    assert ids(where={"n": 1}) == {"seine"}
    assert ids(k=1, mode="lexical") == {"nile"}
    assert ids(namespaces=["nothing"]) == set()


def test_earlier_messages_are_what_a_question_refers_to(served):
    told = [("Where is the Seine?", "In France.\nIndeed."), ("And the Nile?", "In Africa.")]
    messages = [
        {"role": role, "content": text}
        for turn in told
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    question = "And where does it flow?"
    asked = body(messages=[*messages, {"role": "user", "content": question}])
    earlier = [("Where is the Seine?", "In France."), ("And the Nile?", "In Africa.")]
    reply, alone = expected(served, question, earlier=earlier), expected(served, question)
    found = served.openai().chat.completions.create(**asked)
    assert found.choices[0].message.content == reply.answer != alone.answer


def test_sampling_is_seeded_and_stop_texts_stop(served):
    client = served.openai()
    own = body(max_tokens=24, temperature=1.5, seed=7)
    first, again = (client.chat.completions.create(**own).choices[0].message.content for _ in range(2))
    other = client.chat.completions.create(**{**own, "seed": 8}).choices[0].message.content
    greedy = client.chat.completions.create(**body(max_tokens=24)).choices[0].message.content
    assert first == again and len({first, other, greedy}) == 3
    stop = greedy[5:7]
    for stream in (False, True):
        found = client.chat.completions.create(**body(max_tokens=24, stop=stop, stream=stream))
        if stream:
            chunks = list(found)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = found.choices[0].message.content, found.choices[0].finish_reason
        assert text == greedy[: greedy.index(stop)].strip() and reason == "stop"


def test_models_are_listed(served):
    client = served.openai()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.chat.completions.create(**{**body(), "model": "other"})


def test_many_clients_at_once_get_their_own(served):
    for number in range(CLIENTS):
        served.service.store.add([f"Place {number} is town {number * 7}."], ["p"], f"client-{number}")
    questions = [f"Where is place {number}?" for number in range(CLIENTS)]
    wanted = [expected(served, question, f"client-{n}").answer for n, question in enumerate(questions)]

    def one(number):
        memory = {"namespaces": [f"client-{number}"]}
        client = served.openai()
        asked = body(questions[number], stream=bool(number % 2))
        found = client.chat.completions.create(**asked, extra_body={"memory": memory})
        if not number % 2:
            return found.choices[0].message.content, found.sources
        chunks = list(found)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].sources

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(one, range(CLIENTS)))
    for number, (answer, sources) in enumerate(answers):
        assert answer == wanted[number]
        assert [source["namespace"] for source in sources] == [f"client-{number}"]


def test_generations_at_once_do_not_mix(tmp_path, model, tiny_tokenizer):
    with serving(tmp_path / "store", model, tiny_tokenizer, concurrent=4) as own:
        questions = [f"Which river is number {number}?" for number in range(8)]
        names = ["default", "food"] * 4
        wanted = [expected(own, *pair).answer for pair in zip(questions, names)]

        def one(pair):
            memory = {"namespaces": [pair[1]]}
            found = own.openai().chat.completions.create(**body(pair[0]), extra_body={"memory": memory})
            return found.choices[0].message.content

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(one, zip(questions, names))) == wanted
