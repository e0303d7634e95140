"""What a picture file says of itself, put beside the pixels after encoding: they are not touched.

| job's `output.embed` | PNG | JPEG, WebP |
|---|---|---|
| `parameters`: A1111's text of prompt and settings | chunk `parameters` | EXIF UserComment |
| `row`: the output row as JSON | chunk `batchsd` | EXIF ImageDescription |
| `xmp`: made by a trained model (IPTC DigitalSourceType) | iTXt `XML:com.adobe.xmp` | XMP |

No time stands in any of them: the same row gives the same bytes. What does not fit a JPEG segment (64 KB) is left out.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchsd.columns import facts_of, row_json
from batchsd.types import Record, Sink, SinkWriter

if TYPE_CHECKING:
    import pyarrow as pa

SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
COMPOSITE = ("image", "inpaint", "edit")  # tasks whose pictures hold some of an input picture
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType="{}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
KEYWORDS = (b"parameters\0", b"batchsd\0", b"XML:com.adobe.xmp\0")  # of PNG chunks
SEGMENT = 65533  # bytes of a JPEG segment


Called = Callable[[str], tuple[str, str]]
"""What A1111 calls a scheduler, and its sigma schedule ("" for the usual one)."""


def as_it_is(scheduler: str) -> tuple[str, str]:
    return scheduler, ""


@dataclass(frozen=True, slots=True)
class Told:
    """A sink whose pictures tell what `embed` names; rows without a picture pass as they are."""

    inner: Sink
    embed: Sequence[str]
    called: Called = as_it_is

    def open(self, folder: Path, name: str, schema: pa.Schema) -> ToldShard:
        return ToldShard(self.inner.open(folder, name, schema), self.embed, self.called, name, schema)

    def reread(self, *published: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """What the inner sink reads back, if it does (see `published.Rereads`)."""
        return self.inner.reread(*published) if hasattr(self.inner, "reread") else iter(())


@dataclass(frozen=True, slots=True)
class ToldShard:
    inner: SinkWriter
    embed: Sequence[str]
    called: Called
    name: str
    schema: pa.Schema

    def add(self, record: Record) -> None:
        if record.image is not None:
            drawn = replace(record, image=untell(record.image))  # a revision keeps pictures, of rows that may say more
            record = replace(record, image=tell(drawn, self.embed, self.schema, self.name, self.called))
        self.inner.add(record)

    def close(self) -> None:
        self.inner.close()


def untell(data: bytes) -> bytes:
    """The file as the encoder gave it, before `tell`; a file that was never told is the same."""
    if data[:4] == b"RIFF":
        return _out_of_webp(data)
    if data[:2] == b"\xff\xd8":
        end = start = 4 + int.from_bytes(data[4:6], "big") if data[2:4] == b"\xff\xe0" else 2
        while data[end : end + 2] == b"\xff\xe1":
            end += 2 + int.from_bytes(data[end + 2 : end + 4], "big")
    else:
        end = start = 8 + 25  # signature and IHDR
        while data[end + 4 : end + 8] in (b"tEXt", b"iTXt") and data[end + 8 :].startswith(KEYWORDS):
            end += 12 + int.from_bytes(data[end : end + 4], "big")
    return data[:start] + data[end:]


def _out_of_webp(data: bytes) -> bytes:
    """The plain format again: one chunk, the picture's."""
    if data[12:16] != b"VP8X" or data[30:34] not in (b"VP8 ", b"VP8L"):
        return data
    size = int.from_bytes(data[34:38], "little")
    body = b"WEBP" + data[30 : 38 + size + size % 2]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tell(
    record: Record, embed: Sequence[str], schema: pa.Schema, name: str, called: Called = as_it_is
) -> bytes:
    """The record's picture file with what `embed` names; its pixels are the same, to the bit."""
    assert record.image is not None
    facts = facts_of(schema)
    text = parameters(record, facts, called) if "parameters" in embed else ""
    row = row_json(record, schema, name) if "row" in embed else ""
    xmp = XMP.format(SOURCE_TYPES + source_type(record)).encode() if "xmp" in embed else b""
    if record.extension == "png":
        return _into_png(record.image, text, row, xmp)
    exif = _exif(text, row)
    if record.extension == "webp":
        return _into_webp(record.image, exif, xmp)
    if len(exif) > SEGMENT - 6:
        exif = next((e for e in (_exif(text, ""), _exif("", row)) if len(e) <= SEGMENT - 6), b"")
    return _into_jpeg(record.image, exif, xmp)


