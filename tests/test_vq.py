"Codebooks: the arithmetic of a trusted library, nothing lost on disk, nothing that depends on company."
import copy
import io
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.cluster import KMeans
from torch import nn

from imecd.core import ImecdError
from imecd.vq import ModalityVQ, VectorQuantizer, carry, health, kmeans, lost_share, nearest, perplexity, plot_codes, plot_members, plot_usage, revive_codes, warn_collapse

matplotlib.use('Agg')


def states(S=3, P=200, D=8, seed=0): return torch.randn(S, P, D, generator=torch.Generator().manual_seed(seed))
def clouds(S=3, P=600, D=8, n=12, seed=0):
    g = torch.Generator().manual_seed(seed); centres = 4*torch.randn(S, n, D, generator=g)
    return centres[:, torch.randint(n, (P,), generator=g)]+.5*torch.randn(S, P, D, generator=g)


def theirs(ours, dim, **kw):
    "One quantiser of vector-quantize-pytorch for each stream, with the codes and statistics of ours."
    library = pytest.importorskip('vector_quantize_pytorch'); found = []
    for s in range(len(ours.codes)):
        vq = library.VectorQuantize(dim=dim, codebook_size=ours.codes.shape[1], decay=ours.decay, commitment_weight=ours.commitment, threshold_ema_dead_code=0, kmeans_init=False, **kw)
        for name, x in (('embed', ours.codes), ('embed_avg', ours.sums), ('cluster_size', ours.counts)): getattr(vq._codebook, name).data.copy_(x[s:s+1])
        found.append(vq)
    return found


