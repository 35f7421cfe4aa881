"""The form that readers of a file expect its values to have."""
import json
from pathlib import Path

from engine.errors import UserError
from engine.notices import one_line

LARGEST = 1e9   # absolute value of a number; no result of ours is near it


def read_results(path: str | Path, form):
    """Read a json file. UserError for what is no json file of this form, see `mismatch`."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, got {one_line(str(error))}; write the file "
                        "anew") from error
    fault = mismatch(value, form)
    if fault:
        raise UserError(f"{path}: expected {fault}; write the file anew")
    return value


def read_text(path: str | Path) -> str:
    """Read a regular file of UTF-8 text. A pipe or a device would block for ever."""
    if not Path(path).is_file():
        raise UserError(f"expected a file at {path}, got none there")
    return Path(path).read_text(encoding="utf-8", errors="replace")


def mismatch(value, form, name: str = "the file") -> str:
    """Say how a value of a json file or a checkpoint differs from a form, "" if it does not.

    A form is float (any finite number), int, str, [form] (a list of such values), {str: form} (a
    dictionary with any names), or {"a": form, "b": form} (one with at least these names).
    """
    if form is float:
        fits = type(value) in (int, float) and abs(value) <= LARGEST   # False for NaN
        return "" if fits else f"a number as {name}, got {one_line(value, 40)}"
    kind = form if form in (int, str) else type(form)
    if not isinstance(value, kind) or isinstance(value, bool):
        return f"{name} of type {kind.__name__}, got {one_line(value, 40)}"
    if form in (int, str):
        return ""
    if isinstance(form, list):
        parts = [(f"an entry of {name}", part, form[0]) for part in value]
    elif str in form:
        parts = [(one_line(key, 40), part, form[str]) for key, part in value.items()]
    else:
        lacking = [key for key in form if key not in value]
        if lacking:
            return f"{', '.join(lacking)} in {name}, got {one_line(list(value), 80)}"
        parts = [(key, value[key], part) for key, part in form.items()]
    faults = (mismatch(part, part_form, part_name) for part_name, part, part_form in parts)
    return next(filter(None, faults), "")
