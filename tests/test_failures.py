"""The ways in which such a model fails, and what notices.

| # | failure | detector |
|---|---|---|
| 1 | expert collapse | `test_experts_specialise` |
| 2 | the gate ignores the ID, or is constant | `test_gates_follow_items`, `test_model.py::test_presets_do_what_their_name_says` |
| 3 | codebook collapse | `test_codes_are_in_use`, `test_streams_stay_wide`, `test_vq.py::test_collapse_without_revival_and_not_with_it` |
| 4 | state of the codes lost | `test_model.py::test_saved_and_loaded_to_the_bit`, `test_vq.py::test_saved_and_loaded_to_the_bit` |
| 5 | statistics of the codes polluted by padding | `test_model.py::test_only_items_are_counted_by_the_codes` |
| 6 | diffusion ignores the condition | `test_the_condition_is_used` |
| 7 | diffusion ignores the noisy item | `test_the_noisy_item_is_used`, `test_diffusion.py::test_learns_to_use_condition_and_noise` |
| 8 | the answer leaks | `test_the_answer_changes_nothing`, `test_model.py::test_nothing_before_a_changed_item_moves`, `test_batch.py::test_the_target_never_travels_with_the_history` |
| 9 | everybody gets the mean, or what is popular | `test_lists_are_not_those_of_popularity`, `test_generated_vectors_differ` |
| 10 | vectors shrink | `test_vectors_keep_their_spread`, `test_only_an_open_target_shrinks`, `test_diffusion.py::test_targets_are_held_still` |
| 11 | wrong schedules | `test_diffusion.py::test_schedules_are_sound`, `test_diffusion.py::test_q_sample_moments`, `test_diffusion.py::test_perfect_denoiser_is_returned_exactly`, `test_diffusion.py::test_all_steps_reach_the_gaussian` |
| 12 | padding leaks | `test_model.py::test_company_changes_nothing`, `test_model.py::test_pad_is_no_item` |
| 13 | the batch changes the result | `test_model.py::test_batches_change_no_rank` |
| 14 | features of another item | `test_shuffled_features_lose`, `test_features.py::test_strangers_files_and_ids` |
| 15 | false negatives | `test_diffusion.py::test_contrast_is_the_formula`, `test_diffusion.py::test_users_with_the_same_target_are_no_contrast` |
| 16 | numbers at the edges | `test_model.py::test_everything_may_be_one`, `test_model.py::test_short_histories_and_batches_of_one`, `test_model.py::test_all_pictures_may_be_missing` |
| 17 | parameters that never learn | `test_model.py::test_every_parameter_learns` |
| 18 | ties count as hits | `test_metrics.py::test_all_equal_scores_rank_in_the_middle` |
| 19 | the order of a file decides | `test_histories.py::test_file_order_never_matters` |
| 20 | wrong metrics | `test_metrics.py::test_ranks_and_lists_equal_the_slow_version`, `test_metrics.py::test_equal_to_torchmetrics` |
| 21 | one pass is not every prefix | `test_model.py::test_one_pass_is_every_prefix`, `test_encoder.py::test_one_pass_is_every_prefix` |
| 22 | chunks change the loss | `test_model.py::test_chunks_change_neither_loss_nor_gradients`, `test_catalogue.py::test_strips_are_the_dense_loss` |
| 23 | all samples are the same, or none can be had again | `test_samples_differ_and_can_be_had_again`, `test_diffusion.py::test_samples_differ_by_seed_alone` |

What needs a trained model is measured here, on one that has just been trained; the thresholds are those of a sick model, far from what a healthy one reaches.
"""
import ast
import copy
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from imecd.baselines import Popularity
from imecd.batch import Batch, SequenceData, sequence_data
from imecd.core import PAD, configure
from imecd.diffusion import keyed_noise, q_sample, sphere
from imecd.encode import load_features
from imecd.features import Features
from imecd.histories import leave_one_out, load_interactions
from imecd.metrics import Evaluation, coverage, evaluate, gini, ndcg, popularity
from imecd.model import IMECD, PRESETS, ModelConfig, Query
from imecd.ranking import best, ranks
from imecd.shop import make_shop
from imecd.towers import seen_items
from imecd.train import TrainConfig, fit
from imecd.vq import perplexity, shares

CODES, EXPERTS, STEPS = 12, 4, 16
SMALL = dict(dim=32, layers=1, heads=2, inner=64, length=20, codes=CODES, experts=EXPERTS, steps=STEPS, pure=.3, dropout=.2)
RUN = dict(targets=200, lr=4e-3, patience=99)


