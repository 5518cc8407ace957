"The encoders: causal, blind to company and padding, equal to the textbook."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from imecd.core import ImecdError
from imecd.encoder import Attention, SequenceEncoder, lay_out, plot_attention, plot_mask, plot_moved

BOTH = pytest.mark.parametrize('norm', ['pre', 'post'])
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
SMALL = settings(max_examples=15, deadline=None)


def ends(lengths): return torch.tensor([0, *lengths]).cumsum(0)


def made(norm='pre', streams=3, dim=16, layers=2, heads=2, inner=24, length=12, sharp=8, **kw):
    "An encoder whose attention is far from even, at rest."
    torch.manual_seed(0); e = SequenceEncoder(streams, dim, layers, heads, inner, length=length, norm=norm, **kw).eval()
    with torch.no_grad():
        for p in e.parameters(): p.copy_(p*sharp if p.shape[1] > 1 else p+.3*torch.randn_like(p))
    return e


def vectors(lengths, streams=3, dim=16, seed=0): return torch.randn(streams, sum(lengths), dim, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def states(e, x, lengths): return list(e(x, ends(lengths)).split(lengths, 1))


def naive(e, x, s):
    "One stream and one row, with an explicit mask, head by head."
    def norm(layer, x): return (x-x.mean(-1, keepdim=True))/(x.var(-1, correction=0, keepdim=True)+1e-5).sqrt()*layer.weight[s, 0]+layer.bias[s, 0]
    def linear(layer, x): return x@layer.weight[s]+layer.bias[s, 0]
    def attend(a, x):
        q, k, v = linear(a.qkv, x).chunk(3, -1); out, n, width = [], len(x), x.shape[-1]//a.heads
        for i in range(a.heads):
            cut = slice(i*width, (i+1)*width)
            w = (q[:, cut]@k[:, cut].T/math.sqrt(width)).masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
            out.append(w@v[:, cut])
        return linear(a.out, torch.cat(out, -1))
    def feed(b, x): return linear(b.down, F.gelu(linear(b.up, x)))
    h = norm(e.enter, x+e.positions[s, :len(x)])
    for b in e.blocks:
        if e.pre: h = h+attend(b.attention, norm(b.norm1, h)); h = h+feed(b, norm(b.norm2, h))
        else: h = norm(b.norm1, h+attend(b.attention, h)); h = norm(b.norm2, h+feed(b, h))
    return norm(e.leave, h) if e.pre else h


def textbook(e, x, s, heads):
    "The same with torch's own transformer layer."
    h = F.layer_norm(x+e.positions[s, :len(x)], x.shape[-1:], e.enter.weight[s, 0], e.enter.bias[s, 0])[None]
    for b in e.blocks:
        t = nn.TransformerEncoderLayer(x.shape[-1], heads, b.up.weight.shape[-1], dropout=0., activation='gelu', batch_first=True, norm_first=e.pre)
        pairs = [(t.linear1, b.up), (t.linear2, b.down), (t.self_attn.out_proj, b.attention.out)]
        with torch.no_grad():
            for own, mine in pairs: own.weight.copy_(mine.weight[s].T); own.bias.copy_(mine.bias[s, 0])
            t.self_attn.in_proj_weight.copy_(b.attention.qkv.weight[s].T); t.self_attn.in_proj_bias.copy_(b.attention.qkv.bias[s, 0])
            for own, mine in ((t.norm1, b.norm1), (t.norm2, b.norm2)): own.weight.copy_(mine.weight[s, 0]); own.bias.copy_(mine.bias[s, 0])
        h = t(h, src_mask=torch.ones(len(x), len(x)).triu(1).bool())
    return (F.layer_norm(h, x.shape[-1:], e.leave.weight[s, 0], e.leave.bias[s, 0]) if e.pre else h)[0]


@BOTH
@pytest.mark.parametrize('heads', [1, 2, 4])
def test_it_is_the_naive_transformer_values_and_gradients(norm, heads):
    lengths = [5, 1, 8, 3]; e, x = made(norm, heads=heads, layers=1, sharp=3), vectors(lengths)
    got = e(x, ends(lengths)); wanted = torch.stack([torch.cat([naive(e, row, s) for row in x[s].split(lengths)]) for s in range(3)])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    weight = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad((y*weight).sum(), list(e.parameters())) for y in (got, wanted))
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize('heads', [1, 4])
def test_with_a_dot_product_it_is_the_textbook_sasrec(norm, heads):
    lengths = [7, 1, 4]; e, table = made(norm, heads=heads), vectors([31])
    items = torch.randint(1, 31, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        h = e(table[:, items], ends(lengths))
        for s in range(3):
            wanted = torch.cat([textbook(e, table[s, row], s, heads) for row in items.split(lengths)])@table[s].T
            torch.testing.assert_close(h[s]@table[s].T, wanted, rtol=0, atol=1e-5*float(wanted.abs().max()))


@BOTH
@SMALL
@given(lengths=LENGTHS)
def test_one_pass_is_every_prefix(norm, lengths):
    e, x = made(norm), vectors(lengths)
    for row, whole in zip(x.split(lengths, 1), states(e, x, lengths)):
        for n in range(1, row.shape[1]+1): torch.testing.assert_close(states(e, row[:, :n], [n])[0][:, -1], whole[:, n-1], rtol=0, atol=1e-5)


@BOTH
@SMALL
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_order_of_rows_company_and_padding_change_nothing(norm, lengths, seed):
    e, x = made(norm), vectors(lengths); base = states(e, x, lengths); rows = list(x.split(lengths, 1))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    mixed = states(e, torch.cat([rows[r] for r in order], 1), [lengths[r] for r in order])
    for place, r in enumerate(order): torch.testing.assert_close(mixed[place], base[r], rtol=0, atol=1e-5)
    for extra in (10, 12):
        beside = states(e, torch.cat([vectors([extra], seed=seed), *rows], 1), [extra, *lengths])
        for r in range(len(rows)): torch.testing.assert_close(beside[r+1], base[r], rtol=0, atol=1e-5)
    for r, row in enumerate(rows): torch.testing.assert_close(states(e, row, [lengths[r]])[0], base[r], rtol=0, atol=1e-5)


@BOTH
@SMALL
@given(lengths=LENGTHS, order=st.permutations([0, 1, 2]))
def test_streams_are_encoders_of_their_own(norm, lengths, order):
    e, x = made(norm), vectors(lengths); base = e(x, ends(lengths))
    def chosen(streams):
        own = SequenceEncoder(len(streams), 16, 2, 2, 24, length=12, norm=norm).eval()
        own.load_state_dict({k: v[streams] for k, v in e.state_dict().items()}); return own
    torch.testing.assert_close(chosen(order)(x[order], ends(lengths)), base[order], rtol=0, atol=1e-5)
    for s in range(3): torch.testing.assert_close(chosen([s])(x[s:s+1], ends(lengths)), base[s:s+1], rtol=0, atol=1e-5)


@BOTH
def test_nothing_before_a_changed_item_moves(norm):
    lengths = [6, 9]; e, x = made(norm), vectors(lengths); before = states(e, x, lengths)
    for t in range(9):
        other = x.clone(); other[:, 6+t] = vectors([1], seed=1)[:, 0]; after = states(e, other, lengths)
        assert torch.equal(after[0], before[0]) and torch.equal(after[1][:, :t], before[1][:, :t])
        assert ((after[1]-before[1]).abs().amax(-1)[:, t:] > 0).all()


@BOTH
def test_no_gradient_reaches_the_future_or_another_row(norm):
    lengths = [4, 6]; e, x = made(norm), vectors(lengths).requires_grad_()
    for p in range(10):
        (g,) = torch.autograd.grad((e(x, ends(lengths))[:, p]*vectors([1])[:, 0]).sum(), x); reached = g.abs().amax((0, 2)) > 0
        assert reached.nonzero().flatten().tolist() == list(range(0 if p < 4 else 4, p+1))


@SMALL
@given(lengths=st.lists(st.integers(0, 9), min_size=0, max_size=6))
def test_layout_is_left_aligned_and_empty_rows_are_allowed(lengths):
    layout = lay_out(ends(lengths), sum(lengths)); longest = max([0, *lengths])
    assert layout.positions.tolist() == [j for n in lengths for j in range(n)] and layout[1:3] == (len(lengths), longest)
    assert layout.place.tolist() == [r*longest+j for r, n in enumerate(lengths) for j in range(n)]
    out = made()(vectors(lengths), ends(lengths))
    assert out.shape == (3, sum(lengths), 16) and out.isfinite().all()


@BOTH
@pytest.mark.parametrize('lengths', [[1], [1, 1, 1], [12], [1, 12]])
def test_the_smallest_and_the_longest_rows(norm, lengths):
    e = made(norm).train(); out = e(vectors(lengths), ends(lengths)); (out*torch.randn_like(out)).sum().backward()
    assert out.shape == (3, sum(lengths), 16) and out.isfinite().all() and all(p.grad.isfinite().all() for p in e.parameters())


@pytest.mark.parametrize('shape', [dict(streams=1, dim=1, heads=1, layers=1, inner=1, length=1), dict(dim=4, heads=4)])
def test_the_smallest_encoders(shape):
    e = SequenceEncoder(**shape); s, length, d = e.positions.shape
    assert e(torch.randn(s, 2, d), ends([1, 1])).isfinite().all()


@BOTH
def test_positions_count_from_the_left(norm):
    "With the same item everywhere only the place tells positions apart; place p of every row is the same state."
    e, lengths = made(norm), [3, 7, 5]; x = vectors([1]).expand(3, 15, 16); rows = states(e, x, lengths)
    for row in rows: torch.testing.assert_close(row, rows[1][:, :row.shape[1]], rtol=0, atol=1e-5)
    assert (rows[1].diff(dim=1).abs().amax(-1) > 1e-3).all()
    with torch.no_grad(): e.positions[:, 7:] += 1
    assert all(torch.equal(a, b) for a, b in zip(states(e, x, lengths), rows))


@BOTH
def test_every_parameter_learns(norm):
    e, lengths = made(norm, length=9).train(), [9, 2]; out = e(vectors(lengths), ends(lengths)); (out*torch.randn_like(out)).sum().backward()
    silent = [n for n, p in e.named_parameters() if not (p.grad.flatten(1).abs().amax(1) > 0).all()]
    assert not silent and all((b.attention.qkv.bias.grad[:, 0, :16].abs() > 0).all() for b in e.blocks)


@BOTH
def test_weights_are_those_that_attention_uses(norm):
    lengths = [5, 2]; e, x = made(norm, layers=3), vectors(lengths); found = e.attention(x, ends(lengths))
    assert found.shape == (3, 3, 2, 2, 5, 5) and not found.requires_grad
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1])); assert (found.triu(1) == 0).all()
    attention, layout = Attention(3, 16, 4), lay_out(ends(lengths), 7); v = attention.split(x, layout)[2]
    by_hand = (attention.weights(x, layout).flatten(0, 1)@v).transpose(1, 2).reshape(3, -1, 16)[:, layout.place]
    torch.testing.assert_close(attention(x, layout), attention.out(by_hand), rtol=0, atol=1e-5)


