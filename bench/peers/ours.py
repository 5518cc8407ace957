"Targets trained and users ranked per second by a preset of this package, and by its bare matrix products; arguments: data set, preset, bf16 or nothing."
import itertools
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from floor import bare, recorded, timed

from imecd.fitting import configure_preset, cut_streams, load_split, stream_features
from imecd.model import IMECD
from imecd.train import TrainConfig, running_mean, train_epoch, validate

folder, name = Path(sys.argv[1]), sys.argv[2]
data = load_split(folder, 'leave_one_out', 50); config, _ = configure_preset(name, {}, 50, 0); features = stream_features(folder, config.streams)
model = IMECD.of(cut_streams(config, False, features)[0], data, features); train = TrainConfig(warmup=0, bf16='bf16' in sys.argv[3:])
if model.reader.vq is not None: model.place_codes(data)
optimiser = torch.optim.Adam(model.parameters(), 1e-3, fused=True); running_mean(model, optimiser, 100)
batches = list(itertools.islice(data.epoch(0, 0), 44)); train_epoch(model, batches[:4], optimiser, train, 1)
start = time.perf_counter(); train_epoch(model, batches[4:], optimiser, train, 1); took = time.perf_counter()-start
cases = data.cases('valid')
def judge(): model.cache = None; validate(model, data, cases)  # the items anew, as after an epoch
ranked = timed(judge, 5)
asked = lambda some: sum(int((b.targets != 0).sum()) for b in some)
train_products, rank_products = recorded(lambda: train_epoch(model, batches[4:7], optimiser, train, 1)), recorded(judge)
floors = {'targets_per_second_of_products': asked(batches[4:7])/bare(train_products)[0], 'users_per_second_of_products': len(cases.users)/bare(rank_products, apart=True)[0]}
if train.bf16: ranked, floors = None, {'targets_per_second_of_products': floors['targets_per_second_of_products']}  # evaluation is in single precision always
print(json.dumps({'targets_per_second': asked(batches[4:])/took, 'users_per_second': ranked and len(cases.users)/ranked, **floors}))
