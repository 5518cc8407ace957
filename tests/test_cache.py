"A cache is the data set, without what made it: same hash, same training, also where polars is not installed."
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from imecd.cache import choose_features, halved, is_cache, load_cache, make_cache
from imecd.core import ImecdError
from imecd.encode import load_features
from imecd.fitting import load_split, stream_features
from imecd.histories import content_hash, load_interactions
from imecd.metrics import evaluate
from imecd.model import IMECD, ModelConfig
from imecd.train import TrainConfig, fit

SMALL, RUN = ModelConfig(streams='id+text', dim=16, heads=2, inner=32, layers=1, codes=8, length=20), TrainConfig(epochs=3, warmup=1, targets=256)

PROGRAM = '''
import sys
for name in ('polars', 'nbdev', 'fastcore', 'pandas', 'typer'): sys.modules[name] = None
import torch
from imecd.fitting import load_split, stream_features
from imecd.metrics import evaluate
from imecd.model import IMECD, ModelConfig
from imecd.train import TrainConfig, fit
from imecd.core import ImecdError
torch.set_num_threads(int(sys.argv[3]))
data = load_split(sys.argv[1], 'leave_one_out', 20); model = IMECD.of({small}, data, stream_features(sys.argv[1], 'id+text')); history = fit(model, data, {run}, folder=sys.argv[2])
torch.save({{'rank': evaluate(model, data, data.cases('test')).rank, 'loss': [row['loss'] for row in history.rows]}}, sys.argv[2]+'/found.pt')
try: history.table
except ImecdError as e: print(e)
'''


@pytest.fixture(scope='module')
def cache(shop, tmp_path_factory): return make_cache(shop, tmp_path_factory.mktemp('cache')/'cache')


def test_it_is_the_data_set(shop, cache):
    (data, features), whole, made = load_cache(cache), load_interactions(shop), load_features(shop)
    assert is_cache(cache) and not is_cache(shop) and content_hash(data) == content_hash(whole) and features.hash == made.hash and data.items['title'] == whole.items['title'].to_list()
    for a, b in zip((*data[2:], *features[:3]), (*whole[2:], *made[:3])): assert (a is None) == (b is None) and (a is None or np.array_equal(a, b) and a.dtype == b.dtype)


@pytest.mark.filterwarnings('ignore:codebook of')
def test_training_and_evaluation_go_without_polars(shop, cache, tmp_path):
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', PROGRAM.format(small=SMALL, run=RUN), str(cache), str(tmp_path), str(torch.get_num_threads())], capture_output=True, text=True); assert out.returncode == 0, out.stderr
    assert 'polars is not installed' in out.stdout and (tmp_path/'history.jsonl').exists()
    found = torch.load(tmp_path/'found.pt', weights_only=True); data = load_split(shop, 'leave_one_out', 20)
    model = IMECD.of(SMALL, data, stream_features(shop, 'id+text')); history = fit(model, data, RUN)
    assert history.table['loss'].to_list() == found['loss'] and torch.equal(evaluate(model, data, data.cases('test')).rank, found['rank'])


def test_features_can_be_chosen_and_are_checked(shop, cache):
    features = load_cache(cache)[1]; assert choose_features(features, ['text']).hash == load_features(shop, image='none').hash == stream_features(cache, 'id+text').hash
    assert choose_features(features, []).text is None
    features.text[3, 0] += 1
    with pytest.raises(ImecdError, match='not those that about.json describes'): choose_features(features, ['text'])


@pytest.mark.parametrize('harm, message', [
    (lambda f: (f/'arrays.safetensors').write_bytes((f/'arrays.safetensors').read_bytes()[:500]), 'cannot be read'),
    (lambda f: (f/'about.json').write_text('{"kind": "imecd cache 0"}'), 'is not that of'),
    (lambda f: (f/'about.json').write_text('[]'), 'is not that of'),
    (lambda f: (f/'about.json').write_text((f/'about.json').read_text()[:-40]), 'is not JSON'),
    (lambda f: (f/'about.json').write_text(json.dumps(json.loads((f/'about.json').read_text()) | {'hash': 'x'})), 'do not belong together'),
    (lambda f: (f/'about.json').write_text(json.dumps({k: v for k, v in json.loads((f/'about.json').read_text()).items() if k != 'users'})), "lacks 'users'")])
def test_a_broken_cache_is_named(harm, message, cache, tmp_path):
    for p in cache.iterdir(): (tmp_path/p.name).write_bytes(p.read_bytes())
    load_cache(tmp_path); harm(tmp_path)
    with pytest.raises(ImecdError, match=message): load_cache(tmp_path)


def test_what_a_cache_cannot_do_is_said(cache, tmp_path):
    with pytest.raises(ImecdError, match='give --k-core to `imecd data cache`'): load_split(cache, 'leave_one_out', 20, 5)
    np.save(tmp_path/'text_features.npy', np.zeros((100, 4), np.float32))
    with pytest.raises(ImecdError, match='make another cache'): stream_features(cache, 'id+text', tmp_path)


def test_the_command_line_reads_it_as_a_data_set(imecd, shop, tmp_path):
    code, said, err = imecd('data', 'cache', shop, tmp_path/'cache'); assert code == 0 and 'MB' in said, err
    tiny = [x for pair in ('dim=16', 'heads=2', 'inner=32', 'layers=1', 'codes=8') for x in ('--set', pair)]
    for name, folder in (('a', shop), ('b', tmp_path/'cache')): code, _, err = imecd('train', folder, *tiny, '--epochs', 1, '--length', 20, '--out', tmp_path/name); assert code == 0, err
    for file in ('metrics.json', 'ranks.parquet', 'model.safetensors', 'config.json'): assert (tmp_path/'a'/file).read_bytes() == (tmp_path/'b'/file).read_bytes(), file
    code, said, err = imecd('eval', tmp_path/'a', '--data', tmp_path/'cache', '--json'); assert code == 0 and json.loads(said) == json.loads((tmp_path/'a/metrics.json').read_text()), err
    code, _, err = imecd('data', 'cache', shop, tmp_path/'cache'); assert code == 2 and 'exists and is not empty' in err


def test_half_precision_is_half_and_another_set(shop, tmp_path):
    whole, half = (load_cache(make_cache(shop, tmp_path/str(h), half=h))[1] for h in (False, True)); assert half.text.dtype == np.float16 and half.hash != whole.hash and half.manifest['text']['dtype'] == 'float16'
    assert np.allclose(half.text, whole.text, rtol=6e-4, atol=1e-7) and (half.present == whole.present).all() and half.hash == choose_features(half, ['text']).hash
    split = load_split(tmp_path/'True', 'leave_one_out', 20); m = IMECD.of(ModelConfig(streams='id+text', dim=8, inner=16, layers=1, codes=4, length=20), split, half).eval()
    assert m.table.features_text.dtype == torch.float16 and m.table.features_text.data_ptr() == torch.as_tensor(half.text).data_ptr() and m.scores([[1, 2]]).dtype == torch.float32
    wide = IMECD.of(m.config, split, half._replace(text=half.text.astype(np.float32))).eval(); wide.load_state_dict(m.state_dict()); assert torch.equal(wide.scores([[1, 2]]), m.scores([[1, 2]]))


def test_what_half_precision_cannot_hold_is_named(shop):
    features = load_features(shop); features.text[3, 0] = 1e6
    with pytest.raises(ImecdError, match=rf"text, item {features.manifest['items']['ids'][2]}: a feature beyond 65,504"): halved(features)
