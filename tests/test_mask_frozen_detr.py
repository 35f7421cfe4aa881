"""mask_frozen_detr.py: no code or weights of the authors exist, so every part stands beside a slow oracle."""
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from engine.recipe import override
from engine import models
from engine import checkpoints
import co_detr
import scenes
import deformable_detr
import dino
import eval as evaluation
import h_detr
import mask_frozen_detr as mfd
import train
from boxes import box_cxcywh_to_xyxy, roi_align
from matcher import match_cost
from mask_frozen_detr import (SMALL, Config, Criterion, Frozen, MaskFrozenDETR, Regions, ScoreHead, as_memory, blocks, detect,
                              encode, grid_points, interpolation, mask_iou, paste, read, read_objects, uncertain_points)
from recordings import batch, speak

TINY = {**SMALL, **dict(roi_size=8, channel_dim=32, image_ffn_dim=32, box_ffn_dim=32, score_dim=8,
                        score_ffn_dim=16, num_heads=2, num_points=2, loss_points=64)}


def detector(paper=dino, **changes):
    """A small detector whose heads say something."""
    torch.manual_seed(0)
    small = dict(paper.SMALL, dim=32, ffn_dim=48, num_heads=2, decoder_layers=2, num_queries=9, size_divisor=1) | changes
    cfg = override(paper.Config(), small)
    model, _ = paper.build(cfg, 5)
    speak(getattr(model, "detector", model))
    return model


def network(frozen=None, paper=dino, **changes):
    """-> Config, mask network in training mode, criterion."""
    cfg = override(Config(), {**TINY, **changes})
    frozen = frozen or Frozen(detector(paper), paper.detect, cfg.enc_layer)
    torch.manual_seed(1)
    return cfg, MaskFrozenDETR(frozen, cfg).train(), Criterion(cfg)


def scene(*sizes, objects=(3, 0)):
    """`recordings.batch` with an ellipse as mask in every box."""
    images, padding, targets = batch(*sizes, objects=objects)
    for (h, w), target in zip(sizes, targets):
        y, x = ((torch.arange(n) + 0.5) / n for n in (h, w))
        cx, cy, bw, bh = target["boxes"].T[..., None, None]
        target["masks"] = ((x - cx) / bw * 2) ** 2 + ((y[:, None] - cy) / bh * 2) ** 2 < 1           # (n, h, w)
    return images, padding, targets


def regions(xyxy, image=None, objects=None):
    """Regions of one image, or of `image` (n,), which is sorted."""
    n = len(xyxy)
    image = torch.zeros(n, dtype=torch.int64) if image is None else torch.tensor(image)
    counts = torch.bincount(image).tolist() if n else [0]
    objects = torch.arange(n) if objects is None else torch.tensor(objects)
    return Regions(image, torch.arange(n), torch.tensor(xyxy), objects, torch.ones(n), counts)


# ------------------------------------------------------------------------------------------- the frozen detector

@pytest.mark.parametrize("paper", [deformable_detr, dino, h_detr, co_detr], ids=lambda paper: paper.__name__)
def test_any_detector_of_the_project_can_be_wrapped_and_its_boxes_stay(paper):
    model = detector(paper)
    cfg, masks, criterion = network(Frozen(model, paper.detect))
    images, padding, targets = scene((64, 96), (48, 64))
    sum(criterion(masks(images, padding, targets), targets).values()).backward()
    masks.eval()
    with torch.no_grad():
        alone, found = model(images, padding), masks(images, padding)
    sizes = torch.tensor([[100, 150], [75, 100]])
    for ours, theirs, size in zip(detect(found, sizes, replace(cfg, top_k=20)), paper.detect(alone, sizes, replace(model.cfg, top_k=20)), sizes.tolist()):
        assert ours["masks"].shape == (len(ours["boxes"]), *size) and ours["masks"].dtype == torch.bool
        for name in ("scores", "labels", "boxes", "query"):
            assert torch.equal(ours[name], theirs[name]), name


