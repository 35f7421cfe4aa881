"""Text for people: notices that a run prints once, and values shortened to one line."""
import mmap
import reprlib
import sys

KINDS = ("16-bit", "16-bit color", "pages", "shared memory", "temporary files", "mps", "tiles")
printed = mmap.mmap(-1, len(KINDS))   # one byte a kind, shared with forked workers


def notice_once(kind: str, text: str) -> None:
    """Print `text` to stderr unless a notice of this kind (one of KINDS) was printed before."""
    place = KINDS.index(kind)
    if printed[place]:
        return
    printed[place] = 1
    print(f"notice: {text}", file=sys.stderr)


def forget_notices() -> None:
    """Print every kind of notice again when it is due."""
    printed[:] = bytes(len(KINDS))


def quoted(value, limit: int = 60) -> str:
    """Return a value as one_line does, but text in quotation marks: "640" is not 640."""
    return one_line(reprlib.repr(value), limit)


def one_line(value, limit: int = 200) -> str:
    """Return a value as at most `limit` printable characters, safe to print on a terminal."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = "".join(letter if letter.isprintable() else "?" for letter in text[:limit + 1])
    return text if len(text) <= limit else text[:limit - 3] + "..."


def plural(count: int, noun: str, several: str = "") -> str:
    """Return e.g. "1 error", "2 errors"; several: the plural where it needs more than an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {several or noun + 's'}"