def test_dropout_only_in_training():
    e, x = made(dropout=.5), vectors([5]); assert torch.equal(e(x, ends([5])), e(x, ends([5])))
    e.train(); torch.manual_seed(0); a = e(x, ends([5])); assert not torch.equal(a, e(x, ends([5])))
    torch.manual_seed(0); assert torch.equal(a, e(x, ends([5])))


@BOTH
def test_bf16_is_finite_and_near(norm):
    lengths = [1, 9, 4, 12]; e, x = made(norm, sharp=4, dropout=0.), vectors(lengths)
    exact = e(x, ends(lengths))
    with torch.autocast('cpu', torch.bfloat16): low = e(x, ends(lengths)); from_low = e(x.bfloat16(), ends(lengths))
    for got in (low, from_low):
        assert got.dtype == torch.float32 and got.isfinite().all() and float((got-exact).detach().std()/exact.detach().std()) < .05
    (low*torch.randn_like(low)).sum().backward(); assert all(p.grad.isfinite().all() for p in e.parameters())


@BOTH
def test_double_stays_double(norm):
    e, lengths = made(norm).double(), [4, 2]; x = vectors(lengths).double(); out = e(x, ends(lengths))
    wanted = torch.stack([torch.cat([naive(e, row, s) for row in x[s].split(lengths)]) for s in range(3)])
    assert out.dtype == torch.float64; torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@BOTH
