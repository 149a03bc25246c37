"""What the tests of the server share."""

import threading

import pytest
from served import serving
from tiny_models import tiny_model
from transformers import StoppingCriteria

from msa_hf.asking import ask
from msa_hf.serving import generation


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.config.max_position_embeddings = 1024
    return model


@pytest.fixture(scope="module")
def served(tmp_path_factory, model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("served") / "store"
    with serving(folder, model, tiny_tokenizer, body=1 << 16) as own:
        yield own


@pytest.fixture
def gate(monkeypatch):
    """While it is closed, every generation stands still at its second token, unless it is told to stop."""
    opened = threading.Event()
    opened.watches = []

    class Gate(StoppingCriteria):
        def __init__(self, watch):
            self.watch = watch

        def __call__(self, input_ids, scores, **kwargs):
            while self.watch.completion_tokens > 1 and not opened.wait(0.01):
                if self.watch._generation.over:
                    break
            return self.watch(input_ids, scores, **kwargs)

    def gated(*args, stopping_criteria, **options):
        opened.watches.append(stopping_criteria[0])
        return ask(*args, stopping_criteria=[Gate(stopping_criteria[0])], **options)

    monkeypatch.setattr(generation, "ask", gated)
    yield opened
    opened.set()
