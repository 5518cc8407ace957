"Many processes: the same step, the same codes, every user once, a training that goes on with more of them, a failure that all hear of."
import json
import os
import shutil
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import many
import numpy as np
import pytest
import torch

from imecd.batch import take_part
from imecd.core import Dropout, Part, launched, pick_device
from imecd.model import PRESETS
from imecd.processes import Processes, is_main, weave
from imecd.shards import can_share

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'}


def launch(world, *command, launcher=('torch.distributed.run', '--standalone', '--nproc-per-node')):
    "Exit code and standard error of a command in several processes."
    p = subprocess.run([sys.executable, '-m', *launcher, str(world), *map(str, command)], capture_output=True, text=True, timeout=300, env=ENV); return p.returncode, p.stderr


def run(world, task, out, **told):
    "A task of `many.py`; of one process, here. Whoever warns fails."
    out.mkdir(exist_ok=True)
    if world == 1: getattr(many, task)(out, **told); return out
    code, said = launch(world, Path(many.__file__), task, out, json.dumps(told)); assert not code and 'Warning' not in said, said[-3000:]; return out


@pytest.fixture(scope='module')
def stepped(tmp_path_factory):
    "Steps of every preset by one process, by two, and of the full model by three."
    out = tmp_path_factory.mktemp('steps')
    for world, names in ((1, [*many.CASES]), (2, [*many.CASES]), (3, ['imecd'])): run(world, 'all_steps', out, names=names)
    return lambda name, world, rank=0: dict(np.load(out/f'{name}.{world}.{rank}.npz'))


@pytest.mark.parametrize('name, world', [*((name, 2) for name in many.CASES), ('imecd', 3)])
def test_many_take_the_steps_of_one(stepped, name, world):
    one, others = stepped(name, 1), [stepped(name, world, k) for k in range(world)]
    for other in others:
        assert one.keys() == other.keys() and np.array_equal(one['state'], other['state'])                  # everybody drew alike
        for key in one: np.testing.assert_allclose(other[key], one[key], rtol=0, atol=1e-8, err_msg=key)
        for key in one: assert np.array_equal(other[key], others[0][key]), key
    assert np.ptp(one['losses']) > .1 and any(k.startswith('grad ') for k in one)
    if name == 'imecd': assert one['revived'] > 0 and one['state reader.vq.levels.0.ready']                  # so the codes that were placed anew agree, too


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Trainings with the defaults: three seeds alone, one by two processes."
    out, config = tmp_path_factory.mktemp('trained'), dict(epochs=6, targets=256, lr=3e-3, patience=9)
    for seed in range(3): run(1, 'training', out/f'alone {seed}', config=config | {'seed': seed}, seed=seed)
    run(2, 'training', out/'two', config=config, folder=str(out/'kept')); return out, config


def rows(folder): return json.loads((folder/'rows.json').read_text())
def reached(folder): return rows(folder)[-1]['valid ndcg@20']


def test_two_learn_what_one_learns(trained):
    out, _ = trained; alone = [reached(out/f'alone {seed}') for seed in range(3)]
    assert min(alone)-np.ptp(alone)-.01 < reached(out/'two') < max(alone)+np.ptp(alone)+.01 and rows(out/'two')[0]['valid ndcg@20'] < reached(out/'two')


def test_every_process_has_the_same_model_and_ranks(trained):
    a, b = (np.load(trained[0]/'two'/f'2.{k}.npz') for k in (0, 1))
    for key in a.files: assert np.array_equal(a[key], b[key]), key
    assert np.array_equal(a['ranks'], a['alone'])                                                           # shared out or not


def test_a_training_goes_on_with_more_or_fewer(trained, tmp_path):
    _, config = trained; short = config | {'epochs': 3}
    for first in (1, 2): run(first, 'training', tmp_path/f'by {first}', config=short, folder=str(tmp_path/f'kept by {first}'))
    for name, first, then in (('same', 2, 2), ('fewer', 2, 1), ('more', 1, 2)):
        shutil.copytree(tmp_path/f'kept by {first}', tmp_path/name); run(then, 'training', tmp_path/f'{name} then', config=config, folder=str(tmp_path/name), resume=True)
        begun, done = rows(tmp_path/f'by {first}'), rows(tmp_path/f'{name} then'); assert len(done) == 6 and done[:3] == begun
        whole = np.load(trained[0]/('two' if first == 2 else 'alone 0')/f'{first}.0.npz'); now = np.load(tmp_path/f'{name} then'/f'{then}.0.npz')
        same = all(np.array_equal(whole[key], now[key]) for key in whole.files); assert same == (first == then)
        undisturbed = rows(trained[0]/('two' if first == 2 else 'alone 0')); fell = [r['condition'] for r in undisturbed]; assert abs(done[3]['condition']-fell[3]) < .3*(fell[0]-fell[3]), ('begun anew', fell, done[3]['condition']); assert abs(done[-1]['valid ndcg@20']-undisturbed[-1]['valid ndcg@20']) < .1


