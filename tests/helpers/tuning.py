"""Pictures whose question takes a certain number of image tokens to answer."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 160, 20), "black": (0, 0, 0)}
PICTURES = 40
GRID = ("--image-tokens", "4,30,full", "--max-new-tokens", 4, "--tolerance", 20)


def rectangles(folder: Path, pictures: int = PICTURES) -> Path:
    """Pictures of one rectangle each, whose colour 30 tokens show and 4 do not, as rows and as a question of all."""
    question, rows = "what color is the rectangle?", []
    for index in range(pictures):
        name, color = list(COLORS.items())[index % len(COLORS)]
        picture = Image.new("RGB", (64, 64), (240, 240, 240))
        left, top = 6 + 5 * (index % 5), 8 + 4 * (index % 7)
        ImageDraw.Draw(picture).rectangle((left, top, left + 26, top + 20), color)
        picture.save(folder / f"{index:02}.png")
        rows.append({"id": f"{index:02}", "image": f"{index:02}.png", "question": question, "answers": [name]})
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (folder / "asked.txt").write_text(f"{question}\n", encoding="utf-8")
    (folder / "two.txt").write_text(f"{question}\nDescribe the picture.\n", encoding="utf-8")
    return folder
