"""The tables of RESULTS.md about GPUs, from the json that `python -m tools.bench gpu` writes.

The tables stand between two markers of the page. Columns called "published" hold the figures that
other projects give; all other columns were measured on one GPU by one program.
"""
import json
from pathlib import Path

from engine.errors import UserError
from engine.files import complete_file
from tools.timing import table_row

BEGIN = "<!-- tables of the GPU: begin -->"
END = "<!-- tables of the GPU: end -->"
NO_RUN = "No run on a GPU yet: the columns of our own figures are empty."

# README of roulbac/msda-triton: H100, 4 images of 800 x 1333, 300 queries; microseconds, and how
# many times as fast as mmcv's kernel (which has no bfloat16).
PUBLISHED_CASE = "decoder, 800x1333, batch 4, 300 queries"
PUBLISHED = {("forward", "float32"): (12, 2.17), ("forward", "float16"): (8, 4.30),
             ("forward", "bfloat16"): (8, None), ("backward", "float32"): (92, 1.33),
             ("backward", "float16"): (56, 4.50), ("backward", "bfloat16"): (56, None)}
# README of deformops 3: by how much the peak memory of both passes lies below that of the reference
# implementation, at the scale of an encoder.
PUBLISHED_MEMORY = {"deformops, CUDA": "71 %", "deformops, Triton": "88 % (bfloat16)"}
OURS = ("ours", "ours, fused")


def gpu_tables(file: str = "runs/bench/gpu_cuda.json", page: str = "RESULTS.md"):
    """Write the tables of a json between the markers of a page.

    Args:
        file: What `python -m tools.bench gpu` wrote; the word none: published figures alone.
        page: The page, which has the two markers.
    """
    results = {}
    if file and file != "none":
        if not Path(file).exists():
            raise UserError(f"--file: expected a json of `python -m tools.bench gpu`, got {file}, "
                            "which does not exist")
        results = json.loads(Path(file).read_text())
        if results["device"] != "cuda":
            raise UserError(f"--file: expected a run on a GPU, got the rehearsal {file}")
    write_between(Path(page), tables(results))
    print(f"written to {page}")


def write_between(page: Path, text: str) -> None:
    """Replace what stands between the markers. UserError unless each is there once, in order."""
    old = page.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise UserError(f"expected {BEGIN} and then {END} in {page}, once each, got another page: "
                        "put the markers where the tables belong")
    before = old.partition(BEGIN)[0]
    after = old.partition(END)[2]
    with complete_file(page) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


# ---- tables --------------------------------------------------------------------------------------

def tables(results: dict) -> str:
    """All tables as Markdown; {}: the published figures alone."""
    blocks = [heading(results), failures(results), ceilings(results), correctness(results),
              *kernels(results), published(results), memory_of_peers(results), timing(results),
              steps(results), memory(results), transformers(results)]
    return "\n\n".join(block for block in blocks if block)


def heading(results) -> str:
    if not results:
        return NO_RUN
    rehearsal = "" if results["device"] == "cuda" else "Rehearsal with tiny shapes. "
    versions = f"PyTorch {results['torch']}, CUDA {results['cuda']}, Python {results['python']}"
    return (f"{rehearsal}{results['name']}, {versions}, {results['date']}, "
            f"{results['seconds']:.0f} s; `python -m tools.bench gpu`")


def table(columns, rows) -> str:
    """A Markdown table, or nothing without rows."""
    if not rows:
        return ""
    lines = [table_row(columns), "|" + "---|" * len(columns), *map(table_row, rows)]
    return "\n".join(lines)


def rows_of(results, name) -> list[dict]:
    return results.get("parts", {}).get(name, {}).get("rows", [])


def rows_of_all(results, prefix) -> list[dict]:
    """The rows of all parts whose name begins so."""
    names = [name for name in results.get("parts", {}) if name.startswith(prefix)]
    return [row for name in names for row in rows_of(results, name)]


def failures(results) -> str:
    parts = results.get("parts", {})
    rows = [[name, part["failed"]] for name, part in parts.items() if part["failed"]]
    return table(("part", "not measured, or not to its end"), rows)


def ceilings(results) -> str:
    rows = [[row["what"], f"{row['value']:.3g} {row['unit']}"]
            for row in rows_of(results, "machine")]
    return table(("the most that the device did here", ""), rows)


def correctness(results) -> str:
    rows = []
    for row in rows_of(results, "correctness") + rows_of(results, "tests"):
        errors = " ".join(f"{error:.0e}" for error in row.get("errors", []))
        limits = " ".join(f"{limit:.0e}" for limit in row.get("limits", []))
        rows.append([row["what"], errors, limits, "yes" if row["ok"] else "**no**"])
    columns = ("correct?", "relative errors: output, gradients", "allowed", "right")
    return table(columns, rows)


def kernels(results) -> list[str]:
    """A table for every case."""
    cases = dict.fromkeys(row["case"] for row in rows_of_all(results, "kernel: "))
    return [kernel_table(results, case) for case in cases]


def kernel_table(results, case) -> str:
    rows = [row for row in rows_of_all(results, "kernel: ") if row["case"] == case]
    ours = {(row["form"], row["dtype"]): row for row in rows
            if row["implementation"] in OURS and "both_us" in row}
    cells = []
    for row in sorted(rows, key=lambda row: row["dtype"]):
        title = [row["dtype"], row["implementation"], row["form"]]
        if "failed" in row:
            cells.append([*title, row["failed"]] + [""] * 6)
            continue
        mine = ours.get((row["form"], row["dtype"]))
        cells.append([*title, *times(row), *ratios(row, mine), mebibytes(row["mib"]),
                      f"{row['error']:.0e} / {row['gradient_error']:.0e}", row["how"]])
    cells += [bound for row in ours.values() for bound in lower_bound(results, row)]
    columns = (case, "implementation", "from", "forward us", "backward us", "forward, ours faster",
               "both, ours faster", "MiB beside inputs", "error: output / gradients", "timed by")
    return table(columns, cells)


