"""What bytes are, by the first of them: said where a file is not what its name promises."""

from __future__ import annotations

# Beginning of the content, in lower case where it is text; what to call it.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file (`git lfs pull` gets it)"),
    (b"/annex/objects/", "a git-annex pointer in place of the file (`git annex get` gets it)"),
    (b"../../blobs/", "the name of a file in a Hugging Face cache in place of the file"),
    (b"<!doctype html", "a web page (a log-in or an error?) in place of the file"),
    (b"<html", "a web page (a log-in or an error?) in place of the file"),
    (b"<?xml", "an XML page (the error of a download?) in place of the file"),
    (b"\x1a\x45\xdf\xa3", "WebM or Matroska"),
    (b"\x30\x26\xb2\x75", "Windows Media"),
    (b"#!amr", "AMR"),
    (b"#!silk", "SILK"),
    (b"\x02#!silk", "SILK"),
    (b"wvpk", "WavPack"),
    (b"\x1f\x8b", "packed with gzip"),
    (b"bzh", "packed with bzip2"),
    (b"\xfd7zxz", "packed with xz"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd"),
    (b"pk\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"par1", "a Parquet file"),
    (b"%pdf", "a PDF"),
    (b"\x89png", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"uklgr", "a wav file in base64"),
    (b"zkxhq", "a FLAC file in base64"),
    (b"data:", "a data URI (base64)"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
    (b"{", "JSON"),
)
_ADTS = (0xFFF0, 0xFFF6)  # sync word and layer of raw AAC


def known_kind(head: bytes) -> str | None:
    """What the content is that begins with `head` (the first kilobytes), where that is known."""
    if not head:
        return "empty"
    if not head.strip(b"\0"):
        return "nothing but zero bytes"
    if head[4:8] == b"ftyp":
        return "MPEG-4 (m4a, mp4)"
    if int.from_bytes(head[:2], "big") & _ADTS[1] == _ADTS[0]:
        return "raw AAC"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, words in _BEGINNINGS:
        if text.startswith(beginning) or head.startswith(beginning):
            return words
    return None


def describe_bytes(head: bytes) -> str:
    """A few words for any content that begins with `head`."""
    if (kind := known_kind(head)) is not None:
        return kind
    shown = head[:40].decode("utf-8", "ignore")
    lost = len(head[:40]) - len(shown.encode())  # at most the beginning of a last character
    if lost < 4 and shown and " ".join(shown.split()).isprintable():
        return f"text that begins {' '.join(shown.split())!r}"
    return f"of no kind that is known here (begins {head[:8].hex(' ')})"
