"""mask_frozen_detr.py: no code or weights of the authors exist, so each part is compared with a
slow, literal computation."""
from copy import deepcopy
from dataclasses import replace
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

import co_detr
import deformable_detr
import detr
import dino
import eval as evaluation
import h_detr
import mask_frozen_detr as mfd
import scenes
import train
from boxes import box_cxcywh_to_xyxy
from frozen_detector import weight_hash
from heads.regions import roi_align
from engine import checkpoints, models
from engine.errors import UserError
from engine.recipe import configure, override
from mask_frozen_detr import (SMALL, Config, Criterion, FrozenDetector, MaskFrozenDETR, Regions,
                              ScoreHead, build_blocks, detect, encode, region_memory)
from masks import mask_iou, select_masks
from matcher import match_cost
from recordings import batch, randomize_heads
from tools import ship

TINY = {**SMALL, **dict(roi_size=8, channel_dim=32, image_ffn_dim=32, box_ffn_dim=32, score_dim=8,
                        score_ffn_dim=16, num_heads=2, num_points=2, loss_points=64)}
SIZES = torch.tensor([[64, 96], [48, 64]])     # of the two images of most tests


def detector(paper=dino, **changes):
    """A small detector with random predictions of many classes."""
    torch.manual_seed(0)
    small = dict(paper.SMALL, dim=32, ffn_dim=48, num_heads=2, decoder_layers=2, num_queries=9,
                 size_divisor=1)
    cfg = override(paper.Config(), small | changes)
    model, _ = paper.build(cfg, 5)
    randomize_heads(getattr(model, "detector", model))
    return model


def loaded(paper=dino, **changes):
    """What `load_model` returns of such a detector."""
    model = detector(paper, **changes)
    criterion = paper.Criterion(model.cfg)
    meta = {"class_names": ["a", "b", "c", "d", "e"]}
    return models.Loaded(model.eval(), paper, model.cfg, paper.RECIPE, meta, criterion)


def network(frozen=None, paper=dino, **changes):
    """Config, mask network in training mode, criterion."""
    cfg = override(Config(), {**TINY, **changes})
    frozen = frozen or FrozenDetector(detector(paper), paper.detect, cfg.enc_layer)
    torch.manual_seed(1)
    return cfg, MaskFrozenDETR(frozen, cfg).train(), Criterion(cfg)


def scene(*sizes, objects=(3, 0)):
    """`recordings.batch` with an ellipse as mask in every box."""
    images, padding, targets = batch(*sizes, objects=objects)
    for (h, w), target in zip(sizes, targets):
        y = (torch.arange(h) + 0.5) / h
        x = (torch.arange(w) + 0.5) / w
        cx, cy, bw, bh = target["boxes"].T[..., None, None]
        dx = (x - cx) / bw * 2
        dy = (y[:, None] - cy) / bh * 2
        target["masks"] = dx ** 2 + dy ** 2 < 1                            # (n, h, w)
    return images, padding, targets


def two_images(objects=(3, 0)):
    return scene((64, 96), (48, 64), objects=objects)


def regions(xyxy, image=None, objects=None):
    """Regions of one image, or of `image` (n,), which is sorted."""
    n = len(xyxy)
    image = torch.zeros(n, dtype=torch.int64) if image is None else torch.tensor(image)
    counts = torch.bincount(image).tolist() if n else [0]
    objects = torch.arange(n) if objects is None else torch.tensor(objects)
    return Regions(image, torch.arange(n), torch.tensor(xyxy), objects, torch.ones(n), counts)


# ---- The frozen detector

@pytest.mark.parametrize("paper", [deformable_detr, dino, h_detr, co_detr],
                         ids=["deformable_detr", "dino", "h_detr", "co_detr"])
def test_any_detector_of_the_project_can_be_wrapped_and_its_boxes_stay(paper):
    model = detector(paper)
    cfg, masks, criterion = network(FrozenDetector(model, paper.detect))
    images, padding, targets = two_images()
    sum(criterion(masks(images, padding, targets), targets).values()).backward()
    masks.eval()
    with torch.no_grad():
        alone = model(images, padding)
        outputs = masks(images, padding)
    sizes = torch.tensor([[100, 150], [75, 100]])
    with_masks = detect(outputs, sizes, replace(cfg, top_k=20))
    without = paper.detect(alone, sizes, replace(model.cfg, top_k=20))
    for ours, theirs, size in zip(with_masks, without, sizes.tolist()):
        assert ours["masks"].shape == (len(ours["boxes"]), *size)
        assert ours["masks"].dtype == torch.bool
        for name in ("scores", "labels", "boxes", "query"):
            assert torch.equal(ours[name], theirs[name]), name


