"""What making batches costs, against an epoch of the smallest model: an item table, the last item as query, full softmax.

    python bench/batches.py [DATA]             default $IMECD_DATA/amazon14_toys; one JSON line
"""
import json
import os
import sys
import time

import torch

from imecd.batch import sequence_data
from imecd.core import set_seed
from imecd.histories import leave_one_out, load_interactions


def epoch_seconds(data, epoch, model=None):
    "One epoch of batches, with training steps on them where there is a model."
    start = time.perf_counter(); targets = 0
    optimiser = torch.optim.Adam(model.parameters()) if model else None
    for batch in data.epoch(0, epoch):
        targets += len(batch.targets)
        if model is None: continue
        asked = batch.targets > 0
        loss = torch.nn.functional.cross_entropy(model(batch.items[asked]) @ model.weight.T, batch.targets[asked])
        optimiser.zero_grad(); loss.backward(); optimiser.step()
    return time.perf_counter()-start, targets


def main(folder):
    set_seed(0); data = sequence_data(leave_one_out(load_interactions(folder)))
    model = torch.nn.Embedding(data.n_items+1, 64); epoch_seconds(data, 0)
    batches = min(epoch_seconds(data, e)[0] for e in range(3)); training, targets = epoch_seconds(data, 0, model)
    return {'data': os.path.basename(os.path.normpath(folder)), 'targets': targets, 'threads': torch.get_num_threads(), 'batches_seconds': batches,
            'smallest_model_seconds': training, 'share': batches/training}


if __name__ == '__main__': print(json.dumps(main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.environ.get('IMECD_DATA', 'data'), 'amazon14_toys'))))
