"RePlay's SASRec on given events; its model and loss, tensors padded beforehand."
import json
import sys
import time
import warnings

import numpy as np
import torch
from left_padded import rows
from replay.data import FeatureHint, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorSchema
from replay.nn.sequential import SasRec

warnings.simplefilter('ignore')
d = dict(np.load(sys.argv[1])); train, N, L = d['train'], int(d['n_items']), 50


schema = TensorSchema([TensorFeatureInfo('item_id', is_seq=True, feature_type=FeatureType.CATEGORICAL, embedding_dim=64, padding_value=N, cardinality=N, feature_hint=FeatureHint.ITEM_ID)])
torch.manual_seed(0); model = SasRec.from_params(schema, embedding_dim=64, num_heads=2, num_blocks=2, max_sequence_length=L, dropout=.2, hidden_dim=256); optimiser = torch.optim.Adam(model.parameters(), 1e-3)
x, y = rows(d, train, 1); asked = (y != N).sum(1); x, y = x[asked > 0], y[asked > 0]


def step(i):
    out = model({'item_id': x[i]}, x[i] != N, positive_labels=y[i][..., None], target_padding_mask=(y[i] != N)[..., None]); optimiser.zero_grad(); out['loss'].backward(); optimiser.step()


speeds = []
for size in (64, 256):
    model.train(); order = torch.randperm(len(x)).split(size)[:22]; [step(i) for i in order[:2]]
    start = time.perf_counter(); [step(i) for i in order[2:]]; speeds.append(sum(int((y[i] != N).sum()) for i in order[2:])/(time.perf_counter()-start))
model.eval(); h, _ = rows(d, train, 0)  # what precedes the validation item
with torch.no_grad():
    times = []
    for _ in range(6):
        start = time.perf_counter()
        for i in torch.arange(len(h)).split(512): model({'item_id': h[i]}, h[i] != N)['logits'].topk(20)
        times.append(time.perf_counter()-start)
print(json.dumps({'targets_per_second': max(speeds), 'users_per_second': len(h)/sorted(times[1:])[2]}))
