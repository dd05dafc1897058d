"""Predictions drawn under their images."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont

from replknet.tasks.classification.predict import Prediction

MIN_WIDTH, MAX_WIDTH = 320, 960
_ROW, _MARGIN, _PERCENT_WIDTH = 24, 8, 56
_BAR_COLOR, _TEXT_COLOR = "#9ec5fe", "#1b1e21"


def draw_prediction(image: Image.Image, prediction: Prediction) -> Image.Image:
    """The image with a bar for each predicted class below it."""
    width = min(max(image.width, MIN_WIDTH), MAX_WIDTH)
    height = max(round(image.height * width / image.width), 1)
    small = image.width < MIN_WIDTH
    resample = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
    panel = _ROW * len(prediction.labels) + 2 * _MARGIN
    canvas = Image.new("RGB", (width, height + panel), "white")
    canvas.paste(image.convert("RGB").resize((width, height), resample))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=15)
    longest_bar = width - 2 * _MARGIN - _PERCENT_WIDTH
    for row, label in enumerate(prediction.labels):
        top = height + _MARGIN + row * _ROW
        share = label.probability if math.isfinite(label.probability) else 0.0
        right = _MARGIN + round(longest_bar * share)
        draw.rectangle((_MARGIN, top, right, top + _ROW - 4), fill=_BAR_COLOR)
        draw.text(
            (_MARGIN + 4, top + 1), _fitting(label.name, font, longest_bar), _TEXT_COLOR, font
        )
        percent = f"{label.probability:.1%}"
        draw.text((width - _MARGIN, top + 1), percent, _TEXT_COLOR, font, anchor="ra")
    return canvas


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, shortened to ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
