"""Algorithm 1 against a literal transcription of it."""

import copy

import pytest
import torch
from tiny import make_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from mm4ke_plugins.rsft import EpochBooks, Visit, visit_sample

FACTS = ["Who rules Oz? Tark", "Where is Oz? Up", "What is Oz? A box", "Who rules Oz? Tark"]


def algorithm_1(model, samples, optimizer, E, K, tau):
    """arXiv 2506.12384, Algorithm 1, line by line. Returns the (epoch, sample, step) of every update."""
    updates = []
    for epoch in range(E):
        for i, sample in enumerate(samples):
            for k in range(K):
                loss = model(**sample).loss
                if loss < tau:
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                updates.append((epoch, i, k))
    return updates


def visit_every_sample(model, samples, optimizer, E, K, tau):
    updates = []
    for epoch in range(E):
        for i, sample in enumerate(samples):

            def update(loss):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                updates.append((epoch, i, len([u for u in updates if u[:2] == (epoch, i)])))

            visit = visit_sample(lambda: model(**sample).loss, update, loss_threshold=tau, steps_per_sample=K)
            assert visit.updates == len([u for u in updates if u[:2] == (epoch, i)])
            assert visit.converged == (visit.final_loss < tau)
    return updates


@pytest.fixture(scope="module")
def model_and_samples(tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path_factory.mktemp("tiny")))
    tokenizer = tiny_tokenizer()
    samples = []
    for fact in FACTS:
        ids = tokenizer(fact, return_tensors="pt").input_ids
        samples.append({"input_ids": ids, "labels": ids})
    return model, samples


def test_same_updates_and_same_weights_as_algorithm_1(model_and_samples):
    runs = []
    for train in (algorithm_1, visit_every_sample):
        model = copy.deepcopy(model_and_samples[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        updates = train(model, model_and_samples[1], optimizer, E=6, K=4, tau=1.0)
        runs.append((updates, model.state_dict()))
    (expected, expected_weights), (updates, weights) = runs
    assert updates == expected
    # The comparison is worth something only if visits ended in every way: at once, midway, and at K.
    per_visit = [sum(u[:2] == (e, i) for u in expected) for e in range(6) for i in range(4)]
    assert {0, 4} < set(per_visit)
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


def test_a_converged_sample_is_not_updated():
    visit = visit_sample(lambda: torch.tensor(0.05), pytest.fail, loss_threshold=0.1, steps_per_sample=6)
    assert visit == Visit(updates=0, first_loss=pytest.approx(0.05), final_loss=pytest.approx(0.05), converged=True)


def test_a_loss_equal_to_the_threshold_is_trained():
    updates = []
    visit = visit_sample(lambda: torch.tensor(0.5), updates.append, loss_threshold=0.5, steps_per_sample=3)
    assert len(updates) == visit.updates == 3
    assert not visit.converged


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(loss):
    losses = iter([torch.tensor(2.0), torch.tensor(loss)])
    updates = []
    with pytest.raises(FloatingPointError, match=f"{loss} after 1 updates"):
        visit_sample(lambda: next(losses), updates.append, loss_threshold=0.1, steps_per_sample=6)
    assert len(updates) == 1


def test_books_of_an_epoch():
    books = EpochBooks()
    books.enter(Visit(updates=0, first_loss=0.05, final_loss=0.05, converged=True))
    books.enter(Visit(updates=3, first_loss=2.0, final_loss=0.09, converged=True))
    books.enter(Visit(updates=6, first_loss=4.0, final_loss=0.46, converged=False))
    assert books.summary() == {
        "visits": 3,
        "updates": 9,
        "already_converged": 1,
        "converged_fraction": pytest.approx(2 / 3),
        "mean_final_loss": pytest.approx(0.2),
        "max_final_loss": 0.46,
    }
    assert EpochBooks(**books.to_dict()) == books