# the table

def detectors():
    "Failure -> the tests that detect it, as the table says."
    lines = re.findall(r'^\| (\d+) \|.*\| (.*) \|$', __doc__, re.M)
    return {int(n): [(file or 'test_failures.py', name) for file, name in re.findall(r'`(?:(test_\w+\.py)::)?(test_\w+)`', cell)] for n, cell in lines}


def test_every_failure_has_a_detector():
    "All 23, and every test that is named exists."
    found = detectors(); assert sorted(found) == list(range(1, 24)) and all(found.values())
    defined = {p.name: {n.name for n in ast.parse(p.read_text()).body if isinstance(n, ast.FunctionDef)} for p in Path(__file__).parent.glob('test_*.py')}
    for number, tests in found.items():
        for file, name in tests: assert name in defined.get(file, ()), f'failure {number}: there is no {file}::{name}'


def test_docstrings_name_the_failures():
    "A detector of this file names its failures, and only those that the table gives it."
    body = {n.name: ast.get_docstring(n) or '' for n in ast.parse(Path(__file__).read_text()).body if isinstance(n, ast.FunctionDef) and n.name.startswith('test_')}
    told = {name: {int(k) for k in re.findall(r'E\.(\d+)', text)} for name, text in body.items()}
    wanted = {name: {number for number, tests in detectors().items() if ('test_failures.py', name) in tests} for name in body}
    assert told == wanted


# one training

class Learned(NamedTuple):
    "A trained model, and what it says of the test questions."
    model: IMECD
    data: SequenceData
    features: Features
    batch: Batch          # the test histories
    targets: Tensor       # (Q,)
    conditions: Tensor    # (Q, D_x)
    answers: Evaluation
    floor: Evaluation     # of popularity

    def ndcg(self, vectors, seen=True):
        "NDCG@10 of generated vectors (Q, D_x), with what each user has, or without."
        table = seen_items(self.batch, self.batch.offsets[1:]-1)
        return mean(ranks(self.model.score(Query(self.model.ask(vectors), table if seen else torch.zeros_like(table), None)), self.targets).kept)
    def generate(self, conditions=None, seed=0, steps=1): return self.model.cdg.generate(self.conditions if conditions is None else conditions, self.batch.users, seed, steps)


def mean(ranks, k=10): return float(ndcg(ranks, k).mean())


@pytest.fixture(scope='session')
def goods(tmp_path_factory):
    "A shop with pictures: its questions and its features."
    folder = make_shop(tmp_path_factory.mktemp('failures')/'shop', n_users=700, n_items=150)
    return sequence_data(leave_one_out(load_interactions(folder)), SMALL['length']), load_features(folder)


def train(name, data, features, epochs, warmup, **changes):
    "A model as its last epoch left it: failures are looked for where it was trained longest, not where validation was best."
    m, last = IMECD.of(configure(ModelConfig, SMALL | PRESETS[name] | changes), data, features), {}
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='codebook of')               # its own test says so
        fit(m, data, TrainConfig(epochs=epochs, warmup=warmup, **RUN), lambda epoch, row, model: last.update(copy.deepcopy(model.state_dict())))
    m.load_state_dict(last); return m.eval()


@pytest.fixture(scope='session')
def learned(goods):
    data, x = goods; cases = data.cases('test'); batch = data.history(cases); m = train('imecd', data, x, 8, 2)
    return Learned(m, data, x, batch, cases.targets, m.condition(batch)[0], evaluate(m, data, cases), evaluate(Popularity().fit(data), data, cases))


def spread(x):
    "Effective rank: exp of the entropy of the singular values of the centred rows."
    s = torch.linalg.svdvals((x-x.mean(0)).double()); p = s/s.sum(); return float(torch.exp(-(p*p.clamp(min=1e-12).log()).sum()))


def alike(x):
    "Mean cosine between two different rows."
    u = F.normalize(x, dim=-1); n = len(u); return float((u.sum(0).square().sum()-n)/(n*(n-1)))


def test_it_has_learned(learned):
    "Without this the detectors below would measure nothing: far above popularity, with and without what the user has."
    floor = mean(learned.floor.rank); assert mean(learned.answers.rank) > 3*floor and learned.ndcg(learned.generate(), seen=False) > 2*floor


# items

