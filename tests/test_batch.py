"Batches: the same questions as every prefix, nothing lost, nothing leaked."
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from imecd.batch import block_sizes, vary_rows, cut_windows, pad_rows, sequence_data, unpad_rows
from imecd.core import PAD, ImecdError
from imecd.histories import leave_one_out, load_interactions


def rows(batch):
    "(user, items, targets) of every row."
    for r, u in enumerate(batch.users.tolist()):
        lo, hi = batch.offsets[r], batch.offsets[r+1]
        assert batch.positions[lo:hi].tolist() == list(range(hi-lo))
        yield u, batch.items[lo:hi].tolist(), batch.targets[lo:hi].tolist()


def questions(data, **kw): return [(u, tuple(h[:j+1]), t[j]) for b in data.epoch(3, 7, **kw) for u, h, t in rows(b) for j in range(len(h)) if t[j] != PAD]


def prefixes(data, L):
    s = leave_one_out(data)
    for u, (a, b) in enumerate(zip(data.offsets[:-1], s.train)):
        h = data.events[a:b].tolist()
        yield from ((u, tuple(h[:j]), h[j]) for j in range(1, len(h)))


@pytest.mark.parametrize('bucketed', [True, False])
@pytest.mark.parametrize('L', [2, 4, 10, 50])
def test_short_histories_give_exactly_the_prefixes(made, L, bucketed):
    data = made(np.random.default_rng(L).integers(3, L+4, 60))
    assert Counter(questions(sequence_data(leave_one_out(data), L), targets=37, bucketed=bucketed)) == Counter(prefixes(data, L))


@pytest.mark.parametrize('L', [2, 6, 10, 50])
def test_long_histories_ask_every_target_once(made, L):
    data = made(np.random.default_rng(L).integers(3, 6*L, 40)); d = sequence_data(leave_one_out(data), L)
    for b in d.epoch(0, 0): assert int(b.lengths.max()) <= L
    start = {u: int(o) for u, o in enumerate(data.offsets[:-1])}; seen = Counter()
    for b in d.epoch(0, 0):
        for _, h, t in rows(b):
            assert h[1:] == [x for x in t[:-1] if x] or t[0] == PAD
    w = d.windows
    for u, a, z, f in zip(w.users, w.start, w.stop, w.first):
        for target in range(f+1, z+1):
            seen[target] += 1; before = target-a; whole = target-start[u]
            assert before == whole if whole <= L else L//2 <= before <= L
    wanted = Counter(t for u in range(len(start)) for t in range(start[u]+1, int(leave_one_out(data).train[u])))
    assert seen == wanted and d.n_targets == sum(wanted.values())


def test_users_with_one_training_event_ask_nothing(made):
    d = sequence_data(leave_one_out(made([3, 3, 8]))); assert set(d.windows.users) == {2} and len(d.cases('test').users) == 3


def test_an_epoch_depends_on_seed_and_number_alone(made):
    d = sequence_data(leave_one_out(made(np.full(200, 9)))); torch.manual_seed(1)
    again = [b.items.tolist() for b in d.epoch(0, 1, targets=64)]; torch.manual_seed(2)
    assert again == [b.items.tolist() for b in d.epoch(0, 1, targets=64)]
    assert again != [b.items.tolist() for b in d.epoch(0, 2, targets=64)] and again != [b.items.tolist() for b in d.epoch(1, 1, targets=64)]


