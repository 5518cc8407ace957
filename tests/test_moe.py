"ID-guided experts: agreement, gates, trust, and what the room must never do."
import warnings

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from imecd.core import ImecdError
from imecd.moe import ASKING, FIXED, GATES, Agreement, IDGate, IDMoE, evidence, load_balance, plot_gates, plot_load, plot_shuffled, plot_trust, regression, sparse, strangers

SMALL = settings(max_examples=15, deadline=None)
every_gate = pytest.mark.parametrize('gate', GATES)


def content(n=30, widths=(10, 14), seed=0, gone=.2):
    "Features of n items, a mask with holes, which items are known; row 0 is PAD."
    g = torch.Generator().manual_seed(seed); present = torch.rand(n+1, len(widths), generator=g) >= gone; present[0] = False
    features = [torch.randn(n+1, w, generator=g)*present[:, m:m+1] for m, w in enumerate(widths)]
    return features, present, (torch.rand(n+1, generator=g) > .1).index_fill(0, torch.tensor([0]), False)


def room(gate='id_query', n=30, dim=8, seed=0, gone=.2, widths=(10, 14), **kw):
    features, present, known = content(n, widths, seed, gone); torch.manual_seed(seed)
    ids = torch.randn(n+1, dim); ids[0] = 0
    return IDMoE(features, present, known, dim, gate=gate, **kw), ids.requires_grad_(), features, present


def same(a, b, tol=1e-5): torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# agreement

@SMALL
@given(st.integers(3, 25), st.integers(1, 12), st.sampled_from([.01, 1., 20.]), st.integers(0, 99))
def test_leaving_out_equals_refits(n, width, ridge, seed):
    g = torch.Generator().manual_seed(seed); f, e = (torch.randn(n+1, w, generator=g, dtype=torch.float64) for w in (width, 4))
    known = (torch.rand(n+1, generator=g) > .2).index_fill(0, torch.tensor([1, 2, 3]), True); known[0] = False
    x = F.normalize(f-f[known].mean(0), dim=1)*known[:, None]; e = (e-e[known].mean(0))*known[:, None]
    got = Agreement(f, known, ridge, width).guess(e)
    for i in known.nonzero()[:, 0].tolist():
        rest = known.clone(); rest[i] = False
        same(got[i], x[i]@torch.linalg.solve(x[rest].T@x[rest]+ridge*torch.eye(width, dtype=torch.float64), x[rest].T@e[rest]), 1e-6)
    assert not got[~known].any()


