"""Runs of several processes: what they send each other, what they share, and what a loss of one of
them does to the others."""
import importlib
import json
import os
import pickle
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import eval as evaluation
import train
from coco_folders import POLYGON, edit_json, json_file, truncate, write_folder
from deformable_attn import KernelError, MSDeformAttn
from engine import checkpoints, coco_json, commands, layers, models
from engine import machine as machines
from engine.datasets import build_datasets
from engine.errors import UserError
from engine.machine import lost_peers, set_up_machine
from engine.recipe import Recipe
from engine.schedules import is_kept
from small_runs import FLAGS, at_step, cheap_runs, config, forked, run, same  # noqa: F401
from tiny_checkpoint import write_checkpoint

KILLED_PEER_SECONDS = 20     # within which the others end, on a busy machine


# ---- messages ------------------------------------------------------------------------------------

def count_messages(rank, folder, model):
    """Record the collective calls of every step of a run."""
    steps = []

    def counted(name, function):
        def call(*args, **kwargs):
            steps[-1].append(name)
            return function(*args, **kwargs)
        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast"):
            patch.setattr(dist, name, counted(name, getattr(dist, name)))
        original = train.set_lr
        patch.setattr(train, "set_lr", lambda *args: steps.append([]) or original(*args))
        steps.append([])     # of the beginning
        train.train(run(folder, model, num_train=12, max_steps=2), *config(model))
    (folder / f"{rank}.json").write_text(json.dumps(steps))


@pytest.mark.parametrize("model, more", [("dino", []), ("co_detr", ["all_reduce"])])
def test_a_step_sends_one_small_message_beside_gradients_and_batch_statistics(
        tmp_path, model, more):
    """The number of objects and the stop signal; Co-DETR's heads also average their counts.
    DistributedDataParallel sends gradients below the functions that are counted here."""
    assert forked(2, count_messages, tmp_path, model) == [0, 0]
    for rank in (0, 1):
        steps = json.loads((tmp_path / f"{rank}.json").read_text())
        assert steps[1] == ["all_gather", *more, "all_reduce"]      # the last: batch statistics


def skip_a_bad_step(rank, folder):
    """Rank 1 alone has a loss that is not finite."""
    paper = importlib.import_module("deformable_detr")
    build = paper.build

    def bad_build(*args):
        model, criterion = build(*args)
        calls = []

        def sometimes_bad(*inputs):
            losses = criterion(*inputs)
            calls.append(1)
            if rank == 1 and len(calls) == 2:
                losses["cls"] = losses["cls"].detach() / 0
            return losses
        return model, sometimes_bad

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "build", bad_build)
        settings = config("deformable_detr", epochs=1, lr=1e-4)
        train.train(run(folder, num_train=12), *settings)


def test_ranks_skip_a_step_together_when_one_of_them_has_a_bad_loss(tmp_path):
    assert forked(2, skip_a_bad_step, tmp_path) == [0, 0]
    lines = (tmp_path / "run" / "nan_report.jsonl").read_text().splitlines()
    report, = [json.loads(line) for line in lines]
    assert report["step"] == 2 and report["losses"] == ["cls"] and len(report["images"]) == 2
    state = checkpoints.load(tmp_path / "run" / "last.pt")
    assert state["step"] == 3 and state["progress"]["bad_steps"] == 0


# ---- processes of one node -----------------------------------------------------------------------

def test_threads_and_workers_share_the_cores_of_their_own_node(monkeypatch):
    monkeypatch.setattr(machines, "cores", lambda: 16)
    monkeypatch.setattr(commands, "cores", lambda: 16)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    for node, expected in (("2", (8, 2)), ("4", (4, 1))):
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", node)
        machine = set_up_machine(train.Run(device="cpu"))
        assert (machine.threads, machine.workers) == expected
        assert commands.default_workers() == 4
    torch.set_num_threads(threads)


