"Networks that are not IMECD: each is causal, learns with all its parameters, answers alone as in company, and comes back from a run."
import polars as pl
import pytest
import torch

from imecd.batch import sequence_data
from imecd.core import PAD, ImecdError
from imecd.encode import load_features
from imecd.fitting import configure_preset, load_split
from imecd.histories import leave_one_out, load_interactions
from imecd.metrics import evaluate
from imecd.model import PRESETS
from imecd.multimodal import clock
from imecd.generators import DIFFUSION
from imecd.runs import load_run
from imecd.running import NETWORKS, stored_model, train_run
from imecd.shop import make_shop
from imecd.tuning import space_of
from imecd.train import TrainConfig, fit

OTHERS = [name for name in NETWORKS if name not in PRESETS]
SMALL = {'dim': 16, 'inner': 16, 'layers': 1, 'length': 20}
each = pytest.mark.parametrize('name', OTHERS)


@pytest.fixture(scope='module')
def there(tmp_path_factory):
    "A shop with pictures: its folder, data and features."
    folder = make_shop(tmp_path_factory.mktemp('networks')/'shop', n_users=120, n_items=50, seed=3)
    return folder, sequence_data(leave_one_out(load_interactions(folder)), 20), load_features(folder)


def build(name, there, **more):
    config, _ = configure_preset(name, {**SMALL, **more}, networks=NETWORKS)
    return NETWORKS[name].kind.of(config, there[1], there[2])


def batches(data, n=1): return [b for _, b in zip(range(n), data.epoch(0, 0, 256))]


@each
def test_says_where_it_comes_from(name):
    "Source and differences stand in the docstring of the class itself."
    text = NETWORKS[name].kind.__doc__; assert ('et al. 20' in text or 'Tang and Wang 2018' in text or name.startswith('sasrec_')) and len(text) > 60


@each
def test_all_parameters_learn(name, there):
    "After some steps every trainable parameter has had a gradient; a score that is never asked in a softmax has no temperature to learn."
    m = build(name, there).train(); had = set(); free = {'log_scale'} if name == 'dreamrec' else {'cdg.nothing'} if name in DIFFUSION else set()  # these two drop no condition
    if m.reader.vq is not None: m.place_codes(there[1])
    optimiser = torch.optim.Adam(m.parameters(), 1e-3); torch.manual_seed(0)
    for b in batches(there[1], 4):
        optimiser.zero_grad(); out = m.loss(b); out.loss.backward(); optimiser.step(); assert out.loss.isfinite()
        had |= {k for k, p in m.named_parameters() if p.grad is not None and p.grad.any()}
    assert {k for k, p in m.named_parameters() if p.requires_grad} - had == free


@each
def test_the_future_is_not_seen(name, there):
    "Replace the last item of every row, its target and its time: what is asked before stays to the bit."
    m = build(name, there).eval(); b = batches(there[1])[0]; ends = b.offsets[1:]-1; other = b.items.clone(); other[ends] = other[ends] % there[1].n_items+1
    times = None if b.times is None else b.times.clone()
    if times is not None: times[ends] += 10**6
    ask = lambda b: m.reader(m.reader.states(m.items(), b), b)[0]
    with torch.no_grad(): before, after = ask(b), ask(b._replace(items=other, targets=torch.full_like(b.targets, PAD), times=times))
    early = torch.ones(len(b.items), dtype=torch.bool); early[ends] = False
    assert torch.equal(before[early], after[early]) and not torch.equal(before[ends], after[ends])


@each
def test_alone_as_in_company(name, there):
    m, cases = build(name, there, **({'sample_steps': 4} if name in DIFFUSION else {})).eval(), there[1].cases('test'); whole = evaluate(m, there[1], cases)
    for size in (1, 7): assert (evaluate(m, there[1], cases, batch_size=size).rank != whole.rank).float().mean() < .02  # scores nearer than rounding may change places
    with torch.no_grad(): a, b = (m.score(m.query(there[1].history(cases, rows))) for rows in (torch.arange(9), torch.tensor([4])))
    torch.testing.assert_close(a[4, 1:], b[0, 1:], atol=1e-4, rtol=1e-5)


