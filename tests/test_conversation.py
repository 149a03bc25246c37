"""Conversations: turns are documents of the store, found again by later questions, and by no one else's."""

import json
import multiprocessing
from datetime import datetime

import pytest
import torch
from tiny_models import tiny_model

from msa_hf import asking, conversation
from msa_hf.asking import with_earlier
from msa_hf.conversation import Conversation, refers_back
from msa_hf.modeling.prompts_msa import answer_prompt
from msa_hf.store import MemoryStore, StoreLockedError

FACTS = {
    "ada": "Ada Lovelace\nAda Lovelace wrote the first program. She was born in London.",
    "curie": "Marie Curie\nMarie Curie discovered radium. She was born in Warsaw.",
    "honey": "Honey\nHoney never spoils.",
    "gold": "Gold\nGold is dense.",
    "wax": "Wax\nWax melts.",
}
ANSWERS = {"first program": "Ada Lovelace", "born": "London", "spoils": "Honey"}


def scripted(model, asked):
    """Makes a tiny model answer by key words of the last question; `asked` gets (question, texts)."""

    def answer_from(_, questions, documents, tokenizer, *args, **options):
        last = questions[0].rpartition("Question: ")[2]
        asked.append((questions[0], documents[0]))
        answer = next((answer for words, answer in ANSWERS.items() if words in last), "unknown")
        return [torch.tensor([5])], [answer]

    return answer_from


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    # Untrained routers: words alone find documents, so that a test can say which.
    return tiny_model(
        retrieval="router", max_position_embeddings=2048, routers_trained=False, lexical_prior=True
    ), tiny_tokenizer


@pytest.fixture
def asked(model, monkeypatch):
    from msa_hf.modeling import interleave_msa

    found = []
    monkeypatch.setattr(interleave_msa, "answer_from", scripted(model[0], found))
    return found


@pytest.fixture
def folder(tmp_path, model):
    with MemoryStore.create(tmp_path / "store", *model) as store:
        store.add(list(FACTS.values()), list(FACTS))
    return tmp_path / "store"


def cited(reply):
    return [(source.namespace, source.id) for source in reply.sources]


def test_a_follow_up_finds_what_it_refers_to(folder, model, asked):
    with Conversation(folder, "lives", *model) as talk:
        first = talk.ask("Who wrote the first program?")
        assert first.answer == "Ada Lovelace" and cited(first)[0] == ("default", "ada")
        second = talk.ask("And where was she born?")
    assert second.question == "And where was she born?" and second.answer == "London"
    assert ("default", "ada") in cited(second)
    question, texts = asked[-1]
    assert question == (
        "Who wrote the first program?\nAnswer: Ada Lovelace\n\nQuestion: And where was she born?"
    )
    assert FACTS["ada"] in texts
    # Alone, it would have found whoever was born.
    with Conversation(folder, "other", *model) as talk:
        alone = talk.ask("And where was she born?")
    assert asked[-1][0] == "And where was she born?" and {own for _, own in cited(alone)[:2]} == {
        "ada",
        "curie",
    }


def test_a_question_that_stands_alone_is_asked_alone(folder, model, asked):
    with Conversation(folder, "lives", *model) as talk:
        talk.ask("Who wrote the first program?")
        reply = talk.ask("Which food never spoils?")
    assert asked[-1][0] == "Which food never spoils?" and cited(reply)[0] == ("default", "honey")


def test_a_chain_of_follow_ups_goes_back_to_its_subject(folder, model, asked):
    with Conversation(folder, "lives", *model) as talk:
        for question in (
            "What melts?",
            "Who wrote the first program?",
            "And where was she born?",
            "And when?",
        ):
            talk.ask(question)
            if question.startswith("Who"):
                assert talk.referred_to("And how?") == [("Who wrote the first program?", "Ada Lovelace")]
        assert talk.referred_to("And how?") == [
            ("Who wrote the first program?", "Ada Lovelace"),
            ("And where was she born?", "London"),
            ("And when?", "unknown"),
        ]
        talk.ask("And how?")
        assert len(talk.referred_to("And why?")) == conversation.TURNS_BEFORE
    assert "first program" in asked[-1][0] and "melts" not in asked[-1][0]


