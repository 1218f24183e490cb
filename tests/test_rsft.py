"""Algorithm 1 against a literal transcription of it."""

import copy

import pytest
import torch
from paper import algorithm_1
from tiny import make_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from mm4ke_plugins.rsft.algorithm import EpochStatistics, LossNotFinite, Visit, visit

FACTS = ["Who rules Oz? Tark", "Where is Oz? Up", "What is Oz? A box", "Who rules Oz? Tark"]


def visit_every_sample(model, samples, optimizer, E, K, tau):
    updates = []

    def visit_one(epoch, i, sample):
        made = []

        def update(loss, indices):
            assert indices == [0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            made.append((epoch, i, len(made)))

        visited = visit(lambda _: (model(**sample).loss[None],) * 2, update, 1, loss_threshold=tau, steps_per_sample=K)
        assert visited.updates == len(made)
        assert visited.converged == [visited.final_losses[0] < tau]
        return made

    for epoch in range(E):
        for i, sample in enumerate(samples):
            updates += visit_one(epoch, i, sample)
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


def visit_with(losses, judged=None, **settings):
    """A visit of samples whose losses are these rows, one after each update; and what was asked for and updated."""
    rows = iter(zip(losses, judged or losses, strict=True))
    asked, updated = [], []

    def losses_of(indices):
        asked.append(indices)
        return tuple(torch.tensor([row[index] for index in indices]) for row in next(rows))

    def update(loss, indices):
        updated.append((indices, loss.item()))

    return (
        visit(losses_of, update, len(losses[0]), **({"loss_threshold": 0.5, "steps_per_sample": 6} | settings)),
        asked,
        updated,
    )


def test_a_converged_sample_is_not_updated():
    visited, _, updated = visit_with([[0.25]])
    assert visited == Visit(0, [0.25], [0.25], already_converged=[True], converged=[True])
    assert updated == []


def test_a_loss_equal_to_the_threshold_is_trained():
    visited, _, updated = visit_with([[0.5]] * 3, steps_per_sample=3)
    assert len(updated) == visited.updates == 3
    assert visited.converged == [False]


def test_each_sample_of_a_batch_is_judged_by_its_own_loss():
    visited, asked, updated = visit_with(
        [[2.0, 0.25, 4.0, 1.0], [1.0, 9, 0.25, 1.0], [0.25, 9, 9, 3.0]], steps_per_sample=3
    )
    assert asked == [[0, 1, 2, 3], [0, 2, 3], [0, 3]]  # who is done is not computed again
    assert updated == [([0, 2, 3], pytest.approx(7 / 3)), ([0, 3], 1.0), ([3], 3.0)]
    assert visited == Visit(
        3,
        [2.0, 0.25, 4.0, 1.0],
        [0.25, 0.25, 0.25, 3.0],
        already_converged=[False, True, False, False],
        converged=[True, True, True, False],
    )


def test_tau_is_held_against_the_judged_loss_and_the_other_is_trained():
    visited, asked, updated = visit_with([[0.25, 9.0], [0.25, 9.0]], judged=[[2.0, 0.25], [0.25, 9.0]])
    assert asked == [[0, 1], [0]]
    assert updated == [([0], 0.25)]
    assert visited == Visit(1, [2.0, 0.25], [0.25, 0.25], already_converged=[False, True], converged=[True, True])


def test_one_step_a_visit_is_breadth_first():
    visited, asked, updated = visit_with([[2.0, 0.25, 4.0]], steps_per_sample=1)
    assert asked == [[0, 1, 2]]
    assert updated == [([0, 2], 3.0)]
    assert visited.final_losses == [2.0, 0.25, 4.0]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(loss):
    updates = []
    rows = iter([torch.tensor([1.0, 2.0]), torch.tensor([0.75, loss])])
    with pytest.raises(LossNotFinite, match=f"{loss} after 1 updates") as error:
        visit(
            lambda _: (torch.ones(2), next(rows)),
            lambda loss, indices: updates.append(loss),
            2,
            loss_threshold=0.5,
            steps_per_sample=6,
        )
    assert len(updates) == 1
    assert error.value.index == 1


def test_statistics_of_an_epoch():
    statistics = EpochStatistics()
    statistics.add(Visit(0, [0.05], [0.05], already_converged=[True], converged=[True]))
    statistics.add(Visit(3, [2.0, 0.02], [0.09, 0.02], already_converged=[False, True], converged=[True, True]))
    statistics.add(Visit(6, [4.0], [0.44], already_converged=[False], converged=[False]))
    assert statistics.summary() == {
        "visits": 4,
        "updates": 9,
        "already_converged": 2,
        "converged_fraction": pytest.approx(3 / 4),
        "mean_final_loss": pytest.approx(0.15),
        "max_final_loss": 0.44,
    }
    assert EpochStatistics(**statistics.to_dict()) == statistics