@pytest.mark.parametrize('decay', [.5, .99])
@pytest.mark.parametrize('placed', [False, True])
def test_running_means_equal_the_library(decay, placed):
    torch.manual_seed(0); ours = VectorQuantizer(3, 16, 8, decay=decay, revive=0)
    if placed: ours.initialise(states(seed=9))
    other = theirs(ours, 8)
    for step in range(12):
        x = states(seed=step)+.1*step
        training = step not in (4, 9); ours.train(training); out = ours(x)
        told = 0.
        for s, vq in enumerate(other):
            vq.train(training); q, k, loss = vq(x[s:s+1]); told = told+loss.detach().squeeze()
            assert torch.equal(k[0], out.codes[s])
            torch.testing.assert_close(q[0], out.quantised[s], rtol=1e-5, atol=1e-6)
        if training: torch.testing.assert_close(out.loss, told)
        for name, mine in (('embed', ours.codes), ('embed_avg', ours.sums), ('cluster_size', ours.counts)):
            torch.testing.assert_close(torch.cat([getattr(vq._codebook, name) for vq in other]), mine, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('rotation', [False, True])
def test_gradients_and_loss_equal_the_library(rotation):
    torch.manual_seed(0); ours = VectorQuantizer(3, 16, 8, revive=0); other = theirs(ours, 8, rotation_trick=rotation)
    x, y = states().requires_grad_(), states().requires_grad_(); likes = states(seed=5)
    out = ours(x); q = carry(x, out.quantised, rotation); ((q*likes).sum()+out.loss).backward()
    found = [vq(y[s:s+1]) for s, vq in enumerate(other)]
    (sum((q[0]*likes[s]).sum() for s, (q, _, _) in enumerate(found))+sum(f[2].sum() for f in found)).backward()
    torch.testing.assert_close(out.loss, sum(f[2].sum() for f in found))
    torch.testing.assert_close(q, torch.cat([f[0] for f in found]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


def test_rotation_is_a_rotation_and_a_stretch():
    "The Jacobian over the ratio of lengths is orthogonal, with determinant 1, and sends the state's direction to the code's."
    x, q = torch.randn(2, 6, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda v: carry(v, q, True), x); R = J/(q.norm()/x.norm())
    torch.testing.assert_close(R@R.T, torch.eye(6, dtype=torch.float64)); torch.testing.assert_close(torch.det(R), torch.tensor(1., dtype=torch.float64))
    torch.testing.assert_close(J@x, q)


@pytest.mark.parametrize('x, q', [([0., 0.], [1., 2.]), ([1., 2.], [0., 0.]), ([1., 0.], [-3., 0.]), ([1e-8, 0.], [5., 5.]), ([0., 0.], [0., 0.])])
def test_rotation_survives_zeros_and_opposites(x, q):
    x, q = torch.tensor(x, requires_grad=True), torch.tensor(q); y = carry(x, q, True); y.sum().backward()
    torch.testing.assert_close(y.detach(), q); assert x.grad.isfinite().all() and x.grad.abs().max() < 100


def test_kmeans_is_as_good_as_scikit_learn():
    ours, other = [], []
    for d in range(4):
        x = clouds(1, 1500, 8, 24, d)
        def inertia(c, x=x): return float(torch.cdist(x[0], c).min(1).values.square().sum())
        best = KMeans(24, n_init=5, random_state=0).fit(x[0].numpy()).inertia_
        ours += [inertia(kmeans(x, 24, seed=s)[0][0])/best for s in range(4)]
        other += [KMeans(24, n_init=1, random_state=s).fit(x[0].numpy()).inertia_/best for s in range(4)]
    assert np.mean(ours) < 1.15*np.mean(other)


def test_kmeans_from_their_seeds_is_theirs():
    x = clouds(1); pick = KMeans(12, init='k-means++', n_init=1, max_iter=1, random_state=0).fit(x[0].numpy()).cluster_centers_
    other = KMeans(12, init=pick, n_init=1, max_iter=50, tol=0).fit(x[0].numpy()); centres = torch.from_numpy(pick)[None]
    for _ in range(50): k = nearest(x, centres); centres = torch.stack([x[0][k[0] == c].mean(0) for c in range(12)])[None]
    torch.testing.assert_close(centres[0], torch.from_numpy(other.cluster_centers_), rtol=1e-4, atol=1e-4)


def test_one_seed_one_codebook():
    x = clouds(); a, b, c = (kmeans(x, 12, seed=s)[0] for s in (3, 3, 4))
    torch.manual_seed(1); assert torch.equal(a, b) and torch.equal(a, kmeans(x, 12, seed=3)[0]) and not torch.equal(a, c)


def test_streams_do_not_see_each_other():
    x = clouds(); y = x.clone(); y[1] = clouds(seed=7)[1]
    a, b = ModalityVQ(3, 12, 8, revive=2), ModalityVQ(3, 12, 8, revive=2); a.initialise(x), b.initialise(y)
    for t in range(5):
        z = clouds(seed=t); w = z.clone(); w[1] += 3; torch.manual_seed(t); p = a(z); torch.manual_seed(t); q = b(w)
        assert torch.equal(p.quantised[[0, 2]], q.quantised[[0, 2]]) and torch.equal(p.lost[[0, 2]], q.lost[[0, 2]])


@pytest.mark.parametrize('kw', [{}, {'levels': 3}, {'shared': True}, {'learn': 'gradient'}, {'replace': True}])
def test_saved_and_loaded_to_the_bit(kw):
    torch.manual_seed(0); vq = ModalityVQ(3, 8, 8, **kw); fresh = ModalityVQ(3, 8, 8, **kw)
    assert not fresh.ready
    vq.initialise(clouds())
    for t in range(6): vq(clouds(seed=t)+t)
    file = io.BytesIO(); torch.save(vq.state_dict(), file); file.seek(0); fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.ready and all(torch.equal(v, fresh.state_dict()[k]) for k, v in vq.state_dict().items())
    names = {k.rsplit('.', 1)[-1] for k in vq.state_dict()}; assert {'codes', 'sums', 'counts', 'idle', 'ready'} <= names
    for t in range(30):
        torch.manual_seed(t); a = vq(clouds(seed=t)); torch.manual_seed(t); b = fresh(clouds(seed=t))
        assert torch.equal(a.quantised, b.quantised) and torch.equal(a.codes, b.codes)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in vq.state_dict().items())


def test_half_trained_statistics_travel():
    "A loaded quantiser goes on where it was: its statistics, not only its codes, decide the next step."
    torch.manual_seed(0); vq = VectorQuantizer(3, 8, 8, decay=.9); vq.initialise(clouds()); vq(clouds(seed=1)); other = copy.deepcopy(vq); other.counts.mul_(5)
    assert not torch.equal(vq(clouds(seed=2)).quantised.sum()+vq.codes.sum(), other(clouds(seed=2)).quantised.sum()+other.codes.sum())


@settings(deadline=None, max_examples=25)
@given(S=st.integers(1, 3), P=st.integers(1, 40), C=st.integers(1, 20), D=st.integers(1, 9), levels=st.integers(1, 3), shared=st.booleans(), replace=st.booleans(), rotation=st.booleans(), learn=st.sampled_from(['ema', 'gradient']))
def test_shapes(S, P, C, D, levels, shared, replace, rotation, learn):
    vq = ModalityVQ(S, C, D, levels, shared, replace, learn=learn, rotation=rotation); x = states(S, P, D).requires_grad_()
    wanted = (S, P) if levels == 1 else (S, P, levels)
    out = vq(x); assert out.codes.shape == wanted and (out.codes == -1).all() and torch.equal(out.quantised, x)
    vq.initialise(x)
    for _ in range(3): out = vq(x)
    assert out.quantised.shape == x.shape and out.codes.shape == wanted and out.loss.ndim == 0 and out.lost.shape == vq.guidance.shape == (S,)
    assert 0 <= out.codes.min() and out.codes.max() < C and all(v.isfinite().all() for v in out)
    (out.quantised.sum()+out.loss).backward(); assert x.grad.isfinite().all() and len(health(out.codes, C, out.lost)) == S


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), P=st.integers(1, 60), levels=st.integers(1, 2), shared=st.booleans())
def test_another_order_gives_the_same_update(seed, P, levels, shared):
    "Positions in another order: codes move along, codebooks become the same; packed rows have no pads that could pollute them."
    torch.manual_seed(seed); a = ModalityVQ(2, 6, 4, levels, shared, revive=0); a.initialise(states(2, 60, 4, seed)); b = copy.deepcopy(a)
    order = torch.randperm(P)
    x = states(2, P, 4, seed+1); p, q = a(x), b(x[:, order])
    torch.testing.assert_close(p.quantised[:, order], q.quantised, rtol=1e-4, atol=1e-5); assert torch.equal(p.codes[:, order], q.codes)
    for s, t in zip(a.buffers(), b.buffers()): torch.testing.assert_close(s, t, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(1, 199), max_size=5), levels=st.integers(1, 3), shared=st.booleans())
