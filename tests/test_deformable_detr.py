"""deformable_detr.py: the authors' recordings, then one test per claim of the paper."""
import copy
import sys
from dataclasses import replace

import pytest
import torch

from engine.recipe import override
from engine import models
from engine import authors_names
from engine import released
import deformable_detr
import recordings
from deformable_detr import (
    RECIPE, SMALL, VARIANTS, Config, Criterion, DeformableDETR, Memory, build, detect,
    encoder_proposals, encoder_references, param_groups, proposal_boxes, sine_embedding,
    sine_positions)
from recordings import (
    batch, close, config_fields, given_maps, narrow_resnet, overfit, randomize_heads, tensor)

FAMILY = {"plain": "deformable_detr", "single_scale": "deformable_detr",
          "refine": "deformable_detr_refine", "two_stage": "deformable_detr_two_stage",
          "dc5": "deformable_detr"}


@pytest.mark.parametrize("variant", ["plain", "single_scale", "refine", "two_stage"])
def test_tiny_models_equal_the_authors_forward_and_backward(golden, variant):
    rec = golden(f"08_tiny_deformable_{variant}")
    cfg = Config(**config_fields(rec))
    model = DeformableDETR(given_maps(rec), cfg, 11)
    recordings.check_model(rec, model, Criterion(cfg), FAMILY[variant], detect=detect)


@pytest.mark.parametrize("variant", ["refine", "dc5"])
def test_models_with_a_narrow_resnet_equal_the_authors(golden, variant):
    rec = golden(f"09_narrow_r50_deformable_{variant}")
    cfg = Config(**config_fields(rec))
    model = DeformableDETR(narrow_resnet(variant == "dc5"), cfg, 11)
    recordings.check_model(rec, model, Criterion(cfg), FAMILY[variant], detect=detect)


@pytest.mark.parametrize("variant", ["plain", "single_scale", "refine", "two_stage"])
def test_full_size_models_equal_the_authors(golden, recipe, monkeypatch, variant):
    rec = golden(f"10_full_deformable_{variant}")
    cfg = replace(Config(**config_fields(rec)), dropout=0.0)
    model, criterion = build(cfg, 91)
    # The recording has float32 positions, which matters where an image has only padding: there the
    # angles are half a million.
    monkeypatch.setattr(deformable_detr, "sine_positions", float32_positions)
    # float32 would rank nearly tied proposals differently.
    dtype = torch.float64 if variant == "two_stage" else torch.float32
    recordings.check_model(rec, model, criterion, FAMILY[variant], dtype, recipe, detect=detect)


def float32_positions(padding, dim, temperature, shift, dtype):
    return sine_positions(padding, dim, temperature, shift)


@pytest.mark.parametrize("variant, file, tensors, parameters", [
    ("", "r50", 561, 40_069_665),
    ("single_scale", "r50_single_scale", 549, 34_066_593),
    ("refine", "r50_refine", 597, 40_849_660),
    ("two_stage", "r50_refine_two_stage", 630, 41_181_529),
])
def test_released_checkpoints_map_one_to_one(shared, recipe, variant, file, tensors, parameters):
    keys = recipe.read_keys(shared / "golden" / f"keys_deformable_detr_{file}.txt")
    assert len(keys) == tensors
    with torch.device("meta"):
        model, _ = build(replace(Config(), **VARIANTS.get(variant, {})), 91)
        authors = {name: torch.empty(shape) for name, shape in keys}
    assert sum(p.numel() for p in model.parameters()) == parameters
    family, found = released.recognize(authors)
    ours = authors_names.from_authors(authors, family)
    recordings.check_names(ours, model, family, keys)


@pytest.mark.parametrize("variant, file", [
    ("plain", "r50"), ("refine", "r50_refine"), ("two_stage", "r50_refine_two_stage"),
    ("single_scale", "r50_single_scale")])
def test_a_fresh_model_is_initialized_as_the_authors_model(shared, variant, file):
    """Shape, mean, standard deviation and constancy of every parameter outside the backbone."""
    torch.manual_seed(0)
    model, _ = build(override(Config(), VARIANTS.get(variant, {})), 91)
    path = shared / "golden" / f"init_deformable_detr_{file}.txt"
    recordings.check_initialization(path, model, FAMILY[variant])


