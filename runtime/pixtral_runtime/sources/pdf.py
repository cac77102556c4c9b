"""Pages of PDF files as pictures, drawn by PDFium when their turn comes, and the text that they hold.

A page has no pixels of its own. It is drawn at the very size that the model sees of it, the grid of patches that its
budget of image tokens allows a picture of the page's ratio, so that it is as sharp as it can be and nothing is scaled
afterwards. A page of a kilometre takes no more than one of a stamp. The picture stays in memory.

What PDFium makes of odd files: a page without a usable size is a letter's; a page's rotation and crop box hold; a file
encrypted without a password opens as others do; nothing is fetched and no script runs. Images within a page are read
line by line, so their size takes time and hardly memory. What pages hold is inflated up to 1 GiB a stream.

PDFium takes one call at a time, so there is one lock for all files, and everything that was opened is closed within it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, cast, create_string_buffer
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixtral_runtime.errors import ImageError, extra_missing
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image_files import open_file
from pixtral_runtime.sources.file_item import Fit, broken, file_item, ppm
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.open_files import OpenFiles
from pixtral_runtime.sources.pages import MOST_CHARACTERS, PageSettings, page_items, page_name

PDF_SUFFIX = ".pdf"
MAGIC, MAGIC_WITHIN = b"%PDF-", 1024  # bytes; some files have other data before it
MOST_FIELDS = 10_000
WHITE = (255, 255, 255, 255)
LINE_HYPHENS = re.compile(r"[\ufffe\x02]\n?")  # PDFium's, for the hyphen of a word that goes on in the next line
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\ufeff]")


def has_pdf_reader() -> bool:
    """Whether the package is there that PDF files need."""
    try:
        import pypdfium2  # noqa: F401
    except ImportError:
        return False
    return True


def pdf_items(path: Path, settings: PageSettings) -> Iterator[Item]:
    """The pages of a PDF file, or the whole of it. One that cannot be opened is an item that says why.

    Raises MissingPackageError at once.
    """
    if not has_pdf_reader():
        raise extra_missing("pypdfium2", "documents", "a PDF file")
    return _items(path, settings)


def _items(path: Path, settings: PageSettings) -> Iterator[Item]:
    try:
        with _DOCUMENTS.opened(path) as document:
            count = _page_count(document, path)
    except ImageError as error:
        yield file_item(path, str(path), [broken(path, str(path), error)])
        return
    yield from page_items(
        path,
        count,
        settings,
        lambda number: PdfPage(name=page_name(path, number), file=path, number=number, fit=settings.fit),
        lambda number: page_text(path, number) if settings.wants_text else "",
    )


def page_text(path: Path, number: int) -> str:
    """The text of a page as it can be seen, lines ended by a line feed, then what was filled into its form fields.

    "" for a page that holds none or is damaged.
    """
    try:
        with _DOCUMENTS.opened(path) as document, _page(document, path, number) as page:
            return "\n".join(filter(None, (_tidy(text) for text in (_raw_text(page), *_field_values(document, page)))))
    except ImageError:
        return ""  # its picture says what is wrong


@dataclass(frozen=True, kw_only=True)
class PdfPage(StoredPicture):
    """A page of a PDF file, from 1 on."""

    file: Path
    number: int
    fit: Fit

    def read(self) -> bytes:
        with _DOCUMENTS.opened(self.file) as document, _page(document, self.file, self.number) as page:
            return _drawn(document, page, self._size_of(page))

    def size(self) -> tuple[int, int]:
        with _DOCUMENTS.opened(self.file) as document, _page(document, self.file, self.number) as page:
            return self._size_of(page)

    def _size_of(self, page: Any) -> tuple[int, int]:
        width, height = page.get_size()
        if not (width > 0 and height > 0):
            raise ImageError(f"{self.name}: nothing of the page is within its crop box", _repair(self.file))
        return self.fit(width, height)


def _open(path: Path) -> Any:
    import pypdfium2

    file = open_file(path)  # names in any bytes, which PDFium itself does not take
    try:
        document = pypdfium2.PdfDocument(file, autoclose=True)
    except pypdfium2.PdfiumError as error:
        file.seek(0)
        start = file.read(MAGIC_WITHIN)
        file.close()
        raise _refusal(path, start, error.err_code) from error
    if document.get_formtype() == pypdfium2.raw.FORMTYPE_XFA_FULL:
        document.close()
        raise ImageError(f"{path}: a form in XFA, which has no pages yet", "print it to a PDF file in Adobe Reader")
    _show_fields(document)
    return document


def _show_fields(document: Any) -> None:
    """Have form fields drawn, those of pages as well that were taken out of the document that had the form."""
    from pypdfium2 import PdfFormEnv, raw

    settings = raw.FPDF_FORMFILLINFO(version=2)
    fields = raw.FPDFDOC_InitFormFillEnvironment(document, settings)
    if fields:
        document.formenv = PdfFormEnv(fields, settings)


_DOCUMENTS: OpenFiles[Any] = OpenFiles(_open, lambda document: document.close())


def _refusal(path: Path, start: bytes, code: int) -> ImageError:
    """Why PDFium does not open a file."""
    from pypdfium2 import raw

    if code == raw.FPDF_ERR_PASSWORD:
        name = shlex.quote(str(path))
        return ImageError(
            f"{path}: protected by a password",
            f"qpdf --decrypt --password=PASSWORD {name} open.pdf",
        )
    if code == raw.FPDF_ERR_SECURITY:
        return ImageError(f"{path}: encrypted in a way that is not supported", "save a copy without encryption")
    if not start:
        return ImageError(f"{path}: the file is empty", "copy or download it again")
    if MAGIC not in start:
        return ImageError(f"{path}: no PDF file, whatever its name says", "rename it, or copy it again")
    return ImageError(f"{path}: damaged or incomplete PDF", _repair(path))


def _repair(path: Path) -> str:
    return f"copy or download it again; qpdf {shlex.quote(str(path))} repaired.pdf mends some"


def _page_count(document: Any, path: Path) -> int:
    """How many pages there are, which may be fewer than a damaged file says. Raises ImageError where there are none."""
    from pypdfium2 import PdfiumError

    def is_there(index: int) -> bool:
        try:
            document.get_page_size(index)
        except PdfiumError:
            return False
        return True

    count = len(document)
    if count > 0 and not is_there(count - 1):
        count = next(index for index in range(count) if not is_there(index))
    if count < 1:
        raise ImageError(f"{path}: a PDF without pages", _repair(path))
    return count


@contextmanager
def _page(document: Any, path: Path, number: int) -> Iterator[Any]:
    """A page, closed afterwards. Raises ImageError."""
    from pypdfium2 import PdfiumError

    try:
        page = document[number - 1]
    except (PdfiumError, IndexError) as error:
        raise ImageError(f"{page_name(path, number)}: damaged, the page cannot be read", _repair(path)) from error
    try:
        yield page
    finally:
        page.close()


def _drawn(document: Any, page: Any, size: tuple[int, int]) -> bytes:
    """The page on white, its annotations and filled-in forms with it, at (width, height) in pixels."""
    from pypdfium2 import PdfBitmap, raw

    bitmap = PdfBitmap.new_native(*size, raw.FPDFBitmap_BGR, rev_byteorder=True)
    try:
        bitmap.fill_rect(WHITE, 0, 0, *size)
        place = (bitmap, page, 0, 0, *size, 0, raw.FPDF_ANNOT | raw.FPDF_REVERSE_BYTE_ORDER)
        raw.FPDF_RenderPageBitmap(*place)
        if document.formenv is not None:
            raw.FPDF_FFLDraw(document.formenv, *place)
        return ppm(bitmap.to_numpy())
    finally:
        bitmap.close()


def _raw_text(page: Any) -> str:
    from pypdfium2 import PdfiumError

    try:
        text_page = page.get_textpage()
    except PdfiumError:
        return ""
    try:
        text: str = text_page.get_text_bounded()
        return text
    finally:
        text_page.close()


def _field_values(document: Any, page: Any) -> Iterator[str]:
    """What stands in a page's form fields, in the order of the file."""
    from pypdfium2 import raw

    kinds = (raw.FPDF_FORMFIELD_COMBOBOX, raw.FPDF_FORMFIELD_LISTBOX, raw.FPDF_FORMFIELD_TEXTFIELD)
    if document.formenv is None:
        return
    for index in range(min(raw.FPDFPage_GetAnnotCount(page), MOST_FIELDS)):
        field = raw.FPDFPage_GetAnnot(page, index)
        if not field:
            continue
        try:
            if raw.FPDFAnnot_GetFormFieldType(document.formenv, field) in kinds:
                size = raw.FPDFAnnot_GetFormFieldValue(document.formenv, field, None, 0)
                value = create_string_buffer(size)  # UTF-16, with a zero at its end
                raw.FPDFAnnot_GetFormFieldValue(document.formenv, field, cast(value, POINTER(raw.FPDF_WCHAR)), size)
                yield value.raw[:-2].decode("utf-16-le", "ignore")
        finally:
            raw.FPDFPage_CloseAnnot(field)


def _tidy(text: str) -> str:
    """Line ends as everywhere, words in one piece, nothing that cannot be seen."""
    text = text[: 2 * MOST_CHARACTERS].replace("\r\n", "\n").replace("\r", "\n")
    return UNSEEN.sub("", LINE_HYPHENS.sub("", text)).strip()
