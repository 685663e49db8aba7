"""The methods that read or follow a gradient, twice for `edit_speed.py`: as editeval computes them, and straight from their papers.

KN's outcome is the scores of all neurons, GRACE's the key and the learned value. MEND's straightforward form is one plain pass forward and
backward that gives the gradients of all edited matrices; its network is untrained, which writes just those gradients and takes as long
as a trained one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.speed_pairs import Outcome, Pair, by_site
from benchmarks.speed_setup import KN_STEPS, Setup, configured
from benchmarks.straightforward_gradients import full_grace, looped_scores, plain_gradients
from editeval.edits.delta import CodebookDelta, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.inference.encoding import encode_pairs
from editeval.keyvalue.attribution import integration_points, neuron_scores
from editeval.keyvalue.fine_tuning import target_row
from editeval.methods.grace import GRACE, cold_value
from editeval.methods.kn import KN
from editeval.methods.mend import Editor as MendEditor
from editeval.training.hypernetwork import Hypernetwork
from editeval.training.hypernetwork_settings import PUBLISHED_LAYERS, edited_maps
from editeval.types import EditRequest, SilentProgress

NOTHING_KEPT = Cache(Path("unused"))  # neither KN nor GRACE prepares anything
SEED = 0
MEND_RANK = 1920  # published for GPT-2 XL
MOST_PASSES = 3  # that an edit of MEND may cost
# Where one token is asked for, the gradient of ours goes through the head as a product of one row, which BLAS sums over SmolLM2's 49,152
# entries one by one: 1e-4 from float64, where the rows of all positions are 2e-6 from it. With three idle rows beside it ours is as near.
ONE_ROW = 1e-3


def kn(setup: Setup) -> Pair:
    """KN: the scores of all neurons, for the answer that the fact has (without one: what the model says now)."""
    lm = setup.lm
    # The fact's own prompt alone: paraphrases are more rows of the same kind.
    settings = configured("kn", KN, f"method.steps={setup.kn_steps}", "method.refine=false")
    editor = settings.prepare(EditedModel(lm), NOTHING_KEPT, SilentProgress())
    alphas_M = integration_points(settings.steps, settings.points)

    def ours(request: EditRequest) -> Outcome:
        return {"scores": neuron_scores(lm, editor.rows(request), neurons=settings.neurons, alphas_M=alphas_M)}

    def plain(request: EditRequest) -> Outcome:
        return {"scores": looped_scores(lm, editor.rows(request), neurons=settings.neurons, alphas_M=alphas_M)}

    variant = "" if settings.steps == KN_STEPS else f" ({settings.steps} steps)"
    return Pair(ours=ours, plain=plain, goal=4.0, variant=variant)


def grace(setup: Setup) -> Pair:
    """GRACE: a first entry at the published relative depth."""
    lm, settings = setup.lm, configured("grace", GRACE)
    editor = settings.prepare(EditedModel(lm), NOTHING_KEPT, SilentProgress())
    site = editor.codebook.site
    width = lm.module.get_submodule(site).get_parameter("weight").shape[1 if lm.sites.transposed else 0]

    def ours(request: EditRequest) -> Outcome:
        (entry,) = editor.edit([request], seed=SEED).deltas
        assert isinstance(entry, CodebookDelta)
        return {"key": entry.keys[0], "value": entry.values[0]}

    def plain(request: EditRequest) -> Outcome:
        (pair,) = encode_pairs(lm.tokenizer, [request.full_prompt], [f" {request.target_new}"], special_tokens=None)
        entry = full_grace(
            lm,
            pair.context,
            pair.continuation,
            site=site,
            start=cold_value(width, seed=SEED),
            num_steps=settings.num_steps,
            learning_rate=settings.learning_rate,
        )
        return {"key": entry.key, "value": entry.value}

    return Pair(ours=ours, plain=plain, tolerance=ONE_ROW)


def mend(setup: Setup) -> Pair:
    """MEND: the linear maps of the last three layers' MLPs, against one plain pass.

    The statistics are those of mean 0 and deviation 1 and the rate is -1, so that the update is the gradient itself. A rank above the
    width of what goes into a network could say nothing more, so small models get that width.
    """
    lm = setup.lm
    count = lm.description.num_layers
    maps = edited_maps(lm, range(max(0, count - PUBLISHED_LAYERS), count))
    sites = tuple(edited.path for edited in maps)
    rank = min(MEND_RANK, *(edited.d_in + edited.d_out for edited in maps))
    network = Hypernetwork(maps, rank=rank, rate=-1.0, seed=SEED).eval().requires_grad_(False)
    for name, statistic in network.named_buffers():
        statistic.fill_({"count": 2.0, "mean": 0.0, "squares": 1.0}[name.rpartition("_")[2]])
    editor = MendEditor(model=EditedModel(lm), network=network, sites=sites, accumulate=True)

    def ours(request: EditRequest) -> Outcome:
        deltas = editor.edit([request], seed=SEED).deltas
        return by_site(delta for delta in deltas if isinstance(delta, LowRankDelta))

    def plain(request: EditRequest) -> Outcome:
        row = target_row(lm.tokenizer, request, scored_at="target", max_tokens=lm.description.max_positions)
        return plain_gradients(lm, row, sites)

    return Pair(ours=ours, plain=plain, goal=1 / MOST_PASSES, tolerance=ONE_ROW, repeats=5, plain_is_pass=True)


GRADIENTS: Mapping[str, Callable[[Setup], Pair]] = {"kn": kn, "grace": grace, "mend": mend}
