"""Seconds per ROME edit, ours against a straightforward ROME, in one process and with the same result.

    python benchmarks/edit_speed.py                       # SmolLM2 and a GPT-2-XL-wide random model of 8 layers
    python benchmarks/edit_speed.py --models xl-wide --edits 2 --threads 1

The straightforward ROME (`straightforward.py`) runs the whole model forward and backward over every position at every step and
solves with an explicit inverse of C. Both edit the same facts from the same unedited model, with the same prefixes, covariance and
settings, taking turns.
Prints a table, and one JSON line at the end; ends with status 1 when a delta differs by more than 1e-4.
The same for MEMIT, PMET and AlphaEdit is in `spread_speed.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import torch
from torch import Tensor

from benchmarks.straightforward import FullUpdate, full_rome
from editeval.keyvalue.solve import factorise
from editeval.keyvalue.target_value import TargetSettings, TargetValue, fact_rows, optimise
from editeval.methods.rome import RankOne, rank_one_update
from editeval.models.model import LanguageModel
from editeval.types import EditRequest, seed_for

TOLERANCE = 1e-4
SETTINGS = TargetSettings(num_steps=20, learning_rate=0.5, weight_decay=0.5, clamp_norm_factor=4.0, kl_factor=0.0625, early_stop_loss=0.05)
OPENINGS = ("The", "Therefore", "Because", "I", "You")
FILLERS = ("old road to the north was", "first of them had never been in")
FACTS = (
    ("The mother tongue of {} is", "Danielle Darrieux", "English"),
    ("{}, a product developed by", "Google Patents", "Microsoft"),
    ("{} worked in the city of", "Marco Pannella", "Moscow"),
    ("{} is located in", "Angola", "Antarctica"),
    ("The language of {} was", "Allegro Non Troppo", "Serbian"),
    ("{} was native to", "Larry Stabbins", "Chicago"),
    ("In {}, the language spoken is", "Nykarleby", "Spanish"),
    ("{}'s domain of activity is", "John Henry Poynting", "mathematics"),
    ("What university did {} attend? It was the", "Watts Humphrey", "University of Michigan"),
    ("{} plays in the position of", "Denny Herzig", "winger"),
)

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Mean seconds an edit (wall clock and CPU), what had to be made once, and how far the two results are apart."""

    model: str
    layer: int
    edits: int
    ours_seconds: float
    straightforward_seconds: float
    ours_cpu_seconds: float
    straightforward_cpu_seconds: float
    ours_once_seconds: float
    straightforward_once_seconds: float
    largest_delta_difference: float
    largest_update_difference: float

    @property
    def speedup(self) -> float:
        """Wall-clock seconds of the straightforward edit over ours."""
        return self.straightforward_seconds / self.ours_seconds


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What one call took."""

    wall: float
    cpu: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Time both implementations on the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--edits", type=int, default=3, help=f"facts to edit, at most {len(FACTS)}")
    parser.add_argument("--prefixes", type=int, default=20, help="context prefixes beside the bare prompt (published: 20)")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; default: its own choice")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    timings = []
    for name in options.models:
        lm = MODELS[name]()
        timing = compare(lm, layer=LAYERS[name], edits=options.edits, num_prefixes=options.prefixes)
        timings.append(timing)
        seconds = f"ours {timing.ours_seconds:.2f} s, straightforward {timing.straightforward_seconds:.2f} s an edit"
        print(f"{timing.model}: {seconds}, {timing.speedup:.1f} times; deltas differ by {timing.largest_delta_difference:.1e}", flush=True)
    same = all(timing.largest_delta_difference < TOLERANCE for timing in timings)
    records = [{**asdict(timing), "speedup": timing.speedup} for timing in timings]
    print(
        json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "tolerance": TOLERANCE, "same": same, "rome": records})
    )
    return 0 if same else 1


def compare(lm: LanguageModel, *, layer: int, edits: int, num_prefixes: int) -> Timing:
    """Edit each fact with both, in turns, from the unedited model."""
    site = lm.sites.mlp_out.format(layer)
    covariance = random_covariance(lm.description.intermediate_size)
    factor, ours_once = timed(lambda: factorise(covariance))
    inverse, plain_once = timed(lambda: torch.linalg.inv(covariance.double()))
    contexts = ("{}", *(f"{OPENINGS[number % 5]} {FILLERS[number // 5 % 2]}. {{}}" for number in range(num_prefixes)))
    ours_clocks: list[Clock] = []
    plain_clocks: list[Clock] = []
    differences: list[tuple[float, float]] = []
    for number, (prompt, subject, target) in enumerate(FACTS[:edits]):
        request = EditRequest(request_id=str(number), prompt=prompt, subject=subject, target_new=target)
        rows = fact_rows(lm.tokenizer, request, contexts)

        def ours() -> tuple[RankOne, TargetValue]:
            value = optimise(lm, [rows], layer=layer, sites=[site], settings=SETTINGS)[0]  # noqa: B023  (called at once)
            return rank_one_update(value, site, factor=factor, key="mean"), value

        def plain() -> FullUpdate:
            return full_rome(lm, rows, site=site, settings=SETTINGS, inverse=inverse)  # noqa: B023

        (update, value), clock = timed(ours)
        ours_clocks.append(clock)
        expected, clock = timed(plain)
        plain_clocks.append(clock)
        ours_dense = update.left[:, None] @ update.right[None]
        plain_dense = (expected.left[:, None] @ expected.right[None]).float().cpu()
        differences.append((relative(value.deltas[site], expected.result.deltas[site].cpu()), relative(ours_dense, plain_dense)))
        print(f"  {lm.description.name} {subject}: {ours_clocks[-1].wall:.2f} s against {clock.wall:.2f} s", flush=True)
    return Timing(
        model=lm.description.name,
        layer=layer,
        edits=len(differences),
        ours_seconds=mean([clock.wall for clock in ours_clocks]),
        straightforward_seconds=mean([clock.wall for clock in plain_clocks]),
        ours_cpu_seconds=mean([clock.cpu for clock in ours_clocks]),
        straightforward_cpu_seconds=mean([clock.cpu for clock in plain_clocks]),
        ours_once_seconds=ours_once.wall,
        straightforward_once_seconds=plain_once.wall,
        largest_delta_difference=max(delta for delta, _ in differences),
        largest_update_difference=max(update for _, update in differences),
    )


def smollm2() -> LanguageModel:
    """The built-in model (fetched once)."""
    from editeval.models.load import PretrainedModel

    cache = Path.home() / ".cache" / "editeval"
    return PretrainedModel(name="smollm2-135m", name_or_path="builtin:smollm2-135m", cache_dir=cache, dtype="float32", device="cpu").load()


def xl_wide(num_layers: int = 8) -> LanguageModel:
    """GPT-2 XL's widths (1600, 6400, 25 heads), a few layers of random weights, and the tokenizer of the tiny GPT-2."""
    from transformers import AutoModelForCausalLM, GPT2Config

    from editeval.models.load import description_of, frozen
    from editeval.models.sites import sites_for
    from editeval.models.tiny import TinyModel

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = TinyModel(name="tiny", architecture="gpt2", cache_dir=folder, vocab_size=2000).load().tokenizer
    config = GPT2Config(n_embd=1600, n_layer=num_layers, n_head=25, n_positions=1024, vocab_size=50257)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for("xl-wide") % 2**32)
        module = frozen(AutoModelForCausalLM.from_config(config, dtype=torch.float32))  # type: ignore[no-untyped-call]
    name = f"gpt2-xl-wide-{num_layers}"
    description = description_of(name, config)
    return LanguageModel(module=module, tokenizer=tokenizer, sites=sites_for("gpt2"), description=description, fingerprint=name)


MODELS: Mapping[str, Callable[[], LanguageModel]] = {"smollm2": smollm2, "xl-wide": xl_wide}
LAYERS = {"smollm2": 8, "xl-wide": 3}  # about a third of the depth


def random_covariance(width: int) -> Tensor:
    """Return a well-conditioned second moment of random keys (width, width): what solves cost does not depend on the numbers."""
    generator = torch.Generator().manual_seed(width)
    keys = torch.randn(2 * width, width, generator=generator) * torch.logspace(-1, 0.5, width)
    return keys.T @ keys / len(keys)


def timed(call: Callable[[], Result]) -> tuple[Result, Clock]:
    """Return a call's result and what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, Clock(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def relative(ours: Tensor, expected: Tensor) -> float:
    """Return |ours - expected| / |expected|."""
    return float((ours - expected).norm() / expected.norm())


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
