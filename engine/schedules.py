"""What some numbers of a Recipe stand for during a run: other lengths, averages, rates by depth."""
import math
import re

from engine.recipe import Recipe


def other_length(paper, variant: str, recipe: Recipe, epochs: int) -> tuple[dict, str]:
    """What changes with another number of epochs than the recipe's, and a line that says so.

    The published run of that length, which a paper file calls "<variant>_<epochs>_epochs" (or, with
    no variant, "<epochs>_epochs"), or else a learning rate that drops in proportion."""
    if epochs == recipe.epochs:
        return {}, ""
    name = f"{variant}_{epochs}_epochs" if variant else f"{epochs}_epochs"
    published = getattr(paper, "VARIANTS", {}).get(name)
    if published:
        return published, f"--epochs {epochs}: the published recipe {name}"
    drop = max(1, round(recipe.lr_drop * epochs / recipe.epochs))
    text = f"--epochs {epochs}: no published recipe of this length; "
    if recipe.schedule == "step":
        text += f"lr drops after epoch {drop}, "
    return {"lr_drop": drop}, text + f"all else as for {recipe.epochs} epochs"


def is_kept(keep_every: int, recipe: Recipe, epoch: int, steps_per_epoch: int) -> bool:
    """Whether the checkpoint after this epoch, counted from 0, is kept: every keep_every epochs,
    and where lr drops during the next epoch."""
    if keep_every and (epoch + 1) % keep_every == 0:
        return True
    total = steps_per_epoch * recipe.epochs
    drops = []
    if recipe.schedule == "step":
        drops = [recipe.lr_drop * steps_per_epoch]
    elif recipe.schedule == "drops":
        drops = [round(part * total) for part in recipe.lr_drops]
    begin = (epoch + 1) * steps_per_epoch
    end = min(begin + steps_per_epoch, total)
    return any(begin <= drop < end for drop in drops)


def ema_decay(ema: float, ema_warmup: int, step: int) -> float:
    """Decay of the averaged weights at a step, counted from 0: it rises to `ema`.

    Without a warmup it is (1 + step) / (10 + step) at first. With one (ViT-L of Co-DETR, code) the
    share of the new weights is (1 - m) exp(-(1 + step) / ema_warmup) + m, where m = 1 - ema."""
    if not ema_warmup:
        return min(ema, (1 + step) / (10 + step))
    share = 1 - ema
    share += (1 - share) * math.exp(-(1 + step) / ema_warmup)
    return 1 - share


def layer_groups(model, backbone: str, recipe: Recipe) -> list[dict]:
    """Parameter groups whose learning rate falls from block to block of a ViT towards the image.

    backbone: the beginning of its parameters' names. With d blocks, block i has
    lr x layer_decay^(d - i), the embeddings of patches and positions lr x layer_decay^(d + 1), all
    else lr. Vectors (biases, normalizations) have no weight decay."""
    depth = len(model.get_submodule(backbone + "blocks"))
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        block = re.match(re.escape(backbone) + r"blocks\.(\d+)\.", name)
        below = depth - int(block[1]) if block else 0
        if name.startswith((backbone + "pos_embed", backbone + "patch_embed")):
            below = depth + 1
        is_matrix = parameter.dim() > 1
        if (below, is_matrix) not in groups:
            groups[below, is_matrix] = {"params": [], "lr": recipe.lr * recipe.layer_decay ** below,
                                        "weight_decay": recipe.weight_decay if is_matrix else 0.0}
        groups[below, is_matrix]["params"].append(parameter)
    return list(groups.values())
