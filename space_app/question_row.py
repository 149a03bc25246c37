"""A field for a question, the button that sends it, and the one that stops what it began."""

import gradio as gr

from .limits import Limits


def question_row(
    limits: Limits, name: str, placeholder: str, begin: str
) -> tuple[gr.Textbox, gr.Button, gr.Button]:
    """(field, button to begin, button to stop); on the page the field is `name`, the row `name`-row."""
    with gr.Row(equal_height=True, elem_id=f"{name}-row"):
        field = gr.Textbox(
            show_label=False,
            container=False,
            placeholder=placeholder,
            max_length=limits.question_characters,
            scale=6,
            min_width=320,
            elem_id=name,
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
        )
        return (
            field,
            gr.Button(begin, variant="primary", scale=1, min_width=80),
            gr.Button("Stop", scale=1, min_width=80, interactive=False),
        )