def test_sine_positions_equal_the_authors(golden):
    rec = golden("03_embeddings_and_boxes")
    mask = torch.as_tensor(rec["mask"])
    for nf in (16, 128):
        ours = sine_positions(mask, 2 * nf).transpose(1, 2).unflatten(2, mask.shape[1:])
        close(ours, rec[f"sine_deformable_nf{nf}"], 1e-4, f"{nf} features")


def test_proposal_embeddings_equal_the_authors(golden):
    rec = golden("03_embeddings_and_boxes")
    boxes = tensor(rec["proposal_logits"]).sigmoid()
    for nf in (16, 128):
        if f"deformable_proposal_embed_nf{nf}" in rec:
            ours = sine_embedding(boxes, nf).flatten(2)
            close(ours, rec[f"deformable_proposal_embed_nf{nf}"], 1e-5, f"{nf} features")
    embedded = sine_embedding(torch.tensor([0.25, 0.5, 0.1, 0.2]), 128).flatten()
    expected = {0: 1, 1: 0, 2: 0.977918, 3: 0.208991, 128: 0, 129: -1, 256: 0.587785,
                384: 0.951057, 385: 0.309017}
    assert all(abs(float(embedded[i]) - v) < 1e-5 for i, v in expected.items())


@pytest.mark.parametrize("case", "abc")
def test_references_and_proposals_equal_the_authors(golden, case):
    cases = golden("04_reference_points_and_proposals")
    rec = {key[2:]: value for key, value in cases.items() if key.startswith(f"{case}_")}
    memory = Memory(
        tokens=tensor(rec["memory"]), positions=None,
        padding=torch.as_tensor(rec["padding_mask_flat"]),
        shapes=[tuple(shape) for shape in rec["shapes"].tolist()],
        valid_ratios=tensor(rec["valid_ratios"]), features=[], image_sizes=None, padded_size=None)
    close(encoder_references(memory), rec["reference_points"], 1e-5, "references")
    tokens, proposals = encoder_proposals(memory)
    close(tokens, rec["output_memory"], 0, "tokens")
    expected = torch.as_tensor(rec["output_proposals"])
    assert torch.equal(proposals.isinf(), expected.isinf())
    finite = ~expected.isinf()
    close(proposals[finite], expected[finite].numpy(), 1e-4, "proposals")


def test_detections_equal_the_authors(golden):
    rec = golden("11_postprocess")
    outputs = {"pred_logits": tensor(rec["logits"]), "pred_boxes": tensor(rec["boxes"])}
    for model, k in (("deformable_detr", 100), ("h_detr", 100), ("dino", 300)):
        found = detect(outputs, tensor(rec["image_sizes_hw"]), Config(top_k=k))
        for name, tolerance in (("scores", 1e-6), ("labels", 0), ("boxes", 1e-3)):
            ours = torch.stack([image[name] for image in found])
            close(ours, rec[f"{model}_{name}"], tolerance, f"{model} {name}")


# ------------------------------------------------------------------------ claims and corner cases

def small(**changes):
    """A two-layer model of width 32 on the tiny backbone; forward and backward in milliseconds."""
    torch.manual_seed(0)
    tiny = dict(dim=32, ffn_dim=48, decoder_layers=2, num_queries=9)
    cfg = override(Config(), {**SMALL, **tiny, **changes})
    return (cfg, *build(cfg, 5))


