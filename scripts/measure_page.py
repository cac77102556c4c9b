"""What a page of results takes: to write, to open in Chromium, to search and to scroll through. Prints JSON.

    python scripts/measure_page.py --pictures 10000 --folder /tmp/pictures
    python scripts/measure_page.py --page answers.html                         # of a job of yours, only to open

Pictures are made once, each another one, of a size whose thumbnails take what those of photographs take; they stay in
the folder. Opening is timed by the browser, from the navigation to the frame that shows the first rows, with a profile
of its own; the file is in the system's cache. The search, for a word of one record's answer, is timed twice: as soon as
there are rows, while thumbnails still arrive, and at the end. `held_up_ms` is the longest that the page could not react
in between. Medians of `--rounds`; memory is the peak of this process above what it had before.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.browser import browser
from pixtral_runtime.batch.page import write_report
from pixtral_runtime.batch.records import ImageInfo, Record
from pixtral_runtime.device.memory import begin_peak, memory_use, resident_memory_bytes

SIZE = (480, 360)
WORDS = (
    "a",
    "the",
    "red",
    "blue",
    "small",
    "wooden",
    "old",
    "man",
    "dog",
    "table",
    "window",
    "beside",
    "under",
    "looks",
)
WATCH = """
const shown = {held_up_ms: 0};
const frames = next => requestAnimationFrame(() => { const port = new MessageChannel(); port.port1.onmessage = next;
                                                     port.port2.postMessage(0); });
const search = (word, next) => {
  const start = performance.now(), text = document.getElementById("text");
  text.value = word;
  text.dispatchEvent(new Event("input"));
  frames(() => next(performance.now() - start));
};
let last = null;
const ticks = new MessageChannel();
ticks.port1.onmessage = () => {
  const now = performance.now();
  if (last !== null) shown.held_up_ms = Math.max(shown.held_up_ms, now - last);
  last = now;
  if (document.readyState !== "complete") setTimeout(() => ticks.port2.postMessage(0));
};
const look = () => {
  if (!document.querySelector("#list li")) return requestAnimationFrame(look);
  frames(() => {
    shown.first_rows_ms = performance.now();
    search("needle1.", ms => {
      shown.search_while_loading_ms = ms;
      shown.loading_then = document.readyState === "loading";
      search("", () => ticks.port2.postMessage(0));
    });
  });
};
requestAnimationFrame(look);
const seen = () => {
  const pictures = [...document.images].filter(one => one.getBoundingClientRect().top < innerHeight);
  if (!pictures.length || !pictures.every(one => one.complete && one.naturalWidth)) return requestAnimationFrame(seen);
  shown.first_pictures_ms = performance.now();
};
requestAnimationFrame(seen);
addEventListener("load", () => { shown.loaded_ms = performance.now(); });
"""
AFTER = """
(async () => {
  const frame = () => new Promise(next => frames(next));
  shown.search_ms = await new Promise(next => search("needle7.", next));
  shown.found = document.querySelectorAll("#list li").length;
  await new Promise(next => search("", next));
  const start = performance.now();
  scrollTo(0, document.documentElement.scrollHeight);
  await frame();
  await frame();
  shown.to_the_end_ms = performance.now() - start;
  shown.rows = document.querySelectorAll("#list li").length;
  shown.is_last_row_there = document.querySelector("#list li:last-of-type").ariaPosInSet === String(records.length);
  scrollTo(0, 0);
  await frame();
  let longest = 0;
  for (let page = 0; page < 200 && scrollY + innerHeight < document.documentElement.scrollHeight; page++) {
    const before = performance.now();
    scrollBy(0, innerHeight * .5);
    await frame();
    longest = Math.max(longest, performance.now() - before);
  }
  shown.longest_scroll_ms = longest;
  return shown;
})()
"""


def make_picture(path: Path, number: int) -> None:
    """Blotches and edges of its own, about as hard to compress as a photograph."""
    made = np.random.default_rng(number)
    small = Image.fromarray(made.integers(0, 256, (18, 24, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    grain = made.normal(0, 9, (SIZE[1] // 2, SIZE[0] // 2, 1)).repeat(2, 0).repeat(2, 1)
    Image.fromarray((np.asarray(small) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=85)


class Records:
    """Of a job about so many pictures, made anew each time they are gone through."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def path(self, index: int) -> Path:
        return self.folder / f"{index // 1000:02}" / f"picture_{index:06}.jpg"

    def __iter__(self) -> Iterator[Record]:
        for index in range(self.count):
            words = random.Random(index)
            answer = " ".join(words.choice(WORDS) for _ in range(words.randint(8, 90))) + f" needle{index}."
            image = ImageInfo(str(self.path(index)), f"{index:064x}", *SIZE)
            failed: dict[str, Any] = (
                {"error": f"{image.path}: damaged", "hint": "copy it again"} if index % 97 == 0 else {}
            )
            yield Record(
                image.path, "Describe this image in detail.", "0" * 16, [image], answer=None if failed else answer,
                finish_reason=None if failed else "stop", prompt_tokens=1100, image_tokens=1024, new_tokens=80,
                times_ms={"vision": 800.25, "prefill": 1900.5, "decode": 7200.125}, **failed,
            )  # fmt: skip


def written(records: Records, page: Path) -> dict[str, Any]:
    begin_peak()
    before = resident_memory_bytes()
    started = time.monotonic()
    write_report(records, page, title=f"{records.count} pictures", summary={"requests": records.count})
    seconds = time.monotonic() - started
    return {"write_s": round(seconds, 2), "memory_bytes": memory_use()["peak_rss_bytes"] - before}


def opened(page: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as tab:
        tab.call("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        tab.open(page.as_uri())
        tab.until("shown.first_pictures_ms && shown.search_while_loading_ms")
        found: dict[str, Any] = tab.run(AFTER)
        found["js_heap_bytes"] = tab.call("Runtime.getHeapUsage")["usedSize"]
        assert tab.complaints == [], tab.complaints
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pixtral-page")
    parser.add_argument("--page", type=Path, help="a page that is there")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {}
    page = options.page
    if page is None:
        records = Records(options.folder, options.pictures)
        for index in range(options.pictures):
            if not (path := records.path(index)).exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                make_picture(path, index)
        page = options.folder / "page.html"
        write_report(Records(options.folder, 10), page, title="warm", summary={})
        result = {"pictures": options.pictures} | written(records, page)
    rounds = [opened(page.resolve()) for _ in range(options.rounds)]
    result |= {"page_bytes": page.stat().st_size, "rounds": len(rounds)}
    for name, value in rounds[0].items():
        numbers = [one[name] for one in rounds]
        result[name] = value if isinstance(value, bool) else round(median(numbers), 1)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
