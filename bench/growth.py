"""How time and memory grow with items, users, the length of histories and the steps of the sampler, on generated shops.

    python bench/growth.py                     every point, each in a process of its own; one JSON line
    python bench/growth.py point CACHE key=value ...   one point: softmax, length, sample_steps

A point is `fit` on the prepared cache of a shop (no pictures), three epochs of which the first is a warm-up, with checkpoints: all training rows are held, but an epoch takes
about sixteen steps, and 2,048 users are asked. `step ms` is the median of eight steps after it, `epoch s` that time for all steps of a whole epoch,
`users per second` with making the items for ranking (`table s`), `peak GB` (10^9 bytes) what the process ever held. On a processor; the model reads IDs and texts.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from memory import peak

from imecd.batch import SequenceData, Windows
from imecd.cache import make_cache, save_cache
from imecd.core import configure, rng
from imecd.features import Vectors, describe, join_features
from imecd.fitting import load_split, stream_features
from imecd.histories import Interactions
from imecd.model import IMECD, ModelConfig
from imecd.shop import make_shop
from imecd.train import TrainConfig, fit, own_randomness, running_mean, validate

STEPS, ASKED = 16, 2048
ITEMS = [(n, softmax) for n in (10**3, 10**4, 10**5, 10**6) for softmax in ('full', 'sampled') if n < 10**6 or softmax == 'sampled']
USERS, LENGTHS, SAMPLER = (10**3, 10**4, 10**5, 10**6), (10, 50, 100, 200), (1, 2, 4, 8, 16, 32)


def shortened(data, targets):
    "Some of the rows of an epoch, and of the users that validation asks."
    g, w = rng(0, 'growth'), data.windows; order = g.permutation(len(w.users)); some = order[:1+int(np.searchsorted(np.cumsum(w.asked[order]), STEPS*targets))]
    valid = data.split.valid.copy(); users = np.flatnonzero(valid >= 0); valid[np.setdiff1d(users, g.permutation(users)[:ASKED])] = -1
    return SequenceData(data.split._replace(valid=valid), data.length, data.events, data.offsets, Windows(*(x[some] for x in w)), data.rest)


def point(cache, softmax='auto', length='50', sample_steps='1'):
    "Train for a while; what a step and a question cost, and how much memory all of it took."
    data = load_split(cache, 'leave_one_out', int(length), device='cpu'); features = stream_features(cache, 'id+text'); train = TrainConfig(epochs=3, warmup=1)
    model = IMECD.of(configure(ModelConfig, {'streams': 'id+text', 'softmax': softmax, 'length': int(length), 'sample_steps': int(sample_steps)}), data, features); some = shortened(data, train.targets)
    with tempfile.TemporaryDirectory() as tmp: fit(model, some, train, folder=Path(tmp)/'kept', show='none')
    most = peak()*2**20/1e9; optimiser = torch.optim.Adam(model.parameters(), 1e-4, fused=True); running_mean(model, optimiser, 100); times = []
    with own_randomness(data.device):
        model.train()
        for batch, _ in zip(some.epoch(1, 0, train.targets), range(10)):
            start = time.perf_counter(); optimiser.zero_grad(); model.loss(batch).loss.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 5.); optimiser.step(); times.append(time.perf_counter()-start)
    model.eval(); step, cases = sorted(times[2:])[len(times[2:])//2], some.cases('valid'); model.cache = None; start = time.perf_counter(); model.items(); table = time.perf_counter()-start
    model.cache = None; start = time.perf_counter(); validate(model, some, cases); asked = len(cases.users)/(time.perf_counter()-start)
    return {'items': data.n_items, 'users': data.n_users, 'events': len(data.events), 'softmax': 'sampled' if model.sampled else 'full', 'length': data.length, 'sample_steps': int(sample_steps),
            'step_ms': 1e3*step, 'epoch_s': step*data.n_targets/train.targets, 'table_s': table, 'users_per_second': asked, 'peak_GB': most}


def shop(folder, users, items):
    "The cache of a shop; made by a process of its own, so that its memory is not counted."
    make_shop(folder/'shop', n_users=users, n_items=items, pictures=False); make_cache(folder/'shop', folder/'cache')


def walks(folder, events, items):
    "The cache of 2,000 histories of one length, with features of noise: shops have no long histories."
    import polars as pl
    g, names = np.random.default_rng(0), [f'i{k}' for k in range(items)]; text = g.standard_normal((items, 128)).astype(np.float32)
    data = Interactions(np.array([f'u{i:04}' for i in range(2000)], object), pl.DataFrame({'item': names}), g.integers(1, items+1, 2000*events).astype(np.int32), np.arange(2001, dtype=np.int64)*events, None, None)
    save_cache(data, join_features(names, Vectors(text, np.ones(items, bool), describe('noise'))), folder/'cache')


def call(*args): return subprocess.run([sys.executable, __file__, *map(str, args)], check=True, stdout=subprocess.PIPE, text=True).stdout


def measured(maker, *size, cases):
    "Points on one data set, which is removed afterwards."
    with tempfile.TemporaryDirectory() as tmp:
        call(maker, tmp, *size)
        for case in cases: yield json.loads(call('point', Path(tmp)/'cache', *(f'{k}={v}' for k, v in case.items())).splitlines()[-1])


def main():
    rows = {'items': [r for n in sorted({n for n, _ in ITEMS}) for r in measured('shop', 20_000, n, cases=[{'softmax': s} for k, s in ITEMS if k == n])]}
    rows['users'] = [r for n in USERS for r in measured('shop', n, 10**4, cases=[{}])]
    rows['length'] = [r for n in LENGTHS for r in measured('walks', n+3, 10**4, cases=[{'length': n}])]
    rows['sample_steps'] = list(measured('shop', 5_000, 10**4, cases=[{'sample_steps': s} for s in SAMPLER]))
    show = ('softmax', 'step_ms', 'epoch_s', 'table_s', 'users_per_second', 'peak_GB')
    tables = [{f"{by.replace('_', ' ')} {r[by]:,}"+(f" {r['softmax']}" if by == 'items' else ''): {k: r[k] for k in show} for r in found} for by, found in rows.items()]
    print(json.dumps({'rows': rows, 'tables': tables}))


if __name__ == '__main__':
    task, *args = sys.argv[1:] or ['all']
    if task == 'all': main()
    if task == 'point': print(json.dumps(point(Path(args[0]), **dict(a.split('=') for a in args[1:]))))
    if task in ('shop', 'walks'): {'shop': shop, 'walks': walks}[task](Path(args[0]), int(args[1]), int(args[2]))