def test_turns_in_the_prompt_displace_no_document(folder, model, asked):
    with Conversation(folder, "lives", *model) as talk:
        talk.ask("Who wrote the first program?")
        talk.ask("And what is gold, what melts, where was radium found, what spoils?")
        reply = talk.ask("And she?")
        assert len(talk.referred_to("And she?")) == 3 and len(reply.sources) == 6
        assert [namespace for namespace, _ in cited(reply)].count("default") == 4
        assert len(talk.ask("And he?", k=2).sources) == 2


def test_turns_survive_and_are_sources_later(folder, model, asked):
    with Conversation(folder, "lives", *model) as talk:
        talk.ask("Who wrote the first program?")
    with Conversation(folder, "lives", *model) as talk:  # weeks later
        [turn] = talk.turns()
        assert (turn.question, turn.answer) == ("Who wrote the first program?", "Ada Lovelace")
        assert datetime.fromisoformat(turn.time).utcoffset().total_seconds() == 0
        assert turn.sources[0] == {"namespace": "default", "id": "ada"}
        reply = talk.ask("Which program did somebody write first?")
        assert ("conversation/lives", turn.id) in cited(reply)
        [source] = [own for own in reply.sources if own.namespace == "conversation/lives"]
        assert source.text == "Who wrote the first program?\nAda Lovelace"
        assert source.title == "Who wrote the first program?" and source.source == turn.time
        assert "And where was she born?" and talk.referred_to("And where was she born?")
        assert [own.question for own in talk.turns(1)] == ["Which program did somebody write first?"]


def test_the_turns_of_others_are_never_read(folder, model, asked):
    with Conversation(folder, "one", *model, namespaces="*") as one:
        one.ask("Who wrote the first program?")
    with MemoryStore.open(folder, *model) as store:
        store.add(["Programs\nPrograms are long."], ["long"], "notes")
    with Conversation(folder, "two", *model, namespaces="*") as two:
        reply = two.ask("Who wrote the first program, and which programs are long?", k=9)
        assert two.turns(1) and two.referred_to("And she?")[0][0].startswith(
            "Who wrote the first program, and"
        )
    assert {namespace for namespace, _ in cited(reply)} == {"default", "notes"}
    with pytest.raises(ValueError, match="another conversation"):
        Conversation(folder, "two", *model, namespaces=["default", "conversation/one"])
    for name in ("", " ", "a\nb", None):
        with pytest.raises(ValueError, match="name must be"):
            Conversation(folder, name, *model)
    with Conversation(folder, "two", *model, namespaces="conversation/two") as own:
        assert cited(own.ask("Who wrote the first program?"))[0][0] == "conversation/two"


def test_the_store_stays_free_for_others(folder, model, asked):
    with Conversation(folder, "one", *model) as one, Conversation(folder, "two", *model) as two:
        with Conversation(folder, "one", *model) as same:
            one.ask("Who wrote the first program?")
            two.ask("What spoils?")
            same.ask("And where was she born?")
            assert [turn.question for turn in one.turns()] == [turn.question for turn in same.turns()]
        assert asked[-1][0].startswith("Who wrote the first program?")
        with MemoryStore.open(folder) as store:  # nobody has it open for writing between turns
            assert store.count("conversation/one") == 2 and store.count("conversation/two") == 1
            assert store.verify() == []
        with MemoryStore.open(folder, *model) as store:
            store.add(["Tin\nTin melts, too."], ["tin"])
        assert ("default", "tin") in cited(one.ask("Which tin melts?"))


def test_a_turn_waits_while_another_writes(folder, model, asked, monkeypatch, caplog):
    monkeypatch.setattr(conversation, "TRIES", 1)
    with Conversation(folder, "one", *model) as talk:
        with MemoryStore.open(folder):
            reply = talk.ask("Who wrote the first program?")
            assert reply.answer == "Ada Lovelace" and "not yet in the store" in caplog.text
            assert [turn.question for turn in talk.turns()] == ["Who wrote the first program?"]
            assert talk.referred_to("And where was she born?")
        talk.ask("What spoils?")
    with Conversation(folder, "one", *model) as talk:
        assert [turn.question for turn in talk.turns()] == ["Who wrote the first program?", "What spoils?"]


def test_a_turn_is_written_when_a_writer_has_gone(folder, model, asked, monkeypatch):
    """The other writer lets go after the second try."""
    tried, original = [], MemoryStore.open.__func__

    def busy(cls, *arguments, **options):
        if not options.get("read_only"):
            tried.append(1)
            if len(tried) < 3:
                raise StoreLockedError("busy")
        return original(cls, *arguments, **options)

    monkeypatch.setattr(MemoryStore, "open", classmethod(busy))
    with Conversation(folder, "one", *model) as talk:
        talk.ask("Who wrote the first program?")
        assert len(tried) >= 3 and not talk._unwritten