def test_evaluation_does_not_depend_on_company(cuts, levels, shared):
    vq = ModalityVQ(3, 8, 8, levels, shared); vq.initialise(states()); vq.eval(); before = copy.deepcopy(vq.state_dict()); x = states(seed=4); whole = vq(x)
    edges = sorted({0, 200, *cuts}); parts = [vq(x[:, a:b]) for a, b in zip(edges, edges[1:])]
    assert torch.equal(torch.cat([p.codes for p in parts], 1), whole.codes)
    torch.testing.assert_close(torch.cat([p.quantised for p in parts], 1), whole.quantised)
    assert all(torch.equal(before[k], v) for k, v in vq.state_dict().items())


@pytest.mark.parametrize('levels', [1, 2, 4])
@pytest.mark.parametrize('rotation', [False, True])
def test_a_state_gets_its_gradient_once(levels, rotation):
    torch.manual_seed(0); x, likes = states().requires_grad_(), states(seed=3); vq = ModalityVQ(3, 8, 8, levels, rotation=rotation); vq.initialise(x.detach()); out = vq.eval()(x)
    grad, = torch.autograd.grad((out.quantised*likes).sum(), x)
    g = .3; q = ((out.quantised-(1-g)*x)/g).detach(); x2 = x.detach().requires_grad_()
    wanted, = torch.autograd.grad((((1-g)*x2+g*carry(x2, q, rotation))*likes).sum(), x2)
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-3)
    if not rotation: torch.testing.assert_close(grad, likes)


@pytest.mark.parametrize('levels', [1, 3])
def test_levels_add_up(levels):
    x = clouds(); vq = ModalityVQ(3, 8, 8, levels, replace=True); vq.initialise(x); out = vq.eval()(x); codes = out.codes.view(3, -1, levels)
    total = sum(torch.take_along_dim(level.codes, codes[..., k, None], 1) for k, level in enumerate(vq.levels))
    back = vq.units.back(total)
    torch.testing.assert_close(out.quantised, back); torch.testing.assert_close(out.lost, lost_share(vq.units(x), vq.units(x)-total))
    assert torch.equal(vq.guidance, torch.ones(3))


def test_shared_is_one_codebook_for_all_positions():
    x = clouds(); torch.manual_seed(0); vq = ModalityVQ(3, 12, 8, shared=True, replace=True); vq.initialise(x); one = VectorQuantizer(1, 12, 8); one.load_state_dict(vq.levels[0].state_dict())
    torch.manual_seed(1); a = vq(x); torch.manual_seed(1); b = one(vq.units(x).reshape(1, -1, 8))
    assert torch.equal(a.codes.flatten(), b.codes.flatten()); torch.testing.assert_close(a.loss, 3*b.loss); assert torch.equal(vq.levels[0].codes, one.codes)


