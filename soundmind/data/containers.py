"""Which files of sound are read, and whether one is complete.

libsndfile reads a file that was cut short as if it were meant to end there, and a file with more
sound than its header says without the rest. So the bytes of sound that a header promises are
compared here with the bytes that are there. A container of which that cannot be known is not read.

    wav (RIFF, RIFX, RF64), W64, AIFF, CAF   chunks, followed to the end of the file
    AU, NIST                                 counts in a header of its own
    Ogg                                      pages, of which the last one says so
    MP3                                      the count of bytes in its first frame
    FLAC                                     its header counts frames; soundmind.data.audio decodes

Standard library only. [ours]
"""

from __future__ import annotations

import os
import re
import struct
from typing import BinaryIO, NamedTuple

from soundmind.system.content import describe_bytes

FileFault = tuple[str, str]  # kind, and what was found

# Of libsndfile's names, and for people.
READ_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC", "OGG", "MP3")
READ = "wav, W64, AIFF, AU, CAF, NIST, FLAC, Ogg or MP3"
_ADVICE = "write it again as wav or FLAC, e.g. ffmpeg -i FILE OUT.wav"
# Tools that write to a pipe cannot go back to fill in the size and leave a very large one: 4 GiB
# less the header (ffmpeg), 2 GiB less the header (sox, espeak-ng), 2 GiB. Sound until the end.
_PLACEHOLDER = 0x7FFF0000
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICS")  # titles, which some tools put behind the sound
_OGG_FIRST, _OGG_LAST = 2, 4  # flags of a page


class _Chunked(NamedTuple):
    """How a container cuts its file into chunks."""

    start: int  # offset of the first chunk
    id_bytes: int
    size: str  # struct format of a chunk's size
    overhead: int  # bytes of the chunk's own header that its size includes
    align: int
    sound: bytes  # name of the chunk with the samples


