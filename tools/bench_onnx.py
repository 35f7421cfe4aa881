"""Inference beside onnxruntime and OpenVINO, on the files that tools/export.py writes."""
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from engine.errors import UserError
from engine.models import Loaded
from tools import export
from tools.bench_models import logit_difference, paper_of_size, random_batch
from tools.timing import alternating, show_progress, write_table

PACKAGES = (*export.PACKAGES, "onnxruntime", "openvino")


def onnx(repeats: int = 5, models: tuple[str, ...] = ("dino", "deformable_detr:two_stage"),
         size: tuple[int, int] = (800, 1199), folder: str = ""):
    """Time inference in float32 beside onnxruntime and OpenVINO on the exported file, on a CPU.

    Args:
        repeats: Calls of each kind, in turns; the median is reported.
        models: Paper files, each with a variant if wanted: FILE:VARIANT.
        size: Height and width of the image in pixels.
        folder: Where exported files lie or are written; default: a temporary folder.
    """
    if not all_installed():
        raise UserError(f"expected the packages {', '.join(PACKAGES)}, got only some of them: "
                        f"pip install {' '.join(PACKAGES)}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for text in models:
            module = raw_model(text)
            inputs = random_batch(size, 1)[:2]
            path = Path(folder or temporary) / f"{text.replace(':', '_')}_{size[0]}x{size[1]}.onnx"
            if not path.exists():
                program = export.trace(module, inputs, dynamic=False)
                export.write_onnx(path, program, module, {})
            functions = {"ours": lambda: torch.inference_mode()(module)(*inputs),
                         "onnxruntime": onnxruntime_call(path, inputs),
                         "OpenVINO": openvino_call(path, inputs)}
            times = alternating(functions, repeats)
            logits = functions["ours"]()[0][0]                               # (N, K)
            for name, (ms, low, high) in times.items():
                ratio = ms / times["ours"][0]
                difference = logit_difference(logits, functions[name]()[0][0])
                rows.append([text, name, f"{ms:.0f}", f"{low:.0f} to {high:.0f}", f"{ratio:.2f}",
                             f"{difference:.1e}"])
                show_progress(rows[-1])
    columns = (f"{size[0]}x{size[1]}, float32", "runs in", "ms", "all calls", "ratio to ours",
               "difference of logits")
    write_table("onnx", "cpu", columns, rows)


def all_installed() -> bool:
    return all(find_spec(name) for name in PACKAGES)


def raw_model(text: str):
    """A model of published size with random weights, as it is exported: see `paper_of_size`."""
    paper, cfg, recipe = paper_of_size(text)
    torch.manual_seed(0)
    model, criterion = paper.build(cfg, num_classes=80)
    return export.as_module(Loaded(model.eval(), paper, cfg, recipe, {}, criterion), raw=True)


def onnxruntime_call(path: Path, inputs: tuple):
    """Inference in onnxruntime with as many threads as PyTorch has, as a function of nothing."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    arrays = dict(zip(export.Raw.inputs, (x.numpy() for x in inputs)))
    return lambda: [torch.from_numpy(x) for x in session.run(None, arrays)]


def openvino_call(path: Path, inputs: tuple):
    """Inference in OpenVINO, in float32 with as many threads, as a function of nothing."""
    import openvino
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    arrays = [x.numpy() for x in inputs]

    def call():
        results = compiled(arrays)
        return [torch.from_numpy(results[i]) for i in range(len(export.Raw.outputs))]
    return call