def test_the_detector_is_bit_identical_after_training_steps_and_has_no_gradient():
    frozen = Frozen(detector(backbone_norm="batch"), dino.detect)
    cfg, masks, criterion = network(frozen, ema=0.9)
    before = {name: value.clone() for name, value in frozen.model.state_dict().items()}
    average = train.Average(masks, 0.9)
    optimizer = torch.optim.AdamW(mfd.param_groups(masks, override(mfd.RECIPE, SMALL)), lr=1e-2, fused=True)
    examples = scene((64, 96), (48, 64))
    with torch.no_grad():
        boxes = masks(*examples)["pred_boxes"]
    weights = [p.clone() for p in masks.parameters()]
    for number in range(10):
        masks.train()
        train.step(masks, masks, criterion, optimizer, average, [[*examples[:2], [{**t, "index": 0} for t in examples[2]]]],
                   1.0, False, number, 1)
    assert not frozen.model.training and average.model.frozen is frozen
    assert all(p.grad is None and not p.requires_grad for p in frozen.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in frozen.model.state_dict().items())
    assert torch.equal(masks(*examples)["pred_boxes"], boxes)
    assert not any(torch.equal(a, b) for a, b in zip(weights, masks.parameters()))


def test_training_mode_never_reaches_the_detector():
    _, masks, _ = network()
    masks.train()
    assert masks.training and not any(module.training for module in masks.frozen.model.modules())


def test_the_state_dict_holds_the_mask_network_only_and_the_hash_of_its_detector():
    _, masks, _ = network()
    state = masks.state_dict()
    assert {key.split(".")[0] for key in state} == {"neck", "image_encoder", "channel_mapper", "query_mapper", "box_encoder",
                                                    "query_encoder", "score_head", "_extra_state"}
    assert state["_extra_state"].shape == (32,) and torch.equal(state["_extra_state"], mfd.weight_hash(masks.frozen.model))


def test_another_detector_is_refused_by_its_weights_and_the_same_one_elsewhere_is_not():
    _, masks, _ = network()
    same = MaskFrozenDETR(Frozen(deepcopy(masks.frozen.model), dino.detect), masks.cfg)
    same.load_state_dict(masks.state_dict())
    other = deepcopy(masks.frozen.model)
    next(other.parameters()).data.view(-1)[0] += 1e-6
    with pytest.raises(ValueError, match="expected the detector that these masks were trained on.*--detector"):
        MaskFrozenDETR(Frozen(other, dino.detect), masks.cfg).load_state_dict(masks.state_dict())


def test_converting_the_network_converts_the_detector_too():
    _, masks, _ = network()
    masks.double()
    assert {p.dtype for p in masks.frozen.model.parameters()} == {torch.float64}


@pytest.mark.parametrize("levels", [3, 5])
def test_E_is_the_slice_of_the_memory_with_stride_eight(levels):
    frozen = Frozen(detector(num_feature_levels=levels), dino.detect)
    images, padding, _ = scene((64, 96), (48, 64))
    outputs, tokens = frozen(images, padding)
    memory = outputs["memory"]
    assert torch.equal(tokens, memory.tokens)
    level = mfd.stride_eight(memory)
    start = 0 if levels == 3 else 16 * 24
    assert level.shapes == [(8, 12)] and torch.equal(level.tokens, memory.tokens[:, start:start + 96])
    assert level.valid_ratios.shape == (2, 1, 2) and torch.equal(level.padding, memory.padding[:, start:start + 96])


def test_an_inner_encoder_layer_can_be_tapped():
    model = detector(encoder_layers=3)
    images, padding, _ = scene((64, 96), (48, 64))
    seen = []
    model.encoder[1].register_forward_hook(lambda module, inputs, tokens: seen.append(tokens))
    outputs, tokens = Frozen(model, dino.detect, 2)(images, padding)
    assert torch.equal(tokens, seen[0]) and not torch.equal(tokens, outputs["memory"].tokens)
    assert torch.equal(Frozen(model, dino.detect, 3)(images, padding)[1], outputs["memory"].tokens)
    with pytest.raises(ValueError, match="enc_layer from 0 to 3"):
        Frozen(model, dino.detect, 4)


def test_dino_hands_on_the_state_that_its_class_head_reads():
    model = detector()
    outputs, _ = Frozen(model, dino.detect)(*scene((64, 96), (48, 64))[:2])
    assert torch.allclose(model.class_embed[-1](outputs["queries"]), outputs["pred_logits"], atol=1e-6)


# ------------------------------------------------------------------------------------------------- feature map

