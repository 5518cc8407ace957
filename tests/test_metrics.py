"Ranking, metrics and paired comparison against slow and against foreign versions of the same thing."
import math
import subprocess
import sys
import threading
import time
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from imecd.batch import sequence_data
from imecd.core import ImecdError
from imecd.histories import leave_one_out
from imecd.metrics import (Evaluation, by_user, coverage, evaluate, gini, hr, ild, mean, measure, mrr, ndcg, percentiles, plot_discount, plot_ranks,
                           plot_slices, popularity, quarters, slices, summary, user_means)
from imecd.ranking import STRIP, best, block_rows, distinct, even_blocks, history_pairs, rank_dot, ranks
from imecd.significance import bootstrap, compare, holm, paired, plot_compare, users_needed
from imecd.threads import askers, cut_parts, side_by_side


def slow_rank(scores, target, gone=()):
    "Sort; a target among equals gets the mean of their places."
    left = [i for i in range(1, len(scores)) if i not in set(gone)-{target}]
    order = sorted(left, key=lambda i: -scores[i])
    return np.mean([place for place, i in enumerate(order, 1) if scores[i] == scores[target]])


def slow_list(scores, k, gone=()): return sorted((i for i in range(1, len(scores)) if i not in gone and scores[i] > -math.inf), key=lambda i: (-scores[i], i))[:k]


def case(g, rows, n, kind):
    "Random scores (few values, many values, infinities), targets and histories with repetitions, PAD and perhaps the target."
    scores = torch.randint(-2, 3, (rows, n+1), generator=g).float() if kind == 'ties' else torch.randn(rows, n+1, generator=g)
    if kind == 'inf': scores[torch.rand(rows, n+1, generator=g) < .2] = torch.inf; scores[torch.rand(rows, n+1, generator=g) < .2] = -torch.inf
    sizes = torch.randint(0, 2*n, (rows,), generator=g)
    return scores, torch.randint(1, n+1, (rows,), generator=g), (torch.randint(0, n+1, (int(sizes.sum()),), generator=g), torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]))


@pytest.mark.parametrize('kind', ['ties', 'plain', 'inf'])
def test_ranks_and_lists_equal_the_slow_version(kind):
    g = torch.Generator().manual_seed(1)
    for n in (1, 2, 3, 7, 30) * 20:
        scores, targets, seen = case(g, 6, n, kind); found = ranks(scores, targets, seen)
        lists, masked = best(scores, 5), best(scores, 5, history_pairs(seen, targets, n))
        for r, (row, target) in enumerate(zip(scores.tolist(), targets.tolist())):
            gone = seen[0][seen[1][r]:seen[1][r+1]].tolist()
            assert found.kept[r] == slow_rank(row, target) and found.masked[r] == slow_rank(row, target, gone)
            for got, without in ((lists[r], ()), (masked[r], set(gone)-{target})):
                expected = slow_list(row, 5, without); assert got.tolist() == expected + [0]*(5-len(expected))


@pytest.mark.parametrize('strip', [1, 7, 64])
def test_strips_do_not_change_ranks_or_lists(monkeypatch, strip):
    scores, targets, seen = case(torch.Generator().manual_seed(2), 9, 50, 'ties'); whole = ranks(scores, targets, seen), best(scores), best(scores, 10, history_pairs(seen, targets, 50))
    monkeypatch.setattr('imecd.ranking.STRIP', strip)
    again = ranks(scores, targets, seen), best(scores), best(scores, 10, history_pairs(seen, targets, 50))
    assert all(torch.equal(a, b) for a, b in zip([*whole[0], *whole[1:]], [*again[0], *again[1:]]))
    assert STRIP == 2**19


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8])
def test_every_number_type_ranks_alike(dtype):
    g = torch.Generator().manual_seed(3); scores, targets, seen = case(g, 8, 40, 'ties'); a, b = ranks(scores, targets, seen), ranks(scores.to(dtype), targets, seen)
    assert torch.equal(a.kept, b.kept) and torch.equal(a.masked, b.masked) and torch.equal(best(scores), best(scores.to(dtype)))
    assert b.kept.dtype == torch.float32


def test_float64_is_not_rounded():
    scores = torch.tensor([[0., 1, 1+1e-12]], dtype=torch.float64)
    assert ranks(scores, torch.tensor([1])).kept.item() == 2


def test_pad_never_counts():
    scores = torch.randn(4, 9); targets = torch.tensor([1, 2, 3, 8]); seen = torch.zeros(8, dtype=torch.long), torch.tensor([0, 2, 4, 6, 8])
    for value in (torch.inf, -torch.inf, torch.nan, 0.):
        scores[:, 0] = value; found = ranks(scores, targets, seen)
        assert torch.equal(found.kept, found.masked) and found.kept.max() <= 8 and (best(scores, 8) > 0).all()
        assert found.kept.tolist() == [slow_rank(row, t) for row, t in zip(scores.tolist(), targets.tolist())]


