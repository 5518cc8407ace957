"""An epoch, an evaluation and a whole training on a GPU; kernels in a step, and the share of their time in matrix products.

    python bench/gpu.py [FOLDER ...]           data sets, or caches of them (`imecd data cache`); default $IMECD_DATA/amazon18_instruments and amazon14_toys

Goals on an H100: 0.5 s an epoch, 60 s a training to early stop. Epochs and evaluations are medians of five, after one that does not count; the training is one, with the defaults but for bfloat16.
"""
import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch
from floor import median
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from imecd.fitting import configure_preset, cut_streams, load_split, stream_features
from imecd.metrics import ndcg
from imecd.model import IMECD
from imecd.train import TrainConfig, fit, running_mean, train_epoch, validate

DATA = Path(os.environ.get('IMECD_DATA', 'data'))
PRODUCTS = ('gemm', 'cutlass', 'xmma', 'gemv', 'nvjet')


def wait(device):
    if device.type == 'cuda': torch.cuda.synchronize(device)


def seconds(f, device, n=5):
    f(); times = []
    for _ in range(n): wait(device); start = time.perf_counter(); f(); wait(device); times.append(time.perf_counter()-start)
    return median(times)


def kernels(step, device):
    "Kernels of a step, and the share of their time that is matrix products."
    if device.type != 'cuda': return {'kernels_per_step': None, 'share_of_products': None}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p: step(); wait(device)
    found = [e for e in p.events() if e.device_type == DeviceType.CUDA]; time_of = lambda some: sum(e.device_time for e in some)
    return {'kernels_per_step': len(found), 'share_of_products': time_of([e for e in found if any(x in e.name.lower() for x in PRODUCTS)])/time_of(found)}


def measure(folder, name='auto', epochs=100):
    "One data set: both precisions, then a training."
    data, out = load_split(folder, 'leave_one_out', 50, device=name), {}; device = data.device; features = stream_features(folder, 'id+text+image', device=name)
    model = lambda: IMECD.of(cut_streams(configure_preset('imecd', {}, 50, 0)[0], False, features)[0], data, features); cases = data.cases('test')
    for bf16 in (False, True):
        m = model(); m.place_codes(data); optimiser = torch.optim.Adam(m.parameters(), 1e-3, fused=True); running_mean(m, optimiser, 100); how = TrainConfig(warmup=0, bf16=bf16); one = next(data.epoch(0, 0, how.targets))
        def answer(m=m): m.cache = None; validate(m, data, cases)
        row = {'epoch_s': seconds(lambda m=m, o=optimiser, how=how: train_epoch(m, data.epoch(0, 0, how.targets), o, how, 1), device), 'evaluation_s': seconds(answer, device), **kernels(lambda m=m, o=optimiser, how=how, one=one: train_epoch(m, [one], o, how, 1), device)}
        if bf16:
            m = model(); start = time.perf_counter(); history = fit(m, data, TrainConfig(bf16=True, epochs=epochs), show='none'); wait(device)
            row |= {'training_s': time.perf_counter()-start, 'epochs': len(history.rows), 'test_ndcg@10': float(ndcg(validate(m, data, cases)[0], 10).mean())}
        out[f'{Path(folder).name}, {"bfloat16" if bf16 else "float32"}'] = {'epoch_s': None, 'evaluation_s': None, 'kernels_per_step': None, 'share_of_products': None, 'training_s': None, 'epochs': None, 'test_ndcg@10': None} | row
    return out


if __name__ == '__main__':
    if not torch.cuda.is_available(): raise SystemExit('there is no GPU; nothing was measured')
    found = {}
    for folder in itertools.chain(sys.argv[1:] or (DATA/'amazon18_instruments', DATA/'amazon14_toys')): found |= measure(folder)
    print(json.dumps({'device': torch.cuda.get_device_name(), 'tables': [found]}))
