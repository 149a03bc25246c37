"""Prompt formats: how documents, questions and retrieved texts are written for a model.

"msa" is the format of MSA-4B (specs of the reference's prompts); "chat" uses the tokenizer's own chat
template.
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
    """What the runtime appends after the model has named documents (paper section 3.5)."""
    return "".join(f"[{number}]. {text}\n" for number, text in zip(numbers, texts)) + END_OF_DOCUMENTS


def injected_question(question: str) -> str:
    """What the runtime appends after the model has ended retrieval."""
    return f"<|im_start|>The user's question is: {question}\n{END_OF_DOCUMENTS}"


def answer_prompt(style: str, tokenizer, question: str, documents: Sequence[str]) -> tuple[str, str]:
    """(prefix that all questions share, prompt) for an answer from original texts, most relevant first; none
    is closed book.

    Styles: "chat" is the tokenizer's chat template with an instruction; "examples" shows worked examples
    first and continues plain text, which small models follow far better. The most relevant document is
    written last, nearest to the question.
    """
    nearest_last = list(reversed(documents))
    if style == "examples":
        shown = [(texts if documents else (), asked, answer) for texts, asked, answer in EXAMPLES]
        prefix = "".join(f"{_completion(texts, asked)} {answer}\n\n" for texts, asked, answer in shown)
        return prefix, _completion(nearest_last, question)
    instruction = INSTRUCTION if documents else CLOSED_BOOK
    parts = [f"Document: {text.strip()}" for text in nearest_last]
    content = "\n\n".join([*parts, f"{instruction}\nQuestion: {question}"])
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": content}]
        return "", tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return "", f"{content}\nAnswer:"


def clean_answer(style: str, text: str) -> str:
    """The answer in what the model wrote: the first line, where the prompt's style ends answers with a
    newline."""
    text = text.strip()
    return text.partition("\n")[0].strip() if style == "examples" else text


def _completion(documents: Sequence[str], question: str) -> str:
    return "".join(f"{text.strip()}\n\n" for text in documents) + f"Question: {question}\nAnswer:"


EXAMPLES = (
    (
        (
            "Harvest Moon Festival\nThe Harvest Moon Festival is held every September in Linden Park "
            "by the Linden Music Society.",
            "Linden Music Society\nThe Linden Music Society was founded by the violinist Clara Weiss "
            "and the composer Paul Arden in 1956.",
        ),
        "Who founded the society that holds the Harvest Moon Festival?",
        "Clara Weiss and Paul Arden",
    ),
    (
        (
            "Iron Valley\nIron Valley is a novel by Tom Reyes about coal miners in Wales.",
            "Tom Reyes\nTom Reyes was a journalist who wrote for The Evening Herald from 1931 to 1944.",
        ),
        "For which newspaper did the author of Iron Valley write?",
        "The Evening Herald",
    ),
    (
        (
            "Lake Orsa\nLake Orsa is a lake in northern Sweden with an area of 52 square kilometres.",
            "Lake Varn\nLake Varn is a lake in Sweden. It has an area of 113 square kilometres and "
            "is 40 metres deep.",
        ),
        "Which lake is larger, Lake Orsa or Lake Varn?",
        "Lake Varn",
    ),
    (
        (
            "Eastgate Stadium\nEastgate Stadium is the home of the football club Hart Rovers and has "
            "12,400 seats.",
            "Hart Rovers\nHart Rovers are a football club from Hartwell. Their nickname is the Foxes.",
        ),
        "How many seats does the stadium of the Foxes have?",
        "12,400",
    ),
    (
        (
            "Peter Olsen\nPeter Olsen is a Norwegian chess player and the author of six books.",
            "Maria Duarte\nMaria Duarte is a Portuguese chess player and novelist.",
        ),
        "What game do both Peter Olsen and Maria Duarte play?",
        "chess",
    ),
    (
        (
            "Coldwater Bridge\nColdwater Bridge is a stone bridge over the River Tarn, built by "
            "Henry Moss in 1822.",
            "Henry Moss\nHenry Moss (1780 - 1851) was an English engineer, best known for the Selby "
            "Lighthouse.",
        ),
        "The engineer who built Coldwater Bridge is best known for which building?",
        "Selby Lighthouse",
    ),
    (
        (
            "Falcon Air\nFalcon Air is an airline based in Denver.",
            "Skyline Cargo\nSkyline Cargo is an airline based in Denver, Colorado.",
        ),
        "Are Falcon Air and Skyline Cargo based in the same city?",
        "yes",
    ),
    (
        (
            "Anna Brandt\nAnna Brandt (born 4 May 1947) is a Danish film director.",
            "Long Harbour\nLong Harbour is a 1981 drama film directed by Anna Brandt.",
        ),
        "In what year was the director of Long Harbour born?",
        "1947",
    ),
    (
        (
            "Red Tin\nRed Tin were a rock band formed in Leeds.",
            "Marrow\nMarrow is a folk duo from Oslo.",
        ),
        "Were Red Tin and Marrow formed in the same city?",
        "no",
    ),
    (
        (
            "The Milk Jug\nThe Milk Jug is a 1660 painting by Jan Visser.",
            "Jan Visser\nJan Visser was a painter from the Netherlands who lived in Delft.",
        ),
        "Which country is the painter of The Milk Jug from?",
        "Netherlands",
    ),
)
