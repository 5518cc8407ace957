"RePlay's SASRec trained to an early stop on given events: its scores of every item for every user's test question; arguments: the events, where to write, a seed."
import sys
import warnings

import numpy as np
import torch
from left_padded import rows
from replay.data import FeatureHint, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorSchema
from replay.nn.sequential import SasRec

warnings.simplefilter('ignore'); torch.manual_seed(int(sys.argv[3]))
d = dict(np.load(sys.argv[1])); train, N, L = d['train'], int(d['n_items']), 50


def scores(model, x):
    model.eval()
    with torch.no_grad(): return torch.cat([model({'item_id': x[i]}, x[i] != N)['logits'] for i in torch.arange(len(x)).split(512)])  # (U, N)


schema = TensorSchema([TensorFeatureInfo('item_id', is_seq=True, feature_type=FeatureType.CATEGORICAL, embedding_dim=64, padding_value=N, cardinality=N, feature_hint=FeatureHint.ITEM_ID)])
model = SasRec.from_params(schema, embedding_dim=64, num_heads=2, num_blocks=2, max_sequence_length=L, dropout=.5, hidden_dim=256); optimiser = torch.optim.Adam(model.parameters(), 1e-3)
x, y = rows(d, train, 1); asked = (y != N).any(1); x, y = x[asked], y[asked]; before, _ = rows(d, train, 0); target = torch.as_tensor(d['events'].astype(np.int64)[train]-1); best, since = 0., 0
for epoch in range(200):
    model.train()
    for i in torch.randperm(len(x)).split(128): loss = model({'item_id': x[i]}, x[i] != N, positive_labels=y[i][..., None], target_padding_mask=(y[i] != N)[..., None])['loss']; optimiser.zero_grad(); loss.backward(); optimiser.step()
    s = scores(model, before); rank = 1+(s > s.gather(1, target[:, None])).sum(1); now = float(((rank <= 20)/(rank+1.).log2()).mean())  # NDCG@20 of validation
    if now > best: best, since, kept, told = now, 0, scores(model, rows(d, train+1, 0)[0]), epoch
    else: since += 1
    print(epoch, round(now, 5), file=sys.stderr)
    if since == 10: break
np.save(sys.argv[2], kept.numpy().astype(np.float32)); print(told)
