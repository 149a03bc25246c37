"""Parts of the server: metrics, turns, pieces of answers."""

import asyncio
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import HANG, body

from msa_hf.serving.answer_text import AnswerText
from msa_hf.serving.errors import RequestError
from msa_hf.serving.turns import Turns


def test_metrics_are_prometheus_text(served):
    before = served.metric('msa_requests_total{route="POST /v1/chat/completions",status="200"}')
    tokens = served.metric('msa_tokens_total{kind="completion"}')
    served.openai().chat.completions.create(**body())
    served.wait_for('msa_requests_total{route="POST /v1/chat/completions",status="200"}', before + 1)
    text = served.http().get("/metrics").text
    assert served.metric('msa_tokens_total{kind="completion"}') == tokens + 6
    assert served.metric("msa_documents ") == served.service.store.count()
    line = re.compile(r'\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+')
    assert all(line.fullmatch(own) for own in text.splitlines() if not own.startswith("# ")), text
    name = 'msa_request_seconds_bucket{route="POST /v1/chat/completions",le='
    buckets = [float(own.rpartition(" ")[2]) for own in text.splitlines() if own.startswith(name)]
    count = served.metric('msa_request_seconds_count{route="POST /v1/chat/completions"}')
    assert buckets == sorted(buckets) and buckets[-1] == count > 0


def test_turns_go_round_among_clients():
    async def play():
        turns, order = Turns(1, 10), []

        async def one(client, name):
            await turns.take(client, HANG)
            order.append(name)
            turns.give_back()

        await turns.take("a", HANG)
        waiting = [asyncio.create_task(one(client, client + n)) for client in "ab" for n in "123"]
        leaver = asyncio.create_task(one("c", "never"))
        await asyncio.sleep(0)
        assert turns.waiting == 7
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        turns.give_back()
        await asyncio.gather(*waiting)
        assert order == ["a1", "b1", "a2", "b2", "a3", "b3"]
        assert (turns.running, turns.waiting) == (0, 0)

    asyncio.run(play())


def test_a_turn_that_is_given_to_one_who_leaves_goes_on():
    async def play():
        turns = Turns(1, 10)
        await turns.take("a", HANG)
        leaver = asyncio.create_task(turns.take("b", HANG))
        await asyncio.sleep(0)
        turns.give_back()
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert (turns.running, turns.waiting) == (0, 0)
        await turns.take("c", HANG)
        with pytest.raises(RequestError, match="longer"):
            await turns.take("d", 0.0)
        assert turns.waiting == 0

    asyncio.run(play())


@given(
    text=st.text(st.sampled_from("ab \n\ufffd"), max_size=20),
    stops=st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=3), max_size=2),
    first_line=st.booleans(),
)
def test_pieces_of_an_answer_are_the_answer(text, stops, first_line):
    shown = AnswerText(stops, first_line)
    pieces = []
    for end in range(len(text) + 1):
        pieces.append(shown.advance(text[:end]))
        if shown.stopped:
            break
    written = text[:end].strip()
    answer = written.partition("\n")[0].strip() if first_line else written
    places = [answer.find(stop) for stop in stops if stop in answer]
    pieces.append(shown.finish(answer))
    assert "".join(pieces) == shown.shown == answer[: min(places, default=len(answer))].strip()
