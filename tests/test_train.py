"Training: the best epoch is kept, the history says what happened, a seed is a training, mistakes are named."
import copy
import math
import warnings
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from imecd.batch import sequence_data
from imecd.core import ImecdError, configure
from imecd import train
from imecd.features import Features
from imecd.histories import Interactions, leave_one_out
from imecd.metrics import evaluate, ndcg
from imecd.model import IMECD, PRESETS, ModelConfig
from imecd.reports import line, plot_history, plot_terms
from imecd.train import TrainConfig, fit, own_randomness, room_health, running_mean, validate, wear

N = 30
SMALL = dict(dim=8, experts=2, layers=1, heads=2, inner=16, length=10, codes=4, commitment=.25, steps=6, dropout=.1)
RUN = TrainConfig(epochs=4, patience=10, targets=256, lr=1e-2, warmup=2, metric_k=5)


@pytest.fixture(scope='module')
def data():
    "Users who walk round a ring of items, with an excursion now and then."
    g = np.random.default_rng(0); walks = [(np.cumsum(g.choice([1, 1, 1, 7], g.integers(4, 12)))+g.integers(N)) % N+1 for _ in range(150)]
    return sequence_data(leave_one_out(Interactions(np.array([f'u{i:03}' for i in range(150)], object), pl.DataFrame({'item': [f'i{k}' for k in range(N)]}),
                                                    np.concatenate(walks).astype(np.int32), np.r_[0, np.cumsum([len(w) for w in walks])].astype(np.int64), None, None)), 10)


@pytest.fixture(scope='module')
def features():
    g = np.random.default_rng(1); present = np.ones((N+1, 2), bool); present[[0, 0, 4], [0, 1, 1]] = False
    return Features(*((g.standard_normal((N+1, 6))*present[:, [m]]).astype(np.float32) for m in (0, 1)), present=present, manifest={})


def model_of(data, features, name='imecd', **kw): return IMECD.of(configure(ModelConfig, SMALL | PRESETS[name] | kw), data, features)


def quietly(*args, **kw):
    "`fit`, where a tiny codebook may well collapse."
    with warnings.catch_warnings(): warnings.filterwarnings('ignore', message='codebook of'); return fit(*args, **kw)


def ndcg_of(m, data, k=5, part='valid'): return float(ndcg(validate(m, data, data.cases(part))[0], k).mean())


@pytest.fixture(scope='module')
def trained(data, features):
    m = model_of(data, features); return m, quietly(m, data, RUN)


@pytest.mark.parametrize('changes, words', [(dict(epochs=0), 'epochs=0: must be at least 1'), (dict(patience=0), 'at least 1'), (dict(targets=0), 'at least 1'), (dict(warmup=-1), 'at least 0'),
                                            (dict(metric_k=0), 'at least 1'), (dict(seed=-1), 'at least 0'), (dict(lr=0.), 'above 0 and finite'), (dict(lr=math.nan), 'above 0'),
                                            (dict(lr=math.inf), 'finite'), (dict(clip=0.), 'above 0'), (dict(clip=-1.), 'above 0'), (dict(weight_decay=-.1), 'at least 0'), (dict(weight_decay=math.nan), 'at least 0'), (dict(average=-1.), 'average=-1.0: must be at least 0'), (dict(average=math.nan), 'finite')], ids=str)
def test_impossible_settings_are_refused(changes, words):
    with pytest.raises(ImecdError, match=words): TrainConfig(**changes)


def test_unknown_settings_name_the_closest():
    with pytest.raises(ImecdError, match="did you mean 'epochs'"): configure(TrainConfig, {'epoch': 3})


def test_the_best_epoch_is_kept(trained, data):
    "Parameters, codes and all: the restored model scores what the history says of its best epoch."
    m, h = trained; column = f'valid ndcg@{RUN.metric_k}'
    assert not m.training and h.best == RUN.warmup+h.table[column][RUN.warmup:].arg_max() and ndcg_of(m, data) == pytest.approx(h.table[column][h.best], abs=1e-12)