def test_F_is_the_sum_of_C1_and_the_resized_encoder_map_at_odd_sizes_too():
    """C1 = 2 and E = 1 everywhere give 3 everywhere, whether the size of C1 is twice that of E or not."""
    cfg, masks, _ = network(neck=True, image_encoder="none")
    masks.neck, masks.channel_mapper = torch.nn.Identity(), torch.nn.Identity()
    memory = masks.frozen(*scene((57, 90))[:2])[0]["memory"]
    assert memory.features[0].shape[-2:] == (15, 23) and memory.shapes[0] == (8, 12)
    memory = memory._replace(features=[torch.full((1, 32, 15, 23), 2.0)], padding=torch.zeros_like(memory.padding))
    out = masks.feature_map(memory, torch.ones_like(memory.tokens))
    assert out.shape == (1, 15, 23, 32) and torch.equal(out, torch.full_like(out, 3.0))


def test_the_neck_normalises_32_groups():
    out = mfd.Neck(48, 64)(torch.randn(2, 48, 9, 13)).unflatten(1, (32, 2)).flatten(2)               # (2, 32, 2 9 13)
    assert out.mean(-1).abs().max() < 1e-5 and (out.std(-1, correction=0) - 1).abs().max() < 1e-3


def test_the_channel_mapper_commutes_with_roi_align():
    mapper, features = torch.nn.Linear(16, 8), torch.randn(1, 12, 10, 16)
    cut = lambda x: roi_align(x.flatten(1, 2), [(12, 10)], [4], torch.tensor([[3.0, 5.0, 30.0, 41.0]]), torch.tensor([0]),
                              torch.tensor([0]), 8)
    assert torch.allclose(mapper(cut(features)), cut(mapper(features)), atol=1e-5)


def test_regions_are_cut_where_the_box_lies_in_the_unpadded_image():
    """On a map that holds its own x and y in pixels, a region holds the middles of its bins."""
    cfg, masks, _ = network(box_encoder="none", query_encoder="none", mask_scoring=False, channel_dim=32)
    images, padding, _ = scene((64, 96), (48, 64))
    memory = masks.frozen(images, padding)[0]["memory"]
    x = torch.arange(24) * 4 + 2.0
    features = torch.zeros(2, 16, 24, 32)
    features[..., 0] = x
    box = regions([[0.25, 0.25, 0.75, 0.75]], [1])                         # of the second image: 16 to 48 px, 64 px wide
    logits, _ = masks.look_closer(features, box, F.one_hot(torch.tensor([0]), 32).float(), torch.tensor([0]), memory)
    expected = 16 + (torch.arange(8) + 0.5) * 4
    assert torch.allclose(logits[0], expected.expand(8, 8), atol=1e-4)


@pytest.mark.parametrize("kind", ["deformable", "swin", "convnext"])
def test_blocks_keep_shapes_and_have_exact_gradients(kind):
    torch.manual_seed(0)
    layers = blocks(kind, 2, mfd.Sizes(8, 2, 1, 2, 16)).double()
    region = torch.randn(2, 4, 4, 8, dtype=torch.float64, requires_grad=True)
    assert encode(layers, as_memory(region)).tokens.shape == (2, 16, 8)
    assert torch.autograd.gradcheck(lambda x: encode(layers, as_memory(x)).tokens.sum((1, 2)), region)


def test_the_deformable_block_is_post_norm_with_gelu():
    """Against the formula in float64, the attention itself being tested elsewhere."""
    torch.manual_seed(0)
    block, = blocks("deformable", 1, mfd.Sizes(16, 2, 1, 2, 32)).double()
    memory = as_memory(torch.randn(3, 4, 4, 16, dtype=torch.float64))
    references = deformable_detr.encoder_references(memory)
    centers = torch.tensor([[(x + 0.5) / 4, (y + 0.5) / 4] for y in range(4) for x in range(4)], dtype=torch.float64)
    assert torch.allclose(references[:, :, 0].double(), centers.expand(3, -1, -1))
    x = memory.tokens
    norm = lambda layer, v: F.layer_norm(v, (16,), layer.weight, layer.bias)
    x = norm(block.norm1, x + block.self_attn(x + memory.positions, references, x, [(4, 4)]))
    hidden = x @ block.linear1.weight.T + block.linear1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2 ** 0.5))
    expected = norm(block.norm2, x + hidden @ block.linear2.weight.T + block.linear2.bias)
    assert (block(memory, references) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["deformable", "swin", "convnext"])