def test_streams_are_measured_from_their_own_mean_in_their_own_spread():
    x = clouds(); vq = ModalityVQ(3, 8, 8); vq.initialise(x); moved = ModalityVQ(3, 8, 8); y = .01*x+torch.arange(3.)[:, None, None]; moved.initialise(y)
    assert torch.equal(vq.eval()(x).codes, moved.eval()(y).codes)
    torch.testing.assert_close(moved(y).quantised, .01*vq(x).quantised+torch.arange(3.)[:, None, None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vq.units.back(vq.units(x)), x)


def test_the_loss_is_a_sum_over_streams():
    x = clouds(); three = VectorQuantizer(3, 12, 8); three.initialise(x); single = []
    for s in range(3): one = VectorQuantizer(1, 12, 8); one.load_state_dict({k: v[s:s+1] if v.ndim else v for k, v in three.state_dict().items()}); single.append(one.eval()(x[s:s+1]).loss)
    torch.testing.assert_close(three.eval()(x).loss, sum(single))


def test_codes_learn_by_gradient():
    torch.manual_seed(0); x = clouds(); vq = ModalityVQ(3, 12, 8, learn='gradient'); vq.initialise(x+1); opt = torch.optim.Adam(vq.parameters(), .02); first = vq(x).lost
    for _ in range(100): out = vq(x); opt.zero_grad(); out.loss.backward(); opt.step()
    assert (vq(x).lost < .5*first).all() and isinstance(vq.levels[0].codes, nn.Parameter)


def test_every_parameter_gets_a_gradient():
    for kw in ({}, {'learn': 'gradient'}, {'levels': 2}, {'rotation': True}):
        vq = ModalityVQ(3, 8, 8, **kw); vq.initialise(states()); out = vq(states(seed=1)); (out.quantised.square().sum()+out.loss).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vq.parameters())


def test_low_precision_leaves_the_statistics_alone():
    "Under bfloat16 autocast the update is that of float32 on the same states, and a low-precision state comes back as one."
    a = ModalityVQ(3, 8, 8, levels=2); a.initialise(clouds()); b = copy.deepcopy(a); x = clouds(seed=1)
    with torch.autocast('cpu', torch.bfloat16): p = a(x)
    q = b(x); assert torch.equal(p.codes, q.codes) and torch.equal(p.loss, q.loss) and p.quantised.dtype == torch.float32
    assert all(torch.equal(s, t) for s, t in zip(a.buffers(), b.buffers()))
    with torch.autocast('cpu', torch.bfloat16): out = a(x.bfloat16()); a.initialise(x.bfloat16())
    assert out.quantised.dtype == torch.bfloat16 and out.loss.dtype == torch.float32 and all(v.dtype == torch.float32 for v in a.levels[0].buffers() if v.ndim) and out.loss.isfinite()


def test_collapse_without_revival_and_not_with_it():
    "model.md E.3: random codes collapse; revived or placed they do not."
    every = clouds(1, 20*256, 16, 24)+20; x = [every[:, a:a+256] for a in range(0, 20*256, 256)]*10; end = {}
    for placed in (False, True):
        for revive in (0, 10):
            torch.manual_seed(0); vq = VectorQuantizer(1, 24, 16, decay=.9, revive=revive)
            if placed: vq.initialise(x[0])
            for b in x: out = vq(b)
            end[placed, revive] = perplexity(out.codes, 24)
    assert end[False, 0] < .3*24 and end[False, 10] > .6*24 and end[True, 10] > .7*24


def test_a_code_in_use_is_never_revived():
    vq = VectorQuantizer(2, 6, 4, decay=.9, revive=1); x = clouds(2, 600, 4, 6); vq.initialise(x)
    before = vq.counts.clone(); vq(x); assert (vq.counts > .1*before.mean()).all() and not vq.idle.any()
    dead = revive_codes(x, vq.codes, vq.counts, vq.sums, vq.idle, 1); assert not dead.any()


def test_revived_codes_are_states_of_the_batch_and_differ():
    x = states(2, 50, 4); codes, counts, sums, idle = torch.zeros(2, 8, 4), torch.full((2, 8), .001), torch.zeros(2, 8, 4), torch.full((2, 8), 9.); counts[:, 0] = 40
    dead = revive_codes(x, codes, counts, sums, idle, 5); assert dead.sum() == 14 and not dead[:, 0].any()
    for s in range(2):
        new = codes[s][dead[s]]; assert len(new.unique(dim=0)) == 7 and all((x[s] == c).all(-1).any() for c in new)
        torch.testing.assert_close(sums[s][dead[s]]/counts[s][dead[s]][:, None], new)


