"What several processes run: `torchrun tests/many.py TASK FOLDER SETTINGS`; each writes what it found into FOLDER."
import atexit
import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import torch

import imecd.vq
from imecd.batch import sequence_data
from imecd.core import configure
from imecd.features import Features
from imecd.histories import Interactions, leave_one_out
from imecd.model import IMECD, PRESETS, ModelConfig
from imecd.processes import Processes, is_main
from imecd.shards import ShardedProcesses, can_share, full
from imecd.train import TrainConfig, fit, own_randomness, validate

N = 40
SMALL = dict(dim=8, experts=2, layers=1, heads=2, inner=16, length=10, codes=4, steps=6)
EXACT = SMALL | dict(dropout=0., denoiser_dropout=0., commitment=.1, codes=16, decay=.6, revive=1)
CASES = {**{name: (name, {}) for name in PRESETS}, 'residual': ('imecd', {'levels': 2}), 'dot': ('imecd', {'score': 'dot', 'item': 'sum'}), 'nobody seen': ('imecd', {'seen': False}),
         'gradient': ('imecd', {'learn': 'gradient'}), 'only negatives generated': ('imecd', {'contrast': 'generated', 'pure': 1.}), 'strips': ('imecd', {'chunk': 7}),
         'sampled': ('imecd', {'softmax': 'sampled', 'negatives': 16}), **{f'in parts, {name}': (name, {'softmax': 'sampled', 'negatives': 16}) for name in ('imecd', 'sasrec', 'wo_idmoe') if can_share()}}


def made(users=90):
    "Walks round a ring of items, in which days hold several events; features of which some are missing."
    g = np.random.default_rng(0); walks = [(np.cumsum(g.choice([1, 1, 1, 7], g.integers(4, 25)))+g.integers(N)) % N+1 for _ in range(users)]; lengths = [len(w) for w in walks]
    days = np.concatenate([np.sort(g.integers(0, 1+n//2, n)) for n in lengths]).astype(np.int64); items = pl.DataFrame({'item': [f'i{k}' for k in range(N)]})
    data = Interactions(np.array([f'u{i:03}' for i in range(users)], object), items, np.concatenate(walks).astype(np.int32), np.r_[0, np.cumsum(lengths)].astype(np.int64), days, days)
    present = np.ones((N+1, 2), bool); present[[0, 0, 4], [0, 1, 1]] = False; g = np.random.default_rng(1)
    features = Features(*((g.standard_normal((N+1, 6))*present[:, [m]]).astype(np.float32) for m in (0, 1)), present=present, manifest={})
    return sequence_data(leave_one_out(data), 10), features


def steps(out, name, n):
    "Steps in double precision, the first three a warm-up; a batch of one row is among them."
    preset, changes = CASES[name]; data, features = made(); m = IMECD.of(configure(ModelConfig, EXACT | PRESETS[preset] | changes), data, features).double(); wire = (ShardedProcesses if name.startswith('in parts') else Processes)(m)
    optimiser, losses = torch.optim.Adam(m.parameters(), 1e-2), []; batches = [b for epoch in range(4) for b in data.epoch(0, epoch, 100)][:n]
    batches[5] = data.history(data.cases('valid'), torch.tensor([3])); batches[5] = batches[5]._replace(targets=batches[5].items.roll(1))
    wire.seed(0); revived, own = [0], imecd.vq.revive_codes

    def counted(*args, **kw): dead = own(*args, **kw); revived[0] += int(dead.sum()); return dead
    imecd.vq.revive_codes = counted
    for i, batch in enumerate(batches):
        if i == 3:
            with wire.undivided(): m.place_codes(data); wire.agree(m.reader)
        m.train(); optimiser.zero_grad(); out_ = wire.loss(batch, i < 3); out_.loss.backward(); optimiser.step(); losses.append(wire.mean({'loss': out_.loss.detach()})['loss'])
    imecd.vq.revive_codes = own; assert len(batches) == n; state = torch.get_rng_state().numpy()
    grads = {f'grad {k}': full(p.grad).numpy() for k, p in m.named_parameters() if p.grad is not None}; wire.finish()
    np.savez(out/f'{name}.{wire.world}.{wire.rank}.npz', losses=losses, state=state, revived=revived[0], **grads, **{f'state {k}': v.numpy() for k, v in m.state_dict().items()})


def training(out, config, folder=None, resume=False, seed=0, how='imecd', **changes):
    "A whole training; what every process has at its end."
    data, features = made(300); m = IMECD.of(configure(ModelConfig, SMALL | PRESETS[how] | {'commitment': .25, 'seed': seed} | changes), data, features)
    with warnings.catch_warnings(): warnings.filterwarnings('ignore', message='codebook of'); h = fit(m, data, configure(TrainConfig, config), folder=folder, resume=resume)
    wire = Processes(m); cases = data.cases('test'); r = validate(m, data, cases, processes=wire)[0]; alone = validate(m, data, cases)[0]
    np.savez(out/f'{wire.world}.{wire.rank}.npz', ranks=r, alone=alone, **{f'state {k}': v.numpy() for k, v in m.state_dict().items()})
    if is_main(): (out/'rows.json').write_text(json.dumps(h.rows))


def leaves(out):
    "What is left of the group when the interpreter goes; called after everything that was arranged later."
    threads = [(p/'comm').read_text().strip() for p in Path('/proc/self/task').iterdir()]; (out/f'left {os.environ["RANK"]}.txt').write_text(f'{torch.distributed.is_initialized()} {threads.count("pt_gloo_runloop")}')


def fails(out, shard=False):
    "One process of the two meets a number that is none."
    atexit.register(leaves, out)
    data, features = made(); m = IMECD.of(configure(ModelConfig, SMALL | ({'softmax': 'sampled', 'negatives': 16} if shard else {})), data, features); loss = m.loss

    def spoilt(*args): found = loss(*args); bad = replace(found, loss=found.loss*torch.nan, parts=found.parts | {'condition': found.loss*torch.nan}); return found if is_main() else bad
    m.loss = spoilt
    try: fit(m, data, TrainConfig(epochs=1, targets=64, shard=shard))
    except Exception as e: (out/f'{"main" if is_main() else "other"}.txt').write_text(f'{type(e).__name__}: {e}')


def disagrees(out):
    "Only the second process finds checkpoints."
    data, features = made(); m = IMECD.of(configure(ModelConfig, SMALL), data, features); folder = out/f'kept {int(is_main())}'; world = os.environ.pop('WORLD_SIZE')
    if not is_main(): rank = os.environ.pop('RANK'); fit(m, data, TrainConfig(epochs=1, targets=64), folder=folder); os.environ['RANK'] = rank
    os.environ['WORLD_SIZE'] = world
    try: fit(m, data, TrainConfig(epochs=1, targets=64), folder=folder, resume=True)
    except Exception as e: (out/f'{"main" if is_main() else "other"}.txt').write_text(f'{type(e).__name__}: {e}')


def all_steps(out, names):
    "Twenty of the full model, eight of others."
    torch.set_default_dtype(torch.float64)
    try:
        with own_randomness(torch.device('cpu')):
            for name in names: steps(out, name, 20 if name == 'imecd' else 8)
    finally: torch.set_default_dtype(torch.float32)


if __name__ == '__main__': {'all_steps': all_steps, 'training': training, 'fails': fails, 'disagrees': disagrees}[sys.argv[1]](Path(sys.argv[2]), **json.loads(sys.argv[3]))