_WAV = _Chunked(12, 4, "<I", 0, 2, b"data")
_CHUNKED = {
    b"RIFF": _WAV,
    b"RIFX": _WAV._replace(size=">I"),
    b"RF64": _WAV,
    b"FORM": _Chunked(12, 4, ">I", 0, 2, b"SSND"),
    b"riff": _Chunked(40, 16, "<Q", 24, 8, b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"),
    b"caff": _Chunked(8, 4, ">Q", 0, 1, b"data"),
}
_FORMS = {b"FORM": (b"AIFF", b"AIFC")}  # what bytes 8 to 11 say; for the others of 12 bytes: WAVE


def clip_fault(file: BinaryIO, size: int) -> FileFault | None:
    """What is wrong with a file of `size` bytes as a whole; None if all of its sound is there."""
    head = _bytes_at(file, 0, 4096)
    magic = head[:4]
    if magic in _CHUNKED:
        if _CHUNKED[magic].start == 12 and head[8:12] not in _FORMS.get(magic, (b"WAVE",)):
            kind = f"{_shown(magic)} file of kind {_shown(head[8:12])}"
            return "unreadable-clip", f"{kind}. Clips are {READ}; {_ADVICE}"
        return _chunk_fault(file, size, _CHUNKED[magic], head)
    if magic in (b".snd", b"dns."):
        return _au_fault(head, size)
    if head.startswith(b"NIST_1A"):
        return _nist_fault(head, size)
    if magic == b"OggS":
        return _ogg_fault(file, size)
    if magic == b"fLaC":
        return _flac_fault(file, 4, size)
    return _other_fault(file, head, size)


def _chunk_fault(file: BinaryIO, size: int, rule: _Chunked, head: bytes) -> FileFault | None:
    """Follow the chunks: one of them holds the sound, all of it, and nothing else lies behind."""
    header = rule.id_bytes + struct.calcsize(rule.size)
    position, long_size, sound_end = rule.start, None, None
    while position + header <= size:
        name, start, length = _chunk_at(file, position, rule)
        if sound_end is not None and not _fits(name, start + length, size):
            break
        if name == rule.sound and sound_end is None:
            if length in (0xFFFFFFFF, 2**64 - 1) and long_size is not None:
                length = long_size
            present = size - start
            if length == 0 and present > header:
                return "empty-clip", (
                    f"its header says 0 bytes of sound and {present:,} bytes follow: the size was "
                    f"never filled in (written to a pipe?); {_ADVICE}"
                )
            if length >= _PLACEHOLDER and length > present:
                return None
            if length > present:
                return _cut(present, length)
            sound_end = start + length
        elif name == rule.sound or (sound_end is not None and name[:4] in _CHUNKED):
            return "unreadable-clip", (
                f"a second run of sound begins at byte {position:,}, which is not read; {_ADVICE}"
            )
        elif name == b"ds64" and length >= 16:  # RF64: the sizes that four bytes cannot hold
            (long_size,) = struct.unpack("<Q", _bytes_at(file, start + 8, 8).ljust(8, b"\0"))
        end = start + length
        position = end + -end % rule.align if rule.align > 1 else end
        if sound_end == end and end % rule.align and _reads_on(file, end, size, rule):
            position = end  # a writer that does not pad
    if sound_end is None:
        return "truncated-clip", f"{size:,} bytes, ends before its samples"
    return _behind(file, max(sound_end, min(position, size)), size)


def _chunk_at(file: BinaryIO, position: int, rule: _Chunked) -> tuple[bytes, int, int]:
    """Name of the chunk at `position`, offset of its content and length of that."""
    header = rule.id_bytes + struct.calcsize(rule.size)
    data = _bytes_at(file, position, header)
    (length,) = struct.unpack(rule.size, data[rule.id_bytes :])
    return data[: rule.id_bytes], position + header, max(0, length - rule.overhead)


def _fits(name: bytes, end: int, size: int) -> bool:
    """Whether what was read behind the sound is a chunk at all."""
    return name[:4].isascii() and name[:4].decode().isprintable() and end <= size


def _reads_on(file: BinaryIO, position: int, size: int, rule: _Chunked) -> bool:
    if position + rule.id_bytes + struct.calcsize(rule.size) > size:
        return False
    name, start, length = _chunk_at(file, position, rule)
    return _fits(name, start + length, size)


def _behind(file: BinaryIO, end: int, size: int) -> FileFault | None:
    """What lies behind the last chunk: padding and titles, or sound that would not be heard."""
    rest = _bytes_at(file, end, 1 << 16)
    if size - end < 8 or rest.lstrip(b"\0").startswith(_TAGS) or not rest.strip(b"\0"):
        return None
    return "unreadable-clip", (
        f"{size - end:,} bytes lie behind the sound that its header counts (a header that was not "
        f"brought up to date, or two files in one); {_ADVICE}"
    )


def _au_fault(head: bytes, size: int) -> FileFault | None:
    if len(head) < 24:
        return "truncated-clip", f"{size} bytes, ends inside its header"
    start, promised = struct.unpack(">II" if head[:1] == b"." else "<II", head[4:12])
    return _count_fault(promised, size - start)


def _nist_fault(head: bytes, size: int) -> FileFault | None:
    counts = dict(re.findall(rb"(\w+) -i (\d{1,12})\s", head))
    start = re.match(rb"NIST_1A\n\s*(\d{1,9})\n", head)
    if start is None or b"sample_count" not in counts:
        return "unreadable-clip", "a NIST header that does not count its samples"
    promised = int(counts[b"sample_count"])
    for name in (b"channel_count", b"sample_n_bytes"):  # left out where they are 1
        promised *= int(counts.get(name, b"1"))
    return _count_fault(promised, size - int(start[1]))


def _count_fault(promised: int, present: int) -> FileFault | None:
    """For headers that stand before the sound and nothing else."""
    if present > 0 and promised >= _PLACEHOLDER and promised > present:
        return None
    if promised > present:
        return _cut(max(0, present), promised)
    if present - promised >= 8:
        return "unreadable-clip", (
            f"its header counts {promised:,} bytes of sound and {present:,} follow; {_ADVICE}"
        )
    return None


def _cut(present: int, promised: int) -> FileFault:
    share = f" ({100 * present / promised:.0f} %)" if promised else ""
    return "truncated-clip", f"{present:,} of {promised:,} bytes of sound{share}"


def _ogg_fault(file: BinaryIO, size: int) -> FileFault | None:
    """Follow the pages: one stream from its first page to its last."""
    position, pages, flags, sound = 0, 0, 0, False
    while position < size:
        page = _bytes_at(file, position, 27)
        if len(page) < 27 and page[:4] in (b"OggS"[: len(page)], b"OggS"):
            return "truncated-clip", f"ends inside page {pages + 1} of its Ogg stream"
        if page[:4] != b"OggS":
            break
        flags = page[5]
        if flags & _OGG_FIRST and sound:
            return "unreadable-clip", (
                f"a second stream begins at byte {position:,}, which is not read; {_ADVICE}"
            )
        sound = sound or not flags & _OGG_FIRST
        lengths = _bytes_at(file, position + 27, page[26])
        position += 27 + page[26] + sum(lengths)
        pages += 1
        if len(lengths) < page[26] or position > size:
            return "truncated-clip", f"ends inside page {pages} of its Ogg stream"
    if not flags & _OGG_LAST:
        return "truncated-clip", f"{pages} pages, and none of them is marked as the last"
    return _behind(file, position, size)


def _flac_fault(file: BinaryIO, start: int, size: int) -> FileFault | None:
    data = _bytes_at(file, start, size)
    for head in (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22"):
        if (at := data.find(head)) >= 0:
            return "unreadable-clip", (
                f"a second stream begins at byte {at + start:,}, which is not read; {_ADVICE}"
            )
    return None


def _mp3_fault(file: BinaryIO, start: int, size: int) -> FileFault | None:
    """An MP3 whose first frame, at `start`, counts its bytes (Xing or Info, as encoders write)."""
    frame = _bytes_at(file, start, 64)
    at = next((at for tag in (b"Xing", b"Info") if (at := frame.find(tag)) > 0), None)
    if at is None or len(frame) < at + 16 or frame[at + 7] & 3 != 3:  # frames and bytes are there
        return "unreadable-clip", (
            f"an MP3 that does not count its bytes, so that a cut could not be seen; {_ADVICE}"
        )
    (promised,) = struct.unpack(">I", frame[at + 12 : at + 16])
    if promised > size - start:
        return _cut(size - start, promised)
    if size - start - promised >= 8:
        return _behind(file, start + promised, size)
    return None


def _other_fault(file: BinaryIO, head: bytes, size: int) -> FileFault | None:
    start = 0
    while (tag := _bytes_at(file, start, 10))[:3] == b"ID3" and len(tag) == 10:
        length = 0
        for byte in tag[6:]:  # seven bits each
            length = length << 7 | byte & 0x7F
        start += 10 + length
    frame = _bytes_at(file, start, 4)
    is_mp3 = len(frame) == 4 and frame[0] == 0xFF and frame[1] & 0xE6 == 0xE2  # MPEG layer III
    if is_mp3:
        return _mp3_fault(file, start, size)
    if frame == b"fLaC":
        return _flac_fault(file, start + 4, size)
    if start and frame in _CHUNKED:
        return "unreadable-clip", f"titles (ID3) stand before the {_shown(frame)} header; {_ADVICE}"
    if size < 12:
        return "truncated-clip", f"{size} bytes, ends inside its header"
    kind = describe_bytes(head)
    advice = "" if "in place of" in kind else f". Clips are {READ}; {_ADVICE}"
    return "unreadable-clip", kind + advice


def _shown(name: bytes) -> str:
    return name.decode("ascii", "backslashreplace")


def _bytes_at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset, os.SEEK_SET)
    return file.read(count)
