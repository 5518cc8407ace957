"RecBole's SASRec on given events: its loader, its training steps, its evaluation; arguments: the events, a folder to write to."
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

d, folder = np.load(sys.argv[1]), Path(sys.argv[2]); users = np.repeat(np.arange(len(d['offsets'])-1), np.diff(d['offsets'])); (folder/'set').mkdir(exist_ok=True)
lines = ['user_id:token\titem_id:token\ttimestamp:float', *(f'u{u}\ti{i}\t{t}' for t, (u, i) in enumerate(zip(users, d['events'])))]; (folder/'set/set.inter').write_text('\n'.join(lines)+'\n')
sys.argv = sys.argv[:1]; logging.disable(logging.CRITICAL)
config = Config(model='SASRec', dataset='set', config_dict={'data_path': str(folder), 'load_col': {'inter': ['user_id', 'item_id', 'timestamp']}, 'MAX_ITEM_LIST_LENGTH': 50, 'hidden_size': 64, 'inner_size': 256,
    'n_layers': 2, 'n_heads': 2, 'loss_type': 'CE', 'train_neg_sample_args': None, 'eval_args': {'split': {'LS': 'valid_and_test'}, 'order': 'TO', 'mode': 'full'}, 'use_gpu': False, 'show_progress': False,
    'checkpoint_dir': str(folder/'saved'), 'topk': [10, 20], 'valid_metric': 'NDCG@10', 'metrics': ['Hit', 'NDCG']})
init_seed(0, True); dataset = create_dataset(config); train, valid, _ = data_preparation(config, dataset); model = SASRec(config, train.dataset); trainer = Trainer(config, model)
optimiser, asked, model = trainer.optimizer, 0, model.train()
for n, batch in enumerate(train):
    if n == 1: start = time.perf_counter(); asked = 0
    optimiser.zero_grad(); model.calculate_loss(batch).backward(); optimiser.step(); asked += len(batch)
    if n == 9: break
took = time.perf_counter()-start; trainer.evaluate(valid, load_best_model=False); times = []
for _ in range(5): start = time.perf_counter(); trainer.evaluate(valid, load_best_model=False); times.append(time.perf_counter()-start)
print(json.dumps({'targets_per_second': asked/took, 'users_per_second': len(valid.dataset)/sorted(times)[2]}))