def times(row) -> list[str]:
    """Microseconds of the forward pass, and of the backward pass: both passes less the forward."""
    return [f"{row['forward_us']:.1f}", f"{row['both_us'] - row['forward_us']:.1f}"]


def ratios(row, ours) -> list[str]:
    """How many times as fast our operator of the same form is, forward and both passes."""
    if ours is None or row["implementation"] in OURS:
        return ["", ""]
    return [f"{row[name] / ours[name]:.2f}" for name in ("forward_us", "both_us")]


def mebibytes(value) -> str:
    return "" if value is None else f"{value:.0f}"


def lower_bound(results, row) -> list:
    """A row with the least time of our fused form, its bytes at the measured rate of a copy, and
    how many rows of 128 bytes our backward pass added in a second. No row for other forms."""
    rates = [x["value"] for x in rows_of(results, "machine") if x["unit"] == "TB/s"]
    backward = row["both_us"] - row["forward_us"]
    if row["form"] != "fused" or not rates:
        return []
    forward = row["bytes_forward"] / rates[0] * 1e-6
    both = row["bytes_both"] / rates[0] * 1e-6
    added = row["additions"] / 8 / max(backward, 1e-3) * 1e-3
    return [[row["dtype"], "lower bound: device memory", "fused", f"{forward:.1f}",
             f"{both - forward:.1f}", "", "", "", "",
             f"ours added {added:.2g} G rows of 128 bytes a second"]]


def published(results) -> str:
    """Published times of others beside the same case here."""
    cells = []
    for (which, dtype), (us, ratio) in PUBLISHED.items():
        faster = f"{ratio:.2f}" if ratio else "no such kernel"
        mine = [time_here(results, name, which, dtype)
                for name in ("msda-triton", "mmcv", *OURS)]
        cells.append([which, dtype, us, faster, *mine])
    columns = (PUBLISHED_CASE, "type", "published, H100: msda-triton us",
               "published: times as fast as mmcv", "msda-triton us", "mmcv us", "ours us",
               "ours, fused us")
    return table(columns, cells)


def time_here(results, name, which, dtype) -> str:
    for row in rows_of(results, f"kernel: {name}"):
        if (row["case"], row["dtype"]) == (PUBLISHED_CASE, dtype) and "both_us" in row:
            forward, backward = times(row)
            return backward if which == "backward" else forward
    return ""


def memory_of_peers(results) -> str:
    """How much less memory both passes need than the reference implementation, in the first case.
    """
    rows = [row for row in rows_of_all(results, "kernel: ") if row.get("mib")]
    first = [row for row in rows if row["case"] == rows[0]["case"]]
    reference = {row["dtype"]: row["mib"] for row in first if row["implementation"] == "PyTorch"}
    cells = []
    for name in dict.fromkeys([*OURS, *PUBLISHED_MEMORY]):
        saved = [f"{row['dtype']} {1 - row['mib'] / reference[row['dtype']]:.0%}" for row in first
                 if row["implementation"] == name and row["dtype"] in reference]
        cells.append([name, PUBLISHED_MEMORY.get(name, ""), ", ".join(saved)])
    columns = ("peak memory below the reference implementation, encoder", "published", "here")
    return table(columns, cells)


def timing(results) -> str:
    rows = [[row["what"], f"{row['us']:.1f}"] for row in rows_of(results, "timing")]
    return table(("one small kernel, timed in three ways", "us a call"), rows)


def steps(results) -> str:
    rows = []
    for row in rows_of_all(results, "step: "):
        rows.append([row["precision"], "yes" if row["compiled"] else "no", row["batch"],
                     f"{row['ms']:.0f}", f"{1e3 * row['batch'] / row['ms']:.1f}",
                     f"{row['gib']:.1f}", f"{row['warm_up_s']:.0f}", row["attention"]])
    columns = ("DINO, a training step", "compiled", "images", "ms", "images/s", "peak GiB",
               "first three steps s", "attention")
    return table(columns, rows)


def memory(results) -> str:
    rows = []
    for row in rows_of(results, "memory"):
        cells = [row.get("failed"), ""]
        if "ms" in row:
            cells = [f"{row['ms']:.0f}", f"{row['gib']:.2f}"]
        rows.append([row["model"], row["batch"], "yes" if row["recompute"] else "no", *cells])
    columns = ("training step, bfloat16", "images", "--recompute", "ms", "peak GiB")
    return table(columns, rows)


def transformers(results) -> str:
    """Times beside those of the package, with the ratio."""
    rows = rows_of(results, "transformers")
    if not rows:
        return ""
    theirs = {(row["what"], row["dtype"]): row.get("ms") for row in rows
              if row["implementation"] == "transformers"}
    cells = []
    for row in rows:
        first = theirs.get((row["what"], row["dtype"]))
        ratio = f"{first / row['ms']:.2f}" if first and "ms" in row else ""
        time = f"{row['ms']:.1f}" if "ms" in row else row["failed"]
        cells.append([row["what"], row["dtype"], row["implementation"], time, ratio])
    title = f"two-stage Deformable DETR (logits differ by {rows[0]['difference']:.0e} at most)"
    columns = (title, "autocast", "implementation", "ms", "times as fast")
    return table(columns, sorted(cells, key=lambda row: row[:2]))
