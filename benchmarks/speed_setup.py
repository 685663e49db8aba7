"""What `edit_speed.py` measures on: models, facts, context prefixes, covariances, and a clock."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from editeval.build import build
from editeval.datasets.counterfact import CounterFact
from editeval.keyvalue.inverse import CovarianceInverse
from editeval.keyvalue.null_space import NullSpace
from editeval.keyvalue.solve import CholeskyFactor, factorise
from editeval.models.model import LanguageModel
from editeval.types import EditRequest, seed_for

REPOSITORY = Path(__file__).resolve().parents[1]
KN_STEPS = 20  # published
NUM_LAYERS = 5  # edited by the methods that spread, up to a third of the depth
OPENINGS = ("The", "Therefore", "Because", "I", "You")
SHORT = ("old road went north", "first of them left")
LONG = ("old road to the north of the town was closed", "first of them had never been in the other house")
BUILT_IN = (
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
Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """A model, and what methods that solve with a covariance keep of it, made when the first of them asks.

    The one covariance stands for every layer's, and so does the projection: what solves cost does not depend on the numbers.
    `tuned` is the model of conf/model whose pairs in conf/tuned the methods take that locate; None: what was published for GPT-2 XL, at a
    third of the depth.
    """

    lm: LanguageModel
    tuned: str | None = None
    kn_steps: int = KN_STEPS

    @property
    def device(self) -> torch.device:
        """Where the model lies, and the matrices as wide as its keys."""
        return self.lm.input_device

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers of the methods that spread, the one at a third of the depth last."""
        last = round(self.lm.description.num_layers / 3)
        return tuple(range(max(0, last - NUM_LAYERS + 1), last + 1))

    @cached_property
    def covariance(self) -> Tensor:
        """A matrix as wide as the keys."""
        return random_covariance(self.lm.description.intermediate_size).to(self.device)

    @cached_property
    def factor(self) -> tuple[CholeskyFactor, float]:
        """The covariance's factor, and the CPU seconds it took: once a layer."""
        covariance = self.covariance
        return timed(lambda: factorise(covariance))

    @cached_property
    def inverse(self) -> tuple[CovarianceInverse, float]:
        """The inverse made of the factor, and the CPU seconds it took: once a layer."""
        factor, _ = self.factor
        return timed(lambda: CovarianceInverse(matrix=factor.inverse()))

    @cached_property
    def space(self) -> NullSpace:
        """What AlphaEdit projects onto."""
        return random_null_space(self.lm.description.intermediate_size, self.device)


def configured(method: str, kind: type[Kind], *overrides: str, model: str = "tiny-gpt2") -> Kind:
    """Return a method with the numbers of its file in conf/method, and of its pair with the model in conf/tuned where there is one."""
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = compose("config", overrides=[f"model={model}", f"method={method}", *overrides])
    return build(config.method, "method", kind)


def smollm2(device: str) -> LanguageModel:
    """The built-in model (fetched once)."""
    from editeval.models.load import PretrainedModel

    cache = Path.home() / ".cache" / "editeval"
    return PretrainedModel(name="smollm2-135m", name_or_path="builtin:smollm2-135m", cache_dir=cache, dtype="float32", device=device).load()


def xl_wide(device: str) -> LanguageModel:
    """GPT-2 XL's widths (1600, 6400, 25 heads) and vocabulary, 12 layers of random weights.

    The tokenizer is SmolLM2's, which cuts English about as finely as GPT-2's and fits into its vocabulary.
    """
    from transformers import AutoModelForCausalLM, GPT2Config

    from editeval.models.load import description_of, frozen
    from editeval.models.sites import sites_for

    config = GPT2Config(n_embd=1600, n_layer=12, n_head=25, n_positions=1024, vocab_size=50257)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for("xl-wide") % 2**32)
        module = frozen(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).to(device)  # type: ignore[no-untyped-call]
    name = "gpt2-xl-wide"
    description = description_of(name, config)
    tokenizer = smollm2("cpu").tokenizer
    return LanguageModel(module=module, tokenizer=tokenizer, sites=sites_for("gpt2"), description=description, fingerprint=name)


def tiny(device: str) -> LanguageModel:
    """Four layers of width 64: to see that the script works."""
    from editeval.models.tiny import TinyModel

    with tempfile.TemporaryDirectory() as folder:
        return TinyModel(name="tiny-gpt2", architecture="gpt2", cache_dir=folder, device=device).load()


MODELS: Mapping[str, Callable[[str], LanguageModel]] = {"smollm2": smollm2, "xl-wide": xl_wide, "tiny": tiny}
TUNED: Mapping[str, str] = {"smollm2": "smollm2-135m"}


def facts(number: int, data: Path | None) -> list[EditRequest]:
    """Return CounterFact rows from `<data>/counterfact/rome/test.jsonl`, or without a folder some that are built in."""
    if data is not None:
        return list(CounterFact(name="counterfact", subset="rome", split="test", data=str(data)).load()[:number])
    rows = BUILT_IN[:number]
    return [EditRequest(request_id=f"built-in/{i}", prompt=row[0], subject=row[1], target_new=row[2]) for i, row in enumerate(rows)]


def prefixes(long: int, short: int = 0) -> tuple[str, ...]:
    """Return the bare prefix, and as many of about ten and five tokens."""
    texts = [(SHORT, short), (LONG, long)]
    return ("{}", *(f"{OPENINGS[i % 5]} {fillers[i // 5 % 2]}. {{}}" for fillers, count in texts for i in range(count)))


def random_covariance(width: int) -> Tensor:
    """Return a well-conditioned symmetric matrix (width, width) in place of a second moment of keys."""
    generator = torch.Generator().manual_seed(width)
    keys = torch.randn(256, width, generator=generator)
    return keys.T @ keys / len(keys) + torch.diag(torch.logspace(-1, 0.5, width))


def random_null_space(width: int, device: torch.device) -> NullSpace:
    """Return a projection onto half of all directions, drawn at random: eigenvectors would be as many, and take minutes."""
    generator = torch.Generator().manual_seed(width)
    basis = torch.linalg.qr(torch.randn(width, width // 2, generator=generator, dtype=torch.float64)).Q
    return NullSpace(basis=basis.contiguous().to(device), keeps=True, kept=width // 2)


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """Return a call's result and the seconds it took: of the CPU in all threads, or where a GPU was used, until it had ended its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        return result, time.perf_counter() - start
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def relative(ours: Tensor, expected: Tensor) -> float:
    """Return |ours - expected| / |expected|."""
    return float((ours - expected).norm() / expected.norm())


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)