@pytest.mark.parametrize('n', [1, 20, 21, 22, 1001])
def test_all_equal_scores_rank_in_the_middle(n):
    targets = torch.arange(1, n+1); found = ranks(torch.full((1, 1), 3.).expand(n, n+1), targets).kept
    assert (found == (n+1)/2).all() and hr(found, 10).max() == (n < 20)
    assert (rank_dot(torch.randn(n, 8), torch.randn(1, 8).expand(n+1, 8), targets).kept == (n+1)/2).all()


def test_half_a_place_above_k_is_no_hit():
    assert [hr([r], 10)[0] for r in (9.5, 10, 10.5)] == [1, 1, 0]
    assert ndcg([10], 10)[0] == 1/math.log2(11) and ndcg([10.5], 10)[0] == 0 and mrr([4], 5)[0] == .25


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_nan_is_named(dtype):
    scores = torch.randn(6, 30).to(dtype); scores[4, 17] = torch.nan; scores[5, 1] = torch.nan
    with pytest.raises(ImecdError, match=r'^sasrec, row 104, item 17: the score is NaN'): ranks(scores, torch.ones(6, dtype=torch.long), name='sasrec', first=100)


def test_nan_is_named_by_dot_products():
    items, queries, targets = torch.randn(50, 4), torch.randn(30, 4), torch.ones(30, dtype=torch.long)
    items[7] = items[8]; bad = items.clone(); bad[9, 2] = torch.nan
    with pytest.raises(ImecdError, match='^item vectors, row 2, item 9: '): rank_dot(queries, bad, targets)
    queries[23, 0] = torch.nan
    for budget in (10, 49, 100, 2**26):
        with pytest.raises(ImecdError, match=r'^m, row 23, item \d+: '): rank_dot(queries, items, targets, budget=budget, name='m')


@pytest.mark.parametrize('targets, place', [([1, 0], 1), ([1, 6], 1), ([-1, 1], 0)])
def test_targets_outside_the_catalogue_are_named(targets, place):
    for call in (lambda t: ranks(torch.randn(2, 6), t), lambda t: rank_dot(torch.randn(2, 3), torch.randn(6, 3), t)):
        with pytest.raises(ImecdError, match=f'^target of row {place}: .* ids go from 1 to 5'): call(torch.tensor(targets))


def test_history_outside_the_catalogue_is_named():
    with pytest.raises(ImecdError, match='^history, place 1: 6 is no item; ids go from 1 to 5'): ranks(torch.randn(1, 6), torch.tensor([1]), (torch.tensor([5, 6]), torch.tensor([0, 2])))


def test_no_rows_and_no_history():
    empty = torch.zeros(0, dtype=torch.long)
    assert len(ranks(torch.randn(0, 6), empty, (empty, torch.zeros(1, dtype=torch.long))).kept) == 0
    found = ranks(torch.randn(3, 6), torch.tensor([1, 2, 3]), (empty, torch.zeros(4, dtype=torch.long)))
    assert torch.equal(found.kept, found.masked)


@pytest.mark.parametrize('n', [5, 17, 33, 100, 161])
@pytest.mark.parametrize('rows', [1, 2, 7, 64])
def test_equal_vectors_tie_in_every_shape(n, rows):
    "Every vector stands twice; the pair shares a place, whatever the product rounds to and wherever the tiles end."
    g = torch.Generator().manual_seed(n*rows); half = torch.randn(n, 64, generator=g); twice = torch.cat([half, half])[torch.randperm(2*n, generator=g)]
    items, q, targets = torch.cat([torch.zeros(1, 64), twice]), torch.randn(rows, 64, generator=g), torch.randint(1, 2*n+1, (rows,), generator=g)
    exact = q.double()@twice.double().T
    above = (exact > exact[torch.arange(rows), targets-1][:, None] + 1e-9).sum(1)
    for budget in (1, 3, n, 4*n+1, 2**26): assert torch.equal(rank_dot(q, items, targets, budget=budget).kept, above+1.5)


def test_best_of_long_rows_is_that_of_a_stable_sort():
    "Long rows are folded before they are searched: nothing is lost at the seam, at ties, or among the last few columns."
    g = torch.Generator().manual_seed(3)
    for n in (705, 2000, 2001, 2007, 12_001, 47_003):
        for rows in (torch.randn(30, n+1, generator=g), torch.randint(0, 40, (30, n+1), generator=g), torch.arange(n+1.).expand(2, -1), torch.zeros(2, n+1)):
            assert torch.equal(best(rows, 10), rows[:, 1:].sort(dim=1, descending=True, stable=True).indices[:, :10]+1), n


