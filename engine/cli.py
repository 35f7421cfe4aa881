"""..."""
import argparse
import difflib
import re
import sys



class Flags(argparse.ArgumentParser):
    """A parser for which --max_dets and --max-dets are the same flag and abbreviations are unknown flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
            kind = "flag" if unknown[0].startswith("-") else "argument"
            self.error(f"unknown {kind} {unknown[0]}" + (f": did you mean {near[0]}?" if near else ": see --help"))
        return given

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in args]
        return super().parse_known_args(args, namespace)