def fetch_in_order(rank, folder):
    machine = set_up_machine(train.Run(device="cpu"))
    with machine.first_on_node():
        if rank == 0:
            time.sleep(0.5)
            (folder / "weights").write_text("complete")
        else:
            assert (folder / "weights").read_text() == "complete"
    try:
        with machine.first_on_node():
            if rank == 0:
                raise UserError("no network")
    except UserError:
        pass


def test_one_process_of_a_node_fetches_weights_before_the_others(tmp_path):
    """An error of the first one leaves nobody waiting."""
    assert forked(2, fetch_in_order, tmp_path, timeout=60) == [0, 0]


def start_and_record(rank, folder):
    """Which rank reads weights, and which examines the data."""
    def record(name):
        with open(folder / "events", "a") as file:
            file.write(f"{name} {rank}\n")

    with pytest.MonkeyPatch.context() as patch:
        weights = models.load_backbone_weights
        patch.setattr(models, "load_backbone_weights",
                      lambda *args: record("weights") or time.sleep(0.3 * (rank == 0))
                      or record("done") or weights(*args))
        check = train.check_data.quick_check
        patch.setattr(train.check_data, "quick_check",
                      lambda *args, **more: record("check") or check(*args, **more))
        train.train(run(folder, max_steps=1), *config("deformable_detr"))


def test_training_reads_weights_first_on_one_process_and_examines_data_on_it_alone(tmp_path):
    assert forked(2, start_and_record, tmp_path, timeout=60) == [0, 0]
    events = (tmp_path / "events").read_text().split("\n")[:-1]
    assert [e for e in events if "check" in e] == ["check 0", "check 0"]
    assert [e for e in events if "check" not in e] == ["weights 0", "done 0", "weights 1", "done 1"]


# ---- annotations are read once -------------------------------------------------------------------

def two_classes(folder, **fields):
    """A COCO-layout folder with three objects on two of three images."""
    box = (5, 6, 10, 8)
    objects = [(place, category, box, fields) for place, category in ((2, 7), (0, 3), (2, 3))]
    return write_folder(folder, ((40, 30), (30, 40), (40, 30)), objects, ((7, "cat"), (3, "dog")))


def contents(dataset):
    """What a data set holds, in plain types."""
    values = {}
    for name, value in vars(dataset).items():
        if name == "annotations":
            value = [(array.dtype, array.tolist()) for array in value]
        elif isinstance(value, (np.ndarray, torch.Tensor)):
            value = value.dtype, value.tolist()
        values[name] = value if name != "transform" else vars(value)
    return values


def record_readers(patch, rank, folder):
    """Write down who reads which json."""
    read_json = coco_json.read_json

    def read(path, *args):
        with open(folder / "readers", "a") as file:
            file.write(f"{rank} {os.path.basename(path)}\n")
        return read_json(path, *args)

    patch.setattr(coco_json, "read_json", read)
    patch.setattr(commands, "read_json", read)


def open_data(rank, folder, data):
    """Open the data of a training run and those of an evaluation."""
    set_up_machine(train.Run(device="cpu"))
    with pytest.MonkeyPatch.context() as patch:
        record_readers(patch, rank, folder)
        patch.setattr(commands, "fit_classes", lambda *args: None)
        train_set, val_set = build_datasets(data, Recipe(train_sizes=(64,)), 0, load_masks=True)
        assert all(part.unreadable.is_shared() for part in (train_set, val_set))
        paper = SimpleNamespace(NEEDS_MASKS=True)
        meta = {"class_names": train_set.class_names}
        detector = models.Loaded(None, paper, None, Recipe(eval_size=64), meta, None)
        _, listed = commands.with_data(detector, json=str(json_file(data, "val")))
    held = [contents(part) for part in (train_set, val_set, listed)]
    masks = [target["masks"].tolist() for _, target in (train_set[2], val_set[2], listed[2])]
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps((held, masks)))


