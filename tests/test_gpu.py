"A GPU gives what the processor gives: losses, gradients, candidates, rankings, codes and a training."
import os
import warnings
from dataclasses import fields, replace

import many
import pytest
import torch

from imecd.core import configure
from imecd.metrics import ndcg
from imecd.model import IMECD, PRESETS, ModelConfig
from imecd.train import TrainConfig, fit, validate

pytestmark = pytest.mark.cuda
EXACT = many.SMALL | dict(dropout=0., denoiser_dropout=0., feature_dropout=0., id_dropout=0., drop=0., pure=1., ties=False, commitment=.1)


OTHER = os.environ.get('IMECD_OTHER_DEVICE', 'cuda')  # `cpu` tries the tests themselves, on a machine without a GPU


@pytest.fixture(scope='module')
def both():
    "The same data on both devices; skipped where there is no GPU."
    if OTHER == 'cuda' and not torch.cuda.is_available(): pytest.skip('no CUDA device')
    data, features = many.made(200); tensors = {f.name: x.to(OTHER) for f in fields(data) if torch.is_tensor(x := getattr(data, f.name))}
    return data, replace(data, **tensors), features


@pytest.fixture
def drawn_alike(monkeypatch):
    "What is drawn is drawn on the processor, and moved: both devices get the same noise."
    for name in ('rand', 'randn', 'randint', 'randperm'):
        own = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, own=own, device=None, **kw: own(*a, **kw).to(device or 'cpu'))
    for name in ('rand_like', 'randn_like'):
        own = getattr(torch, name); monkeypatch.setattr(torch, name, lambda x, own=own, **kw: own(x.cpu(), **kw).to(x.device))


def pair(both, name='imecd', **changes):
    "One model on both devices, at the same parameters."
    data, there, features = both; c = configure(ModelConfig, EXACT | PRESETS[name] | changes); a, b = IMECD.of(c, data, features), IMECD.of(c, there, features); b.load_state_dict(a.state_dict()); return a, b


@pytest.mark.parametrize('name', [*PRESETS])
def test_loss_and_gradients(both, name):
    a, b = pair(both, name); x, y = (next(d.epoch(0, 0, 256, bucketed=True)) for d in both[:2]); a, b = a.eval(), b.eval(); one, two = a.loss(x, warmup=True), b.loss(y, warmup=True); one.loss.backward(); two.loss.backward()
    assert torch.allclose(one.loss, two.loss.cpu(), rtol=1e-4)
    for (key, p), q in zip(a.named_parameters(), b.parameters()):
        if p.grad is not None: assert torch.allclose(p.grad, q.grad.cpu(), atol=1e-4, rtol=1e-2), key


@pytest.mark.parametrize('name', ['imecd', 'shared_vq', 'wo_contrast', 'cdm_only', 'sampled'])
def test_every_term_after_the_warm_up(both, drawn_alike, name):
    changes = {'softmax': 'sampled', 'negatives': 16} if name == 'sampled' else {}; a, b = pair(both, 'imecd' if changes else name, **changes); a.place_codes(both[0]); b.load_state_dict(a.state_dict()); found = []
    for m, d in zip((a, b), both): torch.manual_seed(3); batch = next(d.epoch(0, 0, 256)); m.eval(); out = m.loss(batch); out.loss.backward(); found.append(out)
    assert {'generated', 'mse', 'vq'} <= found[0].parts.keys() == found[1].parts.keys() and b.reader.vq.ready
    for key, x in found[0].parts.items(): assert torch.allclose(x, found[1].parts[key].cpu(), rtol=1e-3, atol=1e-5), key
    for (key, p), q in zip(a.named_parameters(), b.parameters()):
        if p.grad is not None: assert torch.allclose(p.grad, q.grad.cpu(), atol=1e-3, rtol=1e-2), key


def test_items_made_in_parts(both):
    a, b = pair(both); assert torch.allclose(a.table.everything(7).vectors, b.table.everything(7).vectors.cpu(), atol=1e-5) and torch.allclose(b.table.everything(7).vectors, b.table.everything().vectors, atol=1e-5)


def test_ranks_and_codes(both):
    a, b = pair(both); [m.place_codes(d) for m, d in zip((a, b), both)]; b.load_state_dict(a.state_dict())
    (r, codes), (s, others) = (validate(m, d, d.cases('valid')) for m, d in zip((a, b), both)); assert (r == s.cpu()).float().mean() > .98 and (codes == others.cpu()).float().mean() > .98


@pytest.mark.parametrize('changes', [{}, {'softmax': 'sampled', 'negatives': 32}, {'top_k': 1, 'noisy': True}, {'levels': 2}, {'vq': 'shared'}], ids=str)
def test_a_training(both, changes):
    found = []
    for d in both[:2]:
        m = IMECD.of(configure(ModelConfig, many.SMALL | {'commitment': .25} | changes), d, both[2])
        with warnings.catch_warnings(): warnings.filterwarnings('ignore', message='codebook of'); fit(m, d, TrainConfig(epochs=6, targets=256, lr=1e-2))
        found.append(float(ndcg(validate(m, d, d.cases('valid'))[0], 10).mean()))
    assert abs(found[0]-found[1]) < .12 and min(found) > .1


def test_goes_on(both, tmp_path):
    data, there, features = both; make = lambda d: IMECD.of(configure(ModelConfig, many.SMALL | dict(dropout=0., denoiser_dropout=0.)), d, features); run = TrainConfig(epochs=4, targets=256); a, b = make(there), make(there)
    whole = fit(a, there, run, show='none'); fit(make(there), there, replace(run, epochs=3), folder=tmp_path, show='none'); again = fit(b, there, run, folder=tmp_path, resume=True, show='none')
    assert again.rows[-1]['loss'] == pytest.approx(whole.rows[-1]['loss'], rel=1e-3) and again.rows[-1]['gradient'] == pytest.approx(whole.rows[-1]['gradient'], rel=.02)
    fit(make(data), data, replace(run, epochs=3), folder=tmp_path/'from the processor', show='none'); other = fit(make(there), there, run, folder=tmp_path/'from the processor', resume=True, show='none'); assert len(other.rows) == 4 and other.rows[-1]['loss'] < other.rows[-2]['loss']*1.05


def test_bfloat16(both):
    found = []
    for d in both[:2]:
        torch.manual_seed(0); m = IMECD.of(configure(ModelConfig, many.SMALL), d, both[2])
        found.append(fit(m, d, TrainConfig(epochs=3, targets=256, bf16=True), show='none').rows)
    assert all(a['condition'] == pytest.approx(b['condition'], rel=.05) for a, b in zip(*found))