def test_rank_dot_equals_ranks_whatever_the_budget():
    g = torch.Generator().manual_seed(5); queries, items = torch.randint(-2, 3, (37, 3), generator=g).float(), torch.randint(-2, 3, (61, 3), generator=g).float()
    targets, sizes = torch.randint(1, 61, (37,), generator=g), torch.randint(0, 30, (37,), generator=g)
    seen = torch.randint(0, 61, (int(sizes.sum()),), generator=g), torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    full = ranks(queries@items.T, targets, seen)     # whole numbers: every product is exact
    for budget in (1, 2, 10, 59, 60, 61, 200, 2**26): assert all(torch.equal(a, b) for a, b in zip(full, rank_dot(queries, items, targets, seen, budget)))
    assert torch.equal(rank_dot(queries, items, targets).masked, full.kept)
    assert torch.equal(rank_dot(queries.double(), items.double(), targets, seen).masked, full.masked)


def test_rank_dot_keeps_no_graph_and_leaves_its_inputs():
    queries, items = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True); before = items.detach().clone()
    assert not rank_dot(queries, items, torch.arange(1, 6)).kept.requires_grad and torch.equal(items.detach(), before)


def test_distinct_gives_exact_ties():
    items = torch.randn(40, 16)[torch.randint(0, 40, (300,))]; d = distinct(items); scores = (torch.randn(3, 16)@d.vectors.T)[:, d.group]
    assert torch.equal(d.vectors[d.group], items[1:]) and torch.equal(d.sizes.long(), d.group.bincount())
    same = (items[1:, None] == items[None, 1:]).all(-1)
    assert all((row[:, None] == row)[same].all() for row in scores)


def test_a_hundred_thousand_equal_scores_list_the_first():
    assert best(torch.zeros(3, 100_001)).tolist() == [list(range(1, 11))]*3
    assert best(torch.full((2, 30), -torch.inf)).tolist() == [[0]*10]*2


def test_scores_are_not_written_to():
    table = torch.randn(1, 30); before = table.clone(); scores = table.expand(4, -1)
    ranks(scores, torch.arange(1, 5)); best(scores, 10, (torch.arange(4), torch.arange(1, 5)))
    assert torch.equal(table, before)


def tie_free(rows=40, n=60):
    g = np.random.default_rng(7); scores = np.stack([g.permutation(n) for _ in range(rows)])/n
    return scores.astype(np.float32), g.integers(n, size=rows)


def test_equal_to_torchmetrics():
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG
    scores, target = tie_free(); rows, n = scores.shape; relevant = np.zeros((rows, n), int); relevant[np.arange(rows), target] = 1
    found = summary(ranks(torch.tensor(np.c_[np.zeros(rows), scores]), torch.tensor(target+1)).kept)
    index = torch.arange(rows).repeat_interleave(n)
    for name, cls in {'hr': RetrievalHitRate, 'ndcg': RetrievalNormalizedDCG, 'mrr': RetrievalMRR}.items():
        for k in (5, 10, 20): assert found[f'{name}@{k}'] == pytest.approx(cls(top_k=k)(torch.tensor(scores).ravel(), torch.tensor(relevant).ravel(), indexes=index).item(), abs=1e-5)


def test_equal_to_ir_measures():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', category=DeprecationWarning, module=r'ir_measures|pytrec_eval|pkg_resources')
        import ir_measures
    scores, target = tie_free(); rows, n = scores.shape
    found = summary(ranks(torch.tensor(np.c_[np.zeros(rows), scores]), torch.tensor(target+1)).kept)
    qrels = [ir_measures.Qrel(f'q{r}', f'd{t}', 1) for r, t in enumerate(target)]
    run = [ir_measures.ScoredDoc(f'q{r}', f'd{i}', float(scores[r, i])) for r in range(rows) for i in range(n)]
    measures = {f'{name}@{k}': ir_measures.parse_measure(f'{theirs}@{k}') for name, theirs in (('hr', 'Success'), ('ndcg', 'nDCG'), ('mrr', 'RR')) for k in (5, 10, 20)}
    theirs = ir_measures.calc_aggregate(list(measures.values()), qrels, run)
    for name, measure_ in measures.items(): assert found[name] == pytest.approx(theirs[measure_], abs=1e-5), name


