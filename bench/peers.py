"""SASRec of RecBole and of RePlay against ours and against the full IMECD: targets trained and users ranked per second.

Same events, same order, same split, D = 64, L = 50, two layers, two heads, softmax over all items, one machine, one competitor after the other, each in a process of
its own. RecBole runs its own data loader, model, trainer steps and evaluation (prefix examples, its default batch of 2,048). RePlay's model is fed with tensors that
are padded beforehand (one row a user, the last 50 events), so its loader costs nothing here; the better of two batch sizes counts, and its ranking is a top-20. Ranking is the median of five for all, after one that does not count. Ours runs `train_epoch` and `validate`;
beside them stands what their bare matrix products would reach alone, timed as in `floor.py`: no arrangement of this model in these precisions can be faster than that.
The environments of the two are made by this script in bench/.peers, from the package index that pip is set up with.
"""
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
from floor import BF16

from imecd.histories import leave_one_out, load_interactions

HERE, DATA = Path(__file__).parent.resolve(), Path(os.environ.get('IMECD_DATA', 'data')).resolve()
ENVIRONMENTS = {'recbole': ('torch==2.13.0', 'numpy<2', 'pandas<3', 'scipy<1.15', 'setuptools<81', 'recbole==1.2.1', 'kmeans-pytorch'), 'replay': ('torch==2.13.0', 'replay-rec[torch]==0.22.0'), 'cornac': ('torch==2.13.0', 'cornac==3.0.1')}
SETS = ('movielens_small', 'amazon14_toys')


def python(name):
    "The interpreter of a competitor's environment, made where it is missing."
    home = HERE/'.peers'/name; done = home/'ready'
    if not done.exists():
        venv.create(home, with_pip=True, clear=True); subprocess.run([home/'bin/pip', 'install', '-q', *ENVIRONMENTS[name]], check=True, stdout=sys.stderr); done.touch()
    return home/'bin/python'


def ask(interpreter, script, folder, *args):
    "One competitor's figures; it works in a folder that is thrown away."
    env = {**os.environ, 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': '1', 'OMP_NUM_THREADS': str(os.cpu_count())}
    done = subprocess.run([str(interpreter), str(HERE/'peers'/script), *map(str, args)], stdout=subprocess.PIPE, text=True, check=True, env=env, cwd=folder)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name, folder):
    split = leave_one_out(load_interactions(DATA/name)); data = split.data
    np.savez(folder/'events.npz', events=data.events, offsets=data.offsets, train=split.train, n_items=data.n_items)
    found = {'our SASRec': ask(sys.executable, 'ours.py', folder, DATA/name, 'sasrec'), 'our IMECD': ask(sys.executable, 'ours.py', folder, DATA/name, 'imecd'),
             **({'our IMECD, bfloat16': ask(sys.executable, 'ours.py', folder, DATA/name, 'imecd', 'bf16')} if BF16 else {}),
             "RePlay's SASRec": ask(python('replay'), 'replay_sasrec.py', folder, folder/'events.npz'), "RecBole's SASRec": ask(python('recbole'), 'recbole_sasrec.py', folder, folder/'events.npz', folder)}
    base = found["RecBole's SASRec"]
    over = {'training_over_RecBole': 'targets_per_second', 'floor_of_training_over_RecBole': 'targets_per_second_of_products', 'ranking_over_RecBole': 'users_per_second', 'floor_of_ranking_over_RecBole': 'users_per_second_of_products'}
    return {f'{name}, {who}': {k: r[k] for k in ('targets_per_second', 'users_per_second')} | {k: r[what]/base[what.removesuffix('_of_products')] if r.get(what) else None for k, what in over.items()} for who, r in found.items()}


if __name__ == '__main__':
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SETS: out |= measure(name, Path(folder))
    print(json.dumps({'tables': [out]}))
