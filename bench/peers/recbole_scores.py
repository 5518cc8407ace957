"RecBole's SASRec trained by its own trainer to its early stop: its scores of every item for every user's test question; arguments: the events, where to write, a seed."
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

d, out, seed, folder = np.load(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(tempfile.mkdtemp()); users = np.repeat(np.arange(len(d['offsets'])-1), np.diff(d['offsets'])); (folder/'set').mkdir()
lines = ['user_id:token\titem_id:token\ttimestamp:float', *(f'{u}\t{i}\t{t}' for t, (u, i) in enumerate(zip(users, d['events'])))]; (folder/'set/set.inter').write_text('\n'.join(lines)+'\n')
sys.argv = sys.argv[:1]; logging.disable(logging.CRITICAL)
config = Config(model='SASRec', dataset='set', config_dict={'data_path': str(folder), 'load_col': {'inter': ['user_id', 'item_id', 'timestamp']}, 'MAX_ITEM_LIST_LENGTH': 50, 'hidden_size': 64, 'inner_size': 256,
    'n_layers': 2, 'n_heads': 2, 'loss_type': 'CE', 'train_neg_sample_args': None, 'eval_args': {'split': {'LS': 'valid_and_test'}, 'order': 'TO', 'mode': 'full'}, 'use_gpu': False, 'show_progress': False,
    'checkpoint_dir': str(folder/'saved'), 'topk': [10, 20], 'valid_metric': 'NDCG@20', 'metrics': ['Hit', 'NDCG'], 'stopping_step': 10, 'epochs': 200, 'seed': seed, 'train_batch_size': 2048})
init_seed(seed, True); dataset = create_dataset(config); train, valid, test = data_preparation(config, dataset); model = SASRec(config, train.dataset); trainer = Trainer(config, model); trainer.fit(train, valid, verbose=False)
model.load_state_dict(torch.load(trainer.saved_model_file, weights_only=False)['state_dict']); model.eval()
ids = np.array([int(t) if t.isdigit() else 0 for t in dataset.field2id_token['item_id']]); told = np.array([int(t) if t.isdigit() else -1 for t in dataset.field2id_token['user_id']])
scores = np.full((len(d['offsets'])-1, int(d['n_items'])), -np.inf, np.float32)
with torch.no_grad():
    for batch in test: inter = batch[0]; found = model.full_sort_predict(inter).view(len(inter), -1).numpy(); scores[told[inter['user_id'].numpy()][:, None], ids[None, 1:]-1] = found[:, 1:]
np.save(out, scores); print(trainer.best_valid_score)