def test_summary_has_the_promised_names():
    assert list(summary([1, 2, 30])) == [f'{m}@{k}' for m, ks in (('hr', (5, 10, 20, 50)), ('ndcg', (5, 10, 20, 50)), ('mrr', (5, 10, 20))) for k in ks]
    for empty in ([], torch.zeros(0), pl.Series([], dtype=pl.Float64)):
        with pytest.raises(ImecdError, match='no ranks'): summary(empty)
    for bad in ([1, math.nan], [0.5], [1, 0]):
        with pytest.raises(ImecdError, match='the best rank is 1'): summary(bad)


def test_mean_does_not_depend_on_order():
    x = np.random.default_rng(0).random(10_000)*10.**np.arange(10_000).clip(max=12); assert mean(x) == mean(x[::-1]) == mean(np.sort(x))


def test_beyond_accuracy_by_brute_force():
    g = np.random.default_rng(8); n = 40; top = np.stack([g.permutation(n)[:10]+1 for _ in range(25)]); top[3, 4:] = 0; top[7, 1:] = 0; top[9] = 0
    counts, features = g.integers(0, 5, n+1), g.normal(size=(n+1, 6)); features[[5, 6, 7]] = 0
    listed = top[top > 0]; x = np.bincount(listed, minlength=n+1)[1:]
    assert coverage(top, n) == len(set(listed.tolist()))/n
    assert gini(top, n) == pytest.approx(np.abs(x[:, None]-x).sum()/(2*n*n*x.mean()))
    place = {i: np.mean([(counts[j] < counts[i]) + .5*(counts[j] == counts[i]) for j in range(1, n+1)]) for i in range(1, n+1)}
    assert popularity(top, counts) == pytest.approx(np.mean([place[i] for i in listed])) == pytest.approx(popularity(torch.tensor(top), torch.tensor(counts)))
    assert percentiles(counts)[1:].mean() == pytest.approx(.5)
    cos = lambda a, b: 1-features[a]@features[b]/np.linalg.norm(features[a])/np.linalg.norm(features[b])
    known = [[i for i in row if i and features[i].any()] for row in top]
    expected = np.mean([np.mean([cos(a, b) for a, b in product(row, row) if a != b]) for row in known if len(row) > 1])
    assert ild(top, features) == pytest.approx(expected) == pytest.approx(ild(torch.tensor(top), torch.tensor(features, dtype=torch.float32)), abs=1e-6)


def test_beyond_accuracy_of_nothing():
    empty = np.zeros((3, 10), int)
    assert coverage(empty, 5) == 0 and gini(empty, 5) is None and popularity(empty, np.ones(6)) is None and ild(empty, np.ones((6, 2))) is None and ild(empty, None) is None
    assert gini([[1], [2], [3], [4]], 4) == 0 and gini([[1]]*9, 4) == .75


class Noise:
    "Scores that depend on the history alone; few values, so that there are many ties."
    def __init__(self, n, levels=4): self.table, self.levels = torch.randn(n+1, n+1, generator=torch.Generator().manual_seed(0)), levels
    def query(self, batch):
        rows = torch.repeat_interleave(torch.arange(len(batch.users)), batch.lengths)
        return torch.zeros(len(batch.users), self.table.shape[1]).index_add_(0, rows, self.table[batch.items].sign())
    def score(self, rows): return (rows/self.levels).round()


def test_evaluate_by_brute_force_and_in_any_batch(made):
    g = np.random.default_rng(3); data = sequence_data(leave_one_out(made(g.integers(3, 30, 90)))); cases = data.cases('test'); model = Noise(data.n_items)
    answers = evaluate(model, data, cases); scores = model.score(model.query(data.history(cases))).tolist()
    for q, (user, target, stop) in enumerate(zip(*(x.tolist() for x in cases))):
        gone = data.events[data.offsets[user]:stop].tolist()
        assert answers.rank[q] == slow_rank(scores[q], target) and answers.rank_masked[q] == slow_rank(scores[q], target, gone)
        assert answers.top[q].tolist() == slow_list(scores[q], 10) and answers.top_masked[q].tolist() == slow_list(scores[q], 10, set(gone)-{target})
        assert answers.length[q] == data.offsets[user+1]-data.offsets[user] and answers.users[q] == user and answers.targets[q] == target
    order = torch.tensor(g.permutation(90)); shuffled = type(cases)(*(x[order] for x in cases)); counts = data.counts(); whole = measure(answers, counts)
    for size, budget in product((1, 7, 256), (1, 500, 2**26)):
        again = evaluate(model, data, shuffled, size, budget=budget)
        assert all(torch.equal(a, b[order]) for a, b in zip(again, answers)) and measure(again, counts) == whole


