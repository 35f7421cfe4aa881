"""tools/real_data.py and tools/train_transformers.py: our models beside those of a package."""
import json
import random
from types import SimpleNamespace

import pytest
import torch
from coco_folders import write_folder

import train
from engine.errors import UserError
from tools import real_data, train_transformers
from tools.real_data import RealData, compare
from tools.train_transformers import Settings


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path):
    boxes = [(0, 1, (5, 6, 10, 8)), (0, 2, (20, 10, 10, 8)), (1, 2, (0, 0, 20, 30))]
    return write_folder(tmp_path / "data", images=((40, 30), (60, 40)), boxes=boxes,
                        categories=((1, "cat"), (2, "dog")))


def write_record(folder, ap, seconds, **settings):
    folder.mkdir(parents=True)
    sizes = dict.fromkeys(("AP", "AP50", "APs", "APm"), ap)
    steps = [{"kind": "step", "step": step, "train_seconds": step, "epoch": 0, "lr": 1e-4,
              "loss": 1.0, "losses": {"cls": 1.0}} for step in (1, 2)]
    record = {"kind": "eval", "epoch": 3, "step": 6, "train_seconds": seconds, "bbox": sizes}
    (folder / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (*steps, record)))
    (folder / "config.json").write_text(json.dumps({"run": settings}))


def test_the_table_compares_three_ways_and_gives_the_package_the_same_time(
        data, tmp_path, monkeypatch, capsys):
    options = RealData(data=data, out=tmp_path / "runs", epochs=3, seeds=1, train_sizes=(64,),
                       crop=True, vertical_flip=True, color_jitter=False)
    flags = {"model": "dino", "epochs": 3, "data": str(data), "preset": "small", "seed": 0,
             "num_queries": 100, "top_k": 100, "train_sizes": [64], "eval_size": 176,
             "max_size": 260, "crop": True, "vertical_flip": True, "color_jitter": False}
    # runs with other settings would be refused: each row has its own initial weights
    write_record(tmp_path / "runs/scratch_0", 0.4, 120, init="none", **flags)
    write_record(tmp_path / "runs/scenes_0", 0.5, 130, init="dino_small", **flags)
    monkeypatch.setattr(real_data, "evaluate_run", figures_of_the_log)
    called = []

    def run(command, cwd):
        called.append(command)
        write_record(tmp_path / "runs/transformers_0", 0.1, 120)
        log = tmp_path / "runs/transformers_0/log.jsonl"
        log.write_text(log.read_text().splitlines()[-1])           # its only record
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(real_data, "subprocess", SimpleNamespace(run=run))
    compare(options)
    words, = called
    assert words[words.index("--minutes") + 1] == "2.0"
    assert words[words.index("--size") + 1:][:2] == ["192", "256"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    assert [row[1] for row in cells] == ["0.400", "0.500", "0.100"]
    assert cells[1][3:6] == ["DINO, from scratch", "+0.100", "one seed"]
    assert [row[-1] for row in cells] == ["2.0", "2.2", "2.0"]
    assert (tmp_path / "runs/logs/transformers_0.jsonl").exists()


def figures_of_the_log(out, max_dets):
    last = (out / "log.jsonl").read_text().splitlines()[-1]
    return json.loads(last)["bbox"]


def test_our_runs_of_the_table_are_training_runs(data):
    """train.py knows every flag that the table gives it."""
    words = ["--data", str(data), "--preset", "small", "--num_queries", "9", "--top_k", "9",
             "--train_sizes", "64", "96", "--eval_size", "64", "--max_size", "128",
             "--init", "none"]
    run, cfg, recipe = train.parse(["--model", "dino", *words])
    assert run.init == "none" and cfg.num_queries == 9 and recipe.train_sizes == (64, 96)


def test_sizes_that_the_package_cannot_use_are_refused(data):
    with pytest.raises(UserError, match="multiples of 32"):
        compare(RealData(data=data, their_size=(176, 240)))


def test_mirrored_images_and_boxes_belong_together():
    image = torch.zeros(1, 3, 4, 8)
    image[0, :, 1, 2] = 1                                          # the pixel in column 2 of 8
    label = {"class_labels": torch.tensor([1]),
             "boxes": torch.tensor([[2.5 / 8, 1.5 / 4, 1 / 8, 1 / 4]])}
    seen = set()
    for seed in range(8):
        (pixels,), (found,) = train_transformers.mirror(image, [label], random.Random(seed))
        _, y, x = pixels.nonzero()[0].tolist()
        center = found["boxes"][0, :2] * torch.tensor([8, 4])
        assert center.tolist() == [x + 0.5, y + 0.5]
        seen.add(x)
    assert seen == {2, 5}
    assert label["boxes"][0, 0] == 2.5 / 8                         # the original is unchanged


def test_the_learning_rate_rises_and_falls_with_time():
    factors = [train_transformers.lr_factor(x) for x in (0, 0.02, 0.04, 0.5, 1)]
    assert factors[0] < factors[1] < factors[2] and factors[2] > 0.98
    assert factors[3] == pytest.approx(0.505) and factors[4] == pytest.approx(0.01)


def test_rt_detr_trains_for_the_time_it_is_given(data, tmp_path):
    pytest.importorskip("transformers")
    settings = Settings(data, tmp_path / "run", minutes=0.01, size=(64, 96), num_queries=10)
    threads = torch.get_num_threads()
    try:
        record = train_transformers.train(settings)
    finally:
        torch.set_num_threads(threads)
    assert record["step"] >= 1 and record["train_seconds"] >= 0.6
    assert 0 <= record["bbox"]["AP"] <= 1
    assert json.loads((tmp_path / "run/log.jsonl").read_text()) == record
