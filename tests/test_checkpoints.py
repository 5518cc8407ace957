"Checkpoints: whole or not at all, of this training or refused; a training that is killed ends where it would have ended."
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import many
import pytest
import torch
from safetensors.torch import load_file

from imecd.checkpoints import clear_parts, load_checkpoint, must_agree, save_checkpoint
from imecd.core import ImecdError, configure
from imecd.encode import load_features
from imecd.batch import sequence_data
from imecd.histories import leave_one_out, load_interactions
from imecd.model import IMECD, PRESETS, ModelConfig
from imecd.shop import make_shop
from imecd.train import TrainConfig, fit

SMALL = dict(streams='id+text', dim=16, layers=1, inner=32, codes=8, length=20)
RUN = TrainConfig(epochs=20, patience=50, targets=512, warmup=1)
LONG = replace(RUN, epochs=36, patience=99)  # to be killed ten times before it ends
PROGRAM = '''
import sys, time
from pathlib import Path
import safetensors.torch
from test_checkpoints import model_of, opened, LONG
from imecd.train import fit
def slowly(tensors, path, header):
    raw = safetensors.torch.save(tensors, header)
    with open(path, 'wb') as f: f.write(raw[:len(raw)//2]); f.flush(); time.sleep(.1); f.write(raw[len(raw)//2:])
if sys.argv[3] == 'slowly': safetensors.torch.save_file = slowly
data, features = opened(Path(sys.argv[1]))
print('ready', flush=True)
fit(model_of(data, features), data, LONG, folder=Path(sys.argv[2]), resume=True)
print('done', flush=True)
'''


def opened(folder): return sequence_data(leave_one_out(load_interactions(folder)), 20), load_features(folder)


def model_of(data, features, name='imecd', **kw): return IMECD.of(configure(ModelConfig, SMALL | PRESETS[name] | kw), data, features)


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoints')/'shop'; make_shop(folder, n_users=200, n_items=60, seed=3, pictures=False); return folder


@pytest.fixture(scope='module')
def undisturbed(shop, tmp_path_factory):
    "A training that nothing happened to: its model, its history, its files."
    folder = tmp_path_factory.mktemp('undisturbed'); data, features = opened(shop); m = model_of(data, features); h = fit(m, data, RUN, folder=folder); return m, h, folder


def same(folder, m, h, undisturbed):
    "Model, history and both files, to the bit; only wall time differs."
    model, history, files = undisturbed
    assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), model.state_dict().values(), strict=True)) and h.best == history.best and h.table.drop('seconds', 'targets/s').equals(history.table.drop('seconds', 'targets/s'))
    for name in ('last', 'best'):
        a, b = (load_checkpoint(f/f'{name}.safetensors') for f in (folder, files)); assert a.tensors.keys() == b.tensors.keys() and all(torch.equal(x, b.tensors[k]) for k, x in a.tensors.items())


def stamp(path): return path.stat().st_mtime_ns if path.exists() else 0


def let_run(child, last, epochs, seconds):
    "Wait for so many epochs, then so long."
    seen, passed = stamp(last), 0
    while passed < epochs and child.poll() is None: now = stamp(last); passed += now != seen; seen = now; time.sleep(.0005)
    time.sleep(seconds)


def test_checkpoints_change_nothing(shop, undisturbed):
    data, features = opened(shop); m = model_of(data, features); h = fit(m, data, RUN)
    assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), undisturbed[0].state_dict().values(), strict=True)) and h.best == undisturbed[1].best


@pytest.mark.parametrize('stop', [1, 2, 4])
def test_a_training_goes_on_bit_by_bit(stop, shop, undisturbed, tmp_path):
    data, features = opened(shop); fit(model_of(data, features), data, replace(RUN, epochs=stop), folder=tmp_path)
    m = model_of(data, features); torch.manual_seed(123); h = fit(m, data, RUN, folder=tmp_path, resume=True); same(tmp_path, m, h, undisturbed)


def test_a_finished_training_is_not_trained_again(shop, undisturbed, tmp_path):
    data, features = opened(shop); fit(model_of(data, features), data, RUN, folder=tmp_path); before = (tmp_path/'last.safetensors').stat().st_mtime_ns
    m = model_of(data, features); h = fit(m, data, RUN, folder=tmp_path, resume=True); same(tmp_path, m, h, undisturbed); assert (tmp_path/'last.safetensors').stat().st_mtime_ns == before


