"""What some fields of a Recipe stand for: runs of another length, learning rates by depth."""
import re

from engine.recipe import Recipe


def other_length(paper, variant: str, recipe: Recipe, epochs: int) -> tuple[dict, str]:
    """Adapt a recipe to another number of epochs. -> {field: value} to change, a line that says so

    Uses the published run of that length where there is one: the variant that the paper file calls
    "<variant>_<epochs>_epochs" (or, with no variant, "<epochs>_epochs"), or the main one where the
    variant itself is such a run. Else the lr_drop of the schedule "step" moves in proportion."""
    if epochs == recipe.epochs:
        return {}, ""
    variants = getattr(paper, "VARIANTS", {})
    family = re.sub(r"_?\d+_epochs$", "", variant)
    name = f"{family}_{epochs}_epochs" if family else f"{epochs}_epochs"
    if name in variants:
        return variants[name], f"--epochs {epochs}: the published recipe {name}"
    if family != variant and (family == "" or family in variants):
        main = dict(vars(paper.RECIPE), **variants.get(family, {}))
        if main["epochs"] == epochs:
            replaced = {field: main[field] for field in variants[variant] if field in main}
            return replaced, f"--epochs {epochs}: the published recipe {family or 'of the paper'}"
    changes = {}
    text = f"--epochs {epochs}: no published recipe of this length; "
    if recipe.schedule == "step":
        drop = max(1, round(recipe.lr_drop * epochs / recipe.epochs))
        changes = {"lr_drop": drop}
        text += f"lr drops after epoch {drop}, "
    return changes, text + f"all else as for {recipe.epochs} epochs"


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