def test_evaluate_scores_within_its_budget(made):
    class Watch(Noise):
        rows = []
        def score(self, rows): self.rows.append(len(rows)); return super().score(rows)
    data = sequence_data(leave_one_out(made([5]*50))); model = Watch(data.n_items); evaluate(model, data, data.cases('test'), batch_size=20, budget=2*41*6)
    assert max(model.rows) == 6 and sum(model.rows) == 50


def test_long_lists_of_a_small_catalogue(made):
    data = sequence_data(leave_one_out(made([4, 6, 9], n_items=6))); answers = evaluate(Noise(6), data, data.cases('test'), k=10)
    assert answers.top.shape == (3, 10) and (answers.top[:, 6:] == 0).all() and (answers.top[:, :6].sort(1).values == torch.arange(1, 7)).all()
    assert set(measure(answers, data.counts())['test']) >= {'hr@50', 'ild@10'} and summary(answers.rank)['hr@10'] == 1


class Module(torch.nn.Module):
    def __init__(self, n, fault=None): super().__init__(); self.drop, self.frozen, self.table, self.fault = torch.nn.Dropout(.5), torch.nn.Dropout(.5).eval(), torch.nn.Embedding(n+1, 8), fault
    def query(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        return self.drop(self.table(batch.items[batch.offsets[1:]-1]))
    def score(self, rows):
        scores = rows@self.table.weight.T
        if self.fault == 'nan': scores[-1, 3] = torch.nan
        if self.fault == 'raise': raise KeyError('broken')
        return scores[:, 1:] if self.fault == 'narrow' else scores


def test_a_module_is_asked_at_rest_and_put_back(made):
    data = sequence_data(leave_one_out(made([6]*20))); model = Module(data.n_items).train(); model.frozen.eval(); cases = data.cases('valid')
    a, b = evaluate(model, data, cases), evaluate(model, data, cases, batch_size=3)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and model.training and model.drop.training and not model.frozen.training and torch.is_grad_enabled()
    model.fault = 'raise'
    with pytest.raises(KeyError): evaluate(model, data, cases)
    assert model.training and not model.frozen.training


@pytest.mark.parametrize('n', [1, 2, 5])
def test_parts_are_answered_in_order_with_one_core_each(n, threads):
    threads(n); seen, lock = [], threading.Barrier(min(n, 4), timeout=60)
    def work(k):
        if k and n > 1: lock.wait()                                                # nobody gets on before all are at work
        seen.append(threading.get_ident()); return k, torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled('cpu'), torch.get_autocast_dtype('cpu')
    with torch.no_grad(), torch.autocast('cpu', torch.float16): found = list(side_by_side(work, range(13), n))
    assert [x[0] for x in found] == list(range(13)) and {x[1] for x in found[1:]} == {1} and {x[2:] for x in found} == {(False, True, torch.float16)}
    assert min(n, 4) <= len({*seen[1:]} - {threading.get_ident()}) <= n if n > 1 else {*seen} == {threading.get_ident()}
    assert torch.get_num_threads() == n and list(side_by_side(work, [], n)) == []


def test_who_asks_meanwhile_does_all_alone_and_torch_is_as_it_was(threads):
    threads(2); met = []
    def inner(k): met.append(threading.get_ident()); return k
    def outer(k): return k, threading.get_ident(), list(side_by_side(inner, range(5), 2)) == [0, 1, 2, 3, 4] and {*met[-5:]} == {threading.get_ident()} if k == 0 else True
    assert all(ok for *_, ok in side_by_side(outer, range(4), 2)) and torch.get_num_threads() == 2
    begun = side_by_side(lambda k: k, range(50), 2); next(begun); next(begun); other = threading.Thread(target=lambda: list(side_by_side(inner, range(9), 2))); other.start(); other.join(); begun.close()
    assert torch.get_num_threads() == 2 and len({*met[-9:]}) == 1 and [k for k in side_by_side(lambda k: k, range(9), 2)] == [*range(9)]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 400), most=st.integers(1, 200), cores=st.integers(1, 16))
def test_cut_parts_are_the_same_questions_in_order(n, most, cores):
    parts = torch.arange(n).split(most) if n else []; found = cut_parts(parts, cores)
    assert torch.equal(torch.cat([torch.arange(0), *found]), torch.arange(n)) and all(0 < len(p) <= most for p in found)
    if most >= 33: assert sum(len(p) < 16 for p in found[1:]) <= 2                  # what is left of the first and of the last part
    if cores > 1 and n: assert len(found[0]) == 1 and len(found) > min(2*cores, (n-1)//max(16, most))


def test_a_part_that_fails_stops_the_others(threads):
    threads(2); met = []
    def work(k): met.append(k); time.sleep(.01); return 1//(k-3)
    with pytest.raises(ZeroDivisionError): list(side_by_side(work, range(500), 2))
    assert len(met) < 400 and torch.get_num_threads() == 2


def test_only_modules_on_a_processor_are_asked_by_several(threads, monkeypatch):
    threads(3); assert askers(Module(5)) == 3 and askers(Noise(5)) == 1 and askers(Module(5).to('meta')) == 1
    threads(40); assert askers(Module(5)) == 16 and askers(torch.nn.Module()) == 16
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True); assert askers(Module(5)) == 1


