"""A trained detector inside another network: frozen, or trained further together with it.

    FrozenDetector    its weights never change; the network and its copies share it
    TrainedDetector   a copy of the detector, whose weights belong to the network

Both run the detector and return, besides its outputs, the tokens of one of its encoder layers.
B images, S tokens, dim channels.
"""
from copy import deepcopy
from dataclasses import asdict
from hashlib import sha256

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.recipe import Recipe


class Detector:
    """Runs a detector. Deliberately not an nn.Module: the network on top of it decides whether the
    detector's parameters are its own. `detect` is the function of the detector's paper file."""

    def __init__(self, model: nn.Module, detect, enc_layer: int = 0, class_names=None):
        inner = getattr(model, "detector", model)         # Co-DETR has its detector as a submodule
        if not hasattr(inner, "level_embed"):
            raise UserError(f"expected a detector with several feature levels, got a "
                            f"{type(inner).__name__}: give one of Deformable DETR, DINO, H-DETR or "
                            "Co-DETR with --detector")
        layers = len(inner.encoder)
        if not 0 <= enc_layer <= layers:
            raise UserError(f"expected enc_layer from 0 to {layers}, the detector's number of "
                            f"encoder layers, got {enc_layer}")
        self.model = model
        self.detect = detect
        self.enc_layer = enc_layer
        self.class_names = class_names
        self.channels = inner.backbone.channels[0]        # of the map of stride 4
        self.num_levels, self.dim = inner.level_embed.shape
        self.layer_tokens = None
        if enc_layer:
            inner.encoder[enc_layer - 1].register_forward_hook(self.store_tokens)

    def __call__(self, images: Tensor, padding: Tensor, targets=None) -> tuple[dict, Tensor]:
        """Images (B, 3, H, W), padding (B, H, W), targets as in train.py -> the detector's outputs
        and the tokens (B, S, dim) after encoder layer `enc_layer`: 1 the first, 0 the last."""
        outputs = dict(self.model(images, padding, targets))
        if self.enc_layer == 0:
            return outputs, outputs["memory"].tokens
        tokens = self.layer_tokens
        self.layer_tokens = None                          # frees the memory
        return outputs, tokens

    def store_tokens(self, layer: nn.Module, inputs: tuple, tokens: Tensor) -> None:
        """Forward hook: remember what an encoder layer returned."""
        self.layer_tokens = tokens


class FrozenDetector(Detector):
    """A detector in evaluation mode and without gradients. parameters(), state_dict() and train()
    of the network on top of it skip it, and copies of that network (EMA) share it."""

    def __init__(self, model: nn.Module, detect, enc_layer: int = 0, class_names=None):
        super().__init__(model.eval().requires_grad_(False), detect, enc_layer, class_names)
        self.hash = weight_hash(model)

    @torch.no_grad()
    def __call__(self, images: Tensor, padding: Tensor, targets=None) -> tuple[dict, Tensor]:
        return super().__call__(images, padding)

    def __deepcopy__(self, memo) -> "FrozenDetector":
        return self


class TrainedDetector(Detector):
    """A copy of a detector, for a network that has it as a submodule and trains it. `loaded` is
    what `engine.models.load_model` returned; its own model stays as it is."""

    def __init__(self, loaded, enc_layer: int = 0):
        names = loaded.meta["class_names"]
        super().__init__(deepcopy(loaded.model), loaded.paper.detect, enc_layer, names)
        self.paper_file = loaded.paper.__name__
        self.recipe = loaded.recipe
        self.make_groups = loaded.paper.param_groups
        self.hash = torch.zeros(32, dtype=torch.uint8)    # of no frozen detector

    def param_groups(self, recipe: Recipe, factor: float) -> list[dict]:
        """Groups of the detector's parameters. Their learning rates are those of the detector's own
        recipe, for the batch size of `recipe`, times `factor`."""
        groups = self.make_groups(self.model, self.recipe)
        for group in groups:
            group["lr"] *= factor * recipe.batch_size / self.recipe.batch_size
        return groups

    def description(self) -> dict:
        """What a checkpoint needs, besides weights, to build the detector again."""
        return {"model_name": self.paper_file, "config": asdict(self.model.cfg),
                "recipe": asdict(self.recipe), "class_names": list(self.class_names)}


def weight_hash(model: nn.Module) -> Tensor:
    """SHA-256 of all names and weights of a model: (32,) uint8. Zeros on the device "meta", where
    there are no weights."""
    digest = sha256()
    for name, value in model.state_dict().items():
        if value.is_meta:
            return torch.zeros(32, dtype=torch.uint8)
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