ALL = {"plain": {}, **VARIANTS}


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("objects", [(3, 0), (0, 0), (14, 1)])
def test_every_parameter_gets_a_finite_gradient(variant, objects):
    cfg, model, criterion = small(**ALL[variant])
    images, padding, targets = batch((64, 96), (48, 64), objects=objects)
    losses = criterion(model(images, padding), targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    layers = {name.rsplit(".", 1)[0] for name in losses if "." in name}
    assert layers == ({"aux0", "enc"} if cfg.two_stage else {"aux0"})


@pytest.mark.parametrize("variant", ["plain", "refine", "two_stage"])
def test_it_overfits_four_scenes(variant):
    cfg, model, criterion = small(**ALL[variant])
    groups = param_groups(model, override(RECIPE, SMALL))
    totals = [sum(losses.values()) for losses in overfit(model, criterion, groups)]
    assert totals[-1] < totals[0] / 2


@pytest.mark.parametrize("variant", ALL)
def test_content_of_padding_changes_nothing_in_the_encoder(variant):
    _, model, _ = small(**ALL[variant])
    memory = model.eval().encode(*batch((64, 96), (40, 64))[:2])
    references = encoder_references(memory)
    disturbed = memory._replace(tokens=memory.tokens.masked_fill(memory.padding[..., None], 9.0))
    for layer in model.encoder:
        memory, disturbed = (m._replace(tokens=layer(m, references)) for m in (memory, disturbed))
    valid = ~memory.padding
    assert memory.padding.any() and torch.equal(memory.tokens[valid], disturbed.tokens[valid])


@pytest.mark.parametrize("divisor, same", [(32, True), (1, False)])
def test_small_images_have_the_same_valid_cells_alone_and_beside_others(divisor, same):
    """Otherwise a model trained on batches misplaces boxes in single images: on a map of four rows
    one row is a quarter."""
    _, model, _ = small(size_divisor=divisor)
    images, padding, _ = batch((107, 123), (85, 90))
    together = model.encode(images, padding)
    alone = model.encode(images[1:, :, :85, :90], padding[1:, :85, :90])
    cells = []
    for memory in (together, alone):
        cells.append(memory.valid_ratios[-1] * torch.tensor(memory.shapes).flip(-1))   # (L, 2) x, y
    assert torch.allclose(*cells) == same


def test_padding_an_image_further_hardly_moves_its_boxes():
    _, model, _ = small(**VARIANTS["refine"])
    model.eval()
    randomize_heads(model)
    images, padding, _ = batch((256, 320), objects=(0,))
    wider = torch.zeros(1, 3, 288, 352)
    wider[..., :256, :320] = images
    mask = torch.ones(1, 288, 352, dtype=torch.bool)
    mask[:, :256, :320] = False
    alone, padded = model(images, padding), model(wider, mask)
    assert (alone["pred_boxes"] - padded["pred_boxes"]).abs().max() < 1e-2
    sizes = torch.tensor([[256, 320]])
    best = detect(alone, sizes, Config(top_k=1))[0]
    still = detect(padded, sizes, Config(top_k=1))[0]
    assert best["labels"] == still["labels"] and best["query"] == still["query"]


@pytest.mark.parametrize("variant", ALL)
def test_under_autocast_boxes_keep_float32_from_reference_to_detection(variant):
    """In bfloat16 a coordinate near 1 is rounded to 1/256: 5 pixels of 1333."""
    _, model, _ = small(**ALL[variant])
    images, padding, _ = batch((64, 96))
    with torch.autocast("cpu", torch.bfloat16):
        out = model.eval()(images, padding)
    found = detect(out, torch.tensor([[64, 96]]), Config(top_k=3))[0]
    dtypes = {out["anchors"].dtype, out["pred_boxes"].dtype, found["boxes"].dtype}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("variant", ["plain", "refine"])
def test_under_autocast_reference_points_are_those_of_float32(variant):
    """So training in bfloat16 and evaluation in float32 use the same points."""
    _, model, _ = small(**ALL[variant])
    images, padding, _ = batch((64, 96))
    with torch.autocast("cpu", torch.bfloat16):
        half = model.eval()(images, padding)
    assert torch.equal(half["anchors"], model(images, padding)["anchors"])


@pytest.mark.parametrize("variant", ALL)
def test_under_autocast_class_and_box_heads_run_in_float32(variant):
    """In bfloat16 the logits of many tokens take few different values, so that ties decide which
    proposals become queries."""
    _, model, _ = small(**ALL[variant])
    randomize_heads(model)
    dtypes = set()
    for head in {id(head): head for head in (*model.class_embed, *model.bbox_embed)}.values():
        head.register_forward_hook(lambda _, inputs, output: dtypes.add(output.dtype))
    images, padding, _ = batch((64, 96))
    with torch.autocast("cpu", torch.bfloat16):
        out = model.eval()(images, padding)
    assert dtypes == {torch.float32}
    logits = out.get("enc_outputs", out)["pred_logits"]
    usable = logits[logits != logits[0, 0]] if variant == "two_stage" else logits
    assert len(usable.unique()) > 0.95 * usable.numel()


def test_first_boxes_are_a_point_and_a_fixed_size():
    """A.3: at the start width and height are sigmoid(-2) in every layer, and the center is the
    reference point."""
    _, model, _ = small()
    out = model(*batch((64, 96), (48, 64))[:2])
    for layer in out["aux_outputs"] + [out]:
        assert torch.allclose(layer["pred_boxes"][..., 2:], torch.tensor(0.119203), atol=1e-5)
        assert torch.allclose(layer["pred_boxes"][..., :2], out["anchors"], atol=1e-5)


def test_first_class_probabilities_are_a_hundredth():
    _, model, _ = small()
    p = model(*batch((64, 96))[:2])["pred_logits"].sigmoid().mean()
    assert 0.008 < p < 0.015


def test_refinement_trains_each_box_head_by_its_own_layer_only():
    """Section 4.2: references are detached between layers, so the loss of layer d never reaches
    head d - 1."""
    _, model, _ = small(**VARIANTS["refine"])
    out = model(*batch((64, 96))[:2])
    out["pred_boxes"].sum().backward()
    assert model.bbox_embed[0].layers[-1].bias.grad is None
    assert model.bbox_embed[1].layers[-1].bias.grad.abs().sum() > 0


def test_the_loss_of_the_first_layer_trains_the_reference_point():
    """The authors' code; A.4 would stop the gradient at the inverse sigmoid."""
    _, model, _ = small(**VARIANTS["refine"])
    out = model(*batch((64, 96))[:2])
    out["aux_outputs"][0]["pred_boxes"].sum().backward()
    assert model.reference_points.bias.grad.abs().sum() > 0


def test_five_levels_are_three_backbone_maps_and_two_coarser_ones():
    """As the authors take them; DINO's fifth level is C2."""
    with torch.device("meta"):
        model, _ = build(Config(num_feature_levels=5), 91)
    convolutions = [projection[0] for projection in model.input_proj]
    assert [conv.in_channels for conv in convolutions] == [512, 1024, 2048, 2048, 256]
    assert [conv.stride[0] for conv in convolutions] == [1, 1, 1, 2, 2]
    _, model, criterion = small(num_feature_levels=5)
    images, padding, targets = batch((128, 192), (96, 128))
    out = model(images, padding)
    assert out["memory"].shapes == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert sum(criterion(out, targets).values()).isfinite()


def test_without_refinement_all_layers_share_their_heads():
    _, model, _ = small()
    assert len({id(h) for h in model.bbox_embed}) == len({id(h) for h in model.class_embed}) == 1


def test_two_stage_ranks_proposals_by_the_first_class_column_only():
    cfg, model, _ = small(**VARIANTS["two_stage"])
    model.eval()
    images, padding, _ = batch((64, 96), (48, 64))
    memory = model.encode(images, padding)
    before = model.propose(memory)[0].reference
    head = model.class_embed[-1]
    head.weight.data[1:] = head.weight.data[1:].flip(0) + 3.0
    assert torch.equal(before, model.propose(memory)[0].reference)
    head.weight.data[0] = -head.weight.data[0]
    assert not torch.equal(before, model.propose(memory)[0].reference)


def test_the_encoder_loss_does_not_see_labels():
    cfg, model, criterion = small(**VARIANTS["two_stage"])
    images, padding, targets = batch((64, 96), (48, 64))
    out = model(images, padding)
    relabelled = [{**t, "labels": (t["labels"] + 1) % 5} for t in targets]
    a, b = criterion(out, targets), criterion(out, relabelled)
    assert all(a[k] == b[k] for k in a if k.startswith("enc.")) and a["cls"] != b["cls"]


def test_two_stage_starts_from_its_proposals():
    """At the start every head adds nothing: the boxes are the proposals, whose size doubles from
    level to level."""
    _, model, _ = small(**VARIANTS["two_stage"])
    out = model(*batch((64, 96))[:2])
    boxes, usable = proposal_boxes(out["memory"])
    assert torch.allclose(out["enc_outputs"]["pred_boxes"][usable], boxes[usable], atol=1e-5)
    assert torch.all(out["enc_outputs"]["pred_boxes"][~usable] == 1)
    sizes = [float(level[0, 0, -1]) for level in out["memory"].by_level(boxes)]
    assert sizes == pytest.approx([0.05, 0.1, 0.2])


@pytest.mark.parametrize("size", [(16, 16), (8, 200), (33, 65)])
def test_tiny_and_thin_images(size):
    for variant in ("plain", "two_stage"):
        options = dict(num_queries=300, dim=64, backbone_norm="group", **ALL[variant])
        cfg, model, criterion = small(**options)
        images, padding, targets = batch(size, objects=(2,))
        out = model(images, padding)
        assert sum(criterion(out, targets).values()).isfinite()
        found = detect(out, torch.tensor([size]), Config(top_k=10_000))[0]
        assert len(found["scores"]) == out["pred_logits"].numel()


def test_two_stage_needs_refinement():
    with pytest.raises(ValueError, match="with_box_refine"):
        small(two_stage=True)


def test_learning_rates_come_in_three_groups():
    cfg = Config()
    with torch.device("meta"):
        model, _ = build(cfg, 91)
    rest, backbone, slow = param_groups(model, RECIPE)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in backbone["params"]} == {"backbone"}
    kinds = ("sampling_offsets", "reference_points")
    assert all(any(kind in names[id(p)] for kind in kinds) for p in slow["params"])
    assert len(slow["params"]) == 2 * 12 + 2
    trainable = sum(p.numel() for g in (rest, backbone, slow) for p in g["params"])
    assert trainable == 40_069_665 - 222_400   # stem and first stage are frozen
    assert [g["lr"] for g in (rest, backbone, slow)] == [2e-4, 2e-5, 2e-5]