def test_a_gpu_gives_the_same(norm):
    lengths = [5, 1, 12]; e, x = made(norm), vectors(lengths); wanted = e(x, ends(lengths))
    torch.testing.assert_close(e.cuda()(x.cuda(), ends(lengths).cuda()).cpu(), wanted, rtol=0, atol=1e-3)


def test_state_round_trip():
    a, b = made(), SequenceEncoder(3, 16, 2, 2, 24, length=12).eval(); b.load_state_dict(a.state_dict())
    assert torch.equal(a(vectors([5, 2]), ends([5, 2])), b(vectors([5, 2]), ends([5, 2])))


@pytest.mark.parametrize('make, words', [
    (lambda: SequenceEncoder(dim=10, heads=4), 'make dim a multiple of heads'),
    (lambda: SequenceEncoder(norm='layer'), "use 'pre' or 'post'"),
    (lambda: SequenceEncoder(heads=0), 'at least 1'),
    (lambda: SequenceEncoder(streams=0), 'at least 1'),
    (lambda: made()(vectors([13]), ends([13])), 'show it the last 12, or build it with length=13'),
    (lambda: made()(vectors([5], streams=1), ends([5])), r'\(3, P, 16\)'),
    (lambda: made()(vectors([5], dim=8), ends([5])), r'\(3, P, 16\)'),
    (lambda: made()(vectors([5])[0], ends([5])), r'\(3, P, 16\)'),
    (lambda: made()(vectors([5]), ends([3, 3])), 'there are 5 positions'),
    (lambda: made()(vectors([5]), torch.tensor([1, 5])), 'run from 1 to 5'),
    (lambda: made()(vectors([5]), torch.tensor([0, 6, 5])), 'must rise'),
])
def test_what_does_not_fit_is_refused_with_the_cure(make, words):
    with pytest.raises(ImecdError, match=words) as e: make()
    assert '\n' not in str(e.value) and len(str(e.value)) < 300


