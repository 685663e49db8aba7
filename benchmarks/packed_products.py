"""Float32 products: torch's own against packed copies of the matrix (`editeval/models/packed.py`), in one process, taking turns.

    python benchmarks/packed_products.py                 # matrices of SmolLM2-135M and of GPT-2 XL, 1 to 480 rows
    python benchmarks/packed_products.py --rows 7 42

CPU seconds of one thread, the median of several products. Prints GFLOP/s, and one JSON line. What packing a matrix takes is told too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import torch
from torch import nn

from editeval.models.packed import MOST_BYTES, PackedWeights

SHAPES = {"SmolLM2 up": (576, 1536), "SmolLM2 down": (1536, 576), "GPT-2 XL up": (1600, 6400), "GPT-2 XL head": (1600, 50257)}
ROWS = (1, 7, 42, 120, 480)
REPEATS = 9


def main(arguments: Sequence[str] | None = None) -> int:
    """Time both for each shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_grad_enabled(mode=False)
    records = []
    print("| matrix | rows | torch, GFLOP/s | packed, GFLOP/s | ratio | packing, ms |\n|---|---|---|---|---|---|")
    for name, (d_in, d_out) in SHAPES.items():
        linear = nn.Linear(d_in, d_out, bias=False).requires_grad_(requires_grad=False)
        weights = PackedWeights(most_bytes=MOST_BYTES)
        with weights.products([linear]):
            packing = seconds(lambda: linear(torch.zeros(1, d_in)))  # noqa: B023  (called at once)
        for rows in options.rows:
            states = torch.randn(rows, d_in)
            plain, packed = [], []
            for _ in range(REPEATS):
                plain.append(seconds(lambda: linear(states)))  # noqa: B023
                with weights.products([linear]):
                    linear(states)
                    packed.append(seconds(lambda: linear(states)))  # noqa: B023
            operations = 2e-9 * rows * d_in * d_out
            record = {
                "matrix": name,
                "rows": rows,
                "torch_gflops": operations / median(plain),
                "packed_gflops": operations / median(packed),
                "ratio": median(plain) / median(packed),
                "packing_ms": 1e3 * packing,
            }
            records.append(record)
            print("| " + " | ".join(value if isinstance(value, str) else f"{value:.3g}" for value in record.values()) + " |", flush=True)
    print(json.dumps({"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability(), "products": records}))
    return 0


def seconds(call: Callable[[], object]) -> float:
    """Return the CPU seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
