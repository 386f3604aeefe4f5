"""The SFT step against the same step without attention, norms, rotations and activations, in turns in one process.

    python tests/benchmarks/bare_step.py            hidden 512, 8 layers, 8 rows of 256 tokens; about two minutes
    python tests/benchmarks/bare_step.py --rounds 9 --rows 4 --length 512
    python tests/benchmarks/bare_step.py --smoke    toy size

What is left out is replaced by sums, so that every product with weights is still due, forward and backward: they
are counted. The ratio says what all else costs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import sys
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from harness.in_turns import against, in_turns, median
from harness.sft_step import SftStep, add_sizes, described, sized

from jaxalign.parallel import startup

# A file that an older tree lacks is passed over, so that this script times that tree too.
FILES = [f"jaxalign.models.{name}" for name in ("transformer", "mlp", "norm")]
MODULES = [importlib.import_module(name) for name in FILES if importlib.util.find_spec(name)]
REPLACED = {  # no two terms alike: of equal gradients the compiler would make one product where several are due
    "attention": lambda q, k, v, **options: q + 2 * k + 3 * v,
    "rms_norm": lambda x, scale, eps: x,
    "rotate": lambda x, cos, sin: x,
    "swiglu": lambda gate, up: gate + 2 * up,
}


@contextlib.contextmanager
def left_out():
    """Within it the model lacks what `REPLACED` names, in each of its files that has the name."""
    with contextlib.ExitStack() as stack:
        for name, term in REPLACED.items():
            holders = [module for module in MODULES if hasattr(module, name)]
            assert holders, f"no file of the model has {name}: look for its new name"
            for module in holders:
                stack.enter_context(mock.patch.object(module, name, term))
        yield


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_sizes(parser, layers=8, rows=8, rounds=7)
    return sized(parser.parse_args(), 128)


def made(args: argparse.Namespace) -> SftStep:
    """Llama's step, compiled, with every product that is due."""
    step = SftStep(described("llama", args), args.rows, args.length).compile()
    products = len(re.findall(r" = f32\[\d+,\d+\]\S* dot\(", step.program))
    due = 3 * (7 * args.layers + 1)  # each weight and the head: its own product and both of its derivative
    if products < due:
        raise AssertionError(f"the compiler has left out some of the products with weights: {products} of {due}")
    return step


def main() -> int:
    """Prints both times and their ratio."""
    args = parse()
    startup.start()  # as a run begins
    steps = {"whole": made(args)}
    with left_out():
        steps["bare"] = made(args)
    taken = in_turns(steps, args.rounds, warm=0 if args.smoke else 1)
    whole, bare = (median(taken[name]).wall for name in ("whole", "bare"))
    print(
        f"hidden {args.hidden}, {args.layers} layers, {args.rows} x {args.length} tokens: "
        f"{1000 * whole:.0f} ms a step, {1000 * bare:.0f} without attention, norms, rotations and activations: "
        f"{against(taken['whole'], taken['bare'])}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
