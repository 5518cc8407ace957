"A table of which every process has a part: the training of one process, its files, what is refused."
import json
import shutil

import many
import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_processes import run

from imecd.checkpoints import clear_rows, is_dealt, laid_out, load_checkpoint, load_facts
from imecd.core import ImecdError, configure
from imecd.model import IMECD, ModelConfig
from imecd.shards import ShardedProcesses, can_share, full, refuse_shards
from imecd.train import TrainConfig, fit

pytestmark = pytest.mark.skipif(not can_share(), reason='this torch cannot write checkpoints in parts')
CONFIG = dict(epochs=5, targets=256, lr=3e-3, patience=9, shard=True)
DRAWN = dict(softmax='sampled', negatives=16, dropout=0., denoiser_dropout=0.)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Trainings without dropout of positions, by one process and in parts by two; the first three epochs of both are kept."
    out = tmp_path_factory.mktemp('trained')
    for world, name in ((1, 'one'), (2, 'two')):
        for epochs in (3, 5): run(world, 'training', out/f'{name} {epochs}', config=CONFIG | {'epochs': epochs}, folder=str(out/f'kept {name} {epochs}'), **DRAWN)
    return out


def rows(folder): return json.loads((folder/'rows.json').read_text())


def test_parts_learn_what_one_learns(trained):
    one, two = rows(trained/'one 5'), rows(trained/'two 5')
    for a, b in zip(one, two, strict=True): assert a['loss'] == pytest.approx(b['loss'], rel=2e-3) and a['gradient'] == pytest.approx(b['gradient'], rel=.05)
    assert abs(one[-1]['valid ndcg@20']-two[-1]['valid ndcg@20']) < .02 and two[0]['valid ndcg@20'] < two[-1]['valid ndcg@20']
    a, b = (np.load(trained/'two 5'/f'2.{k}.npz') for k in (0, 1))
    for key in a.files: assert np.array_equal(a[key], b[key]), key
    assert np.array_equal(a['ranks'], a['alone']) and a['state table.ids'].shape == (many.N+1, 8)                   # afterwards, every process has a model


def test_a_training_in_parts_goes_on(trained, tmp_path):
    for name, kept, world in (('in parts', 'two', 2), ('alone', 'two', 1), ('from one', 'one', 2)):
        shutil.copytree(trained/f'kept {kept} 3', tmp_path/name); run(world, 'training', tmp_path/f'{name} then', config=CONFIG, folder=str(tmp_path/name), resume=True, **DRAWN)
        done = rows(tmp_path/f'{name} then'); assert len(done) == 5 and done[:3] == rows(trained/f'{kept} 3')
        assert done[-1]['loss'] == pytest.approx(rows(trained/f'{kept} 5')[-1]['loss'], rel=2e-3)
    whole, now = np.load(trained/'two 5'/'2.0.npz'), np.load(tmp_path/'in parts then'/'2.0.npz'); assert all(np.array_equal(whole[k], now[k]) for k in whole.files)


def test_files_hold_parts(trained):
    for name in ('last', 'best'):
        found = load_facts(trained/'kept two 5'/f'{name}.safetensors'); folder = trained/'kept two 5'/found['shared']['folder']; assert found['shared']['files'] == 2
        assert sorted(p.suffix for p in folder.iterdir()) == ['.safetensors']*2 and not list((trained/'kept two 5').glob('.*'))
    assert len([p for p in (trained/'kept two 5').iterdir() if p.is_dir()]) == 2                                    # what no file speaks of is gone
    table = [p for p in (trained/'kept two 5'/'last.a', trained/'kept two 5'/'last.b') if p.exists()][0]
    lengths = []
    for p in sorted(table.iterdir()):
        with safe_open(p, 'pt') as f: lengths.append(f.get_slice('model.table.ids').get_shape()[0])
    assert sorted(lengths) == [20, 21]


def model_of(**changes):
    data, features = many.made(); return IMECD.of(configure(ModelConfig, many.SMALL | DRAWN | changes), data, features), data


def test_what_is_lost_is_named(trained, tmp_path):
    how = TrainConfig(**CONFIG)
    def fails(spoil):
        folder = tmp_path/str(len(list(tmp_path.iterdir()))); shutil.copytree(trained/'kept two 3', folder); spoil(folder, folder/load_facts(folder/'last.safetensors')['shared']['folder'])
        data = many.made(300)[0]; m = IMECD.of(configure(ModelConfig, many.SMALL | {'commitment': .25} | DRAWN), data, many.made()[1])
        with pytest.raises(ImecdError) as e: fit(m, data, how, folder=folder, resume=True, show='none')
        return str(e.value)
    def cut(_, parts): p = sorted(parts.iterdir())[1]; p.write_bytes(p.read_bytes()[:200])
    assert 'holds 0 files of 2' in fails(lambda _, parts: shutil.rmtree(parts)) and 'holds 1 files of 2' in fails(lambda _, parts: sorted(parts.iterdir())[0].unlink())
    assert 'cannot be read' in fails(cut) and 'put a whole copy there' in fails(cut)


def test_a_folder_that_nobody_speaks_of_is_left_out(trained, tmp_path):
    shutil.copytree(trained/'kept two 3', tmp_path/'k'); spoken = load_facts(tmp_path/'k'/'last.safetensors')['shared']['folder']; other = 'last.b' if spoken == 'last.a' else 'last.a'
    shutil.copytree(tmp_path/'k'/spoken, tmp_path/'k'/other); (tmp_path/'k'/other/'half.safetensors').write_bytes(b'killed here')
    run(2, 'training', tmp_path/'then', config=CONFIG, folder=str(tmp_path/'k'), resume=True, **DRAWN); assert rows(tmp_path/'then')[:3] == rows(trained/'two 3') and not list((tmp_path/'k').rglob('half*'))
    clear_rows(tmp_path/'k'/'last.safetensors'); assert not [p for p in (tmp_path/'k').iterdir() if p.is_dir() and p.name.startswith('last')]


@pytest.mark.parametrize('changes, said', [({'softmax': 'full'}, "set softmax='sampled'"), ({'streams': 'text', 'gate': 'self'}, 'no table to share out')])
def test_what_cannot_be_in_parts_is_refused(changes, said):
    m, data = model_of(**changes)
    with pytest.raises(ImecdError, match=said): refuse_shards(m)
    with pytest.raises(ImecdError, match=said): fit(m, data, TrainConfig(shard=True), show='none')


def test_alone_there_is_nothing_to_share():
    found = []
    for shard in (False, True):
        m, data = model_of(); h = fit(m, data, TrainConfig(epochs=2, targets=256, shard=shard), show='none'); found.append((m.state_dict(), h))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0].values(), found[1][0].values(), strict=True)) and ShardedProcesses(m).net is None
    x = torch.ones(3); assert full(x) is x and laid_out(x, None) is x and laid_out(x, torch.zeros(3)) is x and not is_dealt(x)


def test_a_plain_checkpoint_needs_no_layout(trained):
    found = load_checkpoint(trained/'kept one 5'/'last.safetensors'); assert 'shared' not in found.facts and found.tensors['model.table.ids'].shape == (many.N+1, 8)
