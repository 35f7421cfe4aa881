"""Released weights from the file to the figure: photos as the authors' evaluation sees them, classes by name, settings."""
import json

import numpy as np
import pytest
import torch

import checkpoints
import data
import deformable_detr
import eval as evaluation


@pytest.mark.parametrize("job, photo", [(0, 2), *(pytest.param(job, photo, marks=pytest.mark.slow)
                                                  for job, photo in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)))])
def test_a_photo_on_disk_becomes_the_authors_detections(golden, recipe, shared, tmp_path, job, photo):
    """Their file, our reader, resize and normalisation, their weights in their layout, our model and selection. In double
    precision: neighbouring proposals differ by less than single precision holds."""
    rec = golden("12_photos")
    made = json.loads(str(rec["meta_json"]))[job]
    shapes = [json.loads(str(shape)) for shape in rec[f"j{job}.key_shapes"]]
    weights = recipe.state_dict(zip(rec[f"j{job}.key_names"].tolist(), shapes), made["seed"], made["tied_heads"])
    torch.save({"model": {name: torch.from_numpy(value) for name, value in weights.items()}}, tmp_path / "released.pth")
    model, cfg, meta = checkpoints.load_model(tmp_path / "released.pth")
    assert meta["model_name"] == made["variant"]
    folder, name = made["files"][photo].split("/")
    dataset = data.CocoFolder(shared / "data" / "coco_mini", folder.removesuffix("2017"), data.eval_transform(cfg))
    index = dataset.files.tolist().index(name)
    expected = {key.split(".", 1)[1]: value for key, value in rec.items() if key.startswith(f"j{job}i{photo}.")}

    image, target = dataset[index]                                                 # (3, h, w)
    assert image.shape == tuple(expected["input_shape"]) and target["orig_size"].tolist() == expected["orig_hw"].tolist()
    np.testing.assert_allclose(image.mean((1, 2)), expected["input_mean"], atol=1e-6)
    np.testing.assert_allclose(image[:, ::image.shape[1] // 7, ::image.shape[2] // 9], expected["input_grid"], atol=1e-6)

    model.double().register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))
    (outputs, (target,)), = evaluation.predict(model, dataset, [index], "cpu")
    found, = deformable_detr.detect(outputs, target["orig_size"][None], cfg.top_k)
    assert len(found["scores"]) == len(expected["scores"])
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=0, atol=1e-5)
    assert found["labels"].tolist() == expected["labels"].tolist()
    np.testing.assert_allclose(found["boxes"], expected["boxes"], rtol=0, atol=0.01)
