"""The page's look: a quiet light theme from fonts that every system has, so that nothing is fetched from elsewhere."""

from __future__ import annotations

import gradio as gr
from gradio.themes.utils import colors, sizes

SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue=colors.teal,
        secondary_hue=colors.teal,
        neutral_hue=colors.stone,
        radius_size=sizes.radius_lg,
        font=[gr.themes.Font(name) for name in SANS],
        font_mono=[gr.themes.Font(name) for name in MONO],
    ).set(
        body_background_fill="#f7f6f3",
        body_background_fill_dark="*neutral_950",
        block_background_fill="#ffffff",
        block_border_color="#e7e4de",
        border_color_primary="#e7e4de",
        body_text_color_subdued="*neutral_500",
        block_shadow="none",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#f1efea",
        button_secondary_border_color="#ddd9d1",
        button_secondary_text_color="*neutral_700",
        input_background_fill="#ffffff",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_text_color="#ffffff",
        button_primary_background_fill_dark="*primary_700",
    )