@each
def test_one_seed_one_training(name, there):
    train = TrainConfig(epochs=2, targets=256, warmup=0); one = []
    for k in range(2): torch.manual_seed(k); m = build(name, there); fit(m, there[1], train, show='none'); one.append(m.state_dict())
    assert all(torch.equal(a, one[1][k]) for k, a in one[0].items())


@each
def test_comes_back_from_its_run(name, there, tmp_path):
    "Trained, stored, read again: the same ranks; and a file of another network is refused."
    run = train_run(there[0], tmp_path/name, name, {**SMALL, 'train.epochs': 2, 'train.targets': 256}, length=20)
    data = load_split(there[0], 'leave_one_out', 20); m = stored_model(load_run(tmp_path/name), data, there[0])
    assert torch.equal(evaluate(m, data, data.cases('test')).rank, torch.from_numpy(run.ranks.filter(pl.col('split') == 'test')['rank'].to_numpy().copy()))
    with pytest.raises(ImecdError, match='stored tensor'): build('caser' if name != 'caser' else 'gru4rec', there).set_tensors(m.tensors())


@each
def test_answers_a_stranger(name, there):
    s = build(name, there).scores([[3, 1, 7], [2]]); assert s.shape == (2, there[1].n_items+1) and s[:, 1:].isfinite().all() and (s[:, PAD] == -torch.inf).all()


@each
def test_the_search_looks_only_at_what_has_an_effect(name, there):
    "Each value of each setting gives another model, or another loss."
    space = space_of(name, {}); assert 'train.lr' in space and not set(space) & set(NETWORKS[name].kind.unused)
    for k, values in ((k, v) for k, v in space.items() if isinstance(v, tuple) and not hasattr(v, 'low') and k not in ('dim', 'layers')):
        losses = []
        for v in values:
            m = build(name, there, **{k: v}).train(); optimiser = torch.optim.Adam(m.parameters(), 1e-3); torch.manual_seed(0)
            if m.reader.vq is not None: m.place_codes(there[1]); torch.manual_seed(0)
            for b in batches(there[1], 3): optimiser.zero_grad(); loss = m.loss(b).loss; loss.backward(); optimiser.step()  # denoisers start silent
            losses.append(float(loss.detach()))
        assert len({round(x, 6) for x in losses}) == len(values), (k, losses)


def test_temporal_experts_need_times(there, made):
    assert build('hm4sr', there).reader.temporal is not None
    bare = sequence_data(leave_one_out(made([8]*30, n_items=50)), 20); m = NETWORKS['hm4sr'].kind.of(configure_preset('hm4sr', SMALL, networks=NETWORKS)[0], bare, there[2])
    assert m.reader.temporal is None and not m.config.temporal and m.loss(next(bare.epoch(0, 0, 64))).loss.isfinite()


def test_time_is_that_of_what_was_read(there):
    "A batch carries the times of its items, in training and at evaluation, and the clock counts from the item before."
    data = there[1]; b = batches(data)[0]; r = 3; u = int(b.users[r]); rows = slice(int(b.offsets[r]), int(b.offsets[r+1])); events = load_interactions(there[0])
    own = events.times[events.offsets[u]:events.offsets[u+1]]; n = rows.stop-rows.start
    assert any((b.times[rows].numpy() == own[k:k+n]).all() for k in range(len(own)-n+1))
    h = data.history(data.cases('test'), torch.tensor([r])); assert h.times.tolist() == own[max(0, len(own)-1-20):-1].tolist() if u == int(data.cases('test').users[r]) else h.times is not None
    gap, _ = clock(b); assert (gap[b.positions == 0] == 0).all() and (gap[b.positions > 0] > 0).all()


def test_without_negatives_sources_are_told(there):
    with pytest.raises(ImecdError, match='interests=0'): build('missrec', there, interests=0)
    with pytest.raises(ImecdError, match='window=0'): build('caser', there, window=0)