def test_every_region_is_a_sequence_of_its_own(kind):
    torch.manual_seed(0)
    layers, region, order = blocks(kind, 1, mfd.Sizes(16, 2, 1, 2, 32)), torch.randn(4, 8, 8, 16), [2, 0, 3, 1]
    plain, permuted = (encode(layers, as_memory(x)).tokens for x in (region, region[order]))
    assert torch.allclose(plain[order], permuted, atol=1e-5)
    if kind == "deformable":
        assert layers[0].self_attn.num_levels == 1


@pytest.mark.parametrize("amount", [0, 64])
def test_padding_changes_no_mask(amount):
    """Nothing but the padding's own cells sees what lies there."""
    cfg, masks, _ = network(Frozen(detector(backbone_norm="group"), dino.detect))
    masks.eval()
    images, padding, _ = scene((64, 96), (48, 64))
    with torch.no_grad():
        outputs, tokens = masks.frozen(images, padding)
        memory = outputs["memory"]
        noisy = tokens + 100 * memory.padding[..., None] * torch.randn(tokens.shape)
        first, second = (masks.feature_map(memory, t) for t in (tokens, noisy))
    assert torch.equal(first, second)


# --------------------------------------------------------------------------------------- queries, logits, scores

def test_a_query_sees_its_own_region_and_the_other_queries_of_its_image_alone():
    torch.manual_seed(0)
    encoder = mfd.QueryEncoder(override(Config(), {**TINY, "query_encoder": "both"}))
    queries, region = torch.randn(4, 32), torch.randn(4, 8, 8, 32)
    image = torch.tensor([0, 0, 1, 1])
    changed = region.clone()
    changed[2] += 1
    before, after = (encoder.from_region(queries, as_memory(r)) for r in (region, changed))
    assert ((before - after).abs().amax(-1) > 1e-3).tolist() == [False, False, True, False]
    other = queries.clone()
    other[0] += 1
    before, after = (encoder.among_objects(q, image) for q in (queries, other))
    assert ((before - after).abs().amax(-1) > 1e-4).tolist() == [True, True, False, False]


def test_logits_are_the_dot_products_of_query_and_cells():
    cfg, masks, _ = network(box_encoder="none", query_encoder="none")
    images, padding, targets = scene((64, 96), (48, 64), objects=(2, 1))
    out = masks(images, padding, targets)
    features = masks.feature_map(out["memory"], out["memory"].tokens)
    for i in range(3):
        b, query, xyxy = (out["regions"][k][i] for k in range(3))
        pixels = (xyxy * out["memory"].image_sizes[b][[1, 0, 1, 0]])[None]
        cut = roi_align(features.flatten(1, 2), [(16, 24)], [4], pixels, b[None], torch.tensor([0]), 8)[0]
        q = masks.query_mapper(out["queries"][b, query])
        for r, c in ((0, 0), (3, 5), (7, 7)):
            assert float(out["mask_logits"][i, r, c]) == pytest.approx(float(sum(q * cut[r, c])), abs=1e-4)


def test_the_score_head_gives_one_number_between_0_and_1_per_region():
    out = ScoreHead(8, 32, 16, 32)(torch.rand(5, 32, 32), 100 * torch.randn(5, 32, 32, 8))
    assert out.shape == (5,) and (out >= 0).all() and (out <= 1).all()


def test_masks_without_a_score_of_their_own_are_ranked_by_their_mean_inside():
    """Half of the box at 0.9, half at 0.2; and a mask that is nowhere above one half counts as nothing."""
    half = torch.full((1, 64, 64), 0.2)
    half[:, :, :32] = 0.9
    box = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
    masks, certainty = paste(torch.cat((half, torch.full((1, 64, 64), 0.4))).logit(), box.expand(2, 4), 64, 64)
    assert masks[0, :, :32].all() and not masks[0, :, 32:].any() and not masks[1].any()
    assert certainty.tolist() == pytest.approx([0.9, 0.0])


# ------------------------------------------------------------------------------------------------ pasting