@pytest.mark.parametrize('epochs, warmup', [(1, 1), (2, 2), (3, 3), (3, 2)])
def test_the_best_epoch_is_kept_where_codes_are_placed(epochs, warmup, data, features):
    "Also when the best epoch is the last of the warm-up: what was measured is what is restored."
    m = model_of(data, features); h = quietly(m, data, replace(RUN, epochs=epochs, warmup=warmup))
    assert ndcg_of(m, data) == pytest.approx(h.table['valid ndcg@5'][h.best], abs=1e-12)


def test_the_history_has_every_term(trained):
    h = trained[1]; table = h.table; terms = {'condition', 'generated', 'mse', 'contrast', 'vq', 'pseudo', 'balance'}
    assert {'epoch', 'loss', 'seconds', 'valid ndcg@10', 'valid ndcg@5', *terms} <= set(table.columns) and table['epoch'].to_list() == list(range(len(table))) and h.minutes > 0
    assert all(table[c].drop_nulls().is_finite().all() for c in table.columns)


def test_warm_up_generates_nothing_and_then_places_the_codes(data, features):
    ready = []; m = model_of(data, features); h = quietly(m, data, RUN, lambda epoch, row, model: ready.append((epoch, model is m, model.reader.vq.ready)))
    for c in ('generated', 'mse', 'contrast'): assert h.table[c].is_null().to_list() == [True, True, False, False]
    assert (h.table['vq'][:2] == 0).all() and (h.table['vq'][2:] > 0).all()
    assert [r[0] for r in ready] == [0, 1, 2, 3] and all(r[1] for r in ready) and not ready[0][2] and ready[2][2] and m.reader.vq.ready


def test_codes_are_placed_without_a_warm_up(data, features):
    m = model_of(data, features); quietly(m, data, replace(RUN, warmup=0)); assert m.reader.vq.ready


def test_it_learns(trained, data, features):
    "The ring is found; the loss falls."
    m, h = trained; assert h.table['condition'][-1] < h.table['condition'][0]-.5 and ndcg_of(m, data) > 2*ndcg_of(model_of(data, features), data)


@pytest.mark.parametrize('name, kept', [('imecd', 2), ('wo_cdg', 2), ('sasrec', 0)])
def test_an_unfinished_model_does_not_compete(name, kept, data, features, monkeypatch):
    "However well the condition alone did in the warm-up, what has codes or a diffusion head is kept from after it."
    falling = iter(range(100, 0, -1))
    monkeypatch.setattr(train, 'ndcg', lambda r, k: torch.full((2,), float(next(falling))))
    m = model_of(data, features, name); h = quietly(m, data, replace(RUN, epochs=9, patience=1, warmup=2))
    assert h.best == kept and len(h.table) == kept+2+(name == 'sasrec')


def test_patience_stops(data, features):
    m = model_of(data, features, 'sasrec'); h = quietly(m, data, replace(RUN, epochs=30, patience=2, lr=.3)); rows = h.table['valid ndcg@5']
    assert len(rows) == h.best+3 < 30 and (rows[h.best+1:] <= rows[h.best]).all()


@pytest.mark.parametrize('name', ['imecd', 'topk_gate'])
def test_one_seed_one_training(name, data, features):
    "Bit by bit, whatever the global generator was; another seed is another training."
    found = []
    for start, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(start); m = model_of(data, features, name); h = quietly(m, data, replace(RUN, seed=seed, epochs=3))
        found.append((m.state_dict(), h.table.drop('seconds', 'targets/s')))
    assert found[0][1].equals(found[1][1]) and all(torch.equal(a, b) for a, b in zip(found[0][0].values(), found[1][0].values(), strict=True))
    assert not torch.equal(found[0][0]['table.ids'], found[2][0]['table.ids'])


