"A GPU gives what the processor gives: losses, gradients, candidates, rankings, codes and a training."
import warnings
from dataclasses import replace

import many
import numpy as np
import pytest
import torch

from imecd.core import configure
from imecd.metrics import ndcg
from imecd.model import IMECD, PRESETS, ModelConfig
from imecd.train import TrainConfig, fit, validate

pytestmark = pytest.mark.cuda
EXACT = many.SMALL | dict(dropout=0., denoiser_dropout=0., feature_dropout=0., id_dropout=0., drop=0., pure=1., ties=False, commitment=.1)


@pytest.fixture(scope='module')
def both():
    "The same data on both devices; skipped where there is no GPU."
    if not torch.cuda.is_available(): pytest.skip('no CUDA device')
    data, features = many.made(200); move = lambda x: None if x is None else x.cuda()
    return data, replace(data, events=data.events.cuda(), offsets=data.offsets.cuda(), rest=move(data.rest)), features


def pair(both, name='imecd', **changes):
    "One model on both devices, at the same parameters."
    data, there, features = both; c = configure(ModelConfig, EXACT | PRESETS[name] | changes); a, b = IMECD.of(c, data, features), IMECD.of(c, there, features); b.load_state_dict(a.state_dict()); return a, b


@pytest.mark.parametrize('name', [*PRESETS])
def test_loss_and_gradients(both, name):
    a, b = pair(both, name); x, y = (next(d.epoch(0, 0, 256, bucketed=True)) for d in both[:2]); a, b = a.eval(), b.eval(); one, two = a.loss(x, warmup=True), b.loss(y, warmup=True); one.loss.backward(); two.loss.backward()
    assert torch.allclose(one.loss, two.loss.cpu(), rtol=1e-4)
    for (key, p), q in zip(a.named_parameters(), b.parameters()):
        if p.grad is not None: assert torch.allclose(p.grad, q.grad.cpu(), atol=1e-4, rtol=1e-2), key


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


def test_goes_on_bit_by_bit_nearly(both, tmp_path):
    _, there, features = both; make = lambda: IMECD.of(configure(ModelConfig, many.SMALL), there, features); run = TrainConfig(epochs=4, targets=256); a, b = make(), make()
    fit(a, there, run); fit(make(), there, replace(run, epochs=2), folder=tmp_path); fit(b, there, run, folder=tmp_path, resume=True)
    assert np.allclose(*(float(ndcg(validate(m, there, there.cases('valid'))[0], 10).mean()) for m in (a, b)), atol=.05)
