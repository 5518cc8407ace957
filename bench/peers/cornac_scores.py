"A next-item model of Cornac, the best epoch on validation kept by its own means: its scores of every item for every user's test question; arguments: the events, where to write, a seed, sasrec or gru4rec."
import sys
from collections import OrderedDict

import numpy as np
from cornac.data import SequentialDataset
from cornac.models import GRU4Rec, SASRec

d, seed = np.load(sys.argv[1]), int(sys.argv[3]); events, offsets, train, N = d['events'].astype(np.int64)-1, d['offsets'], d['train'], int(d['n_items'])
items = OrderedDict((i, i) for i in range(N))


def histories(stops):
    "One session a user, up to a stop."
    return SequentialDataset.build([(u, u, int(i), t) for u, (a, b) in enumerate(zip(offsets[:-1], stops)) for t, i in enumerate(events[a:b])], fmt='USIT', global_iid_map=items, seed=seed)


best = {'model_selection': 'best', 'val_eval_every': 10, 'val_metric': 'ndcg', 'val_k': 20, 'seed': seed}
model = {'sasrec': SASRec(embedding_dim=64, num_blocks=2, num_heads=2, dropout=.5, max_len=50, batch_size=128, n_epochs=30, **best), 'gru4rec': GRU4Rec(n_epochs=30, **best)}[sys.argv[4]]
model.fit(histories(train), histories(train+1)); np.save(sys.argv[2], np.stack([model.score(u, list(events[a:b])) for u, (a, b) in enumerate(zip(offsets[:-1], train+1))]).astype(np.float32))