@pytest.mark.parametrize('P, C', [(1, 1), (1, 8), (5, 8), (40, 1)])
def test_the_smallest(P, C):
    vq = ModalityVQ(3, C, 8, revive=2); x = states(3, P, 8); vq.initialise(x)
    for _ in range(8): out = vq(x)
    assert all(v.isfinite().all() for v in out) and all(v.isfinite().all() for v in vq.buffers())
    if P == 1: torch.testing.assert_close(out.quantised, x, rtol=1e-4, atol=1e-4)


def test_equal_states_are_no_trouble():
    x = torch.ones(3, 30, 8); vq = ModalityVQ(3, 4, 8); vq.initialise(x); out = vq(x)
    torch.testing.assert_close(out.quantised, x, rtol=1e-4, atol=1e-4); assert out.loss < 1e-6


@pytest.mark.parametrize('kw, words', [({'n_codes': 0}, 'at least 1'), ({'levels': 0}, 'at least 1'), ({'guidance': 0}, 'between 0 and 1'), ({'guidance': 1.}, 'replace=True'),
                                       ({'learn': 'x'*500}, "'ema' or 'gradient'"), ({'decay': 1}, 'e.g. .99')])
def test_what_cannot_be_is_refused(kw, words):
    with pytest.raises(ImecdError, match=words) as e: ModalityVQ(**kw)
    assert len(str(e.value)) < 300


@pytest.mark.parametrize('x', [torch.zeros(2, 5, 8), torch.zeros(3, 5, 7), torch.zeros(3, 0, 8), torch.zeros(5, 8)])
def test_shapes_that_do_not_fit(x):
    vq = ModalityVQ(3, 4, 8)
    for do in (vq, vq.initialise):
        with pytest.raises(ImecdError, match=r'give \(3, P, 8\)'): do(x)


def test_states_that_are_not_finite():
    with pytest.raises(ImecdError, match='lower learning rate'): ModalityVQ(3, 4, 8).initialise(torch.full((3, 9, 8), torch.inf))


def test_health_and_its_warning():
    alive, collapsed, unplaced = torch.arange(64).repeat(5), torch.zeros(320, dtype=torch.long), torch.full((320,), -1)
    rows = health(torch.stack([alive, collapsed, unplaced]), 64, torch.tensor([.1, .9, 0.]))
    assert [r['dead'] for r in rows] == [0, 63, 64] and rows[0]['usage'] == 1 and rows[0]['perplexity'] == pytest.approx(64) and rows[1]['perplexity'] == 1 and rows[2]['perplexity'] == 0
    assert rows[1]['lost'] == pytest.approx(.9)
    with pytest.warns(UserWarning, match='codebook of text: only 1.0 of 64') as w: warn_collapse(rows, 64)
    assert len(w) == 1
    with warnings.catch_warnings(): warnings.simplefilter('error'); warn_collapse(health(alive[None], 64), 64)
    deep = health(torch.stack([torch.stack([alive, collapsed], -1)]), 64)[0]; assert deep['perplexity'] == 1 and deep['dead'] == 63


def test_lost_is_the_unexplained_share():
    x = states(); assert torch.allclose(lost_share(x, x-x.mean(1, keepdim=True)), torch.ones(3)) and not lost_share(x, 0*x).any()


def test_pictures_draw_plain_data():
    import matplotlib.pyplot as plt
    codes = torch.randint(8, (3, 90)); x = states(1, 60, 5)[0]; before = x.clone()
    axes = [plot_usage(codes, 8), plot_usage(codes[..., None].repeat(1, 1, 2), 8, ('a', 'b', 'c')), plot_usage(torch.full((1, 9), -1), 8), plot_codes(x, x.round(), .3),
            plot_members(torch.randint(9, (8, 31)), ['']+[f'$x_{i}' for i in range(30)], [0, 3], 4)]
    for ax in axes: assert ax.get_title(loc='left'); ax.figure.canvas.draw()
    fig, ax = plt.subplots(); assert plot_usage(codes, 8, ax=ax) is ax and torch.equal(x, before); plt.close('all')


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_the_device_changes_nothing():
    x = clouds(); a, b = ModalityVQ(3, 12, 8, revive=0), ModalityVQ(3, 12, 8, revive=0).cuda(); a.initialise(x), b.initialise(x.cuda())
    for t in range(5): p, q = a(clouds(seed=t)), b(clouds(seed=t).cuda()); assert (p.codes != q.codes.cpu()).float().mean() < .01
    torch.testing.assert_close(a.levels[0].codes, b.levels[0].codes.cpu(), rtol=1e-3, atol=1e-3)