def source_type(record: Record) -> str:
    whole = "trainedAlgorithmicMedia"
    return "compositeWithTrainedAlgorithmicMedia" if record.request.task in COMPOSITE else whole


def parameters(record: Record, facts: Mapping[str, Any], called: Called) -> str:
    """A1111's text: the prompt, the negative prompt, and one last line of settings."""
    request = record.request
    sampler, curve = called(request.scheduler)
    model, _, _ = str(facts.get("model", "")).partition("@")
    settings = {
        "Steps": request.steps,
        "Sampler": sampler,
        "Schedule type": curve,
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": request.seed,
        "Size": f"{record.width}x{record.height}",
        "Model hash": str(facts.get("checkpoint", ""))[:10],
        "Model": model,
        "Version": f"batchsd {facts.get('version', '')}",
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items() if value != ""))
    return "\n".join(lines).replace("\0", "")


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def _into_png(data: bytes, text: str, row: str, xmp: bytes) -> bytes:
    end = 8 + 25  # signature and IHDR
    assert data[12:16] == b"IHDR"
    chunks = b""
    if text:
        try:
            chunks += _chunk(b"tEXt", b"parameters\0" + text.encode("latin-1"))
        except UnicodeEncodeError:
            chunks += _chunk(b"iTXt", b"parameters\0\0\0\0\0" + text.encode())
    if row:
        chunks += _chunk(b"tEXt", b"batchsd\0" + row.encode("ascii"))
    if xmp:
        chunks += _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    return data[:end] + chunks + data[end:]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _exif(text: str, row: str) -> bytes:
    """An EXIF block (TIFF) with what is given, empty where nothing is."""
    from PIL import Image
    from PIL.ExifTags import IFD, Base

    exif = Image.Exif()
    if row:
        exif[Base.ImageDescription] = row
    if text:
        exif.get_ifd(IFD.Exif)[Base.UserComment] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif.tobytes().removeprefix(b"Exif\0\0") if text or row else b""


def _into_jpeg(data: bytes, exif: bytes, xmp: bytes) -> bytes:
    """EXIF and XMP as segments APP1, behind JFIF's APP0 where there is one."""
    end = 2
    if data[2:4] == b"\xff\xe0":
        end += 2 + int.from_bytes(data[4:6], "big")
    segments = b""
    for head, body in ((b"Exif\0\0", exif), (b"http://ns.adobe.com/xap/1.0/\0", xmp)):
        if body:
            segments += b"\xff\xe1" + struct.pack(">H", len(head + body) + 2) + head + body
    return data[:end] + segments + data[end:]


def _into_webp(data: bytes, exif: bytes, xmp: bytes) -> bytes:
    """The extended format: VP8X with the canvas, the picture's chunk, EXIF, XMP."""
    if not exif and not xmp:
        return data
    import io

    from PIL import Image

    assert data[12:16] in (b"VP8 ", b"VP8L"), data[12:16]
    width, height = Image.open(io.BytesIO(data)).size
    flags = 8 * bool(exif) + 4 * bool(xmp)
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + _riff(b"VP8X", bytes([flags, 0, 0, 0]) + canvas) + data[12:]
    body += _riff(b"EXIF", exif) if exif else b""
    body += _riff(b"XMP ", xmp) if xmp else b""
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _riff(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
