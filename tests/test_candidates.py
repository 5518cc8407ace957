"Some of a large catalogue: the sum is right on average, some items are what they are among all, a model learns from them."
from dataclasses import replace

import many
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from imecd.candidates import chances, draw_candidates, step_bytes
from imecd.catalogue import mean_catalogue_loss
from imecd.core import PAD, ImecdError, configure
from imecd.model import IMECD, PRESETS, ModelConfig, is_sampled
from imecd.train import TrainConfig, fit, validate
from imecd.metrics import ndcg


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=30), st.integers(1, 60), st.integers(0, 5))
def test_candidates_are_sorted_unique_and_weighed(counts, k, seed):
    counts = torch.tensor(counts); allowed = counts > 0; allowed[1] = True; p = chances(counts, allowed); torch.manual_seed(seed)
    assert p[PAD] == 0 and float(p.sum()) == pytest.approx(1) and (p[1:][~allowed[1:]] == 0).all() and (p[1:][allowed[1:]] > 0).all()
    needed = torch.randint(0, len(counts), (2, 3)); c = draw_candidates(p, needed, k)
    assert c.rows[0] == PAD and (c.rows.diff() > 0).all() and torch.equal(c.rows[c.local(needed)], needed) and c.bias[0] == -torch.inf
    drawn = c.bias > -torch.inf; n = (c.bias[drawn].double()+(k*p[c.rows[drawn]]).log()).exp()
    assert torch.allclose(n, n.round(), atol=1e-4) and int(n.round().sum()) == k and set(c.rows[~drawn].tolist()) <= {PAD, *needed.flatten().tolist()}


def test_nothing_to_draw():
    with pytest.raises(ImecdError, match='no item may be drawn'): chances(torch.tensor([3, 0]), torch.tensor([True, False]))
    assert torch.equal(chances(torch.zeros(4), torch.ones(4, dtype=torch.bool))*3, torch.tensor([0., 1, 1, 1]).double())


def test_the_sum_is_right_on_average():
    torch.manual_seed(0); n = 60; counts = torch.arange(n+1); s = torch.randn(1, n+1).double(); z = torch.eye(n+1).double(); y, seen = torch.tensor([7]), torch.tensor([[9, 50, PAD]]); q = s
    exact = torch.exp(mean_catalogue_loss(q, z, y)); found = []
    for _ in range(4000):
        c = draw_candidates(chances(counts, counts > 0), torch.tensor([7, 9, 50]), 20)
        found.append(torch.exp(mean_catalogue_loss(q, z[c.rows], c.local(y), c.bias, c.local(seen))))
    found = torch.stack(found); assert abs(float(found.mean()/exact)-1) < 4*float(found.std()/exact)/4000**.5 and float(found.std()/exact) > .05


@pytest.fixture(scope='module')
def walks(): return many.made(300)


def model_of(walks, name='imecd', **changes): return IMECD.of(configure(ModelConfig, many.SMALL | PRESETS[name] | {'commitment': .25} | changes), *walks)


@pytest.mark.parametrize('name', ['imecd', 'wo_idmoe', 'id_gate', 'id_self_gate', 'self_gate', 'shared_gate', 'topk_gate', 'uniform_gate', 'sasrec', 'text_only', 'wo_id_stream_keep_gate'])
def test_some_items_are_what_they_are_among_all(walks, name):
    m = model_of(walks, name).eval(); tower = m.table; tower.ids.data.mul_(5); tower.take_stock(); whole = tower(); rows = torch.tensor([PAD, 3, 4, 17, 40])
    some = tower(None, rows); assert torch.allclose(some.vectors, whole.vectors[rows], atol=1e-6) and torch.allclose(some.read, whole.read[:, rows], atol=1e-6)
    for at_once in (1, 7, 40, 1000):
        every = tower.everything(at_once); assert torch.allclose(every.vectors, whole.vectors, atol=1e-6) and torch.allclose(every.read, whole.read, atol=1e-6) and (every.vectors[PAD] == whole.vectors[PAD]).all()
        if whole.moe is not None:
            for key in ('content', 'read', 'gates', 'trust'): assert torch.allclose(getattr(every.moe, key), getattr(whole.moe, key), atol=1e-6), key


def test_strangers_are_looked_up_among_all(walks):
    m = model_of(walks, 'shuffled_gate').eval(); m.table.ids.data.normal_(); assert torch.equal(m.table.everything(7).vectors, m.table().vectors)


def test_evidence_is_as_old_as_the_last_stock(walks):
    "Other items' IDs move; what some items are stays, until stock is taken. Weights from elsewhere forget the stock, and it moves with the model."
    torch.manual_seed(0); m = model_of(walks, softmax='sampled').eval(); rows = torch.arange(6); m.table.ids.data = m.table.features_text@torch.randn(6, 8)     # the content tells the ID
    for gate in m.table.moe.gates: gate.belief.weight.data.fill_(2.)
    first = m.table(None, rows).moe.trust.detach(); assert (first[1:, 0] > .95).all(); m.table.ids.data[6:].normal_()
    assert torch.equal(m.table(None, rows).moe.trust, first); m.table.take_stock(); assert not torch.equal(m.table(None, rows).moe.trust, first)
    for forget in (lambda: m.load_state_dict(m.state_dict()), lambda: m.set_tensors(m.tensors())): m.table.take_stock(); forget(); assert m.table.stock is None
    m.table.take_stock(); told, long = m.table.stock; m.double(); assert m.table.stock[1].dtype == torch.float64 and torch.allclose(m.table.stock[0][0].float(), told[0]) and len(told) == 2


