"""dino.py: the authors' recordings, then one test per claim of the paper."""
from copy import deepcopy

import pytest
import torch

from engine.recipe import override
from engine import authors_names
from engine import released
import dino
import recordings
from boxes import box_cxcywh_to_xyxy
from deformable_detr import sine_embedding, sine_positions
from dino import (
    RECIPE, SMALL, Config, Criterion, DINO, Noise, build, denoising_groups, denoising_mask,
    denoising_queries, detect, noised_boxes, param_groups)
from recordings import (
    batch, close, config_fields, given_maps, narrow_resnet, overfit, randomize_heads, tensor)


def recorded_config(rec):
    s = recordings.settings(rec)
    fields = config_fields(rec)
    known = {k: v for k, v in fields.items() if k not in ("with_box_refine", "two_stage")}
    return Config(**known, dn_number=s.get("dn_number", 100),
                  dn_label_noise=s.get("dn_label_noise_ratio", 0.5),
                  dn_box_noise=s.get("dn_box_noise_scale", 0.4))


def recorded_noise(rec, ratio, dtype=torch.float32):
    """The recorded draws in place of `dino.draw_noise`."""
    def draw(copies, objects, num_classes, device):
        labels = torch.zeros(copies * objects, dtype=torch.int64)
        relabel = torch.ones(copies * objects, dtype=dtype)
        sign = amount = torch.zeros(copies, objects, 4, dtype=dtype)
        if "draw1_label_chance" in rec:
            relabel = tensor(rec["draw1_label_chance"], dtype)
            labels[relabel < ratio / 2] = tensor(rec["draw2_new_labels"])
        if "draw3_sign01" in rec:
            sign = tensor(rec["draw3_sign01"]).to(dtype).view(copies, objects, 4) * 2 - 1
            amount = tensor(rec["draw4_amount"], dtype).view(copies, objects, 4)
        return Noise(relabel.view(copies, objects), labels.view(copies, objects), sign, amount)
    return draw


@pytest.fixture
def draws(monkeypatch):
    """`draws(rec, cfg, dtype)` makes the next models use the recorded random numbers."""
    return lambda rec, cfg, dtype=torch.float32: monkeypatch.setattr(
        dino, "draw_noise", recorded_noise(rec, cfg.dn_label_noise, dtype))


@pytest.mark.parametrize("name", ["4scale", "4scale_eval", "4scale_one_empty",
                                  "4scale_all_empty", "5scale"])
def test_tiny_models_equal_the_authors_forward_and_backward(golden, draws, name):
    rec = golden(f"08_tiny_dino_{name}")
    cfg = recorded_config(rec)
    draws(rec, cfg)
    model = DINO(given_maps(rec), cfg, 11)
    recordings.check_model(rec, model, Criterion(cfg), "dino", enc="interm", detect=detect)


def test_a_model_with_a_narrow_resnet_equals_the_authors(golden, draws):
    rec = golden("09_narrow_r50_dino_4scale")
    cfg = recorded_config(rec)
    draws(rec, cfg)
    model = DINO(narrow_resnet(), cfg, 11)
    recordings.check_model(rec, model, Criterion(cfg), "dino", enc="interm", detect=detect)


@pytest.mark.parametrize("name", ["4scale", "5scale"])
def test_full_size_models_equal_the_authors(golden, recipe, draws, name):
    rec = golden(f"10_full_dino_{name}")
    cfg = recorded_config(rec)
    draws(rec, cfg, torch.float64)
    model, criterion = build(cfg, 91)
    outputs = recordings.check_model(
        rec, model, criterion, "dino", torch.float64, recipe, "interm", detect)
    logits = outputs["dn_outputs"]["pred_logits"]
    close(logits, rec["out.dn_logits_last_layer"], 4e-4, "denoising logits")


@pytest.mark.parametrize("levels, tensors, parameters", [
    (4, 626, 46_893_182), (5, 630, 47_255_806)])
