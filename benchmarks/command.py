"""The command line of scripts that take names of methods and, anywhere, settings as `launch.py` does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def with_overrides(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse `--methods` and `overrides`; a setting right behind the methods, which argparse takes for one more of them, is a setting."""
    options = parser.parse_intermixed_args(arguments)
    options.overrides += [word for word in options.methods if "=" in word]
    options.methods = [word for word in options.methods if "=" not in word]
    return options
