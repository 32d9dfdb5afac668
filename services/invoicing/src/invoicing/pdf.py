"""PDFs: one long-lived child process that sets invoices, and the client that feeds it.

The child (`python -m invoicing.pdf`) keeps one typst compiler, reads contents from its standard
input and writes PDFs to its standard output, each behind its length; it ends when its input ends,
so it never outlives the service. The event loop never waits for typesetting, and a crash of the
typesetter is a reason on one invoice.

A PDF is a pure function of the content: the template and its fonts come with the packages, the
creation time is midnight of the issue date, the data are strings in JSON. PDF/A-3b carries the
content as an attachment; a name with a character that no embedded font has cannot be PDF/A and is
set as plain PDF instead, never held back.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import sys
from asyncio.subprocess import PIPE, Process
from importlib.resources import files
from typing import BinaryIO, Final

import typst

from hisab_contracts.canonical import canonical_bytes
from hisab_contracts.units import KARACHI
from invoicing.core.document import Content, content_bytes, printed, read_content

RENDER_TIMEOUT_S: Final = 60
RENDERS_PER_CHILD: Final = 2_000
"""A child is replaced after so many: a bound on whatever a typesetter may leak."""
LENGTH_BYTES: Final = 4
_PDF, _FAILED = b"P", b"F"
_PDF_A: Final = "a-3b"


class RenderFailed(Exception):
    """An invoice could not be set; the message says why."""


def pdf_sha256(pdf: bytes) -> str:
    """Return the SHA-256 of a PDF, as invoices and their events state it."""
    return hashlib.sha256(pdf).hexdigest()


class Typesetter:
    """Sets contents as PDF with the embedded fonts and the packaged template."""

    def __init__(self) -> None:
        """Load the template and one compiler, used for every invoice of this process."""
        self._template = (files("invoicing") / "templates" / "invoice.typ").read_bytes()
        # A font of the machine would make the same invoice come out differently elsewhere.
        self._compiler = typst.Compiler(font_paths=typst.Fonts(include_system_fonts=False))

    def pdf_of(self, content: Content) -> bytes:
        """Set one invoice; the same content gives the same bytes."""
        inputs = {
            "printed": canonical_bytes(printed(content)).decode(),
            "content": content_bytes(content).decode(),
        }
        issued_on = dt.date.fromisoformat(content.issued_on)
        issued_at = dt.datetime.combine(issued_on, dt.time(), tzinfo=KARACHI)
        try:
            return self._set(inputs, issued_at, [_PDF_A])
        except typst.TypstError as error:
            if "PDF/A" not in str(error):
                raise
            return self._set(inputs, issued_at, [])

    def _set(
        self, inputs: dict[str, str], issued_at: dt.datetime, standards: list[typst.PDFStandard]
    ) -> bytes:
        pdf = self._compiler.compile(
            input=self._template,
            format="pdf",
            sys_inputs=inputs,
            pdf_standards=standards,
            timestamp=issued_at,
        )
        if not isinstance(pdf, bytes):
            raise TypeError("one document gives one PDF")
        return pdf


class TypesetterProcess:
    """Has invoices set by a child process, one at a time; starts it when it is needed."""

    def __init__(self) -> None:
        """Describe the client; no process runs before the first invoice."""
        self._child: Process | None = None
        self._renders_left = 0
        self._one_at_a_time = asyncio.Lock()

    async def pdf_of(self, content: bytes) -> bytes:
        """Set one invoice from its canonical content; raises `RenderFailed`."""
        async with self._one_at_a_time:
            try:
                async with asyncio.timeout(RENDER_TIMEOUT_S):
                    kind, answer = await self._ask(content)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                await self._end()
                raise RenderFailed(f"the typesetter ended: {error!r}") from error
            except asyncio.CancelledError:
                # An answer may be half read: the next one must come from a new child.
                await self._end()
                raise
        if kind != _PDF:
            raise RenderFailed(answer.decode(errors="replace"))
        return answer

    async def close(self) -> None:
        """End the child."""
        async with self._one_at_a_time:
            await self._end()

    async def _ask(self, content: bytes) -> tuple[bytes, bytes]:
        if self._renders_left == 0:
            await self._end()
        if self._child is None:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "invoicing.pdf", stdin=PIPE, stdout=PIPE
            )
            self._renders_left = RENDERS_PER_CHILD
        self._renders_left -= 1
        into, out = self._child.stdin, self._child.stdout
        if into is None or out is None:
            raise OSError("the typesetter has no pipes")
        into.write(len(content).to_bytes(LENGTH_BYTES, "big") + content)
        await into.drain()
        kind = await out.readexactly(1)
        size = int.from_bytes(await out.readexactly(LENGTH_BYTES), "big")
        return kind, await out.readexactly(size)

    async def _end(self) -> None:
        # Forgotten before it is awaited: whoever is cancelled here leaves no dead child behind.
        child, self._child = self._child, None
        if child is None:
            return
        if child.returncode is None:
            child.kill()
        await child.wait()


def serve(contents: BinaryIO, pdfs: BinaryIO) -> None:
    """Set every content that comes, in order, until the input ends (the child's whole life)."""
    typesetter = Typesetter()
    while True:
        head = contents.read(LENGTH_BYTES)
        if len(head) < LENGTH_BYTES:
            return
        content = contents.read(int.from_bytes(head, "big"))
        try:
            kind, answer = _PDF, typesetter.pdf_of(read_content(content))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is that invoice's reason
            kind, answer = _FAILED, str(error).encode()
        pdfs.write(kind + len(answer).to_bytes(LENGTH_BYTES, "big") + answer)
        pdfs.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