def test_released_checkpoints_map_one_to_one(shared, recipe, levels, tensors, parameters):
    keys = recipe.read_keys(shared / "golden" / f"keys_dino_r50_{levels}scale.txt")
    assert len(keys) == tensors
    with torch.device("meta"):
        model, _ = build(Config(num_feature_levels=levels), 91)
        authors = {name: torch.empty(shape) for name, shape in keys}
    assert sum(p.numel() for p in model.parameters()) == parameters
    family, found = released.recognize(authors)
    ours = authors_names.from_authors(authors, family)
    assert found["num_feature_levels"] == levels and found["num_queries"] == 900
    recordings.check_names(ours, model, family, keys)


@pytest.mark.parametrize("levels", [4, 5])
def test_a_fresh_model_is_initialized_as_the_authors_model(shared, levels):
    torch.manual_seed(0)
    model, _ = build(Config(num_feature_levels=levels), 91)
    path = shared / "golden" / f"init_dino_r50_{levels}scale.txt"
    recordings.check_initialization(path, model, "dino")


def test_sine_embeddings_equal_the_authors(golden):
    rec = golden("03_embeddings_and_boxes")
    mask = torch.as_tensor(rec["mask"])
    for nf in (16, 128):
        ours = sine_positions(mask, 2 * nf, temperature=20.0, shift=0.0)
        ours = ours.transpose(1, 2).unflatten(2, mask.shape[1:])
        close(ours, rec[f"sine_dino_nf{nf}"], 1e-5, f"positions, {nf} features")
    boxes = tensor(rec["boxes"])[..., [1, 0, 2, 3]]
    for key in (k for k in rec if k.startswith("dino_box_embed_4d_nf")):
        close(sine_embedding(boxes, int(key.split("nf")[1])).flatten(2), rec[key], 1e-5, key)


# ------------------------------------------------------------------------------ denoising queries

@pytest.mark.parametrize("case", "abcdef")
def test_denoising_queries_equal_the_authors(golden, draws, case):
    rec = {k[2:]: v for k, v in golden("07_denoising_queries").items() if k.startswith(f"{case}_")}
    cfg = Config(dn_number=int(rec["dn_number"]), dn_label_noise=float(rec["label_noise_ratio"]),
                 dn_box_noise=float(rec["box_noise_scale"]))
    label_enc = torch.nn.Embedding.from_pretrained(tensor(rec["label_embedding"]))
    draws(rec, cfg)
    dn = denoising_queries(recordings.read_targets(rec), label_enc, int(rec["num_classes"]), cfg,
                           int(rec["num_queries"]))
    assert dn.groups == int(rec["groups"]) and dn.content.shape[1] == int(rec["pad_size"])
    close(dn.content, rec["query_label"], 0, "content")
    close(dn.reference, 1 / (1 + torch.exp(-tensor(rec["query_bbox"]))).numpy(), 1e-6, "reference")
    if rec["attn_mask"].size:
        assert torch.equal(dn.attn_mask, torch.as_tensor(rec["attn_mask"]).bool())


@pytest.mark.parametrize("most, groups", [(1, 100), (2, 50), (3, 33), (5, 20), (7, 14), (33, 3),
                                          (34, 2), (51, 1), (100, 1)])
def test_groups_follow_the_image_with_the_most_objects(most, groups):
    assert denoising_groups(100, most, 2) == groups


def test_few_denoising_pairs_no_objects_and_many_pairs_have_groups_as_in_the_code():
    assert denoising_groups(5, 7, 2) == 10
    assert denoising_groups(100, 0, 2) == 1
    assert denoising_groups(1000, 7, 2) == 142


@pytest.mark.parametrize("dn_number", [5, 40, 100, 300])
@pytest.mark.parametrize("denoising", ["plain", "contrastive"])
def test_a_crowd_does_not_make_memory_explode(dn_number, denoising):
    targets = [{"labels": torch.zeros(n, dtype=torch.int64), "boxes": torch.rand(n, 4)}
               for n in (300, 2, 0)]
    cfg = Config(dn_number=dn_number, denoising=denoising)
    dn = denoising_queries(targets, torch.nn.Embedding(4, 8), 3, cfg, 10)
    assert 0 < dn.content.shape[1] <= max(dino.MAX_DENOISING_QUERIES, 2 * dn_number)
    assert all(len(index) == len(set(index.tolist())) * dn.groups for _, index in dn.matches)


