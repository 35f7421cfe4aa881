"""Every setting has one declared range, checked before anything starts."""

import pytest
import torch

import dino
import train
from engine.errors import UserError
from engine.ranges import check_ranges
from engine.recipe import Recipe

WRONG = (
    """--num_val=0 --save_every=0 --eval_every=0 --eval_size=0 --top_k=-1 --accum=0 --batch_size=-1
--device=tpu --seed=-1 --lr=nan --lr=inf --lr=1e9 --weight_decay=1e9 --clip=nan --clip=-1 --dim=0
--epochs=0 --num_points=0 --dropout=1 --train_sizes=0 --lr_drops=2 --schedule=linear --dim=30
--encoder_layers=1000000000 --warmup=-1 --ema=1 --threads=-1 --workers=-2 --check_data= --data=
--init= --out=""".split()
)


@pytest.mark.parametrize("flag", WRONG)
def test_values_outside_their_range_end_in_one_line_that_names_the_flag(
    flag, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name = flag.split("=")[0]
    with pytest.raises(SystemExit, match=f"^train.py: error: .*{name}") as stopped:
        train.main(["--model", "dino", flag])
    assert "\n" not in stopped.value.code and not list(tmp_path.iterdir())


def test_a_number_of_threads_that_is_none_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(SystemExit, match="OMP_NUM_THREADS: expected a number, got 'many'"):
        train.main(["--device", "cpu", "--out", str(tmp_path / "run")])
    monkeypatch.setenv("OMP_NUM_THREADS", "1,2")  # one number a nesting level
    assert train.set_up_machine(train.Run(device="cpu")).threads == 1 == torch.get_num_threads()


def test_types_are_checked_too():
    check_ranges(train.Run(), dino.Config(), Recipe(lr=1, lr_drops=(1, 0.5)))
    for settings in (
        dino.Config(dim=64.0),
        dino.Config(look_forward_twice=1),
        train.Run(seed=True),
        Recipe(train_sizes=()),
        Recipe(train_sizes=("8",)),
        Recipe(lr="1"),
    ):
        with pytest.raises(UserError, match="to be of type"):
            check_ranges(settings)


def test_the_presets_and_variants_of_every_paper_are_within_the_ranges():
    for name in train.cli.paper_files():
        paper = train.load_paper(name)
        for preset in ("paper", "small"):
            for variant in ("", *paper.VARIANTS):
                values = train.cli.preset_values(paper, preset, variant)
                check_ranges(*train.cli.configure(paper, values))


@pytest.mark.parametrize("model, dim", [("dino", 48), ("deformable_detr", 16), ("co_detr", 32)])
def test_widths_that_group_normalization_cannot_divide_are_refused(model, dim):
    """32 groups; the auxiliary heads also meet maps of one token, where a channel is no group."""
    with pytest.raises(UserError, match=f"expected --dim .*got {dim}"):
        train.parse(["--model", model, "--preset=small", f"--dim={dim}", "--num_heads=2"])
    train.parse(["--model=detr", "--preset=small", "--dim=48", "--num_heads=2"])
