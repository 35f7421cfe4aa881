"""The source files of this repository, by module name."""
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("backbones", "engine", "heads", "tools")
PAPERS = ("detr", "deformable_detr", "dino", "h_detr", "co_detr", "mask_frozen_detr")


def module_name(path):
    """dino, backbones.resnet; a package is its __init__.py: backbones"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def python_files():
    """Module name -> path of every source file, without tests."""
    paths = list(ROOT.glob("*.py"))
    for package in PACKAGES:
        paths += (ROOT / package).glob("*.py")
    return {module_name(path): path for path in sorted(paths)}


def kernel_files():
    return [*ROOT.glob("*.cpp"), *ROOT.glob("*.cu")]


def files_of_tests():
    return [*(ROOT / "tests").glob("*.py"), *(ROOT / "tests").glob("*.h")]


MODULES = python_files()