def test_one_process_reads_the_annotations_and_all_have_the_same(tmp_path):
    """Each json once. Masks included, and the json of eval.py --json."""
    data = two_classes(tmp_path, segmentation=POLYGON)
    assert forked(2, open_data, tmp_path, data, timeout=60) == [0, 0]
    train_json, val_json = (json_file(data, split).name for split in ("train", "val"))
    readers = (tmp_path / "readers").read_text().splitlines()
    assert readers == [f"0 {train_json}"] + [f"0 {val_json}"] * 2
    first, second = (pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in (0, 1))
    assert first == second
    alone = build_datasets(data, Recipe(train_sizes=(64,)), 0, load_masks=True)
    assert [contents(part) for part in alone] == second[0][:2]
    assert alone[0][2][1]["masks"].tolist() == second[1][0]


def train_on(rank, folder, data):
    """Train, and write down the message of the end."""
    with pytest.MonkeyPatch.context() as patch:
        record_readers(patch, rank, folder)
        try:
            train.main([*FLAGS, "--model=deformable_detr", f"--data={data}",
                        f"--out={folder / 'run'}"])
        except SystemExit as error:
            (folder / f"{rank}.txt").write_text(str(error))
            os._exit(3)


def no_width(content):
    for row in content["annotations"]:
        row["bbox"][2] = 0


@pytest.mark.parametrize("damage, words", [
    (lambda data: truncate(json_file(data)), "expected JSON, got a file that cannot be parsed"),
    (lambda data: edit_json(data, lambda content: content.update(images=[])), "fatal problem"),
    (lambda data: edit_json(data, no_width), "expected at least one usable box")])
def test_unusable_annotations_end_all_processes_with_the_same_line(tmp_path, damage, words):
    data = two_classes(tmp_path)
    damage(data)
    assert forked(2, train_on, tmp_path, data, timeout=KILLED_PEER_SECONDS) == [3, 3]
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert first == second and "\n" not in first
    assert first.startswith("train.py: error:") and words in first
    assert not [line for line in (tmp_path / "readers").read_text().splitlines() if line[0] != "0"]


def die_reading(rank, folder, data):
    def killed(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coco_json, "read_json", killed)
            train.train(run(folder, data=str(data)), *config("deformable_detr"))
    train_on(rank, folder, data)


def test_the_others_end_with_the_reason_when_the_reader_is_killed(tmp_path):
    data = two_classes(tmp_path)
    codes = forked(2, die_reading, tmp_path, data, timeout=KILLED_PEER_SECONDS)
    assert codes == [-signal.SIGKILL, 3]
    text = (tmp_path / "1.txt").read_text()
    assert text.startswith("train.py: error: another process of this run has ended")
    assert "\n" not in text


def evaluate_with_a_killed_reader(rank, folder, data, checkpoint):
    """Evaluate, and write down the message of the end. Rank 0 is killed when it reads the json."""
    def killed(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_json, "read_json", killed)
        try:
            evaluation.main([f"--checkpoint={checkpoint}", f"--data={data}", "--device=cpu",
                             f"--out={folder / 'out'}"])
        except SystemExit as error:
            (folder / f"{rank}.txt").write_text(str(error))
            os._exit(3)


def test_an_evaluation_ends_with_the_reason_when_the_reader_is_killed(tmp_path):
    data = two_classes(tmp_path)
    args = tmp_path, data, write_checkpoint(tmp_path / "best.pt")
    codes = forked(2, evaluate_with_a_killed_reader, *args, timeout=KILLED_PEER_SECONDS)
    assert codes == [-signal.SIGKILL, 3]
    text = (tmp_path / "1.txt").read_text()
    assert text.startswith("eval.py: error: another process of this run has ended")
    assert text.endswith("Start the evaluation again") and "\n" not in text


# ---- a process that dies -------------------------------------------------------------------------

def train_until_killed(rank, world, folder, seconds):
    if rank == world - 1:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGKILL))
            train.train(run(folder, save_every=1), *settings_of(world))
    started = []
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, lambda: started.append(time.monotonic()))
        try:
            train.main([*FLAGS, "--model=deformable_detr", "--preset=paper",
                        f"--batch_size={world}", "--train_sizes=64,96", "--save_every=1",
                        f"--out={folder / 'run'}"])
        except SystemExit as error:
            (folder / f"{rank}.txt").write_text(str(error))
            assert time.monotonic() - started[0] < seconds
            os._exit(3)


