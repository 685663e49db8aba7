from __future__ import annotations

import numpy
from hypothesis import given
from hypothesis import strategies as st

from editeval.inference.encoding import TokenPair
from editeval.inference.packing import PackingRules, Row, ancestor_mask, batches, pack

EAGER = PackingRules(row_tokens=64, row_scored=64, fill_tokens=1, branch_depth=64, token_price=1 << 20)
CHAINS = PackingRules(row_tokens=64, row_scored=64, fill_tokens=1, branch_depth=0, token_price=1 << 20)

ids = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
some_pairs = st.lists(st.builds(TokenPair, context=ids, continuation=ids), max_size=12)
some_rules = st.builds(
    PackingRules,
    row_tokens=st.integers(12, 40),
    fill_tokens=st.integers(1, 40),
    row_scored=st.integers(1, 20),
    branch_depth=st.integers(0, 12),
    token_price=st.sampled_from([1, 1 << 20, None]),
)


def seen_by(row: Row, node: int) -> list[int]:
    """The tokens that a node sees, in the order of their positions."""
    visible = numpy.flatnonzero(ancestor_mask(row)[node])
    return [row.tokens[index] for index in sorted(visible, key=lambda index: row.depths[index])]


@given(pairs=some_pairs, rules=some_rules)
def test_every_scored_node_sees_exactly_its_own_sequence(pairs: list[TokenPair], rules: PackingRules) -> None:
    rows = pack(pairs, rules)
    assert sorted(member.pair for row in rows for member in row.members) == list(range(len(pairs)))
    for row in rows:
        assert not row.branches or rules.branch_depth
        for member in row.members:
            pair = pairs[member.pair]
            for count, node in enumerate(member.nodes):
                assert seen_by(row, node) == [*pair.context, *pair.continuation[:count]]
                assert row.depths[node] == len(pair.context) + count - 1


@given(pairs=some_pairs, rules=some_rules)
def test_rows_do_not_depend_on_the_order_of_requests(pairs: list[TokenPair], rules: PackingRules) -> None:
    assert [row.tokens for row in pack(pairs, rules)] == [row.tokens for row in pack(pairs[::-1], rules)]


@given(pairs=some_pairs, rules=some_rules, budget=st.integers(1, 80), scored=st.integers(1, 20))
def test_batches_keep_their_budgets_and_lose_no_row(pairs: list[TokenPair], rules: PackingRules, budget: int, scored: int) -> None:
    rows = pack(pairs, rules)
    grouped = batches(rows, batch_tokens=budget, batch_scored=scored)
    assert sorted(id(row) for batch in grouped for row in batch) == sorted(id(row) for row in rows)
    for batch in grouped:
        assert len({row.branches for row in batch}) == 1
        if len(batch) > 1:
            assert len(batch) * max(len(row.tokens) for row in batch) <= budget
            assert sum(len(row.scored) for row in batch) <= scored


def test_choices_of_one_question_compute_its_context_once() -> None:
    context = tuple(range(30))
    (row,) = pack([TokenPair(context=context, continuation=(90 + choice, 7)) for choice in range(4)], EAGER)
    assert len(row.tokens) == 30 + 4


def test_one_token_choices_cost_no_token_at_all_even_in_chains() -> None:
    (row,) = pack([TokenPair(context=(1, 2, 3), continuation=(90 + choice,)) for choice in range(4)], CHAINS)
    assert list(row.tokens) == [1, 2, 3]
    assert not row.branches


def test_questions_behind_one_few_shot_prefix_share_it() -> None:
    prefix = tuple(range(40))
    pairs = [TokenPair(context=(*prefix, 50 + question), continuation=(7,)) for question in range(5)]
    assert sum(len(row.tokens) for row in pack(pairs, EAGER)) == 45


def test_sharing_that_costs_more_attention_than_it_saves_is_declined() -> None:
    frugal = PackingRules(row_tokens=64, row_scored=64, fill_tokens=1, branch_depth=64, token_price=4)
    pairs = [TokenPair(context=(1, *range(10 * question, 10 * question + 9)), continuation=(7,)) for question in range(1, 4)]
    assert len(pack(pairs, frugal)) == 3


def test_short_strangers_stand_side_by_side_instead_of_being_padded() -> None:
    rules = PackingRules(row_tokens=64, row_scored=64, fill_tokens=30, branch_depth=64, token_price=4)
    pairs = [TokenPair(context=(10 * number, *range(number + 4)), continuation=(7,)) for number in range(5)]
    rows = pack(pairs, rules)
    assert sorted(len(row.tokens) for row in rows) == [5, 6 + 7 + 8 + 9]
    assert sum(len(row.members) for row in rows) == len(pairs)


def test_sequence_deeper_than_the_window_stands_alone() -> None:
    rules = PackingRules(row_tokens=64, row_scored=64, fill_tokens=64, branch_depth=8, token_price=1 << 20)
    rows = pack([TokenPair(context=tuple(range(12)), continuation=(7,)), TokenPair(context=(50, 51), continuation=(7,))], rules)
    assert [len(row.tokens) for row in rows] == [12, 2]
