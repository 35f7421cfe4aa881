"""Errors that the person at the command line can correct."""
import contextlib
import os
import sys

import torch


LONGEST_MESSAGE = 1200   # characters
NOT_DETERMINISTIC = "does not have a deterministic implementation"   # PyTorch's words


class UserError(ValueError):
    """A mistake that a user can correct. The message is one line: what was expected, what was
    given instead, and what to do."""


@contextlib.contextmanager
def user_errors(program: str):
    """Around the main function of `program`: print "PROGRAM: error: MESSAGE" in one line, and exit,
    for what a user can correct: a UserError, a training run that diverged, a full disk.

    Other exceptions keep their traceback. When nobody reads the output any more, exit silently."""
    if hasattr(sys.stdout, "reconfigure"):
        # A closed pipe is noticed at the next line. A terminal may lack letters of a class name.
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        yield
    except BrokenPipeError:   # train.py | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except (UserError, FloatingPointError) as error:
        sys.exit(f"{program}: error: {error_line(error)}")
    except (MemoryError, RuntimeError) as error:
        if NOT_DETERMINISTIC in str(error):
            operation = str(error).partition(NOT_DETERMINISTIC)[0].strip()
            sys.exit(f"{program}: error: expected operations with deterministic results, got "
                     f"{operation}, which has none on this device: leave out --deterministic")
        if not is_out_of_memory(error):
            raise
        sys.exit(f"{program}: error: out of memory ({error_line(error) or 'MemoryError'}): try "
                 "smaller images or --device cpu")
    except OSError as error:
        if error.errno is None or error.strerror is None:
            raise
        where = f": {error.filename}" if error.filename else ""
        sys.exit(f"{program}: error: {error.strerror}{where}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of the GPU or of the computer is used up."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def error_line(error: Exception) -> str:
    """The message of an error in one line, without control characters. A damaged file may put
    values of any length into it: the end of a very long message is left out."""
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + "..."


def printable(text: str) -> str:
    """Replace control characters, which would change the terminal, by question marks."""
    return "".join(c if c.isprintable() else "?" for c in text)