def settings_of(world):
    """A batch of `world` images, of two sizes."""
    return config("deformable_detr", batch_size=world, train_sizes=(64, 96), epochs=2)


@pytest.mark.parametrize("world", (2, 4))
def test_processes_end_with_the_reason_when_one_is_killed_and_nothing_is_lost(tmp_path, world):
    args = world, tmp_path, KILLED_PEER_SECONDS
    codes = forked(world, train_until_killed, *args, timeout=120)
    assert codes == [3] * (world - 1) + [-signal.SIGKILL]
    for rank in range(world - 1):
        text = (tmp_path / f"{rank}.txt").read_text()
        assert text.startswith("train.py: error: another process of this run has ended")
        assert f"Continue with --resume --out {tmp_path / 'run'}" in text and "\n" not in text
    last = tmp_path / "run" / "last.pt"
    assert checkpoints.load(last)["step"] == 4

    def resume(rank):
        train.train(run(tmp_path, resume=str(last), max_steps=5), *settings_of(world))

    assert forked(world, resume, timeout=120) == [0] * world
    assert checkpoints.load(last)["step"] == 5


def test_other_errors_are_not_taken_for_a_lost_process():
    with pytest.raises(RuntimeError, match="^shapes do not fit$"):
        with lost_peers("Start again"):
            raise RuntimeError("shapes do not fit")


def train_with_flags(rank, folder, name, flags):
    settings = config("dino", dropout=0.0, train_sizes=(64, 96), backbone_norm="group",
                      denoising="none", batch_size=4)
    train.train(run(folder, "dino", name, max_steps=2, save_every=1, **flags), *settings)


def test_two_processes_recompute_in_two_micro_batches_of_varying_sizes(tmp_path):
    """Recomputing changes nothing; micro-batches of other images average their losses."""
    for name, flags in (("plain", dict(accum=2)), ("again", dict(accum=2, recompute=True))):
        assert forked(2, train_with_flags, tmp_path, name, flags, timeout=120) == [0, 0]
    plain = checkpoints.load(tmp_path / "plain" / "last.pt")
    again = checkpoints.load(tmp_path / "again" / "last.pt")
    assert plain["step"] == 2
    same(plain["model"], again["model"])


# ---- the end of a run, and what is kept ----------------------------------------------------------

def test_max_steps_ends_a_run_that_a_larger_number_continues(tmp_path, capsys):
    settings = config("deformable_detr")
    train.train(run(tmp_path, name="one"), *settings)
    train.train(run(tmp_path, name="two", max_steps=2), *settings)
    last = tmp_path / "two" / "last.pt"
    assert checkpoints.load(last)["step"] == 2
    assert "--max_steps: ended at step 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="--max_steps above 2"):
        train.train(run(tmp_path, name="two", resume=str(last), max_steps=2), *settings)
    train.train(run(tmp_path, name="two", resume=str(last)), *settings)
    one = checkpoints.load(tmp_path / "one" / "last.pt")
    same(one["model"], checkpoints.load(last)["model"])


def test_checkpoints_before_a_drop_and_of_every_n_epochs_are_kept(tmp_path):
    step = Recipe(epochs=12, lr_drop=11)
    drops = Recipe(epochs=10, schedule="drops", lr_drops=(0.5, 0.75))

    def kept(recipe, keep_every):
        return [e + 1 for e in range(recipe.epochs) if is_kept(keep_every, recipe, e, 100)]

    assert kept(step, 0) == [11] and kept(step, 4) == [4, 8, 11, 12]
    assert kept(drops, 0) == [5, 7]
    assert kept(Recipe(epochs=12, schedule="cosine"), 0) == []
    settings = config("deformable_detr", schedule="step", lr_drop=1)
    train.train(run(tmp_path), *settings)
    assert [p.name for p in sorted((tmp_path / "run").glob("epoch_*"))] == ["epoch_0001.pt"]
    before = tmp_path / "run" / "epoch_0001.pt"
    assert checkpoints.load(before)["step"] == 3
    end = checkpoints.load(tmp_path / "run" / "last.pt")
    train.train(run(tmp_path, resume=str(before)), *settings)
    same(end["model"], checkpoints.load(tmp_path / "run" / "last.pt")["model"])


