from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from helpers.pdf_files import Page, pdf_file, text_page
from helpers.places import ROOT
from pixtral_runtime.errors import ImageError, MissingPackageError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image import decode_image
from pixtral_runtime.inputs.preprocess import Preprocess
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.open_files import MOST_OPEN
from pixtral_runtime.sources.pages import PageSettings
from pixtral_runtime.sources.pdf import PdfPage, pdf_items
from test_layers import ENVIRONMENT

PREPROCESS = Preprocess(patch_size=16, max_side=256)
SETTINGS = PageSettings(fit=PREPROCESS.drawn_size)
RED_CORNER = "1 0 0 rg 0 0 100 50 re f"  # the lower left quarter of 200 x 100 points
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)
CORNERS = ((0.1, 0.1), (0.9, 0.1), (0.1, 0.9), (0.9, 0.9))  # upper left, upper right, lower left, lower right


def written(
    folder: Path, *pages: Page | None, catalog: str = "", count: int | None = None, name: str = "a.pdf"
) -> Path:
    path = folder / name
    path.write_bytes(pdf_file(pages, catalog=catalog, count=count))
    return path


def pixels(item: Item) -> NDArray[np.uint8]:
    (picture,) = item.parts
    assert isinstance(picture, StoredPicture)
    return np.asarray(decode_image(picture.read(), picture.name).pixels)


def page_pixels(path: Path) -> NDArray[np.uint8]:
    return pixels(next(iter(pdf_items(path, SETTINGS))))


def at(found: NDArray[np.uint8], across: float, down: float) -> tuple[int, ...]:
    rows, columns, _ = found.shape
    return tuple(int(value) for value in found[int(rows * down), int(columns * across)])


def refusal(path: Path) -> tuple[str, str]:
    """Message and hint of a file that is one item, which cannot be read."""
    (item,) = pdf_items(path, SETTINGS)
    assert item.id == str(path)
    with pytest.raises(ImageError) as caught:
        pixels(item)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value), caught.value.hint


def test_a_page_is_drawn_upright_on_white_at_the_size_that_the_model_sees(tmp_path: Path) -> None:
    found = page_pixels(written(tmp_path, Page(RED_CORNER, "0 0 200 100")))
    assert found.shape == (128, 256, 3)
    assert [at(found, *corner) for corner in CORNERS] == [WHITE, WHITE, RED, WHITE]


def test_a_page_that_is_to_be_turned_is_turned(tmp_path: Path) -> None:
    found = page_pixels(written(tmp_path, Page(RED_CORNER, "0 0 200 100", "/Rotate 90")))
    assert found.shape == (256, 128, 3)
    assert [at(found, *corner) for corner in CORNERS] == [RED, WHITE, WHITE, WHITE]


def test_only_what_is_within_the_crop_box_is_seen(tmp_path: Path) -> None:
    found = page_pixels(written(tmp_path, Page(RED_CORNER, "0 0 200 100", "/CropBox [0 0 100 50]")))
    assert found.shape == (128, 256, 3) and (found == RED).all()


@pytest.mark.parametrize("image_tokens", [None, 20, 100, 500])
@pytest.mark.parametrize("size", [(612, 792), (595.28, 841.89), (10, 3000), (7, 7)])
def test_nothing_is_scaled_after_a_page_was_drawn(
    image_tokens: int | None, size: tuple[float, float], tmp_path: Path
) -> None:
    preprocess = Preprocess(patch_size=16, max_side=500, image_tokens=image_tokens)
    path = written(tmp_path, Page(RED_CORNER, f"0 0 {size[0]} {size[1]}"))
    found = pixels(next(iter(pdf_items(path, PageSettings(fit=preprocess.drawn_size)))))
    assert preprocess(Image.fromarray(found)).shape[1:] == found.shape[:2]


@pytest.mark.parametrize("has_form", [True, False], ids=["form", "page taken out of a form"])
def test_annotations_and_filled_in_forms_are_drawn(has_form: bool, tmp_path: Path) -> None:
    square = "<< /Type /Annot /Subtype /Square /Rect [0 50 100 100] /IC [1 0 0] /C [1 0 0] /F 4 >>"
    field = (
        "<< /Type /Annot /Subtype /Widget /FT /Btn /T (a) /Rect [100 0 200 50] /F 4 /AS /On /V /On "
        "/MK << /BG [1 0 0] >> /AP << /N << /On 5 0 R >> >> >>"
    )
    form = "/Type /XObject /Subtype /Form /BBox [0 0 100 50]"
    data = pdf_file([Page(RED_CORNER, "0 0 200 100", f"/Annots [{square} {field}]")])
    data = data.replace(b"<< /Length", f"<< {form} /Length".encode())  # the page's content is the field's look as well
    if has_form:
        data = data.replace(b"/Catalog", f"/Catalog /AcroForm << /Fields [{field}] >>".encode())
    path = tmp_path / "form.pdf"
    path.write_bytes(data)  # its table of objects is wrong now, which is mended
    found = page_pixels(path)
    assert [at(found, *corner) for corner in CORNERS] == [RED, WHITE, RED, RED]


