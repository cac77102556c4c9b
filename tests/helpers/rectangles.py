"""Pictures that the demo checkpoint answers questions about, right with enough image tokens and wrong with few."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 160, 20), "black": (0, 0, 0)}
QUESTION = "what color is the rectangle?"
PICTURES = 40
GRID = ("--image-tokens", "4,30,full", "--max-new-tokens", 4, "--tolerance", 20)


def write_rectangles(folder: Path, count: int) -> Path:
    """Pictures of one rectangle each, whose colour 30 tokens show and 4 do not, with questions. Returns `folder`.

    `rows.jsonl` has the answers, `asked.txt` the question alone, `two.txt` another one as well.
    """
    folder.mkdir(exist_ok=True)
    rows = []
    for index in range(count):
        name, color = list(COLORS.items())[index % len(COLORS)]
        picture = Image.new("RGB", (64, 64), (240, 240, 240))
        left, top = 6 + 5 * (index % 5), 8 + 4 * (index % 7)
        ImageDraw.Draw(picture).rectangle((left, top, left + 26, top + 20), color)
        picture.save(folder / f"{index:02}.png")
        rows.append({"id": f"{index:02}", "image": f"{index:02}.png", "question": QUESTION, "answers": [name]})
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (folder / "asked.txt").write_text(f"{QUESTION}\n", encoding="utf-8")
    (folder / "two.txt").write_text(f"{QUESTION}\nDescribe the picture.\n", encoding="utf-8")
    return folder