def test_pasting_equals_bilinear_sampling_pixel_by_pixel():
    torch.manual_seed(0)
    maps, boxes = torch.rand(6, 5, 7), torch.rand(6, 4) * 40 - 5
    boxes[:, 2:] = boxes[:, :2] + torch.rand(6, 2) * 40 + 0.3
    height, width = 31, 23
    rows, columns = interpolation(boxes[:, 1::2], 5, height), interpolation(boxes[:, 0::2], 7, width)
    values = rows @ maps @ columns.transpose(1, 2)
    for k, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        for y in range(height):
            for x in range(width):
                u, v = (x + 0.5 - x0) / (x1 - x0), (y + 0.5 - y0) / (y1 - y0)
                expected = 0.0
                if 0 <= u <= 1 and 0 <= v <= 1:
                    expected = float(read(maps[k:k + 1], torch.tensor([[[u, v]]])))
                assert float(values[k, y, x]) == pytest.approx(expected, abs=1e-4), (k, y, x)


def test_pasting_undoes_roi_align():
    """A ramp cut out by RoIAlign, pasted and read at the bin's middles is the ramp: no half pixel is lost."""
    ramp = (torch.arange(64) + 0.5)[None, :, None].expand(64, 64, 1) / 64  # (H, W, 1), x of every pixel
    box = torch.tensor([[8.0, 12.0, 40.0, 44.0]])
    cut = roi_align(ramp.reshape(1, -1, 1), [(64, 64)], [1], box, torch.tensor([0]), torch.tensor([0]), 32)[..., 0]
    rows, columns = interpolation(box[:, 1::2], 32, 64), interpolation(box[:, 0::2], 32, 64)
    pasted = (rows @ cut @ columns.transpose(1, 2))[0]
    assert torch.allclose(pasted[12:44, 8:40], ramp[12:44, 8:40, 0], atol=1e-5)
    assert pasted[:12].abs().max() == 0 and pasted[:, 40:].abs().max() == 0


def test_a_box_half_outside_the_image_does_not_wrap_and_an_empty_one_covers_nothing():
    full = torch.full((3, 8, 8), 0.99)
    boxes = torch.tensor([[-4.0, -3.0, 4.0, 5.0], [16.0, 12.0, 24.0, 20.0], [3.0, 3.0, 3.0, 9.0]])
    masks, _ = paste(full, boxes, 16, 20)
    expected = torch.zeros(3, 16, 20, dtype=torch.bool)
    expected[0, :5, :4], expected[1, 12:, 16:] = True, True
    assert torch.equal(masks, expected)


def test_an_edge_lies_where_the_interpolated_logit_changes_sign():
    """Cells of logits -1 and 9, middles at x = 5 and 15: the sign changes at 6; probabilities would say 8.1."""
    masks, _ = paste(torch.tensor([[[-1.0, 9.0]]]), torch.tensor([[0.0, 0.0, 20.0, 4.0]]), 4, 20)
    assert not masks[0, :, :6].any() and masks[0, :, 6:].all()


# ------------------------------------------------------------------------------------------------ losses

def test_points_gather_where_the_mask_is_uncertain():
    """Logit 0 on a tenth of the area, +-10 elsewhere: k 0.1 + (1 - beta) 0.1 of the points lie on that tenth."""
    torch.manual_seed(0)
    logits = torch.full((1, 200, 200), 10.0)
    logits[:, :, 80:100] = 0.0
    points = uncertain_points(logits, replace(Config(), loss_points=20000))
    assert points.shape == (1, 20000, 2)
    inside = ((points[..., 0] > 0.4) & (points[..., 0] < 0.5)).float().mean()
    assert float(inside) == pytest.approx(0.325, abs=0.01)


def test_points_are_looked_up_at_their_place_in_the_image():
    """A mask that begins at x = a is stepped over at (a - x0) / (x1 - x0) of the box."""
    target = {"masks": torch.zeros(1, 40, 80, dtype=torch.bool)}
    target["masks"][:, :, 30:] = True
    box = regions([[0.25, 0.1, 0.75, 0.9]])                                # 20 to 60 px: the step is at a quarter
    u = torch.linspace(0.01, 0.99, 99)
    truth = read_objects(box, torch.stack((u, torch.full_like(u, 0.5)), -1)[None], [target])[0]
    assert (truth[u < 0.23] == 0).all() and (truth[u > 0.27] == 1).all()
    assert float(truth[(u - 0.25).abs().argmin()]) == pytest.approx(0.5, abs=0.01)