@SMALL
@given(st.integers(3, 30), st.integers(2, 9), st.integers(0, 99))
def test_evidence_equals_every_pair(n, dim, seed):
    g = torch.Generator().manual_seed(seed); e, guess = (torch.randn(n, dim, generator=g, dtype=torch.float64) for _ in range(2))
    known = torch.ones(n, 1, dtype=torch.float64); known[torch.randperm(n, generator=g)[:n//4]] = 0; rows = known[:, 0] > 0
    a, b = F.normalize(e[rows], dim=1), F.normalize(guess[rows], dim=1); z = []
    for i in range(len(a)):
        others = torch.stack([a[i]@b[j] for j in range(len(a)) if j != i])
        z.append((a[i]@b[i]-others.mean())/max(float(others.var(correction=0)), 1/dim)**.5)
    z = torch.stack(z); gap = z.mean().clamp(min=0); got = evidence(e, guess, known)
    same(got[rows], gap*z-gap**2/2, 1e-8); assert not got[~rows].any()


def test_mean_and_spread_are_those_of_a_permutation():
    "z of strangers has mean 0 and spread 1 when contents are handed out at random."
    torch.manual_seed(0); e, guess = (F.normalize(torch.randn(300, 20)+torch.randn(20), dim=1) for _ in range(2))
    own, found = (e*guess).sum(1), []
    mean, spread = (e@guess.sum(0)-own)/299, (((e@(guess.T@guess)*e).sum(1)-own**2)/299)
    for _ in range(300): found.append(((e*guess[torch.randperm(300)]).sum(1)-mean)/(spread-mean**2).sqrt())
    found = torch.stack(found); assert abs(float(found.mean())) < .02 and abs(float(found.std())-1) < .02


def test_half_hat_matrix():
    features, present, known = content(); k = known & present[:, 0]; z = regression(features[0], k.float()[:, None], 2., 99)
    x = F.normalize(features[0]-features[0][k].mean(0), dim=1)*k[:, None]
    same(z@z.T, x@torch.linalg.inv(x.T@x+2*torch.eye(10))@x.T)
    assert z.square().sum(1).max() <= 1/3+1e-6 and not z[~k].any()
    assert regression(features[0], k.float()[:, None], 2., 4).shape == (31, 4)


@pytest.mark.parametrize('n', [0, 1, 2, 3])
def test_few_known_items(n):
    features, _, _ = content(); known = torch.arange(31) < n+1; known[0] = False; e = torch.randn(31, 8)
    got = Agreement(features[0], known)(e)
    assert got.isfinite().all() and not got[~known].any() and (n > 1 or not got.any()) and got.abs().max() < 4*8


def test_evidence_is_nothing_before_training_and_finds_lies_after():
    torch.manual_seed(0); lie = torch.arange(401) > 320; truth = torch.randn(401, 6); truth[0] = 0
    said = torch.where(lie[:, None], truth[torch.randperm(401)], truth)@torch.randn(6, 40)+.3*torch.randn(401, 40)
    known = torch.arange(401) > 0; agreement = Agreement(said, known)
    assert agreement(torch.randn(401, 16)*.02).abs().max() < .5
    told = agreement(truth@torch.randn(6, 16)+.3*torch.randn(401, 16))
    honest, lies = told[known & ~lie], told[lie]
    assert float((honest[:, None] > lies).float().mean()) > .97 and honest.median() > 2 and lies.median() < -1


def test_scale_and_shift_of_ids_do_not_matter():
    features, _, known = content(); agreement, e = Agreement(features[0], known), torch.randn(31, 8)
    same(agreement(e), agreement(3*e+5), 1e-3)


def test_agreement_is_cheap():
    "Products of N x R and R x D, never of N x N, and no copy of the feature."
    torch.manual_seed(0); agreement = Agreement(torch.randn(12_001, 768), torch.arange(12_001) > 0)
    with FlopCounterMode(display=False) as flops: agreement(torch.randn(12_001, 64))
    assert flops.get_total_flops() < 8*12_001*128*64 and sum(b.numel()*b.element_size() for b in agreement.buffers()) < 8e6


# gates

def test_top_k_is_the_softmax_of_what_is_kept():
    torch.manual_seed(0); logits = torch.randn(50, 6)
    for k in range(1, 7):
        g = sparse(logits, k); assert ((g > 0).sum(1) == k).all(); same(g.sum(1), torch.ones(50))
        for row, l in zip(g, logits): i = l.argsort(descending=True)[:k]; same(row[i], l[i].softmax(0))


def test_noise_is_shazeers_and_only_in_training():
    torch.manual_seed(0); gate, ids, y = IDGate(8, 5, 'id', 3, True), torch.randn(40, 8), torch.randn(40, 5, 8)
    torch.manual_seed(1); got = gate(ids, y[:, 0], y)
    torch.manual_seed(1); u = F.layer_norm(ids, (8,)); h = gate.score(u)+torch.randn(40, 5)*(F.softplus(gate.noise(u))+1e-2)
    same(got.gates, sparse(h, 3)); same(got.full, gate.score(u).softmax(-1))
    gate.eval(); same(gate(ids, y[:, 0], y).gates, sparse(gate.score(u), 3))


def test_query_is_a_cosine_with_the_answers():
    torch.manual_seed(0); gate, ids, y = IDGate(8, 3), torch.randn(9, 8), torch.randn(9, 3, 8); got = gate(ids, y[:, 0], y, torch.zeros(9))
    q = gate.score(F.layer_norm(ids, (8,)))
    same(got.gates, torch.stack([F.cosine_similarity(q, y[:, k], dim=1) for k in range(3)], 1).div(.2).softmax(1))
    same(got.trust, torch.full((9,), 2.2).sigmoid())
    assert gate(ids, y[:, 0], torch.zeros(9, 3, 8), torch.zeros(9)).gates.isfinite().all()


def test_balance_loss():
    even, one = torch.eye(4), torch.tensor([1., 0, 0, 0]).repeat(8, 1)
    assert float(load_balance(even, even)) == 1 and float(load_balance(one, one)) == 4
    logits = torch.randn(30, 4, requires_grad=True); load_balance(sparse(logits, 2), logits.softmax(-1)).backward()
    assert logits.grad.abs().sum() > 0


def test_balance_loss_evens_the_load():
    torch.manual_seed(0); gate, ids, y = IDGate(8, 4, 'id', 2), torch.randn(200, 8), torch.randn(200, 4, 8)
    with torch.no_grad(): gate.score.bias.copy_(torch.tensor([3., 0, 0, 0]))
    adam = torch.optim.Adam(gate.parameters(), .05); before = (gate(ids, y[:, 0], y).gates > 0).float().mean(0)
    for _ in range(60): out = gate(ids, y[:, 0], y); adam.zero_grad(); load_balance(out.gates, out.full).backward(); adam.step()
    after = (gate(ids, y[:, 0], y).gates > 0).float().mean(0)
    assert before.max() > .9 and after.max() < .65 and after.min() > .35


def test_balance_counts_what_it_should():
    "Only the items named, only those that have the modality; PAD and others move nothing."
    moe, ids, features, present = room('id', top_k=2, gone=.4); moe.eval(); learn = torch.tensor([3, 5, 7, 9, 11])
    out = moe(ids, features, present, learn); wanted = 0
    for m in range(2):
        rows = learn[present[learn, m]]; g = moe.gates[m](ids[rows], torch.zeros(len(rows), 8), torch.zeros(len(rows), 4, 8)); wanted = wanted+load_balance(g.gates, g.full)
    same(out.balance, wanted)
    grad = torch.autograd.grad(out.balance, ids)[0]; others = torch.ones(31, dtype=torch.bool); others[learn] = False
    assert grad[learn].abs().sum() > 0 and not grad[others].any()
    absent = (~present).any(1).nonzero()[:, 0]; assert float(moe(ids, features, present & False, absent).balance) == 0 == float(moe(ids, features, present).balance)


def test_lone_expert_hears_only_the_balance_loss():
    moe, ids, features, present = room('id', top_k=1, n=60); out = moe(ids, features, present, torch.arange(1, 61))
    (out.content*torch.randn_like(out.content)).sum().backward(retain_graph=True); assert all(not g.score.weight.grad.any() for g in moe.gates)
    out.balance.backward(); assert all(g.score.weight.grad.any() for g in moe.gates)


# the room

@every_gate
@pytest.mark.parametrize('kw', [{}, {'top_k': 2}, {'top_k': 4}, {'top_k': 2, 'noisy': True}, {'raw': True}, {'residual': False}, {'experts': 1}, {'experts': 1, 'top_k': 1}])
def test_what_always_holds(gate, kw):
    moe, ids, features, present = room(gate, **kw); out = moe(ids, features, present, torch.arange(1, 20))
    e = 1 if gate == 'none' else kw.get('experts', 4)
    assert out.content.shape == out.read.shape == (2, 31, 8) and out.gates.shape == (31, 2, e) and out.trust.shape == (31, 2) and out.balance.shape == ()
    assert all(x.isfinite().all() for x in out) and out.trust.min() >= 0 and out.trust.max() <= 1
    same(out.gates.sum(-1), torch.ones(31, 2)); same(out.content.norm(dim=-1), out.trust.T)
    assert not out.content[:, 0].any() and not out.read[:, 0].any() and not out.trust[0].any()
    assert not out.trust[~present].any() and not out.content[~present.T].any()
    absent = ~present.T; absent[:, 0] = False
    for m in range(2): same(out.read[m][absent[m]], F.normalize(moe.missing[m], dim=0).expand(int(absent[m].sum()), 8))
    same(out.read[:, 1:], out.content[:, 1:]+(1-out.trust[1:].T[..., None])*F.normalize(moe.missing, dim=-1)[:, None])  # what is not believed is read as missing


@every_gate
def test_every_parameter_learns(gate):
    "Also the learned vectors of missing modalities; and so do the IDs, except under gates that do not look at them."
    moe, ids, features, present = room(gate, top_k=0 if gate in FIXED else 2, noisy=gate not in FIXED); seen = set(); moe.train()
    ids = (sum(f@torch.randn(f.shape[1], 8) for f in features)*present.any(1, keepdim=True))   # IDs that know something, so that there is evidence
    ids = (ids if moe.order is None else ids[moe.order.argsort()]).requires_grad_()
    adam = torch.optim.Adam(moe.parameters(), 1e-2)
    for _ in range(3):
        out = moe(ids, features, present, torch.arange(1, 31)); adam.zero_grad(); ids.grad = None
        ((out.read*torch.randn_like(out.read)).sum()+out.balance).backward(); adam.step()
        seen |= {name for name, p in moe.named_parameters() if p.grad is not None and p.grad.any()}
    assert seen == {name for name, _ in moe.named_parameters()}
    assert (ids.grad is not None and bool(ids.grad[1:].any())) == (gate not in (*FIXED, 'self'))
    assert not any(f.requires_grad for f in features)


def test_no_gradient_through_the_evidence():
    moe, ids, features, present = room()
    assert torch.autograd.grad(moe(ids, features, present).trust.sum(), ids, allow_unused=True)[0] is None


@every_gate
def test_suppression_is_possible(gate):
    if gate in FIXED: return
    moe, ids, features, present = room(gate)
    with torch.no_grad(): moe.gates[0].belief.bias.fill_(-100)
    out = moe(ids, features, present); assert out.content[0].norm(dim=-1).max() < 1e-6


def test_shared_shares_and_others_do_not():
    for gate, alike in (('shared', True), ('id_query', False), ('id', False)):
        moe = room(gate)[0]; a, b = moe.gates; assert (a is b) == alike
        with torch.no_grad(): a.score.weight.zero_()
        assert bool(b.score.weight.any()) != alike
    assert len(list(room('shared')[0].parameters())) < len(list(room()[0].parameters()))
    moe, twin = room('shared')[0], room('shared', seed=1)[0]; twin.load_state_dict(moe.state_dict()); assert twin.gates[0] is twin.gates[1]


def test_shuffled_gate_gets_anothers_id():
    moe, ids, features, present = room('shuffled'); plain = room()[0]; state = moe.state_dict(); order = state.pop('order'); plain.load_state_dict(state)
    moe.eval(), plain.eval(); a, b = moe(ids, features, present), plain(ids[order], features, present)
    for x, y in zip(a, b): same(x, y)
    assert order[0] == 0 and (order[1:] != torch.arange(1, 31)).all() and len(order.unique()) == 31


@SMALL
@given(st.integers(2, 200), st.integers(0, 99))
def test_strangers_are_no_own(n, seed):
    other = strangers(n+1, seed); assert other[0] == 0 and (other[1:] != torch.arange(1, n+1)).all() and other.sort().values.equal(torch.arange(n+1))
    assert other.equal(strangers(n+1, seed)) and strangers(2, seed).tolist() == [0, 1] and strangers(1, seed).tolist() == [0]


@SMALL
@given(st.sampled_from([g for g in GATES if g != 'shuffled']), st.integers(1, 40), st.sampled_from([0, 1, 3]), st.integers(0, 99))
def test_renaming_items_renames_the_output(gate, n, top_k, seed):
    features, present, known = content(n, seed=seed); order = torch.cat([torch.zeros(1, dtype=torch.long), 1+torch.randperm(n, generator=torch.Generator().manual_seed(seed))])
    double = lambda x: [f.double() for f in x]; ids = torch.randn(n+1, 8, dtype=torch.float64)
    torch.manual_seed(seed); a = IDMoE(double(features), present, known, 8, gate=gate, top_k=top_k).double().eval()
    b = IDMoE(double(f[order] for f in features), present[order], known[order], 8, gate=gate, top_k=top_k).double().eval(); b.load_state_dict(a.state_dict())
    x, y = a(ids, double(features), present), b(ids[order], double(f[order] for f in features), present[order])
    same(x.content[:, order], y.content, 1e-8); same(x.read[:, order], y.read, 1e-8); same(x.gates[order], y.gates, 1e-8); same(x.trust[order], y.trust, 1e-8)


@every_gate
def test_an_item_does_not_depend_on_what_others_say(gate):
    "Except through the evidence, which is a comparison."
    if gate in (*ASKING,): return
    moe, ids, features, present = room(gate); moe.eval(); a = moe(ids, features, present)
    changed = [f.clone() for f in features]; changed[0][5] += 1; changed[1][5] += 1; b = moe(ids, changed, present); rest = torch.arange(31) != 5
    assert torch.equal(a.content[:, rest], b.content[:, rest]) and torch.equal(a.gates[rest], b.gates[rest])


def test_unknown_items_keep_the_prior():
    features, present, known = content(gone=0); moe = IDMoE(features, present, known, 8); out = moe(torch.randn(31, 8), features, present)
    unknown = present.all(1) & ~known; assert unknown.any(); same(out.trust[unknown], torch.full((int(unknown.sum()), 2), 2.2).sigmoid())


@every_gate
@pytest.mark.parametrize('case', ['all missing', 'one item', 'none known', 'one modality', 'no item'])
def test_edges(gate, case):
    features, present, known = content(0 if case == 'no item' else 1 if case == 'one item' else 12, widths=(10,) if case == 'one modality' else (10, 14), gone=0)
    if case == 'all missing': present = present.clone(); present[:, 1] = False; features[1] = features[1]*0
    if case == 'none known': known = known & False
    moe = IDMoE(features, present, known, 8, gate=gate, top_k=2); out = moe(torch.randn(len(present), 8), features, present, torch.arange(1, len(present)))
    out.read.sum().backward()
    assert all(x.isfinite().all() for x in out) and all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())
    if case == 'all missing': assert not out.content[1].any() and not out.trust[:, 1].any()


@every_gate
def test_bfloat16_autocast(gate):
    moe, ids, features, present = room(gate, n=80, dim=16); moe.eval(); full = moe(ids, features, present)
    with torch.autocast('cpu', torch.bfloat16): low = moe(ids, features, present)
    assert all(x.dtype == torch.float32 for x in low)
    same(low.gates.sum(-1), torch.ones(81, 2)); same(low.content.norm(dim=-1), low.trust.T)
    same(low.trust, full.trust, 2e-2); same(low.content, full.content, 3e-2); low.read.sum().backward()


@every_gate
def test_double_precision(gate):
    moe, ids, features, present = room(gate, top_k=2); moe = moe.double().eval()
    out = moe(ids.double(), [f.double() for f in features], present, torch.arange(1, 20)); assert all(x.dtype == torch.float64 for x in out)


def test_equal_seeds_equal_rooms():
    a, ids, features, present = room(top_k=2, noisy=True); b = room(top_k=2, noisy=True)[0]; outs = []
    for moe in (a, b): torch.manual_seed(5); outs.append(moe(ids, features, present, torch.arange(1, 20)))
    for x, y in zip(*outs): assert torch.equal(x, y)
    a.eval(); assert torch.equal(a(ids, features, present).content, a(ids, features, present).content)


def test_dropout_drops_the_same_columns_for_all():
    moe, ids, features, present = room(dropout=.5); moe.train(); torch.manual_seed(3); x = moe.project(features)[0]; layer = moe.experts[0].enter
    torch.manual_seed(3); kept = F.dropout(torch.ones(10), .5); same(x, (features[0]*kept)@layer.weight.T+layer.bias)
    given_, none = moe(ids, features, present, x=[f@e.enter.weight.T for f, e in zip(features, moe.experts)]), moe.eval()(ids, features, present)
    same(given_.content.norm(dim=-1), none.content.norm(dim=-1))


def test_names_of_the_state():
    "What a checkpoint holds; nothing that can be made again from the features."
    names = set(room()[0].state_dict())
    assert names == {'missing'} | {f'{a}.{m}.{b}' for m in range(2) for a, b in
                                   [('experts', f'{layer}.{p}') for layer in ('enter', 'views') for p in ('weight', 'bias')]+[('gates', f'{layer}.{p}') for layer in ('score', 'belief') for p in ('weight', 'bias')]}
    assert 'order' in room('shuffled')[0].state_dict()


def test_refusals():
    for kw, cure in (({'gate': 'ids'}, 'use one of'), ({'experts': 0}, 'at least one'), ({'top_k': 5}, 'between 0'), ({'top_k': -1}, 'between 0'), ({'noisy': True}, 'set top_k')):
        with pytest.raises(ImecdError, match=cure): room(**kw)


def test_pictures_take_plain_data():
    with warnings.catch_warnings():
        warnings.simplefilter('error'); moe, ids, features, present = room(); out = moe(ids, features, present)
        ax = plot_gates(out.gates[:5], out.trust[:5], ['a $x$', 'b', 'c', 'd', 'e'], [None, *[torch.zeros(4, 6, 3).numpy()]*4]); assert len(ax.texts) == 10
        assert 'image' in plot_gates(out.gates[:3, 1:], out.trust[:3, 1:], list('abc'), names=('image',)).get_xlabel()
        plot_trust(out.trust, ~present, present); plot_load(out.gates)
        plot_load(out.gates[:1]); plot_shuffled({'gates': [.1, .2], 'trust': [.1]}, .3)


def test_gates_of_what_is_missing_are_white_and_say_so():
    gates = torch.full((2, 2, 4), .25); gates[1, 1] = torch.tensor([.01, .97, .01, .01])  # hidden, so no measure of what is dark
    ax = plot_gates(gates, torch.tensor([[.9, .8], [.7, 0.]]), ['both', 'no picture'])
    said, strips = [t.get_text() for t in ax.texts], [float(x.get_array().sum()) for x in ax.images]; plt.close(ax.figure)
    assert said == ['0.90', '0.70', '0.80', 'none'] and strips == [2., 1.] and 'darkest: 0.25' in ax.get_title(loc='left')