def test_several_threads_find_the_same_answers(made, threads):
    g = np.random.default_rng(3); data = sequence_data(leave_one_out(made(g.integers(3, 30, 90)))); cases, found = data.cases('test'), []
    torch.manual_seed(0); model = Module(data.n_items)
    for n in (1, 2, 4): threads(n); found += [evaluate(model, data, cases, size, budget=budget) for size, budget in ((7, None), (16, 2*41*6))]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_what_a_model_must_not_do_is_named(made):
    data = sequence_data(leave_one_out(made([6]*20))); cases = data.cases('test')
    with pytest.raises(ImecdError, match='^Module, row 7, item 3: the score is NaN'): evaluate(Module(40, 'nan'), data, cases, batch_size=8)
    with pytest.raises(ImecdError, match=r'^Module.score gave a table \(20, 40\) where \(rows, items\+1\) is \(20, 41\)'): evaluate(Module(40, 'narrow'), data, cases)
    with pytest.raises(ImecdError, match='no question to ask'): evaluate(Module(40), data, type(cases)(*(x[:0] for x in cases)))


def test_a_sparse_query_is_cut_by_rows(made):
    from scipy.sparse import csr_matrix
    class Sparse:
        def query(self, batch): return csr_matrix((np.ones(len(batch.items), np.float32), batch.items.numpy(), batch.offsets.numpy()), shape=(len(batch.users), 41))
        def score(self, rows): return torch.from_numpy(rows.toarray())
    data = sequence_data(leave_one_out(made([5, 9, 30]*7))); cases = data.cases('test')
    assert all(torch.equal(a, b) for a, b in zip(evaluate(Sparse(), data, cases), evaluate(Sparse(), data, cases, 4, budget=200)))


def test_measure_has_the_keys_of_a_run(made):
    data = sequence_data(leave_one_out(made([8]*30))); found = measure(evaluate(Noise(40), data, data.cases('valid')), data.counts(), torch.randn(41, 5), name='valid')
    keys = {f'{m}@{k}' for m in ('hr', 'ndcg') for k in (5, 10, 20, 50)} | {f'mrr@{k}' for k in (5, 10, 20)} | {f'{m}@10' for m in ('coverage', 'gini', 'popularity', 'ild')}
    assert set(found) == {'valid', 'valid_masked'} and all(set(part) == keys and all(type(v) is float for v in part.values()) for part in found.values())
    with pytest.raises(ImecdError, match='features have 40 rows where there are 40 items and PAD'): measure(evaluate(Noise(40), data, data.cases('test')), data.counts(), torch.randn(40, 5))


def answer(users, rank, targets=None, length=None, masked=None):
    n = len(users); t = lambda x, d: torch.tensor(x if x is not None else d)
    return Evaluation(t(users, 0), t(targets, [1]*n), t(rank, 0).float(), t(masked, rank).float(), t(length, [5]*n), torch.ones(n, 10, dtype=torch.long), torch.ones(n, 10, dtype=torch.long))


def test_users_count_once():
    e = answer([2, 2, 2, 0], [1, 1, 1, 100], masked=[1, 60, 60, 100])
    assert by_user(e)['hr@10'] == .5 and by_user(e, masked=True)['hr@10'] == pytest.approx(1/6) and measure(e, np.ones(3))['test']['hr@10'] == .5
    assert user_means(e).columns[0] == 'user' and user_means(e)['user'].to_list() == [0, 2] and set(by_user(e)) == set(summary([1]))


def test_tie_cases_of_real_ties(made):
    ties = np.array([0, 1, 2, 2, 2, 0, 1, 2, 3, 4]); data = sequence_data(leave_one_out(made([5, 5], ties=ties))); answers = evaluate(Noise(40), data, data.tie_cases())
    assert len(answers.users) > len(set(answers.users.tolist())) and 0 <= by_user(answers)['ndcg@10'] <= 1
    assert by_user(answers)['hr@20'] == pytest.approx(np.mean([hr(answers.rank[answers.users == u], 20).mean() for u in (0, 1)]))