def made(value, xyxy=((0.0, 0.0, 1.0, 1.0),), **changes):
    """Losses of constant logits, left half +value and right half -value, for an object that is the left half."""
    logits = torch.full((1, 64, 64), float(value))
    logits[..., 32:] *= -1
    target = {"labels": torch.zeros(1), "masks": torch.zeros(1, 256, 256, dtype=torch.bool)}
    target["masks"][..., :128] = True
    outputs = {"mask_logits": logits, "regions": regions(xyxy)}
    cfg = replace(Config(), loss_bce=1.0, loss_dice=1.0, point_loss=False, **changes)
    return {name: float(loss) for name, loss in Criterion(cfg)(outputs, [target]).items()}


def test_a_perfect_mask_costs_nothing_and_an_inverted_one_all():
    perfect, inverted = made(20), made(-20)
    assert perfect["bce"] < 1e-6 and perfect["dice"] < 1e-3
    assert inverted["bce"] == pytest.approx(20) and inverted["dice"] == pytest.approx(1, abs=1e-3)


def test_losses_are_sums_over_objects_divided_by_the_number_given():
    images, padding, targets = scene((64, 96), (48, 64), objects=(3, 2))
    cfg, masks, criterion = network()
    torch.manual_seed(3)
    out = masks(images, padding, targets)
    losses = []
    for count in (None, 5.0, 10.0):
        torch.manual_seed(4)
        losses.append(criterion(out, targets, count))
    for name in ("bce", "dice", "iou"):
        assert losses[0][name] == losses[1][name] and torch.allclose(losses[0][name], 2 * losses[2][name])


def test_the_iou_to_predict_counts_the_part_of_the_object_outside_the_box():
    target = {"masks": torch.ones(1, 32, 64, dtype=torch.bool)}
    full = torch.full((1, 16, 16), 20.0)
    for box, expected in (((0.0, 0.0, 0.5, 1.0), 0.5), ((0.0, 0.0, 1.0, 1.0), 1.0)):
        assert float(mask_iou(full, regions([box]), [target])) == pytest.approx(expected, abs=0.04)
    assert float(mask_iou(-full, regions([(0.0, 0.0, 1.0, 1.0)]), [target])) == 0


def test_objects_meet_the_queries_of_the_cheapest_assignment():
    from itertools import permutations
    cfg, masks, criterion = network()
    images, padding, targets = scene((64, 96), (48, 64), objects=(3, 1))
    out = masks(images, padding, targets)
    for b, (query, index) in enumerate(criterion.match(out, targets)):
        n = len(targets[b]["labels"])
        logits, boxes = out["pred_logits"][None, b:b + 1], out["pred_boxes"][None, b:b + 1]
        cost = match_cost(logits, boxes, targets[b:b + 1], mfd.Weights(2, 5, 2))[0, 0]                  # (9, n)
        best = min(permutations(range(9), n), key=lambda rows: sum(float(cost[r, j]) for j, r in enumerate(rows)))
        assert {int(j): int(q) for q, j in zip(query, index)} == dict(enumerate(best))
    r = out["regions"]
    assert r.counts == [3, 1]
    assert torch.equal(r.xyxy, box_cxcywh_to_xyxy(out["pred_boxes"][r.image, r.query]).clamp(0, 1))


def test_regions_end_at_the_border_of_the_image():
    assert mfd.inside(torch.tensor([[0.1, 0.5, 0.4, 0.2]]))[0].tolist() == pytest.approx([0.0, 0.4, 0.3, 0.6])


def test_a_crowd_is_represented_by_some_of_its_objects():
    cfg, masks, criterion = network(train_regions=2)
    images, padding, targets = scene((64, 96), (48, 64), objects=(5, 1))
    r = masks(images, padding, targets)["regions"]
    assert r.counts == [2, 1] and r.weight.tolist() == [2.5, 2.5, 1.0] and len(set(r.object[:2].tolist())) == 2