@pytest.mark.parametrize('bucketed', [True, False])
def test_batches_are_about_as_large_as_asked(made, bucketed):
    d = sequence_data(leave_one_out(made(np.random.default_rng(0).integers(3, 40, 800))))
    sizes = [int((b.targets != PAD).sum()) for b in d.epoch(0, 0, targets=256, bucketed=bucketed)]
    assert sum(sizes) == d.n_targets and max(sizes) <= 256+50 and len(sizes) <= -(-d.n_targets//256)+16


def test_the_target_never_travels_with_the_history(made):
    "Changing the target changes nothing that a model sees at evaluation."
    data = made(np.random.default_rng(0).integers(3, 90, 50)); d = sequence_data(leave_one_out(data), 20)
    for part in ('valid', 'test'):
        cases = d.cases(part); batch = d.history(cases)
        changed = data.events.copy(); changed[getattr(d.split, part)] = 1
        other = sequence_data(leave_one_out(data._replace(events=changed)), 20)
        now = other.history(other.cases(part))
        for a, b in zip(batch[:5], now[:5]): assert torch.equal(a, b)
        assert batch.tied is None and now.tied is None
        assert (batch.targets == PAD).all()


def test_test_history_holds_the_validation_item(made):
    data = made([5]); d = sequence_data(leave_one_out(data)); assert d.history(d.cases('test')).items.tolist() == data.events[:4].tolist()


def test_seen_is_the_whole_history(made):
    data = made([30, 70]); d = sequence_data(leave_one_out(data), 10); items, offsets = d.seen(d.cases('test'))
    assert offsets.tolist() == [0, 29, 98] and items[29:].tolist() == data.events[30:99].tolist()


def test_counts_are_of_training_alone(made):
    data = made([6, 9, 30]); d = sequence_data(leave_one_out(data)); s = leave_one_out(data)
    kept = np.concatenate([data.events[a:b] for a, b in zip(data.offsets[:-1], s.train)])
    assert d.counts().tolist() == np.bincount(kept, minlength=41).tolist() and int(d.counts()[PAD]) == 0


def test_rows_of_cases_do_not_depend_on_their_neighbours(made):
    d = sequence_data(leave_one_out(made(np.random.default_rng(0).integers(3, 90, 50))), 20); cases = d.cases('test')
    whole = list(rows(d.history(cases)))
    assert whole == [r for k in range(0, 50, 7) for r in rows(d.history(cases, slice(k, k+7)))]


def test_ties_ask_what_was_not_trained(made):
    data = made([6, 6, 6], ties=np.array([0, 1, 2, 3, 4, 4, 0, 1, 2, 2, 2, 2, 5, 5, 5, 5, 5, 5])); d = sequence_data(leave_one_out(data)); q = d.tie_cases()
    assert q.users.tolist() == [0, 0, 1, 1] and (q.stops-d.offsets[q.users]).tolist() == [4, 4, 2, 2]
    assert q.targets.tolist() == [*data.events[4:6], *data.events[10:12]]


def test_padding_there_and_back(made):
    d = sequence_data(leave_one_out(made([9, 5, 12])), 8); b = next(d.epoch(0, 0)); x = torch.randn(len(b.items), 4)
    r = pad_rows(x, b, 8); assert torch.equal(unpad_rows(r, b), x) and r.shape[1:] == (8, 4) and int((r.abs().sum(-1) == 0).sum()) == r.shape[0]*8-len(b.items)


@pytest.mark.parametrize('length', [0, 1, 7, -2])
def test_a_length_that_cannot_be(made, length):
    with pytest.raises(ImecdError, match='even number of at least 2'): sequence_data(leave_one_out(made([5])), length)


def test_no_windows_of_nothing(): assert len(cut_windows(np.array([0]), np.array([1]), 10).users) == 0


@pytest.mark.real
def test_toys_ask_every_prefix(real):
    data = load_interactions(real('amazon14_toys')); d = sequence_data(leave_one_out(data))
    assert d.n_targets == int((data.lengths-3).sum())


def test_rows_that_vary(made):
    "Turned: every question once, the other way round. Skipped: what is asked stood later in the same row. Tie groups are those of the row as it is read; what a row only reads for context is not asked."
    g = np.random.default_rng(5); lengths = g.integers(3, 60, 40); ties = np.concatenate([np.sort(g.integers(0, max(2, n//3), n)) for n in lengths]); d = sequence_data(leave_one_out(made(lengths, ties=ties)), 10)
    def asked(**kw): return sorted((int(u), int(a), int(b)) for x in d.epoch(0, 3, 64, **kw) for u, a, b in zip(x.users.repeat_interleave(x.lengths), x.items, x.targets) if b)
    assert asked(reverse=1.) == sorted((u, b, a) for u, a, b in asked()) and asked(reverse=1e-9) == asked() and asked(reverse=.5) == asked(reverse=.5) != asked()
    some = asked(skip=.4); assert .5 < len(some)/len(asked()) < .8 and all((u in d.windows.users) for u, _, _ in some)
    for u, a, b in some: h = d.events[d.offsets[u]:d.split.train[u]].tolist(); assert any(a == h[i] and b in h[i+1:] for i in range(len(h)))
    for kw in ({}, {'reverse': 1.}, {'reverse': .5, 'skip': .4}, {'skip': .999}):
        for x in d.epoch(0, 3, 64, **kw):
            places, m, last = torch.arange(len(x.items)), x.targets > 0, x.offsets[1:].repeat_interleave(x.lengths)
            assert (x.lengths > 0).all() and (places+x.tied < last).all() and (x.targets[(places+x.tied)[m]] > 0).all() and (x.positions == places-x.offsets[:-1].repeat_interleave(x.lengths)).all()


def test_a_tie_group_is_that_of_the_row_as_it_is_read(made):
    "Events 0 to 7 in groups of two, three and three; the last two are held out. Read straight and turned, and without the second event of the middle group."
    data = made([8], ties=np.array([0, 0, 1, 1, 1, 2, 2, 2])); d = sequence_data(leave_one_out(data), 10); rows = np.array([0])
    look = lambda turned, kept: vary_rows(d, rows, np.array([turned]), np.array(kept, bool)).tied.tolist()
    assert look(False, [1]*8) == next(d.epoch(0, 0)).tied.tolist() == [0, 2, 1, 0, 0] and look(True, [1]*8) == [2, 1, 0, 1, 0] and look(False, [1, 1, 1, 0, 1, 1, 1, 1]) == [0, 1, 0, 0]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 20), st.integers(1, 200))
def test_blocks_hold_every_row_once_and_no_more_than_they_may(lengths, most, places):
    lengths = torch.tensor(sorted(lengths), dtype=torch.long); sizes = block_sizes(lengths, most, places); assert sum(sizes) == len(lengths) and all(1 <= n <= most for n in sizes)
    parts = lengths.split(sizes) if sizes else []; assert all(n == 1 or n*int(part.max()) <= places for n, part in zip(sizes, parts))
    for part, after in pairwise(parts): assert len(part) == most or (len(part)+1)*int(after[0]) > places  # none is smaller than it must be
