"""What a media file's own header says of its length, against the file's size: which files are cut short.

FFmpeg and libsndfile read such a file to its end and say nothing. Files that deviate from their format count as whole.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Mapping
from functools import cache

Data = mmap.mmap
# Programs that write to a pipe do not know the length, and write 0 or about the largest number.
_UNKNOWN_32 = 0x7FFFF000
_UNKNOWN_64 = 1 << 62
# The formats in WAV that libsndfile reads as FFmpeg does: PCM, floating point, A-law and mu-law.
_PLAIN_WAV = (1, 3, 6, 7)
_EXTENSIBLE = 0xFFFE
# The first bytes of Dolby Digital or DTS in what the header calls PCM, as cables carry them (IEC 61937; DTS CDs).
_DISGUISED = (b"\x72\xf8\x1f\x4e", b"\xfe\x7f\x01\x80", b"\xff\x1f\x00\xe8")
_MP3_FRAME = 1441  # bytes, of the largest; some programs count one frame too many
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


# Formats of FFmpeg whose files name other files, or addresses, which it would open; and its devices.
_NAMING = {
    *(
        "concat",
        "hls",
        "hds",
        "dash",
        "webm_dash_manifest",
        "smoothstreaming",
        "imf",
        "sdp",
        "rtsp",
        "rtp",
        "sap",
        "mlv",
    ),
    *("vobsub", "lavfi", "avisynth", "vapoursynth", "alsa", "fbdev", "kmsgrab", "oss", "video4linux2,v4l2"),
    "image2",  # takes "%d" and "*" in a name for other files; pictures are known by their content
}
# Formats that FFmpeg takes by the extension alone: text, drawn as on a terminal; and sound without a header, whose
# rate it guesses.
_GUESSED = {
    *("tty", "bin", "xbin", "adf", "idf", "alaw", "mulaw", "s8", "u8", "vidc", "g729"),
    *(f"{kind}{bits}{end}" for kind in "fsu" for bits in (16, 24, 32, 64) for end in ("le", "be")),
}
# How files begin that only name other files.
_PLAY_LISTS = (
    b"#EXTM3U",
    b"ffconcat",
    b"[playlist]",
    b"<asx",
    b"<smil",
    b"v=0\r\no=",
    b"v=0\no=",
    b"[Reference]",
    b"RTSPtext",
)


@cache
def open_options() -> dict[str, str]:
    """Options of FFmpeg with which a file is opened: a play list is not followed to what it names."""
    import av

    return {
        "format_whitelist": ",".join(sorted(av.formats_available - _NAMING - _GUESSED)),
        "protocol_whitelist": "file",
    }


def is_play_list(path: str) -> bool:
    """Whether a file names other files, which hold the media, and is none itself."""
    with open(path, "rb") as f:
        head = f.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    marks = (b"<MPD", b"<playlist", b"<SmoothStreamingMedia")
    return head.lower().startswith(tuple(m.lower() for m in _PLAY_LISTS)) or any(m in head for m in marks)


def is_plain_sound(path: str) -> bool:
    """Whether libsndfile reads the file: FLAC, or WAV with sound that is not compressed."""
    with open(path, "rb") as f:
        head = f.read(26)
        if head[:4] == b"fLaC":
            # A program that writes to a pipe leaves the number of samples 0, of which libsndfile makes 2 ** 63.
            return bool(head[21] & 15 or any(head[22:26])) if len(head) == 26 else True
        if head[:4] == b"RIFX" and head[8:12] == b"WAVE":
            return True  # big-endian; FFmpeg takes its samples for little-endian
        if head[:4] not in (b"RIFF", b"RF64") or head[8:12] != b"WAVE":
            return False
        f.seek(12)
        kind = None
        while len(chunk := f.read(8)) == 8:
            name, length = struct.unpack("<4sI", chunk)
            if name == b"fmt " and length >= 16:
                fmt = f.read(min(length, 64))
                kind = struct.unpack_from("<H", fmt)[0]
                if kind == _EXTENSIBLE and len(fmt) >= 26:
                    kind = struct.unpack_from("<H", fmt, 24)[0]
                f.seek(max(length - 64, 0) + (length & 1), os.SEEK_CUR)
            elif name == b"data":
                start = f.read(8192) if kind == 1 else b""
                return kind in _PLAIN_WAV and not any(mark in start for mark in _DISGUISED)
            else:
                f.seek(length + (length & 1), os.SEEK_CUR)
    return kind is None or kind in _PLAIN_WAV  # libsndfile says what is wrong with it


def bytes_missing(path: str) -> int:
    """How many bytes the file's header, or the header of its last part, promises beyond the file's end."""
    size = os.path.getsize(path)
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for applies, missing in _FORMATS.items():
            if applies(data):
                try:
                    return max(missing(data, size), 0)
                except (struct.error, IndexError):
                    return 0
    return 0


def _starts(*marks: bytes, at: int = 0) -> Callable[[Data], bool]:
    return lambda data: any(data[at : at + len(m)] == m for m in marks)


def _riff(data: Data, size: int) -> int:
    """WAV and AVI. A WAV's size in its first bytes is often wrong; that of its sound is not."""
    rf64, wave = data[:4] in (b"RF64", b"BW64"), data[8:12] == b"WAVE"
    at = 12 if wave else 0
    long_size = None
    while at + 8 <= size:
        name, length = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        if name == b"ds64":
            long_size = struct.unpack_from("<Q", data, at + 16)[0]
        if wave and name == b"data":
            if rf64 and length == 0xFFFFFFFF and long_size is not None:
                length = long_size
            elif length >= _UNKNOWN_32:
                return 0
            return at + 8 + length - size if length < _UNKNOWN_64 else 0
        if not wave and (name != b"RIFF" or length == 0 or length >= _UNKNOWN_32):
            return 0
        at += 8 + length + (length & 1)
    return 0 if wave else at - size - (at - size == 1)