@pytest.mark.parametrize('take', [lambda x, rows: x[rows], lambda x, rows: x.index_select(0, rows), lambda x, rows: x[None].index_select(1, rows)], ids=['index', 'select', 'of each stream'])
def test_several_threads_add_up_in_one_order(take):
    "Gradients of an item that occurs often are added up in one order, however many threads do it; outside of a training torch is as it was."
    g, threads, found = torch.Generator().manual_seed(0), torch.get_num_threads(), []; x, rows, w = torch.zeros(50, 64, requires_grad=True), torch.randint(50, (20_000,), generator=g), torch.randn(20_000, 64, generator=g)
    torch.set_num_threads(2)
    try:
        with own_randomness(x.device): found = [torch.autograd.grad((take(x, rows)*w).sum(), x)[0] for _ in range(20)]
    finally: torch.set_num_threads(threads)
    assert all(torch.equal(found[0], y) for y in found[1:]) and not torch.are_deterministic_algorithms_enabled()


def test_a_loss_that_is_no_number_is_named(data, features):
    m = model_of(data, features)
    with torch.no_grad(): m.reader.fuse.bias.fill_(torch.nan)
    with pytest.raises(ImecdError, match='epoch 0, batch 0: loss is nan, condition is nan; lower lr .now 0.01.') as e: fit(m, data, RUN)
    assert '\n' not in str(e.value)
    for bf16 in (False, True):
        with pytest.raises(ImecdError, match='epoch [01], batch .* lower lr .now 1e.30.'+', or set bf16 to false'*bf16) as e: quietly(model_of(data, features), data, replace(RUN, lr=1e30, bf16=bf16))
        assert len(str(e.value)) < 300


def test_a_gradient_that_is_no_number_never_reaches_the_parameters(data, features):
    m = model_of(data, features, 'sasrec'); before = copy.deepcopy(m.state_dict()); m.reader.fuse.weight.register_hook(lambda g: g*torch.inf)
    with pytest.raises(ImecdError, match='epoch 0, batch 0: the gradient is (inf|nan)'): fit(m, data, RUN)
    assert all(torch.equal(x, before[name]) for name, x in m.state_dict().items())


def test_nothing_of_a_training_leaks(data, features):
    "The global generator is where it was; a callback that draws from it changes nothing; the modes of the parts are kept."
    torch.manual_seed(3); before = torch.get_rng_state(); m = model_of(data, features); h = quietly(m, data, replace(RUN, epochs=3)); assert torch.equal(torch.get_rng_state(), before)
    n = model_of(data, features); g = quietly(n, data, replace(RUN, epochs=3), lambda *_: torch.rand(7)); assert h.table.drop('seconds', 'targets/s').equals(g.table.drop('seconds', 'targets/s'))
    for mode in (True, False): m.train(mode); modes = [p.training for p in m.modules()]; room_health(m, validate(m, data, data.cases('valid'))[1]); assert [p.training for p in m.modules()] == modes


def test_a_collapsed_codebook_is_named(data, features):
    "Of the kept epoch, once."
    m = model_of(data, features, codes=64); place = type(m).place_codes
    def collapsed(data, seed): place(m, data, seed); [level.codes.zero_() for level in m.reader.vq.levels]; m.reader.learn_codes = lambda *a: None
    m.place_codes = collapsed
    with warnings.catch_warnings(record=True) as said: warnings.simplefilter('always'); h = fit(m, data, replace(RUN, epochs=2, warmup=0))
    said = [str(w.message) for w in said if 'codebook of' in str(w.message)]; assert len(said) == 3 and 'only 1.0 of 64 codes' in said[0] and h.table['perplexity id'].to_list() == [1., 1.] and h.table['dead id'][0] == 63


def test_nothing_to_learn_is_named(data, features):
    split = data.split._replace(train=data.split.data.offsets[:-1]+1); none = sequence_data(split, 10)
    with pytest.raises(ImecdError, match='nothing can be learnt'): fit(model_of(data, features), none, RUN)