ABLATIONS = [dict(), dict(level="image", box_encoder="none", query_encoder="none", mask_scoring=False), mfd.BASELINE,
             dict(image_encoder="convnext", box_encoder="convnext"), dict(image_encoder="swin", box_encoder="swin"),
             dict(query_encoder="obj2obj"), dict(query_encoder="both", query_ffn=True), dict(point_loss=False), dict(mask_scoring=False), dict(roi_box="gt"),
             dict(enc_layer=1), dict(roi_size=16, channel_dim=64)]


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
@pytest.mark.parametrize("objects", [(3, 0), (0, 0), (12, 1)])
def test_every_parameter_gets_a_finite_gradient(changes, objects):
    cfg, masks, criterion = network(**changes)
    images, padding, targets = scene((64, 96), (48, 64), objects=objects)
    losses = criterion(masks(images, padding, targets), targets)
    sum(losses.values()).backward()
    assert [n for n, p in masks.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert (sum(losses.values()) == 0) == (objects == (0, 0))
    masks.eval()
    found = detect(masks(images, padding, targets), torch.tensor([[64, 96], [48, 64]]), replace(masks.cfg, top_k=20))
    assert [len(f["masks"]) == len(f["mask_scores"]) == len(f["scores"]) for f in found] == [True, True]


def test_an_image_without_a_detector_of_equal_width_needs_the_neck():
    with pytest.raises(ValueError, match="use the neck"):
        network(neck=False)
    with pytest.raises(ValueError, match="image_baseline"):
        network(level="image")
    with pytest.raises(ValueError, match="none, obj2obj, box2obj, both"):
        network(query_encoder="all")


def test_regions_of_the_ground_truth_find_every_object():
    cfg, masks, _ = network(roi_box="gt")
    images, padding, targets = scene((64, 96), (48, 64))
    masks.eval()
    found = detect(masks(images, padding, targets), torch.tensor([[64, 96], [48, 64]]), replace(masks.cfg, top_k=20))
    assert len(found[1]["masks"]) == 0 and found[0]["scores"].tolist() == [1, 1, 1]
    assert sorted(found[0]["labels"].tolist()) == sorted(targets[0]["labels"].tolist())
    assert "found" in masks(images, padding)                               # without targets: the detector's


def test_it_overfits_four_scenes():
    cfg, masks, criterion = network(roi_size=16, channel_dim=64, roi_box="gt")
    images, padding, targets = scene((64, 64), (64, 64), (64, 64), (64, 64), objects=(1, 2, 1, 2))
    optimizer = torch.optim.AdamW(mfd.param_groups(masks, override(mfd.RECIPE, SMALL)), lr=3e-3)
    for _ in range(60):
        out = masks(images, padding, targets)
        losses = criterion(out, targets)
        optimizer.zero_grad(), sum(losses.values()).backward(), optimizer.step()
    assert mask_iou(out["mask_logits"].detach(), out["regions"], targets).mean() > 0.8
    assert float(losses["iou"]) < 0.02


# ------------------------------------------------------------------------------------------------ sizes and recipe

def test_parameters_are_those_that_the_default_sizes_give():
    """Neck, two encoders, mappers, box-to-object attention and scoring head of the defaults on a ResNet-50 detector."""
    class Standin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.level_embed = torch.nn.Identity(), torch.nn.Parameter(torch.zeros(4, 256))
            self.backbone.channels, self.encoder = [256, 512, 1024, 2048], []

    masks = MaskFrozenDETR(Frozen(Standin(), None), Config())
    count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
    assert count(masks.neck) == 66_048
    assert count(masks.image_encoder) == 1_513_728
    assert count(masks.channel_mapper, masks.query_mapper) == 65_792
    assert count(masks.box_encoder) == 618_432
    assert count(masks.query_encoder) == 66_304
    assert count(masks.score_head) == 10_031_745
    assert count(masks) == 12_362_049


def test_the_learning_rate_falls_after_ninety_and_ninety_five_percent():
    recipe = replace(mfd.RECIPE, epochs=1)
    factors = {step: train.lr_factor(recipe, step, 88_500) for step in (0, 79_649, 79_650, 84_074, 84_075, 88_499)}
    assert list(factors.values()) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


# ------------------------------------------------------------------------------------------ from the command line

@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """They have their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.visualize, "predictions", lambda *args, **kwargs: None)
        patch.setattr(train.visualize, "curves", lambda *args, **kwargs: None)
        yield


def run(*words):
    train.main([*words, "--num_val", "3", "--threads", "1", "--workers", "0", "--device", "cpu"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoint of a small DINO of one step."""
    out = tmp_path_factory.mktemp("runs") / "dino"
    run("--model", "dino", "--num_train", "8", "--epochs", "1", "--dim", "32", "--ffn_dim", "32", "--num_heads", "2",
        "--train_sizes", "64", "--eval_size", "64", "--num_queries", "12", "--out", str(out))
    return str(out / "best.pt")


MASKS = ("--model", "mask_frozen_detr", "--num_train", "12", "--train_sizes", "64", "--eval_size", "64", "--batch_size", "4",
         "--channel_dim", "32", "--roi_size", "8")


@pytest.fixture(scope="module")
def masks_folder(tmp_path_factory, trained):
    """Folder of a run of two epochs on top of it."""
    out = tmp_path_factory.mktemp("runs") / "masks"
    run(*MASKS, "--detector", trained, "--epochs", "2", "--out", str(out))
    return out


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path, trained, masks_folder, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train, "evaluation", killed)
        run(*MASKS, "--detector", trained, "--epochs", "2", "--out", str(tmp_path / "cut"))
    run(*MASKS[:2], "--out", str(tmp_path / "cut"), "--resume")
    whole, cut = (checkpoints.load(folder / "last.pt") for folder in (masks_folder, tmp_path / "cut"))
    assert whole["step"] == cut["step"] == 6
    for part in ("model", "ema"):
        assert all(torch.equal(value, cut[part][key]) for key, value in whole[part].items())
    assert not any(key.startswith(("backbone", "encoder", "decoder")) for key in whole["model"])