def _wave64(data: Data, size: int) -> int:
    length = struct.unpack_from("<Q", data, 16)[0]
    return length - size if length < _UNKNOWN_64 else 0


def _aiff(data: Data, size: int) -> int:
    at = 12
    while at + 8 <= size:
        length = struct.unpack_from(">I", data, at + 4)[0]
        if data[at : at + 4] == b"SSND":
            return at + 8 + length - size if length < _UNKNOWN_32 else 0
        at += 8 + length + (length & 1)
    return 0


def _caf(data: Data, size: int) -> int:
    at = 8
    while at + 12 <= size:
        length = struct.unpack_from(">q", data, at + 4)[0]
        if length < 0:
            return 0
        at += 12 + length
    return at - size


def _au(data: Data, size: int) -> int:
    start, length = struct.unpack_from(">II", data, 4)
    return start + length - size if length < _UNKNOWN_32 else 0


def _mp4(data: Data, size: int) -> int:
    at = 0
    while at + 8 <= size:
        length, kind = struct.unpack_from(">I4s", data, at)
        if length == 1 and at + 16 <= size:
            length = struct.unpack_from(">Q", data, at + 8)[0]
        if length < 8:  # 0: to the end of the file, whatever that is
            return 0
        if at + length > size:
            return at + length - size if kind in (b"mdat", b"moof", b"moov") else 0
        at += length
    return 0


def _matroska(data: Data, size: int) -> int:
    """EBML: the header, then the segment, whose size is unknown (all ones) in a recording that was not closed."""
    at = 4
    for mark in (b"", b"\x18\x53\x80\x67"):
        if data[at : at + len(mark)] != mark:
            return 0
        at += len(mark)
        width = 9 - data[at].bit_length()
        if width > 8:
            return 0
        value = int.from_bytes(data[at : at + width], "big") - (1 << 7 * width)
        if value == (1 << 7 * width) - 1:
            return 0
        at += width + value
    return at - size


def _transport_stream(data: Data, size: int) -> int:
    return -size % 188 if size > 188 and data[188] == 0x47 else 0