def test_history_is_drawn(trained):
    import matplotlib.pyplot as plt
    h = trained[1]; ax = plot_history(h.table, best=h.best, levels={'popularity': .1}); assert [t.get_text() for t in ax.get_legend().get_texts()] == ['valid ndcg@10', 'popularity', 'kept']; plt.close('all')
    said = [t.get_text() for t in plot_terms(h.table).get_legend().get_texts()]; plt.close('all')
    assert [s.split()[0] for s in said] == ['condition', 'pseudo', 'vq', 'generated', 'mse', 'contrast'] and 'ndcg@10' in line(h.table.row(0, named=True)) and 'codes id ' in line(h.table.row(-1, named=True)) and 'dead, ' in line(h.table.row(-1, named=True))


def test_nobody_to_validate_is_named(data, features):
    split = data.split._replace(valid=np.full_like(data.split.valid, -1)); none = sequence_data(split, 10)
    with pytest.raises(ImecdError, match='validation target'): fit(model_of(data, features), none, RUN)


def test_parameters_are_lent_and_given_back():
    m = torch.nn.Linear(3, 2); own = [p.detach().clone() for p in m.parameters()]; other = [torch.full_like(p, 7.) for p in own]
    with pytest.raises(KeyError, match='midway'), wear(m, other):
        assert all((p == 7).all() and p.requires_grad for p in m.parameters())
        raise KeyError('midway')
    assert all(torch.equal(p, o) for p, o in zip(m.parameters(), own)) and all((o == 7).all() for o in other)


@pytest.mark.parametrize('steps', [0, 1, 4, 1000])
def test_the_mean_follows_its_formula(steps):
    "Weight of the newest: 9/(9+n), at least 1/steps; the first step starts it."
    m = torch.nn.Linear(2, 1, bias=False); optimiser = torch.optim.SGD(m.parameters(), .1); mean, expected = running_mean(m, optimiser, steps), None
    for n in range(30):
        optimiser.zero_grad(); (m(torch.ones(2))-n).square().sum().backward(); optimiser.step(); now = m.weight.detach().double()
        expected = now if expected is None else expected+(now-expected)*max(1/max(steps, 1), 9/(9+n))
        torch.testing.assert_close(next(mean.parameters()).detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert steps > 1 or torch.equal(next(mean.parameters()), m.weight)


def test_what_is_judged_is_the_mean(data, features, monkeypatch):
    "Validation, callback and the epoch that is kept have the running mean; the parameters that are trained are others, and without averaging they are the same."
    import imecd.train as train
    for average, equal in ((2., False), (0., True)):
        trained_with, judged, kept = [], [], []; plain = train.train_epoch
        def epoch(model, *args, plain=plain): out = plain(model, *args); trained_with.append(model.reader.fuse.weight.detach().clone()); return out
        with monkeypatch.context() as p:
            p.setattr(train, 'train_epoch', epoch)
            m = model_of(data, features); h = quietly(m, data, replace(RUN, average=average), lambda e, row, model: (judged.append(model.reader.fuse.weight.detach().clone()), kept.append(ndcg_of(model, data))))
        assert [torch.equal(a, b) for a, b in zip(trained_with, judged)] == [equal]*len(judged)
        assert torch.equal(m.reader.fuse.weight, judged[h.best]) and ndcg_of(m, data) == kept[h.best] == h.table['valid ndcg@5'][h.best]


def test_bfloat16_trains(data, features):
    m = model_of(data, features); h = quietly(m, data, replace(RUN, bf16=True)); assert h.table['loss'].is_finite().all() and all(p.dtype == torch.float32 for p in m.parameters())
    full = model_of(data, features); quietly(full, data, RUN); assert abs(ndcg_of(m, data)-ndcg_of(full, data)) < .15


@pytest.mark.parametrize('n', [1, 3])
def test_validation_is_that_of_evaluate(trained, data, threads, n):
    "The loop's ranks are those of the shared protocol, and it leaves the model in the mode that it had."
    m, _ = trained; cases = data.cases('valid'); threads(n)
    for mode in (True, False):
        m.train(mode); r = validate(m, data, cases, 32)[0]; assert m.training == mode
        assert torch.equal(r.cpu(), evaluate(m, data, cases).rank)
    m.eval()