def test_detections_equal_a_sort():
    outputs = {"pred_logits": torch.randn(1, 4, 3), "pred_boxes": torch.rand(1, 4, 4)}
    found = detect(outputs, torch.tensor([[10, 20]]), Config(top_k=5))[0]
    flat = sorted(((float(s), q, k) for q, row in enumerate(outputs["pred_logits"][0].sigmoid())
                   for k, s in enumerate(row)), reverse=True)[:5]
    pairs = list(zip(found["query"].tolist(), found["labels"].tolist()))
    assert [(q, k) for _, q, k in flat] == pairs
    cx, cy, w, h = outputs["pred_boxes"][0, flat[0][1]]
    corners = [(cx - w / 2) * 20, (cy - h / 2) * 10, (cx + w / 2) * 20, (cy + h / 2) * 10]
    assert torch.allclose(found["boxes"][0], torch.stack(corners))


def test_dropout_acts_only_in_training():
    _, model, _ = small(dropout=0.5)
    images, padding, _ = batch((64, 64), objects=(0,))
    for training in (False, True):
        model.train(training)
        first, second = (model(images, padding)["pred_logits"] for _ in range(2))
        assert torch.equal(first, second) != training


def test_a_copy_of_the_file_is_a_model(tmp_path):
    """`cp deformable_detr.py mine.py` gives a paper file of one's own."""
    paper = sys.modules["deformable_detr"]
    for name in ("Config", "RECIPE", "build", "detect", "param_groups"):
        assert hasattr(paper, name)
    assert copy.deepcopy(Config()) == Config()