def test_after_training_the_stock_is_that_of_the_kept_epoch(walks):
    m = model_of(walks, softmax='sampled', negatives=16); fit(m, walks[0], TrainConfig(epochs=2, targets=512)); rows = torch.arange(9); some = m.table(None, rows).moe.trust; whole = m.table().moe.trust[rows]
    assert torch.allclose(some, whole, atol=1e-6)


def test_a_training_from_some_goes_on(walks, tmp_path):
    data, _ = walks; run = TrainConfig(epochs=4, targets=512); whole = model_of(walks, softmax='sampled', negatives=16); fit(whole, data, run)
    fit(model_of(walks, softmax='sampled', negatives=16), data, replace(run, epochs=2), folder=tmp_path); other = model_of(walks, softmax='sampled', negatives=16); fit(other, data, run, folder=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True))


def test_who_draws_by_itself_says_so(walks, monkeypatch):
    monkeypatch.setattr('imecd.model.is_sampled', lambda *_: True); m = model_of(walks, negatives=16)
    with pytest.warns(UserWarning, match='each draws 16'): fit(m, walks[0], TrainConfig(epochs=1, targets=2048))


def test_the_last_item_is_never_drawn_without_a_chance():
    p = torch.tensor([0., .3, .7, 0.]).double(); real = torch.rand
    try: torch.rand = lambda *a, **k: torch.ones(*a, dtype=torch.float64); c = draw_candidates(p, torch.tensor([1]), 4)
    finally: torch.rand = real
    assert c.rows.tolist() == [PAD, 1, 2] and c.bias.isfinite().tolist() == [False, False, True]


def test_ranking_in_between_leaves_the_stock(walks):
    m = model_of(walks, softmax='sampled'); m.table.take_stock(); told = m.table.stock; m.table.everything(7); assert m.table.stock is told


@pytest.mark.parametrize('name', ['imecd', 'sasrec', 'three_streams', 'wo_idmoe'])
def test_with_many_draws_the_loss_is_that_of_all(walks, name):
    data, _ = walks; batch = next(data.epoch(0, 0, 256)); same = {'id_dropout': 0., 'feature_dropout': 0., 'dropout': 0., 'denoiser_dropout': 0., 'ties': False}; full = model_of(walks, name, softmax='full', **same); found = []
    for negatives in (8, 200_000):
        some = model_of(walks, name, softmax='sampled', negatives=negatives, **same); some.load_state_dict(full.state_dict()); torch.manual_seed(0)
        found.append(abs(float((some.loss(batch, warmup=True).parts['condition']-full.loss(batch, warmup=True).parts['condition']).detach())))
    assert found[1] < .01 and found[0] > found[1]


def test_only_what_was_made_is_taught(walks):
    data, _ = walks; m = model_of(walks, softmax='sampled', negatives=1); batch = next(data.epoch(0, 0, 8)); m.loss(batch).loss.backward()
    moved = (m.table.ids.grad != 0).any(1).nonzero()[:, 0].tolist(); assert 1 <= len(moved) <= len({*batch.items.tolist(), *batch.targets.tolist()})+1


def test_it_learns_from_some(walks):
    data, _ = walks; run = TrainConfig(epochs=6, targets=256, lr=1e-2, patience=9); found = {}
    for softmax in ('full', 'sampled'): m = model_of(walks, softmax=softmax, negatives=24); fit(m, data, run); found[softmax] = float(ndcg(validate(m, data, data.cases('valid'))[0], 10).mean())
    counts = data.counts().float(); floor = float(np.mean([1/np.log2(r+1) if (r := 1+int((counts[1:] > counts[y]).sum())) <= 10 else 0 for y in data.cases('valid').targets]))
    assert found['sampled'] > 1.3*floor and found['sampled'] > .8*found['full']


def test_one_seed_one_training_from_some(walks):
    data, _ = walks; found = []
    for before in (1, 2): torch.manual_seed(before); m = model_of(walks, softmax='sampled', negatives=16); fit(m, data, TrainConfig(epochs=3, targets=512)); found.append(m.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values()))


def test_when():
    c = ModelConfig(); assert not is_sampled(c, 50_000) and is_sampled(c, 10**6) and not is_sampled(ModelConfig(softmax='full'), 10**6) and is_sampled(ModelConfig(softmax='sampled'), 10)
    assert step_bytes(ModelConfig(streams='id'), 100) < step_bytes(ModelConfig(streams='id+text'), 100) < step_bytes(c, 100) and step_bytes(c, 200) == 2*step_bytes(c, 100)
    with pytest.raises(ImecdError, match="set softmax='full'"): is_sampled(ModelConfig(gate='shuffled', softmax='sampled'), 10)
    with pytest.raises(ImecdError, match='negatives=0: must be at least 1'): ModelConfig(negatives=0)
    with pytest.raises(ImecdError, match='use one of auto, full, sampled'): ModelConfig(softmax='half')
