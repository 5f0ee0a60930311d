"""Centres of identities: against plain formulas, and under wrong labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset_merge import centres as module
from dataset_merge.centres import Method, identity_centres, join_centres
from dataset_merge.unit_rows import UnitRows
from merge_people import draw_set


def test_mean_equals_the_formula() -> None:
    """normalise(mean of unit embeddings), in any order of the images; zeros without any."""
    embeddings = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    labels = torch.arange(50) % 7
    found = identity_centres(embeddings, labels, 8)
    for identity in range(7):
        own = embeddings[labels == identity].double()
        centre = F.normalize(own.mean(0), dim=0)
        torch.testing.assert_close(found.vectors[identity].double(), centre, atol=1e-6, rtol=0)
    assert found.images.tolist() == found.used.tolist() == [8, 7, 7, 7, 7, 7, 7, 0]
    assert not found.vectors[7].any()


@pytest.mark.parametrize("method", ["mean", "trimmed", "medoid"])
def test_chunks_do_not_show(method: module.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings that do not fit on the device go there in parts; the result is the same."""
    people = draw_set(torch.arange(40), torch.arange(40) % 6 + 1, seed=1)
    whole = identity_centres(people.embeddings, people.labels, 40, method)
    monkeypatch.setattr(module, "_CHUNK", 13)
    parts = identity_centres(people.embeddings, people.labels, 40, method)
    torch.testing.assert_close(parts.vectors, whole.vectors)
    assert torch.equal(parts.used, whole.used)


def test_medoid_is_the_image_with_the_highest_mean_cosine() -> None:
    """Against the definition, on all pairs of images of each identity."""
    people = draw_set(torch.arange(30), torch.arange(30) % 7 + 1, seed=2)
    found = identity_centres(people.embeddings, people.labels, 30, "medoid")
    for identity in range(30):
        own = people.embeddings[people.labels == identity]
        cosines = (own @ own.T).fill_diagonal_(0).sum(1)
        best = [own[i] for i in range(len(own)) if cosines[i] >= cosines.max() - 1e-6]
        assert any(torch.equal(found.vectors[identity], F.normalize(row, dim=0)) for row in best)
    assert set(found.used.tolist()) == {1}


def test_robust_centres_hold_under_wrong_labels() -> None:
    """Two strangers among seven images pull the mean away; trimmed leaves out those two, and is nearer to the truth."""
    person = torch.arange(200)
    right = draw_set(person, torch.full((200,), 5), seed=3)
    wrong = draw_set(200 + torch.arange(200), torch.full((200,), 2), seed=4)
    embeddings, labels = torch.cat([right.embeddings, wrong.embeddings]), torch.cat([right.labels, wrong.labels])
    truth = identity_centres(right.embeddings, right.labels, 200).vectors
    near = {
        method: (identity_centres(embeddings, labels, 200, method).vectors * truth).sum(1).mean().item()
        for method in ("mean", "trimmed", "medoid")
    }
    assert near["trimmed"] > 0.99
    assert near["trimmed"] > near["mean"] + 0.03
    assert near["trimmed"] > near["medoid"]
    assert identity_centres(embeddings, labels, 200, "trimmed").used.double().mean() == pytest.approx(5, abs=0.1)


def test_of_two_images_neither_is_left_out() -> None:
    """Nothing tells which of two is wrong: trimmed keeps both."""
    embeddings = torch.eye(4)[:2]
    found = identity_centres(embeddings, torch.zeros(2, dtype=torch.int64), 1, "trimmed")
    assert found.vectors[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0, 0])
    assert found.used.tolist() == [2]


def test_joined_centres_keep_their_order() -> None:
    """Set after set, every field."""
    people = draw_set(torch.arange(5), torch.arange(5) + 1, seed=5)
    part = identity_centres(people.embeddings, people.labels, 5)
    both = join_centres(iter([part, part]), 2 * len(part))
    assert len(both) == 10
    assert both.images.tolist() == 2 * part.images.tolist()
    assert both.used.tolist() == 2 * part.used.tolist()
    assert torch.equal(both.vectors[5:], part.vectors)


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 1], "3 embeddings, but 2 labels"), ([0, 1, 2], "from 0 to 2 for 2")]
)
def test_labels_that_do_not_fit(labels: list[int], message: str) -> None:
    """Refused with the numbers, before anything is computed."""
    with pytest.raises(ValueError, match=message):
        identity_centres(torch.eye(3), torch.from_numpy(np.array(labels)), 2)


def test_a_misspelt_method_is_refused() -> None:
    """And is not taken for the last one."""
    with pytest.raises(ValueError, match="must be one of mean, trimmed, medoid, got 'median'"):
        identity_centres(torch.eye(3), torch.zeros(3, dtype=torch.int64), 1, "median")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["mean", "trimmed", "medoid"])
def test_vectors_of_any_length_are_taken_as_unit_ones(method: Method) -> None:
    """Centres need no copy of the embeddings at length 1, nor one of those that cleaning leaves."""
    people = draw_set(torch.arange(9), torch.full((9,), 7), seed=1)
    lengths = torch.rand(63, generator=torch.Generator().manual_seed(2)) * 30 + 0.1
    features = (people.embeddings * lengths[:, None]).numpy()
    left = np.flatnonzero(np.arange(63) % 5)
    rows = UnitRows(features, str).part(left)
    wanted = identity_centres(people.embeddings[left], people.labels[left], 9, method)
    found = identity_centres(rows, people.labels[left], 9, method)
    assert torch.allclose(found.vectors, wanted.vectors, atol=1e-6)
    assert torch.equal(found.used, wanted.used)
    assert torch.equal(rows[torch.tensor([3, 0])], torch.stack((rows[:][3], rows[:][0])))
    features[11, 2] = np.inf
    assert len(rows[:8]) == 8  # of the images before it
    with pytest.raises(ValueError, match="no finite embedding for image 11: is the model damaged"):
        identity_centres(UnitRows(features, "image {}".format).part(left), people.labels[left], 9, method)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_centres_on_a_card_are_the_same_each_time() -> None:
    """Sums in any order differ in the last bits, so that what was kept of a comparison would not be found again."""
    embeddings = F.normalize(torch.randn(60_000, 128, generator=torch.Generator().manual_seed(0)))
    labels = torch.randint(300, (60_000,), generator=torch.Generator().manual_seed(1))
    first, *others = (identity_centres(embeddings, labels.cuda(), 300, "trimmed").vectors for _ in range(5))
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first.cpu(), identity_centres(embeddings, labels, 300, "trimmed").vectors)


def test_the_median_of_four_images_is_the_lower_one() -> None:
    """The upper one would make half of four unlike images wrong: with cosines of 0.9, 0.5 and 0.4 to the first, all
    are above 0.6 x 0.5, and not above 0.6 x 0.9."""
    axes = torch.eye(4)
    images = torch.stack(
        [axes[0], *(c * axes[0] + (1 - c * c) ** 0.5 * axes[i] for i, c in ((1, 0.9), (2, 0.5), (3, 0.4)))]
    )
    assert identity_centres(images, torch.zeros(4, dtype=torch.int64), 1, "trimmed").used.tolist() == [4]