def test_the_detector_is_bit_identical_after_training_steps_and_has_no_gradient():
    frozen = FrozenDetector(detector(backbone_norm="batch"), dino.detect)
    cfg, masks, criterion = network(frozen, ema=0.9)
    before = {name: value.clone() for name, value in frozen.model.state_dict().items()}
    average = train.make_ema(masks, 0.9)
    groups = mfd.param_groups(masks, override(mfd.RECIPE, SMALL))
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    images, padding, targets = two_images()
    micro_batches = [(images, padding, targets)]
    with torch.no_grad():
        boxes = masks(images, padding, targets)["pred_boxes"]
    weights = [p.clone() for p in masks.parameters()]
    machine = train.Machine()
    for _ in range(10):
        masks.train()
        train.step(masks, masks, criterion, optimizer, average, micro_batches, 1.0, machine)
    assert not frozen.model.training and average.module.base is frozen
    assert all(p.grad is None and not p.requires_grad for p in frozen.model.parameters())
    after = frozen.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert torch.equal(masks(images, padding, targets)["pred_boxes"], boxes)
    assert not any(torch.equal(a, b) for a, b in zip(weights, masks.parameters()))


def test_training_mode_never_reaches_the_detector():
    _, masks, _ = network()
    masks.train()
    assert masks.training
    assert not any(module.training for module in masks.base.model.modules())


def test_the_state_dict_holds_the_mask_network_only_and_the_hash_of_its_detector():
    _, masks, _ = network()
    state = masks.state_dict()
    assert {key.split(".")[0] for key in state} == {
        "neck", "image_encoder", "channel_mapper", "query_mapper", "box_encoder", "query_encoder",
        "score_head", "_extra_state"}
    assert state["_extra_state"].shape == (32,)
    assert torch.equal(state["_extra_state"], weight_hash(masks.base.model))


def test_another_detector_is_refused_by_its_weights_and_the_same_one_elsewhere_is_not():
    _, masks, _ = network()
    copy = FrozenDetector(deepcopy(masks.base.model), dino.detect)
    MaskFrozenDETR(copy, masks.cfg).load_state_dict(masks.state_dict())
    other = deepcopy(masks.base.model)
    next(other.parameters()).data.view(-1)[0] += 1e-6
    on_other = MaskFrozenDETR(FrozenDetector(other, dino.detect), masks.cfg)
    message = "expected the detector that these masks were trained on.*--detector"
    with pytest.raises(UserError, match=message):
        on_other.load_state_dict(masks.state_dict())


def test_converting_the_network_converts_the_detector_too():
    _, masks, _ = network()
    masks.double()
    assert {p.dtype for p in masks.base.model.parameters()} == {torch.float64}


@pytest.mark.parametrize("levels", [3, 5])
def test_F_is_made_of_the_tokens_of_stride_eight(levels):
    frozen = FrozenDetector(detector(num_feature_levels=levels), dino.detect)
    images, padding, _ = two_images()
    outputs, tokens = frozen(images, padding)
    memory = outputs["memory"]
    assert torch.equal(tokens, memory.tokens)
    level = mfd.stride_eight(memory)
    start = 0 if levels == 3 else 16 * 24
    assert level.shapes == [(8, 12)]
    assert torch.equal(level.tokens, memory.tokens[:, start:start + 96])
    assert torch.equal(level.padding, memory.padding[:, start:start + 96])
    assert level.valid_ratios.shape == (2, 1, 2)


def test_an_inner_encoder_layer_can_be_tapped():
    model = detector(encoder_layers=3)
    images, padding, _ = two_images()
    seen = []
    model.encoder[1].register_forward_hook(lambda module, inputs, tokens: seen.append(tokens))
    outputs, second = FrozenDetector(model, dino.detect, 2)(images, padding)
    assert torch.equal(second, seen[0]) and not torch.equal(second, outputs["memory"].tokens)
    outputs, last = FrozenDetector(model, dino.detect, 3)(images, padding)
    assert torch.equal(last, outputs["memory"].tokens)
    with pytest.raises(UserError, match="enc_layer from 0 to 3"):
        FrozenDetector(model, dino.detect, 4)


def test_dino_returns_the_state_that_its_class_head_reads():
    model = detector()
    images, padding, _ = two_images()
    outputs, _ = FrozenDetector(model, dino.detect)(images, padding)
    logits = model.class_embed[-1](outputs["queries"])
    assert torch.allclose(logits, outputs["pred_logits"], atol=1e-6)


def test_h_detr_returns_the_state_that_its_class_head_reads_of_its_one_to_one_queries():
    model = detector(h_detr)
    images, padding, _ = two_images()
    outputs, _ = FrozenDetector(model, h_detr.detect)(images, padding)
    assert outputs["queries"].shape[1] == model.cfg.num_queries
    logits = model.class_embed[model.cfg.decoder_layers - 1](outputs["queries"])
    assert torch.allclose(logits, outputs["pred_logits"], atol=1e-6)


# ---- A detector that is trained too

@pytest.mark.parametrize("paper", [deformable_detr, dino, h_detr, co_detr],
                         ids=["deformable_detr", "dino", "h_detr", "co_detr"])
