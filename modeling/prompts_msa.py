"""Prompt formats: how documents, questions and retrieved texts are written for a model.

"msa" is the format of MSA-4B (specs of the reference's prompts); "chat" uses the tokenizer's own chat template.
"""

from collections.abc import Sequence

DOCUMENT = "<|im_start|>[{number}]. {text}[{number}]<|im_end|>"
HEAD = "<|im_start|>user\n"
QUESTION = (
    "\nPlease answer the question based on the above historical document information\n\n{question}\n"
    "Please return all documents related to the question\n"
)
TAIL = "<|im_end|>\n"
RESPONSE = "<|im_start|>"
END_OF_DOCUMENTS = "<|object_ref_end|>"
END_OF_RETRIEVAL = "<End-of-Retrieve>"
ANSWER_MARK = "The answer to the question is:"
END_OF_TURN = "<|im_end|>"

INSTRUCTION = "Answer the question with a few words from the documents. Give only the answer."
CLOSED_BOOK = "Answer the question with a few words. Give only the answer."


def document_prompt(prompt_format: str, number: int, text: str) -> str:
    """The text that is encoded for document `number` (from 0) of a memory."""
    return DOCUMENT.format(number=number, text=text) if prompt_format == "msa" else text


def template_head(prompt_format: str) -> str:
    """Text whose K/V stand before everything in every layer; empty where the format has none."""
    return HEAD if prompt_format == "msa" else ""


def msa_prompt(question: str) -> list[tuple[str, int]]:
    """MSA-4B's prompt after the template head, as (text, doc_id) parts; doc_id 0 routes."""
    return [(QUESTION.format(question=question), 0), (TAIL, -2), (RESPONSE, -1)]


def injected_documents(numbers: Sequence[int], texts: Sequence[str]) -> str:
    """What the runtime appends after the model has named documents (generative interleave, paper section 3.5)."""
    return "\n".join(f"[{number}]. {text}" for number, text in zip(numbers, texts)) + f"\n{END_OF_DOCUMENTS}"


def injected_question(question: str) -> str:
    """What the runtime appends after the model has ended retrieval."""
    return f"<|im_start|>The user's question is: {question}\n{END_OF_DOCUMENTS}"


def chat_prompt(tokenizer, question: str, documents: Sequence[str]) -> str:
    """The prompt for an answer from original texts, in the tokenizer's chat template if it has one.

    The most relevant document is written last, nearest to the question.
    """
    parts = [f"Document: {text.strip()}" for text in reversed(documents)]
    instruction = INSTRUCTION if documents else CLOSED_BOOK
    content = "\n\n".join([*parts, f"{instruction}\nQuestion: {question}"])
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return f"{content}\nAnswer:"
