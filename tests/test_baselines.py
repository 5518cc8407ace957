"The two models that only count."
from collections import Counter

import numpy as np
import pytest
import torch

from imecd.baselines import MODELS, Popularity, TransitionKNN, TransitionKNNConfig, fit_baseline, make_model, quick_ranks, sample_cases, transition_counts, tune_knn, parse_value
from imecd.features import Features
from imecd.batch import sequence_data
from imecd.core import ImecdError, configure
from imecd.histories import leave_one_out, load_interactions
from imecd.metrics import evaluate, summary


def trained(data): return [data.events[a:b].tolist() for a, b in zip(data.offsets[:-1], leave_one_out(data).train)]


def brute_counts(data, c):
    "Pair by pair."
    out = Counter()
    for h in trained(data):
        for i, a in enumerate(h):
            for gap, b in enumerate(h[i+1:i+1+c.window], 1):
                out[a, b] += c.decay**(gap-1)
                if c.direction == 'both': out[b, a] += c.decay**(gap-1)
    return out


CONFIGS = [TransitionKNNConfig('forward', 1, 1., 0., 0.), TransitionKNNConfig('both', 3, .5, 2., .3), TransitionKNNConfig('forward', 10, .9, 0., 1.)]


@pytest.mark.parametrize('config', CONFIGS, ids=str)
def test_counts_and_scores_are_those_of_a_loop(made, config):
    data = made(np.random.default_rng(1).integers(3, 15, 80), n_items=20); d = sequence_data(leave_one_out(data)); counts = brute_counts(data, config)
    matrix = transition_counts(d, config).toarray()
    for a in range(21):
        for b in range(21): assert matrix[a, b] == pytest.approx(counts[a, b])
    popularity = np.bincount(np.concatenate(trained(data)), minlength=21); rows = matrix.sum(1)
    model = TransitionKNN(config).fit(d); cases = d.cases('test'); scores = model.score(model.query(d.history(cases))).numpy()
    for r, u in enumerate(cases.users.tolist()):
        h = data.events[data.offsets[u]:data.offsets[u+1]-1].tolist()[::-1][:config.window]
        for b in range(1, 21):
            want = sum(config.decay**k * matrix[a, b]/max(rows[a]+config.shrinkage, 1e-9)/max(popularity[b], 1)**config.pop_norm for k, a in enumerate(h))
            assert scores[r, b] == pytest.approx(want+float(model.back_off[b]), rel=1e-4, abs=1e-12)


def content(n):
    "Features of n items; the second has none, the third is the fourth again."
    x = np.random.default_rng(7).normal(size=(n+1, 6)).astype(np.float32); x[[0, 2]] = 0; x[3] = x[4]; return Features(x, x[:, ::-1].copy(), np.ones((n+1, 2), bool), {'hash': 'x'})


@pytest.mark.parametrize('name', MODELS)
def test_validation_and_test_events_teach_nothing(made, name):
    data = made(np.random.default_rng(2).integers(3, 12, 60)); split = leave_one_out(data); changed = data.events.copy(); changed[split.valid] = 1; changed[split.test] = 2
    a, b = (make_model(name).fit(sequence_data(leave_one_out(x)), content(x.n_items)).tensors() for x in (data, data._replace(events=changed)))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('name', MODELS)
def test_answers_do_not_depend_on_the_batch(made, name):
    d = sequence_data(leave_one_out(made(np.random.default_rng(3).integers(3, 40, 100)))); model = make_model(name).fit(d, content(d.n_items)); cases = d.cases('test')
    whole = evaluate(model, d, cases).rank
    for size in (1, 7, 256): assert torch.equal(evaluate(model, d, cases, batch_size=size).rank, whole)
    assert torch.equal(quick_ranks(model, d, cases, budget=1000), whole)


@pytest.mark.parametrize('name', MODELS)
def test_a_stored_model_answers_the_same(made, name):
    d = sequence_data(leave_one_out(made(np.full(50, 8)))); model = make_model(name).fit(d, content(d.n_items)); cases = d.cases('test')
    assert torch.equal(evaluate(make_model(name).set_tensors(model.tensors()), d, cases).rank, evaluate(model, d, cases).rank)


def test_popularity_counts_training_events(made):
    data = made([9, 9, 30]); d = sequence_data(leave_one_out(data)); p = Popularity().fit(d)
    assert p.counts[1:].tolist() == np.bincount(np.concatenate(trained(data)), minlength=41)[1:].tolist()