@pytest.mark.parametrize(
    ("box", "shape"),
    [
        ("0 0 2834646 2834646", (256, 256)),  # a kilometre
        ("0 0 1000000000 100", (16, 256)),
        ("0 0 0.001 0.001", (256, 256)),
        ("-100 -100 100 0", (128, 256)),
        ("200 100 0 0", (128, 256)),
        ("0 0 0 0", (256, 208)),  # a letter's page, as for all that give no size
        ("0 0 NaN NaN", (256, 208)),
        ("0 0 99999999999999999999 1", (256, 208)),
        ("", (256, 208)),
    ],
)
def test_a_page_of_any_size_becomes_a_picture_of_the_usual_one(
    box: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    assert page_pixels(written(tmp_path, Page(RED_CORNER, box))).shape == (*shape, 3)


def test_a_page_whose_crop_box_is_elsewhere_is_refused(tmp_path: Path) -> None:
    (item,) = pdf_items(written(tmp_path, Page(RED_CORNER, extra="/CropBox [900 900 990 990]")), SETTINGS)
    with pytest.raises(ImageError, match="#page=1: nothing of the page is within its crop box"):
        pixels(item)


def test_an_image_that_claims_a_gigapixel_is_drawn_without_the_memory_for_it(tmp_path: Path) -> None:
    image = "BI /W 60000 /H 60000 /BPC 8 /CS /RGB ID \xff\xff\xff EI"
    found = page_pixels(written(tmp_path, Page(f"{RED_CORNER} q 200 0 0 100 0 0 cm {image} Q", "0 0 200 100")))
    assert at(found, 0.9, 0.1) == WHITE


def test_a_protected_file_is_named_with_what_opens_it() -> None:
    message, hint = refusal(ROOT / "tests" / "data" / "documents" / "user_password.pdf")
    assert message.endswith("user_password.pdf: protected by a password")
    assert hint.startswith("qpdf --decrypt --password=PASSWORD ")


def test_a_file_that_is_only_protected_from_changes_opens() -> None:
    found = page_pixels(ROOT / "tests" / "data" / "documents" / "owner_password.pdf")
    assert [at(found, *corner) for corner in CORNERS] == [WHITE, WHITE, RED, WHITE]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (b"GIF89a", "no PDF file, whatever its name says"),
        (b"%PDF-1.7\n", "damaged or incomplete PDF"),
        (pdf_file([Page(RED_CORNER)])[:150], "damaged or incomplete PDF"),
        (pdf_file([None]), "a PDF without pages"),
        (pdf_file([Page()], catalog="/AcroForm << /XFA [] /Fields [] >> /NeedsRendering true"), "a form in XFA"),
    ],
)
def test_a_broken_file_is_one_item_that_says_why(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "b.pdf").write_bytes(data)
    message, hint = refusal(tmp_path / "b.pdf")
    assert said in message and hint


