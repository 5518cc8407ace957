"""The mean over the catalogue in strips equals the plain loss, in value and gradient, for whatever is scored."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from imecd.catalogue import ROWS, mean_catalogue_loss, products, strip_rows
from imecd.diffusion import catalogue_loss
from imecd.core import ImecdError


def plain(q, z, y, bias, seen, again):
    "Every score written out; target and history count as they are."
    r = torch.arange(len(q))[:, None]; s = (q@z.T).index_put((r.expand_as(seen), seen), again, accumulate=True) if again is not None else q@z.T
    bias = bias.expand(len(q), -1).clone(); bias[r, seen] = bias[r[:, 0], y] = 0.
    return F.cross_entropy((s+bias)[:, 1:], y-1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.booleans(), st.booleans(), st.integers(0, 3))
def test_strips_are_the_dense_loss(rows, strip, biased, again, seed):
    g = torch.Generator().manual_seed(seed*10_000+rows*100+strip); q, z = (torch.randn(n, 6, generator=g, dtype=torch.float64, requires_grad=True) for n in (rows, 13))
    y, bias = torch.randint(1, 11, (rows,), generator=g), torch.zeros(13, dtype=torch.float64); bias[11:] = -torch.inf if biased else 0.
    seen, r = torch.stack([torch.randperm(12, generator=g)[:3]+1 for _ in range(rows)]), torch.tensor(.7, dtype=torch.float64, requires_grad=True) if again else None
    wanted, found = plain(q, z, y, bias, seen, r), mean_catalogue_loss(q, z, y, bias, seen, r, strip=strip)
    assert torch.allclose(found, wanted, rtol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, [q, z]+[r]*again) for x in (found, wanted))): assert torch.allclose(a, b, atol=1e-12)


def test_the_slope_from_above_is_passed_on():
    torch.manual_seed(0); q, z, y = torch.randn(9, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True), torch.randint(1, 8, (9,))
    (3*mean_catalogue_loss(q, z, y, count=18)).backward(); got = q.grad.clone(), z.grad.clone(); q.grad = z.grad = None
    (1.5*catalogue_loss(q, z, y).mean()).backward()
    assert torch.allclose(got[0], q.grad, atol=1e-6) and torch.allclose(got[1], z.grad, atol=1e-6)


def test_the_target_is_never_taken_out():
    "The correction of sampled candidates is for candidates; a target counts as it is."
    torch.manual_seed(0); q, z, y = torch.randn(5, 4), torch.randn(8, 4), torch.full((5,), 3); bias = torch.full((8,), -torch.inf)
    assert float(mean_catalogue_loss(q, z, y, bias)) == 0.


def test_bfloat16_is_near():
    torch.manual_seed(0); q, z, y = F.normalize(torch.randn(300, 32), dim=1).mul(14).requires_grad_(), F.normalize(torch.randn(500, 32), dim=1).requires_grad_(), torch.randint(1, 500, (300,))
    wanted = torch.autograd.grad(mean_catalogue_loss(q, z, y), (q, z))
    with torch.autocast('cpu', torch.bfloat16): found = mean_catalogue_loss(q, z, y)
    assert found.dtype == torch.float32 and torch.allclose(found, mean_catalogue_loss(q, z, y), rtol=1e-3)
    for a, b in zip(torch.autograd.grad(found, (q, z)), wanted): assert a.dtype == torch.float32 and F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > .999


def test_no_second_derivative_and_no_empty_mean():
    q, z, y = torch.randn(5, 4, requires_grad=True), torch.randn(8, 4), torch.randint(1, 8, (5,))
    slope, = torch.autograd.grad(mean_catalogue_loss(q, z, y), q, create_graph=True)
    with pytest.raises(RuntimeError): slope.sum().backward()
    with pytest.raises(ImecdError, match='at least one'): mean_catalogue_loss(q[:0], z, y[:0])


def test_a_strip_is_never_empty(): assert strip_rows(10**9, 'cpu') >= 1 and strip_rows(1, 'cuda') >= 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_a_graphics_card_agrees():
    torch.manual_seed(0); q, z, y = torch.randn(50, 16), torch.randn(90, 16), torch.randint(1, 90, (50,))
    assert torch.allclose(mean_catalogue_loss(q, z, y), mean_catalogue_loss(q.cuda(), z.cuda(), y.cuda()).cpu(), rtol=1e-4)


def test_products_are_aligned_where_nobody_asks_for_more():
    q, z = torch.randn(5, 8), torch.randn(27, 8); wanted = q@z.T
    with torch.no_grad(): s = products(q, z); assert torch.equal(s, wanted) and s.shape == (5, 27) and s.stride() == (-(-27//ROWS)*ROWS, 1)
    for x in (q, z): x.requires_grad_()
    products(q, z).sum().backward(); assert torch.allclose(q.grad, z.sum(0).expand_as(q), atol=1e-5) and torch.allclose(z.grad, q.sum(0).expand_as(z), atol=1e-5)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): s = products(q, z); assert s.dtype == torch.bfloat16 and torch.allclose(s.float(), wanted, atol=.1)