@pytest.mark.parametrize('shard', [False, True])
def test_all_hear_of_a_failure_and_leave(tmp_path, shard):
    if shard and not can_share(): pytest.skip('this torch cannot write checkpoints in parts')
    run(2, 'fails', tmp_path, shard=shard); said = {k: (tmp_path/f'{k}.txt').read_text() for k in ('main', 'other')}
    assert 'epoch 0, batch 0: loss is nan, condition is nan; lower lr' in said['other'] and 'the gradient is nan; lower lr' in said['main']
    for k in (0, 1): assert (tmp_path/f'left {k}.txt').read_text() in ('False 0', *['False 2']*shard)             # else gloo's threads end the process with SIGABRT, now and then; a mesh of devices keeps them, idle


TORCHRUN = ('torch.distributed.run', '--standalone', '--no-python', '--nproc-per-node')
ACCELERATE = ('accelerate.commands.launch', '--cpu', '--no_python', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--num_cpu_threads_per_process', '1', '--num_processes')


def test_the_command_under_both_launchers(imecd, shop, tmp_path):
    small = ['--length', 20, '--epochs', 2, *(x for s in ('dim=16', 'layers=1', 'inner=32', 'codes=4', 'streams=id+text') for x in ('--set', s))]; command = Path(sys.executable).with_name('imecd')
    for name, world, launcher in (('torchrun', 2, TORCHRUN), ('accelerate', 1, ACCELERATE)):                    # which starts several processes on GPUs only
        code, said = launch(world, command, 'train', shop, '--out', tmp_path/name, *small, launcher=launcher); assert not code, said[-3000:]
        assert said.count('epoch 0, ') == 1 and not (tmp_path/f'{name}.training').exists(); facts = json.loads((tmp_path/name/'provenance.json').read_text()); assert facts['training']['processes'] == world
    assert imecd('train', shop, '--out', tmp_path/'plain', *small)[0] == 0 and (tmp_path/'plain'/'ranks.parquet').read_bytes() == (tmp_path/'accelerate'/'ranks.parquet').read_bytes()
    code, said = launch(2, command, 'train', shop, '--out', tmp_path/'counted', '--model', 'popularity', launcher=TORCHRUN); assert not code and (tmp_path/'counted'/'metrics.json').exists()


@pytest.mark.parametrize('names', ['RANK WORLD_SIZE LOCAL_RANK', 'PMI_RANK PMI_SIZE MPI_LOCALRANKID', 'OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK', 'MV2_COMM_WORLD_RANK MV2_COMM_WORLD_SIZE MV2_COMM_WORLD_LOCAL_RANK'])
@pytest.mark.parametrize('meet', [False, True])
def test_what_launchers_say(names, meet, monkeypatch):
    "MPI's names count where there is a place to meet at; a farm of seeds under Slurm has none."
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', *names.split()): monkeypatch.delenv(name, raising=False)
    for name, value in zip(names.split(), '352'): monkeypatch.setenv(name, value)
    if meet: monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    heard = meet or names.startswith('RANK'); assert [launched(what, -1) for what in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')] == ([3, 5, 2] if heard else [-1]*3) and is_main() != heard


def test_the_command_as_mpi_starts_it(shop, tmp_path):
    "`accelerate launch --mpirun_hostfile` leaves it to MPI to say who is who, in names of its own."
    small = ['--length', '20', '--epochs', '2', *(x for s in ('dim=16', 'layers=1', 'inner=32', 'codes=4', 'streams=id+text') for x in ('--set', s))]
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = str(s.getsockname()[1])
    told = [{**ENV, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': k, 'OMPI_COMM_WORLD_LOCAL_SIZE': '2', 'OMPI_COMM_WORLD_LOCAL_RANK': k} for k in '01']
    both = [subprocess.Popen([Path(sys.executable).with_name('imecd'), 'train', shop, '--out', tmp_path/'run', *small], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env) for env in told]
    try: said = [p.communicate(timeout=300)[1] for p in both]
    finally: [p.kill() for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert sum(t.count('epoch 0, ') for t in said) == 1 and json.loads((tmp_path/'run'/'provenance.json').read_text())['training']['processes'] == 2


def test_processes_that_see_other_files_stop(tmp_path):
    code, said = launch(2, Path(many.__file__), 'disagrees', tmp_path, '{}'); assert not code, said[-3000:]
    assert all("what is stored: process 1 has '1 epochs (" in (tmp_path/f'{k}.txt').read_text() for k in ('main', 'other'))


@pytest.mark.parametrize('world', range(1, 8))
def test_rows_are_dealt_out_once(world):
    data, _ = many.made()
    for batch in list(data.epoch(0, 0, 64))[:6]:
        turns = [take_part(batch, k, world) for k in range(world)]; n = len(batch.users)
        if n < world: assert all(t.batch is batch and t.asked == Part.of(len(t.places)) for t in turns); continue
        for i in range(4): assert torch.equal(torch.cat([t.batch[i] for t in turns]), batch[i])
        assert torch.equal(torch.cat([t.batch.tied for t in turns]), batch.tied) and all(a.asked.stop == b.asked.start and a.positions.stop == b.positions.start for a, b in pairwise(turns))
        assert all(len(t.batch.users) and t.asked.own.stop-t.asked.own.start == int(t.batch.targets.count_nonzero()) and len(t.batch.offsets) == len(t.batch.users)+1 for t in turns)
        assert sum(t.asked.weight for t in turns) == pytest.approx(world) and (n < 4*world or max(len(t.batch.items) for t in turns) < 2*len(batch.items)/world+12)
        for t in turns: assert torch.equal(t.places[t.asked.own]-t.positions.start, t.batch.targets.nonzero()[:, 0])


def test_parts():
    x = torch.randn(7, 3); parts = [Part(a, b, 7, 3) for a, b in ((0, 1), (1, 5), (5, 7))]; at = torch.tensor([6, 0, 0, 4])
    assert torch.equal(sum(p.pick(x[p.own], at) for p in parts), x[at]) and torch.allclose(sum(p.mean(x[p.own].mean(0)) for p in parts), x.mean(0), atol=1e-6)
    assert sorted(i for p in parts for i in p.among(at).tolist()) == [0, 1, 2, 3] and parts[1].times(2) == Part(2, 10, 14, 3, parts[1].sum)
    whole = Part.of(7); assert whole.weight == 1 and torch.equal(whole.pick(x, at), x[at]) and whole.mean(x) is x and x[whole.own] is not None and torch.equal(x[whole.among(at)][:4], x[:4])


def test_alone_nothing_is_said():
    data, features = many.made(); m = many.IMECD.of(many.configure(many.ModelConfig, many.SMALL), data, features); wire = Processes(m); batch = next(data.epoch(0, 0, 64))
    assert is_main() and wire.world == 1 and wire.net is None
    wire.seed(3); a = wire.loss(batch).loss; wire.seed(3); b = m.loss(batch).loss; assert torch.equal(a, b) and all(d.generator is None for d in m.modules() if isinstance(d, Dropout))
    told = {'x': torch.ones(())}; assert wire.mean(told) is told and wire.spread(torch.arange(3), lambda r: (r, None))[0].tolist() == [0, 1, 2]


def test_dropout_from_a_generator_of_its_own():
    drop = Dropout(.5); drop.generator = torch.Generator().manual_seed(1); x = torch.ones(50, 8); state = torch.get_rng_state(); a = drop(x)
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(a, drop(x)); drop.generator.manual_seed(1); assert torch.equal(a, drop(x)) and set(a.unique().tolist()) == {0., 2.}


@pytest.mark.parametrize('n, world', [(5, 5), (7, 3), (8, 2), (9, 4)])
def test_weaving_undoes_dealing(n, world):
    x = torch.randn(n, 2); assert torch.equal(weave([x[k::world] for k in range(world)]), x)


def test_each_process_its_device(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1'); assert pick_device('cpu') == torch.device('cpu')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True); monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert pick_device('auto') == pick_device('cuda') == torch.device('cuda', 1) and pick_device('cuda:0') == torch.device('cuda', 0)


def test_presets_are_all_tried(): assert set(PRESETS) <= set(many.CASES)
