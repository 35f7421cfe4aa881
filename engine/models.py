"""..."""
import importlib
from pathlib import Path
from torch import nn
from engine.checkpoints import load, make_config
from engine.released import convert

def load_model(path: str | Path, device="cpu", variant: str = "", detector: str = "") -> tuple[nn.Module, object, dict]:
    """A checkpoint of ours or a released one -> model in eval mode (moving average when there is one), its Config and
    {model_name, class_names, category_ids, step, ...}. `variant`: one of the paper file's VARIANTS, for what neither
    weights nor options of a released file tell, such as `dc5`; `detector`: where the frozen one of a mask network lies now."""
    state = load(path)
    if "model_name" not in state:
        state = convert(state, path, variant)
    elif variant:
        raise ValueError(f"--variant is for released weights, {path} knows its own settings: leave it out")
    paper = importlib.import_module(state["model_name"])
    cfg = make_config(paper, {**state["config"], **({"detector": detector} if detector else {})})
    model, _ = paper.build(cfg, len(state["class_names"]))
    model.load_state_dict(state.get("ema", state["model"]))
    meta = {key: value for key, value in state.items() if key not in ("model", "ema", "optimizer", "rng")}
    return model.to(device).eval(), cfg, meta