def test_a_copy_of_any_detector_can_be_trained_with_its_masks(paper):
    """Its own losses are those it would have alone; the masks' gradient reaches its encoder."""
    original = loaded(paper)
    before = {name: value.clone() for name, value in original.model.state_dict().items()}
    cfg = override(Config(), {**TINY, "train_detector": True})
    masks, criterion = mfd.build(cfg, 5, original)
    masks.train()
    assert masks.detector is not original.model and masks.detector.training
    assert hasattr(criterion, "set_image_counts") == (paper is co_detr)
    images, padding, targets = two_images()
    outputs = masks(images, padding, targets)
    losses = criterion(outputs, targets)
    own = original.criterion(outputs, targets)
    assert {name for name in losses if name.startswith("detector.")} == {
        f"detector.{name}" for name in own}
    assert torch.equal(losses["detector.cls"], own["cls"])

    projection = getattr(masks.detector, "detector", masks.detector).input_proj[0][0].weight
    losses["bce"].backward(retain_graph=True)
    assert projection.grad.abs().max() > 0
    sum(losses.values()).backward()
    groups = mfd.param_groups(masks, override(mfd.RECIPE, SMALL))
    assert sum(len(group["params"]) for group in groups) == len(
        [p for p in masks.parameters() if p.requires_grad])
    torch.optim.AdamW(groups).step()
    after = original.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    changed = [name for name, value in masks.detector.state_dict().items()
               if not torch.equal(value, before[name])]
    assert len(changed) > len(before) / 2


def test_a_trained_detector_learns_at_a_tenth_of_its_own_rates():
    """DINO's recipe has batches of 16 images, that of the masks of 8."""
    masks, _ = mfd.build(override(Config(), {**TINY, "train_detector": True}), 5, loaded())
    rates = [group["lr"] for group in mfd.param_groups(masks, mfd.RECIPE)]
    assert rates == pytest.approx([1.5e-4, 1e-4 / 20, 1e-5 / 20])


def test_the_average_of_a_network_averages_its_trained_detector():
    """The copy of the network has a detector of its own, which its hook and its wrapper know."""
    cfg = override(Config(), {**TINY, "train_detector": True, "enc_layer": 1})
    masks, _ = mfd.build(cfg, 5, loaded(encoder_layers=2))
    average = train.make_ema(masks, 0.9).module
    assert average.base.model is average.detector and average.detector is not masks.detector
    images, padding, _ = two_images()
    _, tokens = average.base(images, padding)
    assert tokens is not None and masks.base.layer_tokens is None


def test_masks_of_a_trained_detector_do_not_load_onto_a_frozen_one():
    original = loaded()
    cfg = override(Config(), TINY)
    trained, _ = mfd.build(replace(cfg, train_detector=True), 5, original)
    frozen, _ = mfd.build(cfg, 5, original)
    weights = {name: value for name, value in trained.state_dict().items()
               if not name.startswith("detector.")}
    with pytest.raises(UserError, match="expected the detector that these masks were trained on"):
        frozen.load_state_dict(weights)


# ---- The map F and regions

def test_F_is_the_sum_of_C1_and_the_resized_encoder_map_at_odd_sizes_too():
    """C1 = 2 and E = 1 everywhere give 3 everywhere, also where C1 is not twice as large as E."""
    cfg, masks, _ = network(neck=True, image_encoder="none")
    masks.neck = masks.channel_mapper = torch.nn.Identity()
    images, padding, _ = scene((57, 90))
    memory = masks.base(images, padding)[0]["memory"]
    assert memory.features[0].shape[-2:] == (15, 23) and memory.shapes[0] == (8, 12)
    memory = memory._replace(features=[torch.full((1, 32, 15, 23), 2.0)],
                             padding=torch.zeros_like(memory.padding))
    out = masks.feature_map(memory, torch.ones_like(memory.tokens))
    assert out.shape == (1, 15, 23, 32) and torch.equal(out, torch.full_like(out, 3.0))


def test_the_neck_normalizes_32_groups():
    out = mfd.Neck(48, 64)(torch.randn(2, 48, 9, 13))
    groups = out.unflatten(1, (32, 2)).flatten(2)                          # (2, 32, 2 9 13)
    assert groups.mean(-1).abs().max() < 1e-5
    assert (groups.std(-1, correction=0) - 1).abs().max() < 1e-3


def test_the_channel_mapper_commutes_with_roi_align():
    mapper = torch.nn.Linear(16, 8)
    features = torch.randn(1, 12, 10, 16)

    def cut(x):
        box = torch.tensor([[3.0, 5.0, 30.0, 41.0]])
        zero = torch.tensor([0])
        return roi_align(x.flatten(1, 2), [(12, 10)], [4], box, zero, zero, 8)

    assert torch.allclose(mapper(cut(features)), cut(mapper(features)), atol=1e-5)


