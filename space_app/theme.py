"""How the page looks: Gradio's base theme in our colours, with the fonts that a machine has."""

from pathlib import Path

import gradio as gr

STYLES = [Path(__file__).resolve().parent / name for name in ("style.css", "trials.css")]
_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]


def theme() -> gr.themes.Base:
    """Light and dark; fetches no font from anywhere."""
    made = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=_SANS,
        font_mono=_MONO,
    )
    return made.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        color_accent="*primary_700",
        block_label_text_weight="500",
        block_shadow="none",
        block_border_width="1px",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        layout_gap="12px",
        button_secondary_background_fill="*background_fill_primary",
        button_secondary_background_fill_hover="*background_fill_secondary",
        button_secondary_border_color="*border_color_primary",
        button_secondary_text_color="*body_text_color",
        button_secondary_background_fill_dark="*background_fill_secondary",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color_dark="*border_color_primary",
        button_secondary_text_color_dark="*body_text_color",
        button_border_width="1px",
        button_large_text_size="*text_md",
        button_large_text_weight="550",
        button_small_text_weight="450",
        button_large_padding="9px 16px",
    )
