"""Labels of a validation set: those of its training set."""
import itertools

import numpy as np

from engine.coco_json import Problem
from engine.errors import UserError
from engine.notices import one_line


def match_classes(dataset, class_names: list[str], category_ids: list[int] | None = None) -> None:
    """Give a data set the labels of its training set, matching the classes by name.

    class_names, category_ids: those of the training set; without ids (a checkpoint may have none)
    only names are compared. If ids differ or classes are missing, a warning is added to
    `dataset.problems`.

    Raises UserError if a class is unknown to the training set, or if two classes share a name.
    """
    if category_ids is None and dataset.class_names == class_names:
        return
    if (dataset.class_names, dataset.category_ids) == (class_names, category_ids):
        return
    where = f"{dataset.name}, {dataset.split}"
    unknown = [name for name in dataset.class_names if name not in class_names]
    if unknown:
        raise UserError(
            f"{where}: expected the training set's classes, got {one_line(unknown, 100)}, which it "
            "does not have; give the categories of both json files the same names")
    for names in (class_names, dataset.class_names):
        if len(set(names)) < len(names):
            raise UserError(
                f"{where}: category ids differ from the training set's and two classes share a "
                "name, so they cannot be matched; give every category a name of its own")

    # A class that only the training set has needs an id that no other class has here.
    own_ids = dict(zip(dataset.class_names, dataset.category_ids))
    free_ids = itertools.count(max(dataset.category_ids + (category_ids or [])) + 1)
    new_labels = np.array([class_names.index(name) for name in dataset.class_names])
    missing = [name for name in class_names if name not in own_ids]
    annotations = dataset.annotations
    dataset.annotations = annotations._replace(labels=new_labels[annotations.labels])
    dataset.class_names = class_names
    dataset.category_ids = [own_ids.get(name) for name in class_names]
    dataset.category_ids = [next(free_ids) if i is None else i for i in dataset.category_ids]
    kind = "classes of train and val differ"
    text = f"{where}: category ids differ from the training set's, classes are matched by name"
    if missing:
        text += f"; missing in this split: {one_line(missing, 100)}"
    dataset.problems = [*dataset.problems, Problem("warning", kind, text)]
