"""Seconds an edit and peak memory on the shape of a large model, with random weights: no download and no licence.

    python benchmarks/large_edits.py --data DIR                                  # llama2-7b, bfloat16, GPU: ROME and MEMIT, 20 facts
    python benchmarks/large_edits.py --device cpu --model pythia-160m --edits 2  # to see that it works

The model is built from its published config; the tokenizer is SmolLM2's, so the vocabulary is as large as that where it is
smaller. Methods have their settings for the model; second moments are of `--tokens` tokens. Facts are edited one after another,
each written into the weights. Beside the peak that was measured stands the one that `python -m editeval doctor` predicts. Prints a
table, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM

from benchmarks.speed_setup import facts, smollm2
from editeval.build import build
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod
from editeval.models.load import DTYPES, description_of, frozen
from editeval.models.model import LanguageModel
from editeval.models.shapes import published_config, weight_bytes
from editeval.models.sites import sites_for
from editeval.sweep.doctor import plan_of
from editeval.types import EditRequest, SilentProgress

REPOSITORY = Path(__file__).resolve().parents[1]
GIB = 1 << 30
COLUMNS = ("method", "facts", "s/edit, median", "first", "getting ready, s", "peak, GiB", "predicted, GiB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the model once, and edit it with each method from its unedited state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b")
    parser.add_argument("--methods", nargs="+", default=["rome", "memit"])
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=30_000, help="tokens that second moments are of")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", type=Path, default=None, help="a folder with counterfact/rome/test.jsonl; default: ten built-in facts")
    options = parser.parse_args(arguments)
    requests = facts(options.edits, options.data)
    model: EditedModel | None = None
    records = []
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for name in options.methods:
        settings = [f"model={options.model}", f"method={name}", f"corpus.tokens={options.tokens}", f"+model.device={options.device}"]
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            config = compose("config", overrides=settings)
        if model is None:
            model = EditedModel(random_model(config, options.device))
        with tempfile.TemporaryDirectory() as cache:
            records.append(measure(model, config, requests, Cache(Path(cache)), options.device))
        record = records[-1]
        cells = [record["facts"], *(f"{record[key]:.2f}" for key in ("seconds", "first", "once", "peak_gib", "predicted_gib"))]
        print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)
    print(json.dumps({"model": options.model, "device": _device_name(options.device), "torch": torch.__version__, "edits": records}))
    return 0


def random_model(config: DictConfig, device: str) -> LanguageModel:
    """Return a model of the published shape, its weights drawn on the device."""
    shape = published_config(config.model.name_or_path)
    assert shape is not None, config.model.name_or_path
    tokenizer = smollm2("cpu").tokenizer
    shape.vocab_size = max(shape.vocab_size, len(tokenizer))
    torch.manual_seed(0)
    with torch.device(device):
        module = frozen(AutoModelForCausalLM.from_config(shape, dtype=DTYPES[config.model.dtype]))  # type: ignore[no-untyped-call]
    description = description_of(config.model.name, shape)
    return LanguageModel(
        module=module, tokenizer=tokenizer, sites=sites_for(description.model_type), description=description, fingerprint="random"
    )


def measure(model: EditedModel, config: DictConfig, requests: Sequence[EditRequest], cache: Cache, device: str) -> dict[str, Any]:
    """Get the method ready, edit every fact, and return the figures."""
    method = build(config.method, "method", EditMethod)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    editor = method.prepare(model, cache, SilentProgress())
    once = time.perf_counter() - start
    seconds = []
    for request in requests:
        start = time.perf_counter()
        model.apply(editor.edit([request], seed=0))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    element = torch.empty(0, dtype=DTYPES[config.model.dtype]).element_size()
    plan = plan_of(config, method, model.lm.description, weight_bytes(model.lm.module.config, element_bytes=element))
    model.restore()
    return {
        "method": str(config.method.name),
        "facts": len(seconds),
        "seconds": median(seconds),
        "first": seconds[0],
        "all": [round(second, 3) for second in seconds],
        "once": once,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else 0.0,
        "predicted_gib": plan.device_bytes / GIB,
        "predicted": {name: round(size / GIB, 2) for name, size in plan.device.items()},
    }


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


if __name__ == "__main__":
    sys.exit(main())