def test_regions_are_cut_where_the_box_lies_in_the_unpadded_image():
    """On a map that holds its own x in pixels, a region holds the centers of its cells."""
    changes = dict(box_encoder="none", query_encoder="none", mask_scoring=False, channel_dim=32)
    cfg, masks, _ = network(**changes)
    images, padding, _ = two_images()
    memory = masks.base(images, padding)[0]["memory"]
    features = torch.zeros(2, 16, 24, 32)
    features[..., 0] = torch.arange(24) * 4 + 2.0
    box = regions([[0.25, 0.25, 0.75, 0.75]], [1])     # second image, 64 px wide: 16 to 48 px
    first_channel = F.one_hot(torch.tensor([0]), 32).float()
    out = masks.box_masks(features, box, first_channel, memory.image_sizes)
    expected = 16 + (torch.arange(8) + 0.5) * 4
    assert torch.allclose(out["mask_logits"][0], expected.expand(8, 8), atol=1e-4)


@pytest.mark.parametrize("kind", ["deformable", "swin", "convnext"])
def test_blocks_keep_shapes_and_have_exact_gradients(kind):
    torch.manual_seed(0)
    layers = build_blocks(kind, 2, mfd.BlockConfig(8, 2, 1, 2, 16)).double()
    region = torch.randn(2, 4, 4, 8, dtype=torch.float64, requires_grad=True)

    def tokens(x):
        return encode(layers, region_memory(x)).tokens

    assert tokens(region).shape == (2, 16, 8)
    assert torch.autograd.gradcheck(lambda x: tokens(x).sum((1, 2)), region)


def test_the_deformable_block_is_post_norm_with_gelu():
    """Against the formula in float64; the attention itself is tested elsewhere."""
    torch.manual_seed(0)
    block, = build_blocks("deformable", 1, mfd.BlockConfig(16, 2, 1, 2, 32)).double()
    memory = region_memory(torch.randn(3, 4, 4, 16, dtype=torch.float64))
    references = deformable_detr.encoder_references(memory)
    centers = [[(x + 0.5) / 4, (y + 0.5) / 4] for y in range(4) for x in range(4)]
    centers = torch.tensor(centers, dtype=torch.float64)
    assert torch.allclose(references[:, :, 0].double(), centers.expand(3, -1, -1))

    def norm(layer, x):
        return F.layer_norm(x, (16,), layer.weight, layer.bias)

    x = memory.tokens
    x = norm(block.norm1, x + block.self_attn(x + memory.positions, references, x, [(4, 4)]))
    hidden = x @ block.linear1.weight.T + block.linear1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2 ** 0.5))
    expected = norm(block.norm2, x + hidden @ block.linear2.weight.T + block.linear2.bias)
    assert (block(memory, references) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["deformable", "swin", "convnext"])
def test_every_region_is_a_sequence_of_its_own(kind):
    torch.manual_seed(0)
    layers = build_blocks(kind, 1, mfd.BlockConfig(16, 2, 1, 2, 32))
    region = torch.randn(4, 8, 8, 16)
    order = [2, 0, 3, 1]
    plain = encode(layers, region_memory(region)).tokens
    permuted = encode(layers, region_memory(region[order])).tokens
    assert torch.allclose(plain[order], permuted, atol=1e-5)
    if kind == "deformable":
        assert layers[0].self_attn.num_levels == 1


def test_padding_changes_no_mask():
    """Noise in the padding's tokens does not change the map F."""
    cfg, masks, _ = network(FrozenDetector(detector(backbone_norm="group"), dino.detect))
    masks.eval()
    images, padding, _ = two_images()
    with torch.no_grad():
        outputs, tokens = masks.base(images, padding)
        memory = outputs["memory"]
        noise = 100 * memory.padding[..., None] * torch.randn(tokens.shape)
        clean = masks.feature_map(memory, tokens)
        noisy = masks.feature_map(memory, tokens + noise)
    assert noise.abs().max() > 0 and torch.equal(clean, noisy)


@pytest.mark.parametrize("chunk", [1, 2])
def test_masks_do_not_depend_on_how_many_regions_are_computed_at_a_time(chunk, monkeypatch):
    cfg, masks, _ = network()
    masks.eval()
    images, padding, _ = two_images()
    with torch.no_grad():
        together = masks(images, padding)
        monkeypatch.setattr(mfd, "CHUNK", chunk)
        apart = masks(images, padding)
    assert len(together["mask_logits"]) > 2
    for name in ("mask_logits", "mask_ious"):
        assert torch.allclose(together[name], apart[name], atol=1e-5), name


# ---- Queries, logits, scores

def test_a_query_depends_on_its_own_region_and_the_other_queries_of_its_image_only():
    torch.manual_seed(0)
    encoder = mfd.QueryEncoder(override(Config(), {**TINY, "query_encoder": "both"}))
    queries = torch.randn(4, 32)
    region = torch.randn(4, 8, 8, 32)
    image = torch.tensor([0, 0, 1, 1])
    changed_region = region.clone()
    changed_region[2] += 1
    before = encoder.from_region(queries, region_memory(region))
    after = encoder.from_region(queries, region_memory(changed_region))
    assert ((before - after).abs().amax(-1) > 1e-3).tolist() == [False, False, True, False]
    changed_queries = queries.clone()
    changed_queries[0] += 1
    before = encoder.among_objects(queries, image)
    after = encoder.among_objects(changed_queries, image)
    assert ((before - after).abs().amax(-1) > 1e-4).tolist() == [True, True, False, False]