def test_quarters_by_brute_force():
    g = np.random.default_rng(2)
    for counts in (g.integers(0, 6, 50), g.integers(0, 1000, 50), np.zeros(5, int), np.array([9, 1])):
        trained = [c for c in counts[1:] if c]
        expected = [0 if not c or i == 0 else min(4, 1+int(4*(sum(x < c for x in trained)+.5*sum(x == c for x in trained))/len(trained))) for i, c in enumerate(counts)]
        assert quarters(counts).tolist() == expected == quarters(torch.tensor(counts)).tolist()
    assert np.bincount(quarters(np.arange(101)))[1:].tolist() == [25]*4


def test_slices_by_hand():
    e = answer([0, 1, 2, 3, 4], [1, 50, 2, 1, 11], targets=[1, 2, 3, 4, 5], length=[3, 5, 6, 11, 200], masked=[1, 5, 2, 1, 9]); table = slices(e, np.array([0, 0, 1, 2, 3, 4]))
    row = lambda s, group: table.filter(slice=s, group=group).row(0, named=True)
    assert [row('length', x)['users'] for x in ('<5', '5-6', '7-10', '>10')] == [1, 2, 0, 2] and row('length', '7-10')['ndcg@10'] is None and row('length', '5-6')['hr@10'] == .5
    assert [row('popularity', str(i))['users'] for i in (1, 2, 3, 4)] == [1]*4 and row('target', 'new')['hr@10'] == 1 and row('target', 'known')['users'] == 4
    assert row('all', 'all')['hr@10'] == .6 and row('all', 'all')['hr@10_masked'] == 1
    assert slices(answer([0], [3]), np.array([0, 0, 0])).filter(slice='popularity')['users'].to_list() == [0]*4


def test_figures_are_drawn():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    e = answer(list(range(30)), list(range(1, 31)), targets=[1]*30); table = slices(e, np.array([0, 2, 3])); found = compare(e, e, metric='hr@5')
    for ax in (plot_discount(), plot_ranks({'a $_{': e, 'b': e.rank}, 40), plot_slices(table), plot_slices({'a': table, 'b': table}), plot_compare(found)):
        assert ax.get_xlabel() and ax.get_ylabel(); ax.figure.canvas.draw(); plt.close(ax.figure)


def frames(seed=0, users=300):
    g = np.random.default_rng(seed); a, b = g.integers(1, 40, users).astype(float), g.integers(1, 60, users).astype(float)
    return [pl.DataFrame({'user': [f'u{i}' for i in range(users)], 'rank': x, 'rank_masked': np.maximum(x-3, 1)}) for x in (a, b)]


def test_compare_equals_scipy():
    a, b = frames(); found = compare(a, b.sample(fraction=1, shuffle=True, seed=1), names=('A', 'B')).row(0, named=True)
    x, y = ndcg(a['rank'], 10), ndcg(b['rank'], 10); t, p = stats.ttest_rel(x, y)
    assert (found['t'], found['p'], found['p_holm']) == pytest.approx((t, p, p)) and found['difference'] == pytest.approx((x-y).mean()) and found['mean'] == pytest.approx(x.mean())
    assert found['effect'] == pytest.approx((x-y).mean()/(x-y).std(ddof=1)) and found['p_wilcoxon'] == pytest.approx(stats.wilcoxon((x-y)[x != y], method='approx').pvalue)
    assert found['low'] < found['difference'] < found['high'] and (found['low'], found['high']) == pytest.approx(stats.t.interval(.95, 299, (x-y).mean(), stats.sem(x-y)), abs=.2*stats.sem(x-y))  # the Monte Carlo error of a 2.5 % quantile of 2,000 is .06 of it
    masked = compare(a, b, masked=True).row(0, named=True); assert masked['mean'] == pytest.approx(ndcg(a['rank_masked'], 10).mean())


def test_compare_corrects_over_all_comparisons():
    a, b = frames(); c, d = frames(1); found = compare(a, b, c, d, names=('a', 'b', 'c', 'd'))
    assert found['p_holm'].to_list() == holm(found['p']).tolist() and found['p_wilcoxon_holm'].to_list() == holm(found['p_wilcoxon']).tolist() and found['against'].to_list() == ['b', 'c', 'd']
    assert compare(a, b, c, d, names=('a', 'b', 'c', 'd')).equals(found)


def test_holm_by_hand():
    assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02]) and holm([.9, .6]) == pytest.approx([1, 1]) and holm([.02]) == pytest.approx([.02]) and len(holm([])) == 0