def test_items_never_seen_come_last(made):
    d = sequence_data(leave_one_out(made([5, 5, 5], n_items=500))); model = TransitionKNN().fit(d); s = model.score(model.query(d.history(d.cases('test'))))
    cold = d.counts()[1:] == 0; assert (s[:, 1:][:, cold] == 0).all() and (s[:, 1:][:, ~cold] > 0).all()


def test_search_takes_what_is_best_on_validation(shop):
    d = sequence_data(leave_one_out(load_interactions(shop))); best, trials = tune_knn(d, {'decay': .5})
    assert set(trials['decay']) == {.5} and trials['ndcg@10'].is_sorted(descending=True)
    assert summary(quick_ranks(TransitionKNN(best).fit(d), d, d.cases('valid')))['ndcg@10'] == trials['ndcg@10'][0]
    again, _ = tune_knn(d, {'decay': .5}); assert again == best
    model, none = fit_baseline('transition_knn', d, {'window': 2}, tune=False); assert none is None and model.config == TransitionKNNConfig(window=2)


def test_a_sample_is_fixed_and_sorted(made):
    d = sequence_data(leave_one_out(made(np.full(50, 8)))); cases = d.cases('valid'); a, b = sample_cases(cases, 20), sample_cases(cases, 20)
    assert torch.equal(a.users, b.users) and len(a.users) == 20 and (a.users.diff() > 0).all() and sample_cases(cases, 50) is cases


@pytest.mark.parametrize('settings, message', [({'windw': 1}, "did you mean 'window'"), ({'direction': 'back'}, "use 'forward' or 'both'"), ({'window': 0}, 'window=0; it must be between 1 and 1000'),
                                               ({'decay': 0}, 'decay=0'), ({'shrinkage': -1.}, 'shrinkage=-1'), ({'shrinkage': float('inf')}, 'at least 0 and finite'), ({'pop_norm': 2}, 'pop_norm=2'), ({'zzz': 1}, 'it has direction, window')])
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ImecdError, match=message): configure(TransitionKNNConfig, settings)


def test_models_that_are_not_there():
    with pytest.raises(ImecdError, match="did you mean 'popularity'"): make_model('popularty')
    with pytest.raises(ImecdError, match='there are popularity, transition_knn'): make_model('imecd')


FLOORS = {'amazon14_toys': ('forward', .0552, .005), 'amazon18_instruments': ('both', .0909, .030), 'amazon18_office': ('both', .1042, .018)}


@pytest.mark.real
@pytest.mark.parametrize('name', FLOORS)
def test_floors_are_reached(name, real):
    "The kNN's NDCG@10 in its better direction is at least the floor that the protocol measured; popularity is where it was."
    direction, floor, popular = FLOORS[name]; d = sequence_data(leave_one_out(load_interactions(real(name)))); cases = d.cases('test')
    assert summary(quick_ranks(Popularity().fit(d), d, cases))['ndcg@10'] == pytest.approx(popular, abs=.001)
    model = TransitionKNN(TransitionKNNConfig(direction, window=10, decay=.6, shrinkage=100.)).fit(d)
    assert summary(quick_ranks(model, d, cases))['ndcg@10'] >= floor


@pytest.mark.parametrize('text, value', [('.5', .5), ('-.5', -.5), ('3', 3), ('1e-3', 1e-3), ('true', True), ('null', None), ('both', 'both'), ('.', '.'), ('.a', '.a'), ('id+text', 'id+text'), ('5.', '5.')])
def test_values_are_read_as_people_write_them(text, value): assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_content_that_is_equal_ties_and_none_is_last(made):
    d = sequence_data(leave_one_out(made(np.full(30, 9)))); f = content(d.n_items); model, trials = fit_baseline('content_knn', d, features=f); s = model.score(model.query(d.history(d.cases('test'))))
    assert torch.equal(s[:, 3], s[:, 4]) and (s[:, 2] == 0).all() and len(trials) > 10 and set(trials.columns) == {'window', 'decay', 'image', 'ndcg@10'}
    texts = fit_baseline('content_knn', d, {'image': .9}, tune=False, features=f._replace(image=None))[0]; assert texts.matrix.shape[1] == 6 and texts.matrix.norm(dim=1).max() < 1.001  # one modality has it all
    with pytest.raises(ImecdError, match='`imecd features` makes them'): fit_baseline('content_knn', d)