def _m2ts(data: Data, size: int) -> int:
    return -size % 192 if size > 196 and data[196] == 0x47 else 0


def _program_stream(data: Data, size: int) -> int:
    at = 0
    while at + 14 <= size and data[at : at + 3] == b"\0\0\1":
        kind = data[at + 3]
        if kind == 0xBA:  # pack header, of MPEG-2 or MPEG-1
            at += 14 + (data[at + 13] & 7) if data[at + 4] >> 6 == 1 else 12
        elif kind >= 0xBB:
            at += 6 + struct.unpack_from(">H", data, at + 4)[0]
        else:
            return 0
    return at - size


def _flv(data: Data, size: int) -> int:
    found = data[:4096].find(b"\x00\x08filesize\x00")
    if found >= 0:
        stated = struct.unpack_from(">d", data, found + 11)[0]
        if size < stated < _UNKNOWN_64:
            return int(stated) - size
    at = struct.unpack_from(">I", data, 5)[0] + 4
    while at + 11 <= size and data[at] & 0x1F in (8, 9, 18):
        at += 11 + int.from_bytes(data[at + 1 : at + 4], "big") + 4
    return at - 4 - size


def _asf(data: Data, size: int) -> int:
    at = data[:8192].find(_ASF_FILE)
    if at < 0 or struct.unpack_from("<I", data, at + 88)[0] & 1:  # a broadcast states no size
        return 0
    stated = struct.unpack_from("<Q", data, at + 40)[0]
    return stated - size if stated < _UNKNOWN_64 else 0


def _ogg(data: Data, size: int) -> int:
    at = 0
    while at + 27 <= size and data[at : at + 4] == b"OggS":
        lengths = data[at + 27 : at + 27 + data[at + 26]]
        at += 27 + data[at + 26] + sum(lengths)
    return at - size


def _mp3(data: Data, size: int) -> int:
    """The size in the first frame, which the programs of most MP3 files put there (Xing or Info; VBRI)."""
    start = 0
    if data[:3] == b"ID3":
        a, b, c, d = data[6:10]
        start = 10 + (a << 21 | b << 14 | c << 7 | d)
    head = data[start : start + 200]
    if len(head) < 200 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0
    for mark in (b"Xing", b"Info"):
        if (at := head.find(mark)) > 0:
            flags = struct.unpack_from(">I", head, at + 4)[0]
            if not flags & 2:
                return 0
            stated = struct.unpack_from(">I", head, at + 8 + 4 * (flags & 1))[0]
            return start + stated - size if start + stated - size > _MP3_FRAME else 0
    if (at := head.find(b"VBRI")) > 0:
        stated = struct.unpack_from(">I", head, at + 10)[0]
        return start + stated - size if start + stated - size > _MP3_FRAME else 0
    return 0


def _dsf(data: Data, size: int) -> int:
    return struct.unpack_from("<Q", data, 12)[0] - size


def _wavpack(data: Data, size: int) -> int:
    at = 0
    while at + 8 <= size and data[at : at + 4] == b"wvpk":
        at += 8 + struct.unpack_from("<I", data, at + 4)[0]
    return at - size


_FORMATS: Mapping[Callable[[Data], bool], Callable[[Data, int], int]] = {
    _starts(b"RIFF", b"RF64", b"BW64"): _riff,
    _starts(b"riff\x2e\x91\xcf\x11"): _wave64,
    _starts(b"FORM"): _aiff,
    _starts(b"caff"): _caf,
    _starts(b".snd"): _au,
    _starts(b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", at=4): _mp4,
    _starts(b"\x1a\x45\xdf\xa3"): _matroska,
    _starts(b"FLV"): _flv,
    _starts(_ASF_HEADER): _asf,
    _starts(b"OggS"): _ogg,
    _starts(b"DSD "): _dsf,
    _starts(b"wvpk"): _wavpack,
    _starts(b"\0\0\1\xba"): _program_stream,
    _starts(b"\x47"): _transport_stream,
    _starts(b"\x47", at=4): _m2ts,
    _starts(b"ID3", b"\xff"): _mp3,
}