def test_differences_without_spread():
    x = np.random.default_rng(0).random(50)
    assert paired(x, x) == {'difference': 0, 't': 0, 'p': 1, 'effect': 0, 'p_wilcoxon': 1}
    up = paired(x+.1, x); assert up['t'] == up['effect'] == math.inf and up['p'] == 0 and up['p_wilcoxon'] < 1e-6 and paired(x, x+.1)['t'] == -math.inf
    for n in (2, 3, 5, 9, 10, 60):
        found = paired(np.r_[1, np.zeros(n-1)], np.zeros(n)); assert all(map(math.isfinite, found.values())) and found['p_wilcoxon'] == pytest.approx(1, abs=.7)


def test_bootstrap_is_seeded_and_covers():
    g = np.random.default_rng(4); samples = g.normal(.2, 1, (200, 150)); found = [bootstrap(d, resamples=400) for d in samples]
    assert bootstrap(samples[0]) == bootstrap(samples[0]) != bootstrap(samples[0], seed=1) and .88 <= np.mean([lo <= .2 <= hi for lo, hi in found]) <= .99
    lo, hi = bootstrap(np.random.default_rng(0).normal(size=300_000), resamples=30); assert lo < hi


def test_compare_refuses_what_does_not_pair():
    a, b = frames()
    with pytest.raises(ImecdError, match=r"user 'u5' is only in B \(1 such users\)"): compare(a.filter(pl.col('user') != 'u5'), b, names=('A', 'B'))
    with pytest.raises(ImecdError, match="user 'u0' is only in A"): compare(a, b[1:], names=('A', 'B'))
    with pytest.raises(ImecdError, match='same kind of id'): compare(a, answer([1, 2], [1, 2]))
    with pytest.raises(ImecdError, match=r'user 2 was asked for \[1\] in ours and for \[3\] in other 1'): compare(answer([1, 2], [1, 2]), answer([2, 1], [1, 2], targets=[3, 1]))
    with pytest.raises(ImecdError, match='at least two models'): compare(a)
    with pytest.raises(ImecdError, match='a name for each'): compare(a, b, names=('a',))
    with pytest.raises(ImecdError, match='at least two are needed'): compare(a[:1], b[:1])
    with pytest.raises(ImecdError, match="no column 'rank_masked'"): compare(a.drop('rank_masked'), b)
    with pytest.raises(ImecdError, match='holds several splits'): compare(a.with_columns(split=pl.when(pl.int_range(pl.len()) < 5).then(pl.lit('valid')).otherwise(pl.lit('test'))), b)
    for metric in ('ndcg', 'ndcg@0', 'ndcg@x', 'ild@10', ''):
        with pytest.raises(ImecdError, match='is not one of'): compare(a, b, metric=metric)


def test_users_needed_is_enough():
    g = np.random.default_rng(6); n = users_needed(.3); assert n == 88
    assert .74 <= np.mean([paired(d, np.zeros(n))['p'] < .05 for d in g.normal(.3, 1, (400, n))]) <= .86


def test_bench_speaks_json(tmp_path):
    import json
    script = Path(__file__).parents[1]/'bench'/'ranking.py'
    run = subprocess.run([sys.executable, str(script), '--users', '50', '--items', '2000'], capture_output=True, text=True, check=True, cwd=tmp_path)
    found = json.loads(run.stdout); assert found['users'] == 50 and found['extra_peak_mb'] < 500 and 800 < found['mean_rank'] < 1200


@pytest.mark.parametrize('kind', ['cpu', 'cuda'])
@pytest.mark.parametrize('n', [1, 700, 12_000, 10**6, 10**8])
def test_a_block_of_scores_takes_128_mb_at_most(n, kind):
    rows = block_rows(n, kind); assert rows == 1 or rows*n*4 <= 128*2**20; assert block_rows(n, kind, 5*n) == 5 and block_rows(n, kind, 10*n, 2) == 5 and block_rows(n, kind, 5*n, 16) == 1
    assert block_rows(n, kind, None, 16) == 1 or 16*block_rows(n, kind, None, 16)*n*4 <= 128*2**20
    if kind == 'cpu' and n <= 65_536: assert 64*n >= rows*n or rows*n*4 <= 16*2**20


@pytest.mark.parametrize('most', [1, 2, 3, 16, 349, 10**6])
def test_even_blocks_differ_by_one_row_and_are_not_half_as_large_again(most):
    for n in {*range(60), 3*most//2, 3*most//2+1, 5*most, 5*most+1}:
        blocks = even_blocks(n, most); sizes = [b.stop-b.start for b in blocks]; assert [*range(n)] == [k for b in blocks for k in range(b.start, b.stop)]
        assert max(sizes)-min(sizes) <= 1 and max(sizes) <= math.ceil(1.5*most) and (min(sizes) >= int(.75*most) or len(blocks) == 1)