def test_pictures():
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3); e, x = made(), vectors([5])
    assert plot_attention(e.attention(x, ends([5]))[0, 0, 0, 0], ['$5 tea', *'bcde'], ax=axes[0]) is axes[0]
    assert axes[0].get_yticklabels()[0].get_text() == '$5 tea  0'
    assert plot_mask(ends([3, 2]), ax=axes[1]) is axes[1] and (axes[1].images[0].get_array() > 0).sum() == 9
    assert plot_moved(torch.ones(4, 4).triu(), ax=axes[2]) is axes[2]
    fig.canvas.draw(); plt.close(fig); assert plot_attention(torch.eye(3)); plt.close('all')


@BOTH
@SMALL
@given(LENGTHS)
def test_the_last_states_alone_are_those_of_the_whole_pass(norm, lengths):
    for layers, heads in ((1, 2), (3, 1), (1, 4)):
        e, x, o = made(norm, layers=layers, heads=heads), vectors(lengths), ends(lengths); assert all(b.attention.qkv.bias.abs().min() > 0 for b in e.blocks)
        with torch.no_grad(): assert torch.allclose(e(x, o, last=True), e(x, o)[:, o[1:]-1], atol=1e-5)


@BOTH
def test_the_last_states_have_the_gradients_of_the_whole_pass(norm):
    lengths = [5, 1, 12]; e, x, o = made(norm, dropout=0.).double(), vectors(lengths).double().requires_grad_(), ends(lengths); way = torch.randn(3, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    def slopes(out): return torch.autograd.grad((out*way).sum(), [x, *e.parameters()])
    for mine, whole in zip(slopes(e(x, o, last=True)), slopes(e(x, o)[:, o[1:]-1])): torch.testing.assert_close(mine, whole, rtol=0, atol=1e-10)


@BOTH
def test_the_last_states_in_bf16(norm):
    lengths = [1, 9, 4, 12]; e, x, o = made(norm, sharp=4, dropout=0.), vectors(lengths), ends(lengths)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): low = e(x, o, last=True)
    exact = e(x, o)[:, o[1:]-1].detach(); assert low.isfinite().all() and float((low-exact).std()/exact.std()) < .05


def test_the_last_state_asks_for_one_query_a_row():
    "A gradient reaches the whole history through keys and values, and nobody else's."
    e, x = made(), vectors([3, 4]).requires_grad_(); e(x, ends([3, 4]), last=True)[:, 1].sum().backward()
    assert (x.grad[:, :3] == 0).all() and (x.grad[:, 3:].abs().sum(-1) > 0).all()


@BOTH
def test_parts_at_rest_are_the_whole(norm):
    "More positions than are looked at together where no gradient is asked for."
    lengths = [12]*180; e, x, o = made(norm), vectors([12]*180), ends(lengths); whole = e(x, o)
    with torch.no_grad(): assert x.shape[1] > 2*1024 and torch.allclose(e(x, o), whole, atol=1e-5) and torch.allclose(e(x, o, last=True), whole[:, o[1:]-1], atol=1e-5)