def test_a_file_that_is_not_there_and_a_folder_are_items_that_say_so(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.pdf")[0]
    (tmp_path / "folder.pdf").mkdir()
    assert "it is a folder" in refusal(tmp_path / "folder.pdf")[0]
    os.mkfifo(tmp_path / "pipe.pdf")
    assert "a pipe" in refusal(tmp_path / "pipe.pdf")[0]


def test_a_damaged_page_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    path = written(tmp_path, text_page("one"), None, text_page("three"))
    first, second, third = pdf_items(path, PageSettings(fit=PREPROCESS.drawn_size, wants_text=True))
    assert pixels(first).min() < 100 and pixels(third).min() < 100
    with pytest.raises(ImageError, match=r"a\.pdf#page=2: damaged, the page cannot be read"):
        pixels(second)
    assert [item.text for item in (first, second, third)] == ["one", "", "three"]


def test_a_file_that_claims_a_million_pages_has_those_that_are_there(tmp_path: Path) -> None:
    assert len(list(pdf_items(written(tmp_path, Page(), Page(), count=1_000_000), SETTINGS))) == 2


def test_the_text_of_a_page_is_read_where_it_is_wanted_only(tmp_path: Path) -> None:
    path = written(tmp_path, text_page("A line", "and \\(another\\)"), Page())
    assert [item.text for item in pdf_items(path, SETTINGS)] == ["", ""]
    wanted = PageSettings(fit=PREPROCESS.drawn_size, wants_text=True)
    assert [item.text for item in pdf_items(path, wanted)] == ["A line\nand (another)", ""]


@pytest.mark.parametrize("form", ["/AcroForm << /Fields [] >>", ""], ids=["form", "page taken out of a form"])
def test_what_was_filled_in_is_text_behind_that_of_the_page(form: str, tmp_path: Path) -> None:
    kinds = ["/FT /Tx /V (Ada \\\\ Lovelace)", "/FT /Tx", "/FT /Ch /V (blue)", "/FT /Btn /V /Yes /AS /Yes"]
    fields = " ".join(
        f"<< /Type /Annot /Subtype /Widget /T (f{n}) /Rect [0 {n} 50 {n + 1}] {kind} >>" for n, kind in enumerate(kinds)
    )
    path = written(tmp_path, Page(text_page("Name:").content, extra=f"/Annots [{fields}]"), catalog=form)
    (item,) = pdf_items(path, PageSettings(fit=PREPROCESS.drawn_size, wants_text=True))
    assert item.text == "Name:\nAda \\ Lovelace\nblue"


def test_a_word_that_goes_on_in_the_next_line_is_one_word(tmp_path: Path) -> None:
    path = written(tmp_path, text_page("exam-", "ple text"))
    (item,) = pdf_items(path, PageSettings(fit=PREPROCESS.drawn_size, wants_text=True))
    assert item.text == "example text"


def test_a_file_that_another_program_wrote_shows_and_says_what_it_holds(tmp_path: Path) -> None:
    figure = Figure(figsize=(4, 2), facecolor="red")
    figure.text(0.4, 0.4, "a title", fontsize=20, color="black")
    figure.savefig(tmp_path / "plot.pdf")
    (item,) = pdf_items(tmp_path / "plot.pdf", PageSettings(fit=PREPROCESS.drawn_size, wants_text=True))
    found = pixels(item)
    assert found.shape == (128, 256, 3) and at(found, 0.1, 0.1) == RED
    assert (found.reshape(-1, 3).max(axis=1) < 40).any() and item.text == "a title"


def test_a_scan_is_what_was_scanned(tmp_path: Path) -> None:
    picture = Image.open(ROOT / "tests" / "data" / "images" / "blue_circle_64x64.png").convert("RGB")
    picture.save(tmp_path / "scan.pdf", quality=95)
    found = Image.fromarray(page_pixels(tmp_path / "scan.pdf")).resize(picture.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(found, float) - np.asarray(picture, float)).mean() < 4  # seen 1.6, JPEG's


@pytest.mark.parametrize("name", ["Ä ö.PDF", os.fsdecode(b"\xff.pdf"), "#page=1 'x'.pdf"])
def test_a_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    (item,) = pdf_items(written(tmp_path, Page(RED_CORNER), name=name), SETTINGS)
    assert item.id == f"{tmp_path}/{name}#page=1" and pixels(item).size


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = written(tmp_path, Page("", "0 0 200 100"))
    (item,) = pdf_items(path, SETTINGS)
    assert (pixels(item) == WHITE).all()
    other = written(tmp_path, Page("0 g 0 0 200 100 re f", "0 0 200 100"), name="other")
    other.replace(path)
    assert (pixels(item) == BLACK).all()


def test_threads_draw_what_one_draws_and_few_files_stay_open(tmp_path: Path) -> None:
    paths = [written(tmp_path, *(text_page(f"{n} {k}") for k in range(6)), name=f"{n}.pdf") for n in range(5)]
    pictures = [item.parts[0] for path in paths for item in pdf_items(path, SETTINGS)]
    assert all(isinstance(picture, PdfPage) for picture in pictures)
    mixed = pictures[::2] + pictures[1::2]

    def read(picture: object) -> bytes:
        assert isinstance(picture, PdfPage)
        return picture.read()

    alone = [read(picture) for picture in mixed]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, mixed)) == alone
    assert len(set(alone)) == len(mixed)
    assert sum(path in paths for path in open_files()) <= MOST_OPEN


def open_files() -> Iterator[Path]:
    for link in Path("/proc/self/fd").iterdir():
        try:
            yield link.readlink()
        except OSError:
            continue


def test_a_program_that_ends_while_files_are_open_says_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, Page(RED_CORNER))
    code = (
        "import sys, weakref; weakref.finalize(sys.modules['sys'], int)\n"  # so that these end behind PDFium
        "from pathlib import Path; from pixtral_runtime.sources.pdf import *\n"
        "settings = PageSettings(fit=lambda width, height: (16, 16))\n"
        "print([len(item.parts[0].read()) for item in pdf_items(Path(sys.argv[1]), settings)])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.stdout, done.stderr) == ("[781]\n", "")


def test_without_its_package_a_pdf_file_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(MissingPackageError) as caught:
        pdf_items(tmp_path / "a.pdf", SETTINGS)
    assert caught.value.hint == "pip install 'pixtral[documents]'"


def test_a_page_is_a_ppm_file_which_every_reader_takes(tmp_path: Path) -> None:
    (item,) = pdf_items(written(tmp_path, Page(RED_CORNER)), SETTINGS)
    (picture,) = item.parts
    assert isinstance(picture, PdfPage) and picture.file == tmp_path / "a.pdf"
    with Image.open(io.BytesIO(picture.read())) as image:
        assert (image.format, image.mode) == ("PPM", "RGB")