def test_killed_ten_times_it_ends_where_it_would_have_ended(shop, tmp_path, tmp_path_factory):
    "SIGKILL at random moments of a real process, also in the middle of the write of a checkpoint, each time gone on with; afterwards everything is as if nothing had happened."
    dice, halves, epochs = random.Random(0), 0, []; env = {**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads()), 'PYTHONPATH': str(Path(__file__).parent)}
    last = tmp_path/'last.safetensors'
    for kill in range(10):
        aimed = kill % 2; child = subprocess.Popen([sys.executable, '-c', PROGRAM, str(shop), str(tmp_path), 'slowly' if aimed else 'as it is'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env); assert child.stdout.readline() == b'ready\n'
        half = lambda: [p for p in tmp_path.glob(f".{('last', 'best')[kill % 4 == 1]}.*") if 0 < p.stat().st_size]
        if aimed:  # in the middle of a write
            with contextlib.suppress(FileNotFoundError):
                while not half() and child.poll() is None: pass
        else: let_run(child, last, dice.randint(1, 3), dice.uniform(0, .2))
        child.send_signal(signal.SIGKILL); child.wait(); child.stdout.close(); assert child.returncode == -signal.SIGKILL; halves += aimed and len(half())
        epochs.append(len(load_checkpoint(last).facts['rows']) if last.exists() else 0)
    assert epochs == sorted(epochs) and epochs[0] > 0 and all(a < b for a, b in zip(epochs[1::2], epochs[2::2])) and epochs[-1] < LONG.epochs and halves >= 3, (epochs, halves)
    data, features = opened(shop); m, whole = model_of(data, features), model_of(data, features); h = fit(m, data, LONG, folder=tmp_path, resume=True); there = tmp_path_factory.mktemp('whole'); same(tmp_path, m, h, (whole, fit(whole, data, LONG, folder=there), there))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['best.safetensors', 'history.jsonl', 'last.safetensors']


def test_the_history_is_lines_of_json(undisturbed):
    rows = [json.loads(x) for x in (undisturbed[2]/'history.jsonl').read_text().splitlines()]; assert [r['epoch'] for r in rows] == list(range(RUN.epochs)) and rows[-1]['loss'] == undisturbed[1].table['loss'][-1]


def test_what_is_there_is_not_written_over(shop, undisturbed):
    data, features = opened(shop); before = {p.name: p.read_bytes() for p in undisturbed[2].iterdir()}
    with pytest.raises(ImecdError, match='resume it, or give another folder'): fit(model_of(data, features), data, RUN, folder=undisturbed[2])
    for change, words in ((dict(dim=8), 'model, dim was 16 and is 8'), (dict(seed=1), 'model, seed was 0 and is 1')):
        with pytest.raises(ImecdError, match=words): fit(model_of(data, features, **change), data, RUN, folder=undisturbed[2], resume=True)
    with pytest.raises(ImecdError, match='training, lr was 0.001 and is 0.1'): fit(model_of(data, features), data, replace(RUN, lr=.1), folder=undisturbed[2], resume=True)
    assert before == {p.name: p.read_bytes() for p in undisturbed[2].iterdir()}


def test_another_data_set_is_refused(undisturbed, tmp_path):
    make_shop(tmp_path/'other', n_users=200, n_items=60, seed=4, pictures=False); data, features = opened(tmp_path/'other')
    with pytest.raises(ImecdError, match='of another training: data was'): fit(model_of(data, features), data, RUN, folder=undisturbed[2], resume=True)


@pytest.mark.parametrize('name', ['last', 'best'])
def test_a_file_that_was_cut_is_named(name, shop, undisturbed, tmp_path):
    for p in undisturbed[2].iterdir(): (tmp_path/p.name).write_bytes(p.read_bytes())
    f = tmp_path/f'{name}.safetensors'; f.write_bytes(f.read_bytes()[:-100]); data, features = opened(shop)
    with pytest.raises(ImecdError, match=f'{name}.safetensors cannot be read.*put a whole copy there'): fit(model_of(data, features), data, RUN, folder=tmp_path, resume=True)


def test_a_write_that_fails_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path/'last.safetensors'; save_checkpoint(path, {'x': torch.ones(3)}, {'k': 1}); before = path.read_bytes()

    def full(*_): raise OSError(28, 'No space left on device')
    for where in ('os.fsync', 'os.replace'):
        with monkeypatch.context() as m:
            m.setattr(where, full)
            with pytest.raises(ImecdError, match='No space left.*what was there before is unharmed'): save_checkpoint(path, {'x': torch.zeros(3)}, {'k': 2})
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert load_checkpoint(path).facts == {'k': 1}


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_that_is_read_only_is_named(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(ImecdError, match='a folder that can be written to'): save_checkpoint(tmp_path/'last.safetensors', {'x': torch.ones(3)}, {})


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path/'file').write_text('x')
    with pytest.raises(ImecdError, match='a folder that can be written to'): save_checkpoint(tmp_path/'file'/'last.safetensors', {'x': torch.ones(3)}, {})


def test_the_state_is_tensors_and_json(undisturbed):
    "Nothing is pickled: any reader of safetensors opens it."
    assert {k.split('.')[0] for k in load_file(undisturbed[2]/'last.safetensors')} == {'model', 'mean', 'optimiser'}


def test_parts_of_killed_writers_are_cleared_and_nothing_else(tmp_path):
    stay = ['.best.safetensors.abc', '.gitignore', 'last.safetensors', 'other']
    for name in ('.last.safetensors.abc.safetensors', '.last.safetensors.x', '.tmpAbC123', *stay): (tmp_path/name).write_text('')
    clear_parts(tmp_path, ('last.safetensors',)); assert sorted(p.name for p in tmp_path.iterdir()) == stay


def test_the_first_difference_is_named():
    must_agree({'a': 1, 'b': {'c': 2}, 'more': 3}, {'a': 1, 'b': {'c': 2}}, Path('x'))
    with pytest.raises(ImecdError, match='x is of another training: b, c was 2 and is 3'): must_agree({'a': 1, 'b': {'c': 2}}, {'a': 1, 'b': {'c': 3}}, Path('x'))


def test_killed_between_best_and_last(tmp_path):
    data, features = many.made(); config = TrainConfig(epochs=4, targets=64, warmup=1, patience=9); make = lambda: IMECD.of(configure(ModelConfig, many.SMALL), data, features); kept, models, tables = {}, {}, {}
    for n in (3, 4): kept[n] = tmp_path/str(n); models[n] = make(); tables[n] = fit(models[n], data, replace(config, epochs=n), folder=kept[n], show='none')
    assert tables[4].best == 3; shutil.copytree(kept[3], tmp_path/'torn'); shutil.copy(kept[4]/'best.safetensors', tmp_path/'torn'/'best.safetensors'); shutil.copytree(tmp_path/'torn', tmp_path/'short')
    again = make(); fit(again, data, config, folder=tmp_path/'torn', resume=True, show='none'); assert all(torch.equal(a, b) for a, b in zip(models[4].state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(ImecdError, match=r'best.safetensors is of epoch 3, last.safetensors ends before it.* epochs=4 or more'): fit(make(), data, replace(config, epochs=3), folder=tmp_path/'short', resume=True, show='none')


FULL = '''
import resource, sys
from pathlib import Path
from dataclasses import replace
from test_checkpoints import model_of, opened, RUN
from imecd.core import ImecdError
from imecd.train import fit
data, features = opened(Path(sys.argv[1])); out = Path(sys.argv[2]); resource.setrlimit(resource.RLIMIT_FSIZE, (room := (out/'last.safetensors').stat().st_size//2, room))
try: fit(model_of(data, features), data, replace(RUN, epochs=4), folder=out, resume=True, show='none')
except ImecdError as e: print(e)
'''


def test_a_disk_that_takes_half_a_checkpoint(shop, tmp_path):
    "The system itself stops the writing, half way: the error names the file, the older checkpoint loads, and with room the training ends as if nothing had been."
    data, features = opened(shop); a, b, kept, two = model_of(data, features), model_of(data, features), tmp_path/'kept', replace(RUN, epochs=2); fit(b, data, two, folder=kept, show='none'); before = (kept/'last.safetensors').read_bytes()
    said = subprocess.run([sys.executable, '-c', FULL, str(shop), str(kept)], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')])}); assert said.returncode == 0, said.stderr
    assert 'safetensors' in said.stdout and 'File too large' in said.stdout and 'what was there before is unharmed' in said.stdout, said.stdout
    assert (kept/'last.safetensors').read_bytes() == before and load_checkpoint(kept/'last.safetensors').facts['rows'] and not [*kept.glob('.*')]
    fit(a, data, replace(RUN, epochs=4), folder=tmp_path/'whole', show='none'); fit(b, data, replace(RUN, epochs=4), folder=kept, resume=True, show='none'); assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_disk_that_is_full_at_the_history(tmp_path, monkeypatch):
    data, features = many.made(); write = Path.write_text
    def full(self, *args, **kw):
        if 'history.jsonl' in self.name: raise OSError(28, 'No space left on device')
        return write(self, *args, **kw)
    monkeypatch.setattr(Path, 'write_text', full)
    with pytest.raises(ImecdError, match='history.jsonl cannot be written .*No space left.*make room and resume'): fit(IMECD.of(configure(ModelConfig, many.SMALL), data, features), data, TrainConfig(epochs=1, targets=64), folder=tmp_path, show='none')
    assert load_checkpoint(tmp_path/'last.safetensors').facts['rows']


def test_what_a_first_killed_writer_left_is_cleared(tmp_path):
    (tmp_path/'.best.safetensors.xyz.safetensors').write_bytes(b'half'); data, features = many.made()
    fit(IMECD.of(configure(ModelConfig, many.SMALL), data, features), data, TrainConfig(epochs=1, targets=64), folder=tmp_path, resume=True, show='none'); assert not [*tmp_path.glob('.*')]


def test_a_training_on_other_rows_of_the_same_data_is_refused(tmp_path):
    data, features = many.made(); fit(IMECD.of(configure(ModelConfig, many.SMALL), data, features), data, TrainConfig(epochs=1, targets=64), folder=tmp_path, show='none'); short = sequence_data(data.split, 4)
    with pytest.raises(ImecdError, match='of another training: length was 10 and is 4'): fit(IMECD.of(configure(ModelConfig, many.SMALL), short, features), short, TrainConfig(epochs=2, targets=64), folder=tmp_path, resume=True, show='none')


def test_the_better_of_a_torn_pair_stands(tmp_path, monkeypatch):
    "Where the epoch that is done again comes out worse, what was written before the kill is kept."
    data, features = many.made(); make = lambda: IMECD.of(configure(ModelConfig, many.SMALL), data, features); values = iter((.1, .4, .3, .2))
    monkeypatch.setattr('imecd.train.ndcg', lambda r, k: torch.full((len(r),), next(values) if k == 20 else 0.))
    fit(make(), data, TrainConfig(epochs=1, targets=64, warmup=0), folder=tmp_path, show='none'); shutil.copy(tmp_path/'last.safetensors', tmp_path/'first'); fit(make(), data, TrainConfig(epochs=2, targets=64, warmup=0), folder=tmp_path, resume=True, show='none')
    (tmp_path/'first').replace(tmp_path/'last.safetensors'); kept = load_checkpoint(tmp_path/'best.safetensors').tensors; m = make()
    assert fit(m, data, TrainConfig(epochs=3, targets=64, warmup=0), folder=tmp_path, resume=True, show='none').best == 1 and all(torch.equal(x, kept[k]) for k, x in m.state_dict().items())


def test_a_training_that_diverges_in_its_last_step_says_so(tmp_path):
    data, features = many.made()
    with pytest.raises(ImecdError, match=r'epoch 0, validation after its last batch: .*NaN.*lower lr \(now 1e\+30\)'): fit(IMECD.of(configure(ModelConfig, many.SMALL), data, features), data, TrainConfig(epochs=1, targets=10**6, lr=1e30), show='none')


def test_fewer_epochs_than_were_trained_are_refused(tmp_path):
    data, features = many.made(); make = lambda: IMECD.of(configure(ModelConfig, many.SMALL), data, features); fit(make(), data, TrainConfig(epochs=3, targets=64), folder=tmp_path, show='none'); before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ImecdError, match='was trained for 3 epochs already; resume with as many or more, epochs is 2'): fit(make(), data, TrainConfig(epochs=2, targets=64), folder=tmp_path, resume=True, show='none')
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