def _talk(folder, name, count):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    path = folder.with_name("model")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    with Conversation(folder, name, model, tokenizer) as talk:
        for number in range(count):
            talk.ask(f"What spoils, number {number}?", max_new_tokens=1)


def test_several_processes_talk_at_once(folder, model):
    model[0].save_pretrained(folder.with_name("model"))
    model[1].save_pretrained(folder.with_name("model"))
    context = multiprocessing.get_context("spawn")
    talkers = [context.Process(target=_talk, args=(folder, name, 4)) for name in ("a", "b", "b")]
    for process in talkers:
        process.start()
    for process in talkers:
        process.join(300)
        assert process.exitcode == 0
    with MemoryStore.open(folder) as store:
        assert store.count("conversation/a") == 4 and store.count("conversation/b") == 8
        assert store.verify() == []


def test_uses_are_counted_for_every_namespace(folder, model, asked, monkeypatch):
    used = []
    monkeypatch.setattr(MemoryStore, "record_use", lambda self, ids, namespace: used.append((namespace, ids)))
    with Conversation(folder, "one", *model) as talk:
        talk.ask("Who wrote the first program?")
        used.clear()
        reply = talk.ask("Who wrote the first program?")
    pairs = [(namespace, own) for namespace, ids in used for own in ids]
    assert sorted(pairs) == sorted(cited(reply)) and len({namespace for namespace, _ in pairs}) == 2


def test_note_use_gives_up_quietly(folder, model, asked):
    with Conversation(folder, "one", *model) as talk:
        reply = talk.ask("Who wrote the first program?")
    with MemoryStore.open(folder) as store:
        asking.note_use(folder, reply.sources)  # another writer has it
        store.delete([own.id for own in reply.sources if own.namespace == "default"])
    asking.note_use(folder, reply.sources)  # they are gone


def test_odd_questions_and_turns(folder, model, asked):
    with Conversation(folder, "odd", *model) as talk:
        with pytest.raises(ValueError, match="must not be empty"):
            talk.ask("  ")
        assert talk.turns() == []
        talk.ask("Tell me\nabout\tgold " + "and wax " * 150)
        [turn] = talk.turns()
        assert "\n" not in turn.text.partition("\n")[0] and len(turn.text) <= 2 * conversation.LONGEST + 1
    with MemoryStore.open(folder, *model) as store:  # someone edits it by hand
        store.add(["A question?\nAn answer."], ["by hand"], "conversation/odd")
        store.forget([turn.id], "conversation/odd")
    with Conversation(folder, "odd", *model) as talk:
        [turn] = talk.turns()
        assert (turn.question, turn.answer, turn.sources) == ("A question?", "An answer.", [])


@pytest.mark.parametrize(
    "question, expected",
    [
        ("And where was she born?", True),
        ("Where was she born?", True),
        ("What about the Nile?", True),
        ("Why?", True),
        ("And the tallest building in Paris?", True),
        ("How high is it above the sea?", True),
        ("Who wrote the first program?", False),
        ("Which river that flows through Paris is longest?", False),
        ("Is there a river in Paris?", False),
        ("Andorra has which capital city?", False),
    ],
)
def test_refers_back(question, expected):
    assert refers_back(question) is expected


def test_earlier_turns_look_like_the_prompts_own(tiny_tokenizer):
    """In the completion style, a question with earlier ones is a dialogue in the prompt's own words."""
    assert with_earlier("Where?", []) == "Where?"
    asked = with_earlier("Why?", [("Who?", "Ada"), ("When?", "1843")])
    _, prompt = answer_prompt("examples", tiny_tokenizer, asked, ["Ada\nAda wrote."])
    assert prompt == (
        "Ada\nAda wrote.\n\nQuestion: Who?\nAnswer: Ada\n\nQuestion: When?\nAnswer: 1843\n\n"
        "Question: Why?\nAnswer:"
    )


def test_a_real_generation_and_its_json(folder, model):
    with Conversation(folder, "real", *model) as talk:
        talk.ask("Who wrote the first program?", max_new_tokens=3)
        reply = talk.ask("And she?", max_new_tokens=3, k=2)
    assert json.loads(json.dumps(reply.to_dict()))["question"] == "And she?" and reply.sources