def test_experts_specialise(learned):
    "E.1: no expert does everything, and items do not all ask the same of all of them."
    m = learned.model; g = m.items().moe.gates
    for k, name in enumerate(m.table.modalities):
        gates = g[m.table.present[:, k], k]; load, entropy = gates.mean(0), -(gates.clamp(min=1e-12).log()*gates).sum(-1).mean()
        assert load.max() < .9 and entropy < .999*math.log(EXPERTS), name


def test_gates_follow_items(learned):
    """E.2: gates and trust vary over items, and another item's gates make other items of them.

    NDCG falls by a percent or less when the rows of gates are permuted at test time, and not on every seed, so that is no criterion here; the control `shuffled_gate` is measured over seeds in the experiments."""
    m = learned.model; moe, own = m.items().moe, [gate.forward for gate in m.table.moe.gates]
    for k in range(len(own)):
        here = m.table.present[:, k]; assert moe.gates[here, k].var(0).mean() > 1e-4 and moe.trust[here, k].std() > 1e-3
    order = torch.cat([torch.zeros(1, dtype=torch.long), torch.randperm(m.n_items, generator=torch.Generator().manual_seed(0))+1])
    try:
        for gate, forward in zip(m.table.moe.gates, own): gate.forward = lambda *x, forward=forward: type(out := forward(*x))(*(v[order] for v in out))
        with torch.no_grad(): other = m.table().moe
    finally:
        for gate in m.table.moe.gates: del gate.forward
    assert torch.allclose(other.gates[1:], moe.gates[order][1:], atol=1e-6)
    for k in range(len(own)):
        here = m.table.present[:, k]; moved = (F.normalize(other.content[k][here], dim=-1)-F.normalize(moe.content[k][here], dim=-1)).norm(dim=-1); assert moved.mean() > .01


# sequences

def states(learned, part='valid'):
    m = learned.model; batch = learned.data.history(learned.data.cases(part)); h = m.reader.states(m.items(), batch)
    return h.detach(), m.reader(h, batch)[1]


def test_codes_are_in_use(learned):
    "E.3: on validation every stream uses most of its codes, and as if there were at least a third of them."
    for name, codes in zip(learned.model.config.streams.split('+'), states(learned)[1].codes):
        assert perplexity(codes, CODES) > .3*CODES and (shares(codes, CODES) > 0).double().mean() > .8, name


def test_streams_stay_wide(learned):
    "E.3: a codebook is also in use when it quantises next to nothing; states of every stream vary by more than a tenth of their size."
    for name, h in zip(learned.model.config.streams.split('+'), states(learned)[0]): assert h.std(0).mean() > .1*h.square().mean().sqrt(), name


# generation

def test_the_condition_is_used(learned):
    "E.6: with the conditions of other users NDCG falls to that of popularity or below, and the guess depends on the condition, not on the pure noise."
    order = torch.randperm(len(learned.targets), generator=torch.Generator().manual_seed(0)); strange = learned.ndcg(learned.generate(learned.conditions[order]), seen=False)
    assert strange <= mean(learned.floor.rank) and strange < .4*learned.ndcg(learned.generate(), seen=False)
    c = sphere(learned.conditions[:60].float()); noise = [keyed_noise(torch.full((60,), k), c.shape[1], 1) for k in range(12)]
    with torch.no_grad(): grid = torch.stack([learned.model.cdg.guess(x, STEPS, c) for x in noise])                  # (noise, condition, D_x)
    assert grid.var(1).mean() > 10*grid.var(0).mean() and grid.var(1).mean() > .1


