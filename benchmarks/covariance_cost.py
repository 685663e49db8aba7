"""What second moments of five layers cost beside a plain forward pass over the same tokens.

    python benchmarks/covariance_cost.py                               # SmolLM2, 100,000 tokens, layers 7 to 11
    python benchmarks/covariance_cost.py --model tiny-llama --tokens 5000

Both read the same rows in the same batches, taking turns chunk by chunk, and CPU seconds are compared: the plain pass runs the whole model
without its head; ours stops at the last site and sums up k k^T of each. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import torch
from hydra import compose, initialize_config_dir

from editeval.build import build
from editeval.interfaces import ModelSource
from editeval.keyvalue.covariance import _batches, _chunk_sums, _chunks, token_pieces
from editeval.keyvalue.suffix import pad_rows
from editeval.models.model import LanguageModel

REPOSITORY = Path(__file__).resolve().parents[1]
LIMIT = 1.3


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the text both ways; ends with status 1 where ours costs more than LIMIT times the plain pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--layers", type=int, nargs="+", default=None, help="default: five, up to the published relative depth")
    options = parser.parse_args(arguments)
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = compose("config", overrides=[f"model={options.model}", f"corpus.tokens={options.tokens}"])
    lm = build(config.model, "model", ModelSource).load()
    last = round(17 / 48 * lm.description.num_layers)
    layers = options.layers or list(range(max(0, last - 4), last + 1))
    sites = [lm.sites.mlp_out.format(layer) for layer in layers]
    corpus = build(config.corpus, "corpus", object)
    pieces = token_pieces(lm.tokenizer, corpus.texts(), tokens=options.tokens, max_length=corpus.max_length)  # type: ignore[attr-defined]
    ours = plain = 0.0
    tokens = 0
    for number, chunk in enumerate(_chunks(pieces)):
        turns = ("ours", "plain") if number % 2 else ("plain", "ours")
        for turn in turns:
            start = time.process_time()
            if turn == "ours":
                _chunk_sums(lm, sites, chunk)
                ours += time.process_time() - start
            else:
                plain_pass(lm, chunk)
                plain += time.process_time() - start
        tokens += sum(map(len, chunk))
        print(f"  {tokens} tokens: ours {ours:.1f} s, plain {plain:.1f} s of CPU", file=sys.stderr, flush=True)
    ratio = ours / plain
    numbers = {"model": options.model, "layers": layers, "tokens": tokens, "threads": torch.get_num_threads()}
    print(json.dumps({**numbers, "ours_cpu_seconds": ours, "plain_cpu_seconds": plain, "ratio": ratio, "limit": LIMIT}))
    return 0 if ratio <= LIMIT else 1


def plain_pass(lm: LanguageModel, chunk: Sequence[tuple[int, ...]]) -> None:
    """Run the whole model, without its head, over the rows of a chunk."""
    device = lm.input_device
    with torch.no_grad():
        for batch in _batches(sorted(chunk, key=len)):
            lm.module.base_model(input_ids=pad_rows(batch, device), use_cache=False)


if __name__ == "__main__":
    sys.exit(main())