def test_a_checkpoint_is_evaluated_with_and_without_mask_scores_and_knows_its_detector(tmp_path, trained, masks_folder, capsys):
    log = (masks_folder / "log.jsonl").read_text()
    assert '"segm"' in log and '"segm_cls"' in log
    moved = tmp_path / "elsewhere.pt"
    moved.write_bytes(open(trained, "rb").read())
    words = ["--checkpoint", str(masks_folder / "best.pt"), "--device", "cpu"]
    evaluation.main([*words, "--detector", str(moved), "--max_dets", "150"])
    printed = capsys.readouterr().out
    assert all(f"\n{kind}" in printed for kind in ("bbox", "segm", "segm_cls")) and "best 150 detections" in printed
    image = tmp_path / "scene.png"
    scenes.Shapes("val", 1).image(0).save(image)
    evaluation.main([*words, "--images", str(image), "--out", str(tmp_path / "drawn"), "--score_threshold", "0"])
    assert (tmp_path / "drawn" / "scene.jpg").exists() and "mask_score" in (tmp_path / "drawn" / "detections.json").read_text()
    state = checkpoints.load(trained)
    state["ema"]["level_embed"] += 1
    checkpoints.save(moved, state)
    with pytest.raises(SystemExit, match="expected the detector that these masks were trained on"):
        evaluation.main([*words, "--detector", str(moved)])
    with pytest.raises(SystemExit, match="no file: say where it lies with --detector"):
        evaluation.main([*words, "--detector", "nowhere.pt"])


def test_without_a_detector_the_error_says_how_to_get_one(tmp_path):
    with pytest.raises(SystemExit, match="--detector FILE.*python train.py --model dino"):
        run(*MASKS, "--out", str(tmp_path / "masks"))


def test_a_mask_network_is_no_detector_and_classes_must_agree(tmp_path, trained, masks_folder):
    with pytest.raises(SystemExit, match="expected a detector, got"):
        run(*MASKS, "--detector", str(masks_folder / "best.pt"), "--out", str(tmp_path / "other"))
    with pytest.raises(ValueError, match="a detector of 3 classes"):
        mfd.build(Config(), 3, models.load_detector(trained))
    state = checkpoints.load(trained)
    state["class_names"] = state["class_names"][::-1]
    checkpoints.save(tmp_path / "reversed.pt", state)
    with pytest.raises(SystemExit, match="expected a detector of the classes of the data"):
        run(*MASKS, "--detector", str(tmp_path / "reversed.pt"), "--out", str(tmp_path / "other"))


def test_data_without_masks_is_refused(shared, tmp_path, trained):
    with pytest.raises(SystemExit, match="expected a segmentation for every object of bccd"):
        run(*MASKS[:2], "--data", str(shared / "data" / "bccd"), "--preset", "small", "--detector", trained,
            "--out", str(tmp_path / "masks"))