# ---- memory of the GPU ---------------------------------------------------------------------------

def settings_before_torch():
    """Run train.py up to its import of torch."""
    lines = []
    for line in open(train.__file__):
        if line.startswith("import torch"):
            break
        lines.append(line)
    exec("".join(lines), {})


@pytest.mark.parametrize("name", ("", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
                                  "PYTORCH_HIP_ALLOC_CONF"))
def test_gpu_memory_is_in_segments_that_grow_unless_the_user_has_set_it(monkeypatch, name):
    """PyTorch reads the setting when it is imported, under another name in other versions."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    for other in names:
        monkeypatch.delenv(other, raising=False)
    expected = dict.fromkeys(names[:2], "expandable_segments:True")
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:128")
        expected = {name: "max_split_size_mb:128"}
    settings_before_torch()
    assert {other: os.environ[other] for other in names if other in os.environ} == expected


# ---- arithmetic ----------------------------------------------------------------------------------

def test_training_multiplies_in_tf32_on_a_gpu_only_and_evaluation_exactly(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    set_up_machine(train.Run(device="cpu", threads=1))
    assert chosen == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    set_up_machine(train.Run(device="cuda", amp=False, threads=1))
    assert chosen == ["high"]
    commands.join_processes("cpu")
    assert chosen == ["high", "highest"] and not torch.backends.cudnn.allow_tf32


def test_channels_last_is_refused_on_a_cpu_and_reorders_resnets_elsewhere():
    model, _ = importlib.import_module("deformable_detr").build(config("deformable_detr")[0], 3)
    with pytest.raises(UserError, match="expected a GPU with --channels_last"):
        layers.order_channels_last(model, torch.device("cpu"))
    images = torch.randn(2, 3, 64, 96)
    expected = model.backbone(images)
    layers.order_channels_last(model, SimpleNamespace(type="cuda"))
    assert model.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model.backbone(images), expected, rtol=1e-3, atol=1e-4)


def test_a_wrong_kernel_ends_training_and_evaluation_in_one_line(tmp_path, monkeypatch):
    def wrong(device):
        raise KernelError("the kernel is wrong here: error 1; go on without it by --impl torch")

    monkeypatch.setattr(layers, "verify_kernel", wrong)
    monkeypatch.setattr(MSDeformAttn, "impl", None)
    command = [*FLAGS, "--model=deformable_detr", "--epochs=1", f"--out={tmp_path / 'run'}"]
    message = "^train.py: error: the kernel is wrong here.*--impl torch$"
    with pytest.raises(SystemExit, match=message):
        train.main(command)
    train.main([*command, "--impl=torch"])
    assert MSDeformAttn.impl == "torch"
    command = ["--checkpoint", str(tmp_path / "run"), "--workers=0"]
    with pytest.raises(SystemExit, match="^eval.py: error: the kernel is wrong here"):
        evaluation.main(command)
    evaluation.main([*command, "--impl=torch"])
    with pytest.raises(SystemExit, match="--impl kernel or torch"):
        evaluation.main([*command, "--impl=fast"])
    with pytest.raises(SystemExit, match="--impl kernel or torch"):
        train.main([*FLAGS, "--model=deformable_detr", "--impl=fast"])


def test_an_impl_that_cannot_be_built_is_refused(monkeypatch):
    monkeypatch.setattr(layers, "verify_kernel", lambda device: False)
    monkeypatch.setattr(MSDeformAttn, "impl", None)
    layers.prepare_attention("", "cpu")
    with pytest.raises(UserError, match="got none that can be built here"):
        layers.prepare_attention("kernel", "cpu")
