"""The data sets of a run: what training and validation share."""

import json

import pytest
import torch
from small_runs import coco_folder

from engine.datasets import build_datasets
from engine.errors import UserError
from engine.recipe import Recipe


def edit_val(folder, change):
    path = f"{folder}/annotations/instances_val2017.json"
    with open(path) as file:
        content = json.load(file)
    change(content)
    with open(path, "w") as file:
        json.dump(content, file)


def labels_of(dataset):
    targets = [dataset[i][1] for i in range(len(dataset))]
    return [dataset.class_names[label] for t in targets for label in t["labels"].tolist()]


def test_ids_that_differ_between_training_and_validation_are_matched_by_name(tmp_path):
    folder = coco_folder(tmp_path, images=2)
    train, val = build_datasets(folder, Recipe(train_sizes=(64,), eval_size=64), 0)
    assert labels_of(val) == ["cat", "dog"] and "by name" not in str(val.problems)

    def exchange(content):
        content["categories"] = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
        for row in content["annotations"]:
            row["category_id"] = {3: 7, 7: 3}[row["category_id"]]

    edit_val(folder, exchange)
    train, val = build_datasets(folder, Recipe(train_sizes=(64,), eval_size=64), 0)
    assert "classes are matched by name" in str(val.problems)
    assert val.class_names == train.class_names == ["dog", "cat"]
    assert labels_of(val) == ["cat", "dog"] and val.category_ids == [7, 3]
    truth = val.coco()
    assert {truth.cats[row["category_id"]]["name"] for row in truth.imgToAnns[1]} == {"cat"}
    assert torch.equal(val[0][1]["labels"], torch.tensor([1]))


def test_unknown_categories_in_validation_are_refused_at_the_start(tmp_path):
    folder = coco_folder(tmp_path, images=2)
    edit_val(folder, lambda content: content["categories"][0].update(name="bird"))
    with pytest.raises(UserError, match="expected the training set's classes, got .*bird"):
        build_datasets(folder, Recipe(train_sizes=(64,), eval_size=64), 0)


def test_fewer_categories_in_validation_are_no_fault(tmp_path):
    folder = coco_folder(tmp_path, images=2)

    def drop(content):
        content["categories"] = [{"id": 7, "name": "cat"}]
        content["annotations"] = [row for row in content["annotations"] if row["category_id"] == 7]

    edit_val(folder, drop)
    train, val = build_datasets(folder, Recipe(train_sizes=(64,), eval_size=64), 0)
    assert val.class_names == train.class_names and labels_of(val) == ["cat"]
    assert len(set(val.category_ids)) == 2
