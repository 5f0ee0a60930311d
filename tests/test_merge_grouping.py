"""From scores to groups: the rules at their smallest, and the same result for any order of sets and pairs."""

import numpy as np
import pytest
import torch

from dataset_merge.deciding import MatchSettings, decide
from dataset_merge.grouping import Grouping, Pairs, Rule, group_identities
from merge_people import draw_set


def pairs_of(*links: tuple[int, int, float]) -> Pairs:
    """Pairs with their score, which is their cosine too."""
    first, second, score = (np.array(column) for column in zip(*links, strict=True))
    return Pairs(first, second, score.astype(float), score.astype(float))


def group(sets: list[int], *links: tuple[int, int, float], rule: Rule = "mutual", within: bool = False) -> Grouping:
    return group_identities(np.array(sets), pairs_of(*links), 0.5, rule, within)


def test_a_pair_joins_from_the_threshold_on() -> None:
    """At the threshold it joins, below it does not; each identity is told its best match all the same."""
    found = group([0, 0, 1, 1], (0, 2, 0.5), (1, 3, 0.499))
    assert found.group.tolist() == [0, 1, 0, 2]
    assert found.decision == ["joined", "below"]
    assert found.match.tolist() == [2, 3, 0, 1]
    assert found.score.tolist() == pytest.approx([0.5, 0.499, 0.5, 0.499])


def test_two_near_one_the_nearer_joins() -> None:
    """Mutual best: two identities of a set near one of another, the second stays alone."""
    found = group([0, 1, 1], (0, 1, 0.8), (0, 2, 0.9))
    assert found.group.tolist() == [0, 1, 0]
    assert found.decision == ["not mutual", "joined"]


def test_clusters_join_all_links_but_those_that_a_set_forbids() -> None:
    """0 and 2 are not each other's best, but clusters join them through 1 of another set; two of one set never."""
    links = ((0, 1, 0.9), (0, 2, 0.8), (1, 2, 0.6))
    assert group([0, 1, 2], *links, rule="clusters").group.tolist() == [0, 0, 0]
    found = group([0, 1, 1], (0, 1, 0.9), (0, 2, 0.8), rule="clusters")
    assert found.group.tolist() == [0, 0, 1]
    assert found.decision == ["joined", "split"]


def test_a_chain_is_split_at_its_weakest_link() -> None:
    """A0 - B1 - C2 - A3 would join two of set A: the link of 0.6 goes, and is listed with whom it would have joined."""
    found = group([0, 1, 2, 0], (0, 1, 0.9), (1, 2, 0.6), (2, 3, 0.8))
    assert found.group.tolist() == [0, 0, 1, 1]
    assert [(s.first, s.second, s.score, s.held_apart) for s in found.splits] == [(1, 2, 0.6, (0, 3))]
    assert found.decision == ["joined", "split", "joined"]


def test_within_joins_identities_of_one_set_by_their_own_link_only() -> None:
    """Two of one set are joined when their pair says so, and not through somebody of another set."""
    assert group([0, 0], (0, 1, 0.7), within=True).group.tolist() == [0, 0]
    assert group([0, 0], (0, 1, 0.7)).group.tolist() == [0, 1]
    through = ((0, 2, 0.9), (1, 2, 0.8))
    assert group([0, 0, 1], *through, rule="clusters", within=True).group.tolist() == [0, 1, 0]
    assert group([0, 0, 1], *through, (0, 1, 0.6), rule="clusters", within=True).group.tolist() == [0, 0, 0]


def test_within_joins_a_person_of_more_identities_than_matches_are_kept() -> None:
    """30 identities of one person in a set, of each the best 8 pairs are kept: all pairs reach the threshold."""
    one = draw_set(torch.zeros(30, dtype=torch.int64), torch.full((30,), 3), seed=0)
    settings = MatchSettings(t=0.5, rule="clusters", within=True)
    found = decide([one.embeddings], [one.labels], [30], settings, ["one"], torch.device("cpu")).grouping
    assert found.group.tolist() == [0] * 30


def test_groups_are_numbered_by_their_first_members() -> None:
    """Also where the first one came last, to a group that was larger."""
    assert group([0, 1, 2, 3], (2, 3, 0.9), (0, 2, 0.8), rule="clusters").group.tolist() == [0, 1, 0, 0]


def test_nothing_to_compare() -> None:
    """No pair, no match: everybody alone."""
    nothing = Pairs(*(np.empty(0, np.int64) for _ in range(2)), *(np.empty(0) for _ in range(2)))
    found = group_identities(np.array([0, 1]), nothing, 0.5)
    assert found.group.tolist() == [0, 1]
    assert found.match.tolist() == [-1, -1]
    assert np.isnan(found.score).all()


@pytest.mark.parametrize("rule", ["mutual", "clusters"])
@pytest.mark.parametrize("within", [False, True])
def test_the_order_of_sets_and_pairs_does_not_show(rule: Rule, within: bool) -> None:
    """Four random sets with links at random: identities renumbered and pairs shuffled, the groups are the same, and
    none has two of a set that are held apart.
    """
    generator = np.random.default_rng(0)
    for _ in range(20):
        sets = np.repeat(np.arange(4), 6)
        i, j = np.triu_indices(24, 1)
        chosen = (generator.random(len(i)) < 0.3) & (within | (sets[i] != sets[j]))
        i, j = i[chosen], j[chosen]
        score = generator.random(len(i))
        one = group_identities(sets, Pairs(i, j, score, score), 0.4, rule, within)
        new = generator.permutation(24)  # old number to new
        order = generator.permutation(len(i))
        a, b, shuffled = new[i][order], new[j][order], score[order]
        moved = np.empty(24, np.int64)
        moved[new] = generator.permutation(4)[sets]
        other = group_identities(
            moved, Pairs(np.minimum(a, b), np.maximum(a, b), shuffled, shuffled), 0.4, rule, within
        )
        together = one.group[:, None] == one.group
        assert (together == (other.group[new][:, None] == other.group[new])).all()
        assert {(s.score) for s in one.splits} == {(s.score) for s in other.splits}
        if not within:
            assert not (together & (sets[:, None] == sets) & ~np.eye(24, dtype=bool)).any()
        assert len(np.unique(one.group)) < 24