def test_denoising_queries_without_an_object_hold_zeros_and_a_centered_box():
    targets = [{"labels": torch.zeros(n, dtype=torch.int64),
                "boxes": torch.tensor([[.5, .5, .2, .1]] * n)} for n in (2, 3)]
    cfg = Config(dn_number=50, dn_box_noise=0.0)
    dn = denoising_queries(targets, torch.nn.Embedding(4, 8), 3, cfg, 10)
    assert dn.groups == 16 and dn.content.shape[1] == 96
    assert torch.equal(dn.content[0, 2], torch.zeros(8))
    assert torch.equal(dn.reference[0, 2], torch.full((4,), 0.5))
    box = torch.tensor([.5, .5, .2, .1])
    assert torch.allclose(dn.reference[0, [0, 1, 3, 4]], box, atol=1e-6)


def test_negatives_are_noisier_than_positives():
    """Section 3.3: corners of positives move by less than the scale, of negatives by one to two
    scales; at scale 1 43.75 % of negatives become degenerate in one direction."""
    torch.manual_seed(0)
    boxes = torch.tensor([[.5, .5, .2, .1]]).expand(4000, 4)
    negative = torch.tensor([False, True])
    noised = noised_boxes(boxes, dino.draw_noise(2, 4000, 10, "cpu"), negative, 1.0)
    moved = (box_cxcywh_to_xyxy(noised) - box_cxcywh_to_xyxy(boxes)).abs()
    moved = moved / (boxes[:, 2:].repeat(1, 2) / 2)
    assert moved[0].max() < 1.0001 and moved[1].min() > 0.9999 and moved[1].max() < 2.0001
    degenerate = (noised[1, :, 2:] <= 0).any(-1).float().mean()
    assert abs(float(degenerate) - 0.4375) < 0.03


def test_a_quarter_of_the_labels_change():
    torch.manual_seed(0)
    targets = [{"labels": torch.full((90,), 3), "boxes": torch.rand(90, 4)}]
    label_enc = torch.nn.Embedding.from_pretrained(torch.arange(92.)[:, None])
    changed = []
    for _ in range(60):
        dn = denoising_queries(targets, label_enc, 91, Config(), 1)
        changed.append(dn.content.flatten() != 3)
    assert abs(float(torch.cat(changed).float().mean()) - 0.25 * 90 / 91) < 0.02


