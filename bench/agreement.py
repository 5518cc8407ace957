"""How close are we: models of RecBole, RePlay and Cornac trained on the same split, each by its own code, and scored by our evaluator; beside them our own. A csv line for each.

    python bench/agreement.py OUT.csv [--seeds 3] [--data DIR]        default $IMECD_DATA/amazon18_office

D = 64, two layers, two heads, the last 50 events, dropout .5, Adam with 1e-3, the epoch that is best on validation NDCG@20 (patience of ten epochs for RecBole and RePlay; of 10, 20 and 30 epochs for Cornac, whose loss samples 2,048
negatives). Cornac's GRU4Rec has its defaults, and 30 epochs. A peer writes its scores of all items for each test question; ranks, ties and lists are ours. Environments as in `peers.py`.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch
from peers import DATA, HERE, python

from imecd.fitting import load_split
from imecd.histories import leave_one_out, load_interactions
from imecd.metrics import evaluate, measure
from imecd.runs import commit_of_package

PEERS = {"RecBole's SASRec": ('recbole', 'recbole_scores.py', ()), "RePlay's SASRec": ('replay', 'replay_scores.py', ()), "Cornac's SASRec": ('cornac', 'cornac_scores.py', ('sasrec',)), "Cornac's GRU4Rec": ('cornac', 'cornac_scores.py', ('gru4rec',))}


class Told:
    "A table of scores (U, N), one row a user, that the evaluator may ask like a model."
    def __init__(self, scores): self.scores = torch.cat([torch.full((len(scores), 1), -torch.inf), torch.as_tensor(scores)], 1)
    def query(self, batch): return batch.users
    def score(self, users): return self.scores[users]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path); parser.add_argument('--seeds', type=int, default=3); parser.add_argument('--data', type=Path, default=DATA/'amazon18_office'); parser.add_argument('--only', default='')
    a = parser.parse_args(); commit = commit_of_package(); split = leave_one_out(load_interactions(a.data)); d = split.data; data = load_split(a.data, 'leave_one_out', 50); rows = []
    with tempfile.TemporaryDirectory() as folder:
        events, scores = Path(folder)/'events.npz', Path(folder)/'scores.npy'; np.savez(events, events=d.events, offsets=d.offsets, train=split.train, n_items=d.n_items)
        for who, (home, script, args) in PEERS.items():
            if a.only not in who: continue
            for seed in range(a.seeds):
                start = time.time(); subprocess.run([python(home), HERE/'peers'/script, events, scores, str(seed), *args], check=True, stdout=sys.stderr, cwd=folder, env={**os.environ, 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': '1'})
                m = measure(evaluate(Told(np.load(scores)), data, data.cases('test')), data.counts())
                rows.append({'model': who, 'seed': seed, **{k: m['test'][k] for k in ('hr@10', 'ndcg@10', 'coverage@10')}, 'masked ndcg@10': m['test_masked']['ndcg@10'], 'data': a.data.resolve().name, 'minutes': (time.time()-start)/60, 'commit': commit}); pl.DataFrame(rows).write_csv(a.out); print(rows[-1], flush=True)


if __name__ == '__main__': main()