def test_the_noisy_item_is_used(learned):
    "E.7: the guess moves with the noisy item where that says something; the less noise the lower the cross-entropy; and one step is not what several steps give."
    m, y = learned.model, learned.targets; vectors = m.items().vectors; z = sphere(vectors[y]); noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)); loss = []
    for t in (1, STEPS//4, STEPS//2, STEPS):
        x = q_sample(z, m.cdg.schedule.alpha_bar[t].expand(len(z)), noise).requires_grad_(); guess = m.cdg.guess(x, t, sphere(learned.conditions.float()))
        slope = torch.autograd.grad((guess*noise).sum(), x)[0].norm(dim=-1).mean()
        if t <= STEPS//4: assert slope > .1
        loss.append(F.cross_entropy((m.ask(guess)@vectors.T).detach()[:, 1:], y-1))
    assert loss[0] < loss[1] < loss[2] < loss[3]+.05 and loss[0] < loss[3]-.5
    with torch.no_grad(): assert (learned.generate()-learned.generate(steps=4)).abs().max() > .1


def test_the_answer_changes_nothing(learned):
    "E.8: with other test items in the data every query and every score is the same, bit by bit."
    data = learned.data.split.data; events = data.events.copy(); at = learned.data.split.test; at = at[at >= 0]; events[at] = events[at] % data.n_items+1
    other = sequence_data(learned.data.split._replace(data=data._replace(events=events)), learned.data.length); cases = other.cases('test'); assert (cases.targets != learned.targets).all()
    one, two = (learned.model.query(d.history(d.cases('test'))) for d in (learned.data, other))
    assert torch.equal(one.vectors, two.vectors) and torch.equal(one.seen, two.seen) and torch.equal(learned.model.score(one), learned.model.score(two))


def test_lists_are_not_those_of_popularity(learned):
    "E.9: lists cover most of the catalogue, more evenly and with rarer items than popularity's."
    n, counts = learned.data.n_items, learned.data.counts(); own, floor = learned.answers.top.numpy(), learned.floor.top.numpy()
    assert coverage(own, n) > .8 > .2 > coverage(floor, n) and gini(own, n) < .6*gini(floor, n) and popularity(own, counts) < popularity(floor, counts)-.1


def test_generated_vectors_differ(learned):
    "E.9: users do not all get the mean: generated vectors are not one direction, nor a few."
    x0 = learned.generate(); assert alike(x0) < .9 and spread(x0) > 8


def test_vectors_keep_their_spread(learned):
    "E.10: item vectors span as much of their space as training leaves free; no dimension is dead."
    z = learned.model.items().vectors[1:]; fresh = IMECD.of(learned.model.config, learned.data, learned.features).eval().items().vectors[1:]
    assert spread(z) > .3*spread(fresh) and z.std(0).mean() > .3*fresh.std(0).mean() and z.std(0).min() > 1e-3 and alike(z) < .9


def test_only_an_open_target_shrinks(goods):
    "E.10: with the squared error alone, targets that take part in it all meet in one point; as the model holds them still, they do not."
    data, _ = goods; c = SMALL | PRESETS['id_only'] | dict(vq='none', dim=16, dropout=0., seen=False, contrast='none', w_generated=0., w_condition=0., w_mse=1.); found = {}
    for held in (True, False):
        m = IMECD.of(configure(ModelConfig, c), data); m.train(); optimiser = torch.optim.Adam(m.parameters(), 1e-2)
        for batch in [b for epoch in range(2) for b in data.epoch(0, epoch, 256)]:
            out = m.loss(batch); y = batch.targets[batch.targets != PAD]
            loss = out.loss if held else (2-2*F.cosine_similarity(out.cdg.x0, out.items.vectors[y], dim=-1)).mean()
            optimiser.zero_grad(); loss.backward(); optimiser.step()
        found[held] = alike(m.table().vectors[1:].detach())
    assert found[True] < .4 and found[False] > .8


def test_shuffled_features_lose(goods):
    "E.14: on streams of text alone, the features of other items cost a third of the accuracy or more."
    data, x = goods; order = np.r_[0, np.random.default_rng(0).permutation(data.n_items)+1]; cases = data.cases('test'); found = []
    for features in (x, x._replace(text=x.text[order], image=x.image[order], present=x.present[order])):
        m = train('text_only', data, features, 4, 0, gate='none', vq='none', head='direct', seen=False, ties=False, feature_dropout=0.); found.append(mean(evaluate(m, data, cases).rank))
    assert found[1] < .67*found[0]


def test_samples_differ_and_can_be_had_again(learned):
    "E.23: several steps from other noise end elsewhere, and lists differ; the same seed gives the same sample to the bit. A single step starts from noise that says nothing, and gives nearly one answer."
    few = torch.stack([learned.generate(seed=s, steps=4) for s in range(5)]); one = torch.stack([learned.generate(seed=s) for s in range(5)])
    assert few.var(0).mean() > 1e-3 and one.var(0).mean() < few.var(0).mean()
    assert torch.equal(few[0], learned.generate(seed=0, steps=4)) and torch.equal(one[1], learned.generate(seed=1))
    seen = seen_items(learned.batch, learned.batch.offsets[1:]-1); top = [best(learned.model.score(Query(learned.model.ask(x), seen, None)), 10) for x in few[:2]]
    assert (top[0] != top[1]).float().mean() > .05