def test_the_mask_separates_groups_and_hides_them_from_matching_queries():
    mask = denoising_mask(6, 2, 3, "cpu")
    for i in range(9):
        for j in range(9):
            hidden = j < 6 and (i >= 6 or i // 2 != j // 2)
            assert bool(mask[i, j]) == hidden, (i, j)


# ------------------------------------------------------------------------ claims and corner cases

def small(**changes):
    """A two-layer model of width 32 on the tiny backbone; forward and backward in milliseconds."""
    torch.manual_seed(0)
    tiny = dict(dim=32, ffn_dim=48, decoder_layers=2, num_queries=9)
    cfg = override(Config(), {**SMALL, **tiny, **changes})
    return (cfg, *build(cfg, 5))


ABLATIONS = [
    dict(), dict(denoising="plain"), dict(denoising="none"), dict(query_selection="pure"),
    dict(query_selection="static"), dict(look_forward_twice=False), dict(num_feature_levels=4),
    dict(num_feature_levels=5)]


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
@pytest.mark.parametrize("objects", [(3, 0), (0, 0), (14, 1)])
def test_every_parameter_gets_a_finite_gradient(changes, objects):
    cfg, model, criterion = small(**changes)
    images, padding, targets = batch((64, 96), (48, 64), objects=objects)
    losses = criterion(model(images, padding, targets), targets)
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert ("enc.cls" in losses) == (cfg.query_selection != "static")
    assert ("dn.aux0.giou" in losses) == (cfg.denoising != "none")


@pytest.mark.parametrize("changes", ABLATIONS[:5], ids=str)
def test_it_overfits_four_scenes(changes):
    cfg, model, criterion = small(**changes)
    groups = param_groups(model, override(RECIPE, SMALL))
    steps = overfit(model, criterion, groups)
    totals = [losses["cls"] + losses["l1"] + losses["giou"] for losses in steps]
    assert sum(totals[-5:]) / 5 < totals[0] / 2


def test_matching_queries_cannot_see_denoising_queries():
    """Other noise, or none in eval mode, changes the outputs of matching queries by exactly 0."""
    cfg, model, _ = small(backbone_norm="group")
    randomize_heads(model)
    images, padding, targets = batch((64, 96), (48, 64))
    model.train()
    first, second = model(images, padding, targets), model(images, padding, targets)
    model.eval()
    plain = model(images, padding, targets)
    assert not torch.equal(first["dn_outputs"]["pred_boxes"], second["dn_outputs"]["pred_boxes"])
    for name in ("pred_logits", "pred_boxes", "queries"):
        assert torch.equal(first[name], second[name])
        assert (first[name] - plain[name]).abs().max() < 1e-6, name
    assert "dn_outputs" not in plain


@pytest.mark.parametrize("twice, reached", [
    (True, {0: {0}, 1: {0, 1}, 2: {1, 2}}), (False, {0: {0}, 1: {1}, 2: {2}})])
def test_looking_forward_twice_trains_two_box_heads_per_layer(twice, reached):
    """Section 3.5, with a box head for each layer, to distinguish them."""
    for layer, heads in reached.items():
        cfg, model, _ = small(decoder_layers=3, look_forward_twice=twice, denoising="none")
        randomize_heads(model)
        model.bbox_embed = torch.nn.ModuleList(deepcopy(h) for h in model.bbox_embed)
        out = model(*batch((64, 96))[:2])
        (out["aux_outputs"] + [out])[layer]["pred_boxes"].sum().backward()
        got = {i for i, h in enumerate(model.bbox_embed)
               if h.layers[-1].bias.grad is not None and h.layers[-1].bias.grad.abs().sum() > 0}
        assert got == heads
        assert model.tgt_embed.weight.grad.abs().sum() > 0
        assert model.enc_out_bbox_embed.layers[-1].bias.grad is None   # anchors are detached


def test_mixed_selection_takes_boxes_from_the_image_and_content_from_the_table():
    cfg, model, _ = small()
    model.eval()
    images, padding, _ = batch((64, 64), (64, 64), objects=(0, 0))
    queries, enc = model.propose(model.encode(images, padding))
    assert torch.equal(queries.content[0], model.tgt_embed.weight)
    assert torch.equal(queries.content[0], queries.content[1])
    assert not torch.equal(queries.reference[0], queries.reference[1])
    best = enc["pred_logits"].amax(-1)
    assert torch.equal(best, best.sort(descending=True).values)
    assert not queries.reference.requires_grad and enc["pred_boxes"].requires_grad


def test_static_selection_ignores_the_image_and_pure_selection_reads_it():
    images, padding, _ = batch((64, 64), (64, 64), objects=(0, 0))
    _, static, _ = small(query_selection="static")
    queries, enc = static.propose(static.encode(images, padding))
    assert enc is None and torch.equal(queries.reference[0], queries.reference[1])
    assert 0.2 < queries.reference.std() < 0.4   # 0.29: uniform in [0, 1]
    _, pure, _ = small(query_selection="pure")
    queries, _ = pure.propose(pure.encode(images, padding))
    assert not torch.equal(queries.content[0], queries.content[1])


@pytest.mark.parametrize("selection", ["mixed", "pure"])
def test_under_autocast_proposals_are_ranked_by_float32_scores(selection):
    """In bfloat16 many proposals tie, and it would be arbitrary which become queries."""
    _, model, _ = small(query_selection=selection, num_queries=100)
    randomize_heads(model)
    images, padding, _ = batch((96, 128))
    with torch.autocast("cpu", torch.bfloat16):
        out = model.eval()(images, padding)
    scores = out["enc_outputs"]["pred_logits"].amax(-1)
    assert scores.dtype == torch.float32
    assert len(scores.unique()) > 95
    assert out["pred_logits"].dtype == out["pred_boxes"].dtype == torch.float32
    assert len(out["pred_logits"].unique()) > 0.95 * out["pred_logits"].numel()


def test_nearly_tied_proposals_trade_places_and_nothing_else():
    """Difference 9: when two ranks are exchanged, two learned contents meet each other's boxes. The
    set of boxes is the same, and the predictions of these queries change."""
    _, model, _ = small(backbone_norm="group", denoising="none")
    randomize_heads(model)
    images, padding, _ = batch((64, 96))
    memory = model.eval().encode(images, padding)
    queries, _ = model.propose(memory)
    order = torch.tensor([1, 0, *range(2, 9)])
    traded = queries._replace(reference=queries.reference[:, order])
    first = model.decode(memory, queries)[0][-1]["pred_boxes"]
    second = model.decode(memory, traded)[0][-1]["pred_boxes"]
    assert (first - second)[:, :2].abs().max() > 1e-3
    assert (first - second)[:, 2:].abs().max() < 1e-1 * (first - second)[:, :2].abs().max()


def test_first_boxes_are_the_anchors_in_every_layer():
    _, model, _ = small()
    out = model.eval()(*batch((64, 96))[:2])
    anchors = out["anchors"].clamp(1e-3, 1 - 1e-3)
    for layer in out["aux_outputs"] + [out]:
        assert torch.allclose(layer["pred_boxes"], anchors, atol=1e-5)


def test_the_proposal_loss_sees_labels():
    _, model, criterion = small()
    images, padding, targets = batch((64, 96), (48, 64))
    out = model(images, padding, targets)
    relabelled = [{**t, "labels": (t["labels"] + 1) % 5} for t in targets]
    assert criterion(out, targets)["enc.cls"] != criterion(out, relabelled)["enc.cls"]


def test_all_denoising_queries_have_a_class_loss_and_positives_a_box_loss():
    _, model, criterion = small()
    images, padding, targets = batch((64, 96), (48, 64), objects=(3, 1))
    out = model(images, padding, targets)
    dn = out["dn_outputs"]
    for name in ("pred_boxes", "pred_logits"):
        dn[name] = dn[name].detach().requires_grad_()
    losses = criterion.denoising(dn, targets, 4.0)
    (losses["dn.cls"] + losses["dn.l1"] + losses["dn.giou"]).backward()
    has_box_loss = dn["pred_boxes"].grad.abs().sum(-1) > 0               # (B, P)
    assert has_box_loss.sum(1).tolist() == [3 * dn["groups"], 1 * dn["groups"]]
    assert (dn["pred_logits"].grad.abs().sum(-1) > 0).all()


def test_learning_rates_come_in_two_groups():
    with torch.device("meta"):
        model, _ = build(Config(), 91)
    rest, backbone = param_groups(model, RECIPE)
    assert (len(backbone["params"]), sum(p.numel() for p in backbone["params"])) == (42, 23_232_512)
    assert (len(rest["params"]), sum(p.numel() for p in rest["params"])) == (273, 23_438_270)


@pytest.mark.parametrize("size", [(16, 16), (8, 200), (33, 65)])
def test_tiny_and_thin_images(size):
    cfg, model, criterion = small(num_queries=900, dim=64, backbone_norm="group")
    images, padding, targets = batch(size, objects=(2,))
    out = model(images, padding, targets)
    assert sum(criterion(out, targets).values()).isfinite()
    found = detect(out, torch.tensor([size]), Config(top_k=10_000))[0]
    assert len(found["scores"]) == out["pred_logits"].numel()


def test_a_misspelt_choice_names_the_choices():
    with pytest.raises(ValueError, match="none, plain, contrastive"):
        small(denoising="contrast")
    with pytest.raises(ValueError, match="static, pure, mixed"):
        small(query_selection="mix")


def test_a_backbone_whose_maps_would_go_unread_is_refused():
    with pytest.raises(ValueError, match="four maps, got vit_l with 5"), torch.device("meta"):
        build(Config(backbone="vit_l", num_feature_levels=5), 3)