@pytest.mark.parametrize("variant", ["plain", "single_scale", "refine", "two_stage"])
def test_files_of_transformers_give_the_same_boxes_here(tmp_path, variant):
    """An independent implementation: random weights, two images of different size in one batch. Its
    file as it saves it, with a config.json that has the number of heads and queries and the class
    names, and its state dict as a .bin."""
    peer = pytest.importorskip("transformers")
    options = ALL[variant]
    maps = ["stage4"] if variant == "single_scale" else ["stage2", "stage3", "stage4"]
    stages = peer.ResNetConfig(embedding_size=64, hidden_sizes=[256, 512, 1024, 2048],
                               depths=[3, 4, 6, 3], out_features=maps)
    torch.manual_seed(0)
    theirs = peer.DeformableDetrForObjectDetection(peer.DeformableDetrConfig(
        use_timm_backbone=False, backbone_config=stages, num_queries=20,
        two_stage_num_proposals=20, d_model=64, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
        decoder_ffn_dim=96, id2label=dict(enumerate("abcdefg")), disable_custom_kernels=True,
        **options)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, p in theirs.named_parameters():
        if "backbone" not in name:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    for name, b in theirs.named_buffers():
        if "running" in name:
            b.data.uniform_(0.5, 1.5, generator=generator)
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ours, _, cfg, _, meta, _ = models.load_model(tmp_path / "model.safetensors")
    assert (cfg.num_heads, cfg.num_queries, "".join(meta["class_names"])) == (4, 20, "abcdefg")
    same, *_ = models.load_model(tmp_path / "pytorch_model.bin")
    for a, b in zip(ours.state_dict().values(), same.state_dict().values()):
        assert torch.equal(a, b)
    images, padding, _ = batch((96, 128), (64, 88), objects=())
    with torch.no_grad():
        expected = theirs(pixel_values=images, pixel_mask=(~padding).long())
        got = ours(images, padding)
    assert torch.allclose(got["pred_logits"], expected.logits, atol=1e-5)
    assert torch.allclose(got["pred_boxes"], expected.pred_boxes, atol=1e-5)
