"""How far is a training epoch, and an evaluation, from the time of its bare matrix products?

The floor is measured, not assumed: every matrix product that a room or a step really does is recorded with its shapes (of an evaluation: as one thread makes them), and timed alone, in the same process.
A fused kernel of attention counts as its two products, its gradient as four. What stands above the floor is everything else: softmax, norms, dropout, gathering, the optimiser, Python.
An evaluation answers parts of the questions side by side, so each of its products may be made by all cores together, or by each core at one time another; the faster way counts. bfloat16 is measured where the processor has instructions for it (AVX512). A step is the median of 16 over the mean floor of three of them, an evaluation the median of ten, five before its products and five after them, because a machine is not as fast at all times.
"""
import itertools
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from imecd.diffusion import contrastive_loss
from imecd.catalogue import aligned, mean_catalogue_loss
from imecd.fitting import configure_preset, cut_streams, load_split, stream_features
from imecd.model import IMECD
from imecd.towers import seen_items
from imecd.train import TrainConfig, running_mean, train_epoch, validate

DATA = Path(os.environ.get('IMECD_DATA', 'data'))
BF16 = 'AVX512' in torch.backends.cpu.get_cpu_capability()  # without it a processor multiplies bfloat16 number by number, and what that takes says nothing
PRODUCTS, FUSED = {'mm', 'addmm', 'bmm', 'baddbmm'}, '_scaled_dot_product_flash_attention_for_cpu'  # the gradient's name ends in `_backward`


class Recorder(TorchDispatchMode):
    "Shapes and types of all matrix products inside."
    def __init__(self): super().__init__(); self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS: a, b = args[-2:]; self.found[tuple(a.shape), tuple(b.shape), a.dtype] += 1
        if name.startswith(FUSED):                                                 # queries with keys, weights with values; of the gradient each with two others
            q, k, v = (tuple(x.flatten(0, 1).shape) for x in args[name != FUSED:][:3]); n = 1 if name == FUSED else 2
            self.found[q, (k[0], k[2], k[1]), args[0].dtype] += n; self.found[(*q[:2], k[1]), v, args[0].dtype] += n
        return func(*args, **(kwargs or {}))


def median(times): return sorted(times)[len(times)//2]


def clocked(f, n):
    f(); out = []
    for _ in range(n): start = time.perf_counter(); f(); out.append(time.perf_counter()-start)
    return out


def timed(f, n=7): return median(clocked(f, n))


def recorded(f):
    "The products of f, made by one thread, because what others do is not seen here; so the parts of an evaluation are not cut for several."
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try:
        with Recorder() as r: f()
    finally: torch.set_num_threads(threads)
    return r.found


def abreast(f, n=5):
    "Seconds of f where each core does one at one time."
    threads = torch.get_num_threads()
    def often(_):                                                                  # so that handing over does not count
        for _ in range(4): f()
    try:
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool: return timed(lambda: list(pool.map(often, range(threads))), n)/(4*threads)
    finally: torch.set_num_threads(threads)


def bare(found, apart=False):
    "Seconds of the products alone, each as fast as it goes (into a new table, or into one that is there and whose rows are aligned; `apart`: or one on each core), and their floating-point operations."
    total, work = 0., 0
    for (a, b, kind), n in found.items():
        x, y, f = torch.randn(a).to(kind), torch.randn(b).to(kind), torch.mm if len(a) == 2 else torch.bmm; new = lambda: aligned(math.prod(a[:-1]), b[-1], x).unflatten(0, a[:-1]); room, own = new(), threading.local()
        def into():
            if not hasattr(own, 'room'): own.room = new()
            return f(x, y, out=own.room)
        ways = [timed(lambda: x@y, 5), timed(lambda: f(x, y, out=room), 5), *([abreast(lambda: x@y), abreast(into)] if apart else [])]; total += n*min(ways); work += n*2*x.numel()*b[-1]
    return total, work


def room(f):
    "Milliseconds of a room, forward and backward, and how far above its products it is."
    floor, work = bare(recorded(f)); took = timed(f); return {'ms': 1e3*took, 'products_ms': 1e3*floor, 'GFLOP': work/1e9, 'ratio': took/floor}


def rooms(model, batch):
    "The rooms one by one on the tensors of a real step."
    items = model.table(batch.targets.unique()); asked = batch.targets.nonzero()[:, 0]; y = batch.targets[asked]; seen = seen_items(batch, asked)
    fixed = items._replace(vectors=items.vectors.detach(), read=items.read.detach().requires_grad_()); z = fixed.vectors.clone().requires_grad_()
    q = model.reader(model.reader.states(fixed, batch), batch)[0][asked].detach().requires_grad_()
    learn = lambda x: x.backward()
    return {'items': room(lambda: learn((i := model.table(y)).vectors.sum()+i.read.sum())),
            'encoder': room(lambda: learn(model.reader(model.reader.states(fixed, batch), batch)[0].sum())),
            'codes': room(lambda: model.reader.learn_codes(fixed, batch)),
            'catalogue': room(lambda: learn(mean_catalogue_loss(model.ask(q), z, y, model.bias, seen, model.repeat))),
            'denoiser': room(lambda: learn(model.cdg(q, z[y]).x0.sum())),
            'contrast': room(lambda: learn(contrastive_loss(q, z[y], y).mean()))}


def measure(name, bf16=False):
    data = load_split(DATA/name, 'leave_one_out', 50); config, _ = configure_preset('imecd', {}, 50, 0); train = TrainConfig(warmup=0, bf16=bf16)
    features = stream_features(DATA/name, config.streams); model = IMECD.of(cut_streams(config, False, features)[0], data, features); model.place_codes(data); model.train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3, fused=True); running_mean(model, optimiser, 100); batches = list(itertools.islice(data.epoch(0, 0), 16))
    step = lambda b: train_epoch(model, [b], optimiser, train, 1); step(batches[0]); took = []
    for b in batches: start = time.perf_counter(); step(b); took.append(time.perf_counter()-start)
    floors = [bare(recorded(lambda b=b: step(b))) for b in batches[:3]]
    floor, work = (sum(x)/3 for x in zip(*floors)); steps = data.n_targets/1024; cases = data.cases('valid'); cases = type(cases)(*(x[:8192] for x in cases))
    def judge(): model.cache = None; validate(model, data, cases)                  # the items anew, as after an epoch
    before = clocked(judge, 5); ask_floor, ask_work = bare(recorded(judge), apart=True); ask = median(before+clocked(judge, 5)); share = len(data.cases('valid').users)/len(cases.users)
    out = {f'{name}{", bfloat16" if bf16 else ""}': {'epoch_s': median(took)*steps, 'epoch_floor_s': floor*steps, 'epoch_over_floor': median(took)/floor, 'epoch_TFLOP': work*steps/1e12, 'GFLOP/s_of_products': work/floor/1e9,
           'evaluation_s': ask*share, 'evaluation_floor_s': ask_floor*share, 'evaluation_over_floor': ask/ask_floor, 'evaluation_TFLOP': ask_work*share/1e12}}
    return out, {} if bf16 else {f'{name}, {k}': v for k, v in rooms(model, batches[0]).items()}


if __name__ == '__main__':
    totals, parts = {}, {}
    for name in ('amazon18_instruments', 'amazon14_toys'):
        for bf16 in (False, True)[:1+BF16]: a, b = measure(name, bf16); totals |= a; parts |= b; print(a, file=sys.stderr)
    print(json.dumps({'tables': [totals, parts]}))