def test_logits_are_the_dot_products_of_query_and_cells():
    cfg, masks, _ = network(box_encoder="none", query_encoder="none")
    images, padding, targets = two_images(objects=(2, 1))
    with torch.no_grad():
        out = masks(images, padding, targets)
        features = masks.feature_map(out["memory"], out["memory"].tokens)
        for i in range(3):
            b, query, xyxy = [out["regions"][field][i] for field in range(3)]
            box = (xyxy * out["memory"].image_sizes[b][[1, 0, 1, 0]])[None]
            level = torch.tensor([0])
            cut = roi_align(features.flatten(1, 2), [(16, 24)], [4], box, b[None], level, 8)[0]
            q = masks.query_mapper(out["queries"][b, query])
            for r, c in ((0, 0), (3, 5), (7, 7)):
                expected = float(sum(q * cut[r, c]))
                assert float(out["mask_logits"][i, r, c]) == pytest.approx(expected, abs=1e-4)


def test_image_level_masks_are_the_dot_products_of_query_and_map():
    cfg, masks, _ = network(level="image", **mfd.BASELINE)
    images, padding, targets = two_images(objects=(2, 1))
    with torch.no_grad():
        out = masks(images, padding, targets)
        features = masks.feature_map(out["memory"], out["memory"].tokens)
    assert out["mask_logits"].shape == (3, 16, 24)
    for i, b in enumerate([0, 0, 1]):
        query = masks.query_mapper(out["queries"][b, out["regions"].query[i]])
        expected = float(sum(query * features[b, 5, 9]))
        assert float(out["mask_logits"][i, 5, 9]) == pytest.approx(expected, abs=1e-4)
    # The second image, 48 x 64, is padded to 64 x 96.
    assert out["regions"].xyxy[0].tolist() == [0, 0, 1, 1]
    assert out["regions"].xyxy[2].tolist() == pytest.approx([0, 0, 96 / 64, 64 / 48])


def test_the_score_head_gives_one_number_between_0_and_1_per_region():
    out = ScoreHead(8, 32, 16, 32)(torch.rand(5, 32, 32), 100 * torch.randn(5, 32, 32, 8))
    assert out.shape == (5,) and (out >= 0).all() and (out <= 1).all()


# ---- Numbers that are not finite

@pytest.mark.parametrize("name", ["pred_boxes", "queries"])
def test_a_detector_that_returns_NaN_gives_a_loss_that_is_not_finite(name, monkeypatch):
    """RoIAlign makes zeros of a NaN box, but the true mask there is NaN: the step is skipped."""
    cfg, masks, criterion = network()
    images, padding, targets = two_images()
    outputs, tokens = masks.base(images, padding)
    outputs[name] = torch.full_like(outputs[name], torch.nan)
    monkeypatch.setattr(masks, "base", lambda images, padding, targets: (outputs, tokens))
    losses = criterion(masks(images, padding, targets), targets)
    assert losses["bce"].isnan() and losses["dice"].isnan()


@pytest.mark.parametrize("mask_scoring", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_mask_of_logits_that_are_not_finite_has_the_score_NaN(mask_scoring, value):
    """Such logits are pasted as an empty mask, which eval.py must not score as one."""
    cfg, masks, _ = network(mask_scoring=mask_scoring)
    masks.eval()
    images, padding, _ = two_images()
    with torch.no_grad():
        outputs = masks(images, padding)
    first = outputs["detections"][0]["region"][0]
    outputs["mask_logits"][first, 3, 3] = value
    broken = outputs["detections"][0]["region"] == first
    scores = detect(outputs, SIZES, cfg)[0]["mask_scores"]
    assert scores[broken].isnan().all() and scores[~broken].isfinite().all()
    assert len(scores[~broken])


# ---- Losses

def made(value, **changes):
    """Losses of constant logits, +value in the left half and -value in the right half, for an
    object that is the left half."""
    logits = torch.full((1, 64, 64), float(value))
    logits[..., 32:] *= -1
    target = {"labels": torch.zeros(1), "masks": torch.zeros(1, 256, 256, dtype=torch.bool)}
    target["masks"][..., :128] = True
    outputs = {"mask_logits": logits, "regions": regions([[0.0, 0.0, 1.0, 1.0]])}
    cfg = replace(Config(), loss_bce=1.0, loss_dice=1.0, point_loss=False, **changes)
    return {name: float(loss) for name, loss in Criterion(cfg)(outputs, [target]).items()}


def test_a_perfect_mask_has_no_loss_and_an_inverted_one_the_largest():
    perfect, inverted = made(20), made(-20)
    assert perfect["bce"] < 1e-6 and perfect["dice"] < 1e-3
    assert inverted["bce"] == pytest.approx(20)
    assert inverted["dice"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("wrap", [float, torch.tensor])
def test_losses_are_sums_over_objects_divided_by_the_number_given(wrap):
    images, padding, targets = two_images(objects=(3, 2))
    cfg, masks, criterion = network()
    torch.manual_seed(3)
    out = masks(images, padding, targets)
    losses = []
    for count in (None, wrap(5.0), wrap(10.0)):
        torch.manual_seed(4)
        losses.append(criterion(out, targets, count))
    for name in ("bce", "dice", "iou"):
        assert losses[0][name] == losses[1][name]
        assert torch.allclose(losses[0][name], 2 * losses[2][name])


def test_objects_are_matched_by_the_cheapest_assignment():
    cfg, masks, criterion = network()
    images, padding, targets = two_images(objects=(3, 1))
    with torch.no_grad():
        out = masks(images, padding, targets)
    for b, (query, index) in enumerate(criterion.match(out, targets)):
        n = len(targets[b]["labels"])
        logits, boxes = out["pred_logits"][b:b + 1], out["pred_boxes"][b:b + 1]
        cost = match_cost(logits, boxes, targets[b:b + 1], mfd.Weights(2, 5, 2))[0]    # (9, n)

        def total(rows):
            return sum(float(cost[row, column]) for column, row in enumerate(rows))

        best = min(permutations(range(9), n), key=total)
        assert {int(j): int(q) for q, j in zip(query, index)} == dict(enumerate(best))
    r = out["regions"]
    assert r.counts == [3, 1]
    corners = box_cxcywh_to_xyxy(out["pred_boxes"][r.image, r.query])
    assert torch.equal(r.xyxy, corners.clamp(0, 1))


def test_regions_end_at_the_border_of_the_image():
    corners = mfd.clipped_corners(torch.tensor([[0.1, 0.5, 0.4, 0.2]]))
    assert corners[0].tolist() == pytest.approx([0.0, 0.4, 0.3, 0.6])


def test_a_random_sample_represents_the_objects_of_a_crowded_image():
    cfg, masks, criterion = network(train_regions=2)
    images, padding, targets = two_images(objects=(5, 1))
    r = masks(images, padding, targets)["regions"]
    assert r.counts == [2, 1] and r.image.tolist() == [0, 0, 1]
    assert r.weight.tolist() == [2.5, 2.5, 1.0] and len(set(r.object[:2].tolist())) == 2


def test_a_detector_without_feature_levels_is_refused():
    model, _ = detr.build(override(detr.Config(), detr.SMALL), 5)
    with pytest.raises(UserError, match="several feature levels, got a DETR"):
        FrozenDetector(model, detr.detect, 0)


ABLATIONS = [
    dict(), dict(level="image", **mfd.BASELINE), mfd.BASELINE,
    dict(image_encoder="convnext", box_encoder="convnext"),
    dict(image_encoder="swin", box_encoder="swin"), dict(query_encoder="obj2obj"),
    dict(query_encoder="both", query_ffn=True), dict(point_loss=False), dict(mask_scoring=False),
    dict(roi_box="gt"), dict(enc_layer=1), dict(roi_size=16, channel_dim=64)]


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
@pytest.mark.parametrize("objects", [(3, 0), (0, 0), (12, 1)])
def test_every_parameter_gets_a_finite_gradient(changes, objects):
    cfg, masks, criterion = network(**changes)
    images, padding, targets = two_images(objects=objects)
    losses = criterion(masks(images, padding, targets), targets)
    sum(losses.values()).backward()
    for name, parameter in masks.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert (sum(losses.values()) == 0) == (objects == (0, 0))
    masks.eval()
    for image in detect(masks(images, padding, targets), SIZES, replace(cfg, top_k=20)):
        assert len(image["masks"]) == len(image["mask_scores"]) == len(image["scores"])
        assert image["mask_scores"].isfinite().all()


def test_settings_that_do_not_exist_or_do_not_go_together_are_refused():
    with pytest.raises(UserError, match="use the neck"):
        network(neck=False)
    with pytest.raises(UserError, match="image_baseline"):
        network(level="image")
    with pytest.raises(UserError, match="none, obj2obj, box2obj, both"):
        network(query_encoder="all")


def test_regions_of_the_ground_truth_detect_every_object():
    cfg, masks, _ = network(roi_box="gt")
    images, padding, targets = two_images()
    masks.eval()
    first, second = detect(masks(images, padding, targets), SIZES, replace(cfg, top_k=20))
    assert len(second["masks"]) == 0 and first["scores"].tolist() == [1, 1, 1]
    assert sorted(first["labels"].tolist()) == sorted(targets[0]["labels"].tolist())
    without_targets = masks(images, padding)
    assert without_targets["detections"][0]["scores"].max() < 1    # the detector's own


def test_it_overfits_four_scenes():
    cfg, masks, criterion = network(roi_size=16, channel_dim=64, roi_box="gt")
    images, padding, targets = scene(*[(64, 64)] * 4, objects=(1, 2, 1, 2))
    groups = mfd.param_groups(masks, override(mfd.RECIPE, SMALL))
    optimizer = torch.optim.AdamW(groups, lr=3e-3, fused=True)
    for _ in range(60):
        out = masks(images, padding, targets)
        losses = criterion(out, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    r = out["regions"]
    true_masks = select_masks(targets, r.object.split(r.counts))
    assert mask_iou(out["mask_logits"].detach(), true_masks, r.xyxy).mean() > 0.8
    assert float(losses["iou"]) < 0.02


# ---- Sizes and recipe

def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameters_are_those_that_the_default_sizes_give():
    """Neck, both encoders, mappers, box-to-object attention and scoring head of the defaults, on a
    ResNet-50 detector."""
    class StandIn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Identity()
            self.backbone.channels = [256, 512, 1024, 2048]
            self.level_embed = torch.nn.Parameter(torch.zeros(4, 256))
            self.encoder = []

    masks = MaskFrozenDETR(FrozenDetector(StandIn(), None), Config())
    assert count(masks.neck) == 66_048
    assert count(masks.image_encoder) == 1_513_728
    assert count(masks.channel_mapper, masks.query_mapper) == 65_792
    assert count(masks.box_encoder) == 618_432
    assert count(masks.query_encoder) == 66_304
    assert count(masks.score_head) == 10_031_745
    assert count(masks) == 12_362_049


# Both systems of the main comparison: detector, its variant, and the parameters of detector and
# mask network. H-DETR counts its one-to-many queries; the detector of DINO has five levels.
SYSTEMS = {"h_detr_swin_l": (h_detr, "swin_l", 218_213_728, 12_345_665),
           "dino_focalnet_l": (dino, "focalnet_l_o365", 228_113_952, 12_395_009)}


@pytest.mark.parametrize("variant", SYSTEMS)
def test_the_systems_of_the_main_comparison_compose(variant):
    """On the device meta, at their published sizes and for the 80 classes of COCO."""
    paper, name, detector_size, masks_size = SYSTEMS[variant]
    cfg, recipe = configure(paper, paper.VARIANTS[name])
    mask_cfg, _ = configure(mfd, mfd.VARIANTS[variant])
    with torch.device("meta"):
        model, criterion = paper.build(cfg, 80)
        meta = {"class_names": [str(i) for i in range(80)]}
        detector = models.Loaded(model, paper, cfg, recipe, meta, criterion)
        masks, _ = mfd.build(mask_cfg, 80, detector)
    assert count(model) == detector_size
    assert count(masks) == masks_size
    other = detector._replace(cfg=replace(cfg, backbone="resnet50"))
    with pytest.raises(UserError, match=f"{mask_cfg.expected_detector}, got .* resnet50"):
        mfd.build(mask_cfg, 80, other)


def test_the_learning_rate_falls_after_ninety_and_ninety_five_percent():
    recipe = replace(mfd.RECIPE, epochs=1)
    steps = (0, 79_649, 79_650, 84_074, 84_075, 88_499)
    factors = [train.lr_factor(recipe, step, 88_500) for step in steps]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


# ---- From the command line

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
    """Checkpoint of a small DINO after one step."""
    out = tmp_path_factory.mktemp("runs") / "dino"
    run("--model", "dino", "--num_train", "8", "--epochs", "1", "--dim", "32", "--ffn_dim", "32",
        "--num_heads", "2", "--train_sizes", "64", "--eval_size", "64", "--num_queries", "12",
        "--out", str(out))
    return str(out / "best.pt")


MASKS = ("--model", "mask_frozen_detr", "--num_train", "12", "--train_sizes", "64", "--eval_size",
         "64", "--batch_size", "4", "--channel_dim", "32", "--roi_size", "8")


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
        m.setattr(train, "validate", killed)
        run(*MASKS, "--detector", trained, "--epochs", "2", "--out", str(tmp_path / "cut"))
    run(*MASKS[:2], "--out", str(tmp_path / "cut"), "--resume")
    complete = checkpoints.load(masks_folder / "last.pt")
    resumed = checkpoints.load(tmp_path / "cut" / "last.pt")
    assert complete["step"] == resumed["step"] == 6
    for part in ("model", "ema"):
        for key, value in complete[part].items():
            assert torch.equal(value, resumed[part][key]), key
    detector_parts = ("backbone", "encoder", "decoder")
    assert not any(key.startswith(detector_parts) for key in complete["model"])


def test_a_run_that_trains_its_detector_resumes_and_is_evaluated_without_the_detectors_file(
        tmp_path, monkeypatch, capsys):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    detector = tmp_path / "detector"
    run("--model", "h_detr", "--num_train", "8", "--epochs", "1", "--dim", "32", "--ffn_dim", "32",
        "--num_heads", "2", "--train_sizes", "64", "--eval_size", "64", "--num_queries", "12",
        "--out", str(detector))
    words = [*MASKS, "--detector", str(detector / "best.pt"), "--train_detector", "true",
             "--epochs", "2", "--out"]
    run(*words, str(tmp_path / "masks"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "validate", killed)
        run(*words, str(tmp_path / "cut"))
    start = checkpoints.load(detector / "best.pt")["model"]["level_embed"]
    (detector / "best.pt").unlink()
    again = [*MASKS[:2], "--out", str(tmp_path / "cut"), "--resume"]
    with pytest.raises(SystemExit, match="last.pt has trained its own: leave it out"):
        run(*again, "--detector", str(tmp_path / "masks" / "best.pt"))
    run(*again)
    complete = checkpoints.load(tmp_path / "masks" / "last.pt")
    resumed = checkpoints.load(tmp_path / "cut" / "last.pt")
    assert not torch.equal(complete["model"]["detector.level_embed"], start)
    for part in ("model", "ema"):
        for key, value in complete[part].items():
            assert torch.equal(value, resumed[part][key]), key

    path = str(tmp_path / "masks" / "best.pt")
    evaluation.main(["--checkpoint", path, "--device", "cpu"])
    assert "\nsegm" in capsys.readouterr().out
    shipped = tmp_path / "masks.safetensors"
    ship.ship(path, shipped)
    of_file = models.load_model(shipped).model.state_dict()
    for name, value in models.load_model(path).model.state_dict().items():
        assert torch.allclose(of_file[name].float(), value.float(), rtol=1e-3, atol=1e-6), name
    with pytest.raises(SystemExit, match="has trained its own: leave it out"):
        evaluation.main(["--checkpoint", path, "--device", "cpu", "--detector", path])


def test_a_checkpoint_is_evaluated_with_and_without_mask_scores_and_knows_its_detector(
        tmp_path, trained, masks_folder, capsys):
    log = (masks_folder / "log.jsonl").read_text()
    assert '"segm"' in log and '"segm_cls"' in log
    moved = tmp_path / "elsewhere.pt"
    moved.write_bytes(open(trained, "rb").read())
    words = ["--checkpoint", str(masks_folder / "best.pt"), "--device", "cpu"]
    evaluation.main([*words, "--detector", str(moved), "--max_dets", "150"])
    printed = capsys.readouterr().out
    assert all(f"\n{kind}" in printed for kind in ("bbox", "segm", "segm_cls"))
    assert "best 150 detections" in printed

    image = tmp_path / "scene.png"
    drawn = tmp_path / "drawn"
    scenes.Shapes("val", 1).image(0).save(image)
    evaluation.main([*words, "--images", str(image), "--out", str(drawn), "--score_threshold", "0"])
    assert (drawn / "scene.jpg").exists()
    assert "mask_score" in (drawn / "detections.json").read_text()

    state = checkpoints.load(trained)
    state["ema"]["level_embed"] += 1
    checkpoints.save(moved, state)
    with pytest.raises(SystemExit, match="expected the detector that these masks were trained on"):
        evaluation.main([*words, "--detector", str(moved)])
    with pytest.raises(SystemExit, match="no file: say where it lies with --detector"):
        evaluation.main([*words, "--detector", "nowhere.pt"])


def test_an_evaluation_of_more_detections_makes_as_many_masks(monkeypatch):
    """A limit above the 10 of the Config; the detector has 45 pairs of a query and a class."""
    cfg, masks, _ = network(top_k=10)
    rows = []
    figures = {"bbox": {"curves": {}}}
    monkeypatch.setattr(evaluation, "score_results",
                        lambda dataset, results, *args: rows.extend(results) or figures)
    dataset = scenes.Shapes("val", 2)
    for limit, expected in ((30, 30), (0, 45), (5, 10)):
        rows.clear()
        evaluation.evaluate(masks, detect, dataset, cfg, "cpu", max_dets=limit)
        figures["bbox"]["curves"] = {}
        count = {image_id: 0 for image_id in dataset.image_ids.tolist()}
        for row in rows:
            count[row["image_id"]] += "segmentation" in row
        assert set(count.values()) == {expected}, limit


def test_without_a_detector_the_error_says_how_to_get_one_before_any_image_is_made(
        tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build_datasets", lambda *args: pytest.fail("too late"))
    with pytest.raises(SystemExit, match="--detector FILE.*python train.py --model dino"):
        run(*MASKS, "--out", str(tmp_path / "masks"))


def test_a_mask_network_is_no_detector_and_classes_must_agree(tmp_path, trained, masks_folder):
    out = ("--out", str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="expected a detector, got"):
        run(*MASKS, "--detector", str(masks_folder / "best.pt"), *out)
    with pytest.raises(UserError, match="as many classes as the data, 3, got one with"):
        mfd.build(Config(), 3, models.load_detector(trained))
    state = checkpoints.load(trained)
    state["class_names"] = state["class_names"][::-1]
    checkpoints.save(tmp_path / "reversed.pt", state)
    with pytest.raises(SystemExit, match="expected a detector of the classes of the data"):
        run(*MASKS, "--detector", str(tmp_path / "reversed.pt"), *out)


def test_data_without_masks_is_refused(shared, tmp_path, trained):
    with pytest.raises(SystemExit, match="expected a segmentation for every object of bccd"):
        run(*MASKS[:2], "--data", str(shared / "data" / "bccd"), "--preset", "small",
            "--detector", trained, "--out", str(tmp_path / "masks"))
