"The command as a user types it: folders, tables, exit codes, one line on a mistake."
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from imecd.baselines import make_model, read_config
from imecd.cli import app
from imecd.histories import content_hash, load_interactions


def last(text): return text.strip().splitlines()[-1]


@pytest.fixture(scope='module')
def run(imecd, shop, tmp_path_factory):
    "A finished run of the kNN."
    out = tmp_path_factory.mktemp('runs')/'knn'
    code, said, err = imecd('train', shop, '--model', 'transition_knn', '--set', 'window=2', '--set', 'direction=forward', '--out', out)
    assert code == 0, err
    return out


def commands(group=app, path=()):
    for c in group.registered_commands: yield (*path, c.name or c.callback.__name__), c
    for g in group.registered_groups: yield from commands(g.typer_instance, (*path, g.name))


def test_every_command_has_help_with_an_example(imecd):
    found = list(commands())
    assert [' '.join(p) for p, _ in found] == ['features', 'train', 'eval', 'demo', 'data check', 'data shop', 'data convert', 'data amazon']
    for path, command in found: assert (command.epilog or '').startswith(f"Example: imecd {' '.join(path)} "), path
    code, said, _ = imecd('data', 'convert', '--help'); assert code == 0 and 'Example: imecd data convert' in said


def test_run_folder_holds_what_it_promises(run):
    assert sorted(p.name for p in run.iterdir()) == ['config.json', 'figures', 'metrics.json', 'model.safetensors', 'provenance.json', 'ranks.parquet', 'slices.csv', 'trials.csv']
    metrics = json.loads((run/'metrics.json').read_text()); names = {f'{m}@{k}' for m in ('hr', 'ndcg') for k in (5, 10, 20, 50)} | {'mrr@5', 'mrr@10', 'mrr@20'}
    assert set(metrics) == {'valid', 'test', 'test_masked', 'test_ties'}
    for part in ('valid', 'test', 'test_masked'): assert set(metrics[part]) == names | {'coverage@10', 'gini@10', 'popularity@10', 'ild@10'}
    ranks = pl.read_parquet(run/'ranks.parquet')
    assert ranks.columns == ['user', 'split', 'target', 'rank', 'rank_masked', 'length'] and ranks['rank'].min() >= 1 and set(ranks['split']) == {'valid', 'test'}
    assert {p.name for p in (run/'figures').iterdir()} == {'ranks.png', 'slices.png'} and json.loads((run/'config.json').read_text())['settings']['window'] == 2
    origin = json.loads((run/'provenance.json').read_text()); assert origin['data']['hash'] and origin['time']['minutes'] > 0 and origin['code']['torch']


def test_two_equal_runs_are_equal_byte_for_byte(run, imecd, shop, tmp_path):
    assert imecd('train', shop, '--model', 'transition_knn', '--set', 'window=2', '--set', 'direction=forward', '--out', tmp_path/'b', '--length', 50)[0] == 0
    for name in ('metrics.json', 'config.json', 'ranks.parquet', 'slices.csv', 'model.safetensors'): assert (run/name).read_bytes() == (tmp_path/'b'/name).read_bytes(), name


def test_eval_measures_the_stored_model_again(run, imecd):
    code, said, err = imecd('eval', run, '--json'); assert code == 0, err
    assert json.loads(said) == json.loads((run/'metrics.json').read_text())


def test_eval_refuses_other_data(run, imecd, tmp_path):
    assert imecd('data', 'shop', tmp_path/'other', '--users', 50, '--items', 50, '--no-pictures')[0] == 0
    code, _, err = imecd('eval', run, '--data', tmp_path/'other'); assert code == 2 and 'is not the data set of this run' in err


def test_truth_never_reaches_a_model(run, imecd, shop, tmp_path):
    "Permuting the truth of the shop, or taking it away, changes no metric."
    import shutil
    copy = tmp_path/'shop'; shutil.copytree(shop, copy); truths = list(copy.glob('truth*')); assert truths
    for path in truths:
        t = pl.read_parquet(path); t.with_columns([c.shuffle(seed=1) for c in t.get_columns()]).write_parquet(path)
    args = ('--model', 'transition_knn', '--set', 'window=2', '--set', 'direction=forward')
    assert imecd('train', copy, *args, '--out', tmp_path/'a')[0] == 0
    for path in truths: path.unlink()
    assert imecd('train', copy, *args, '--out', tmp_path/'b')[0] == 0
    for name in ('a', 'b'): assert (tmp_path/name/'metrics.json').read_bytes() == (run/'metrics.json').read_bytes()


def test_check_says_what_is_there(imecd, shop, tmp_path):
    code, said, err = imecd('data', 'check', shop, '--json', '--figures', tmp_path/'f'); found = json.loads(said)
    assert code == 0 and found['users'] == 400 and found['hash'] == content_hash(load_interactions(shop)) and {p.name for p in (tmp_path/'f').iterdir()} == {'lengths.png', 'long_tail.png', 'ties.png'}


def test_convert_from_csv_to_ranked_result(imecd, tmp_path):
    rows = [f'c{u},p{(u*7+k*3) % 11},{1_500_000_000+86_400*k}' for u in range(30) for k in range(8)]+['c1,,5', 'c2,p1,-4']
    (tmp_path/'orders.csv').write_text('customer,product,when\n'+'\n'.join(rows)+'\n')
    (tmp_path/'goods.csv').write_text('code,name\n'+''.join(f'p{k},"Thing, no. {k}"\n' for k in range(11)))
    code, _, err = imecd('data', 'convert', tmp_path/'orders.csv', tmp_path/'set'); assert code == 2 and 'no column looks like' in err and not (tmp_path/'set').exists()
    columns = [x for c in ('user=customer', 'item=product', 'timestamp=when') for x in ('--column', c)]+['--item-column', 'item=code']
    code, said, err = imecd('data', 'convert', tmp_path/'orders.csv', tmp_path/'set', *columns, '--items', tmp_path/'goods.csv', '--quarantine', tmp_path/'bad.csv', '--json')
    assert code == 0, err
    report = json.loads(said); assert sum(report['dropped'].values()) == 2 and report['text_columns'] == ['title'] and report['items_without_text'] == 0
    assert pl.read_csv(tmp_path/'bad.csv')['line'].to_list() == [242, 243]
    assert imecd('train', tmp_path/'set', '--model', 'popularity', '--out', tmp_path/'run')[0] == 0


def test_time_split_from_the_shell(imecd, shop, tmp_path):
    code, said, err = imecd('train', shop, '--model', 'popularity', '--split', 'time', '--out', tmp_path/'run', '--json'); assert code == 0, err
    assert json.loads((tmp_path/'run/config.json').read_text())['split'] == 'time'


MISTAKES = {
    'no folder': (('data', 'check', 'nowhere'), 'interactions.parquet is not there'),
    'no model yet': (('train', '{shop}', '--out', 'x'), "there is no model 'imecd' in this version"),
    'model misspelt': (('train', '{shop}', '--out', 'x', '--model', 'popularty'), "did you mean 'popularity'"),
    'setting misspelt': (('train', '{shop}', '--out', 'x', '--model', 'transition_knn', '--set', 'windw=3'), "did you mean 'window'"),
    'setting without value': (('train', '{shop}', '--out', 'x', '--model', 'transition_knn', '--set', 'window'), 'write it as name=value'),
    'setting of the wrong kind': (('train', '{shop}', '--out', 'x', '--model', 'transition_knn', '--set', 'window=many'), "window='many'"),
    'split': (('train', '{shop}', '--out', 'x', '--model', 'popularity', '--split', 'half'), 'use leave_one_out or time'),
    'odd length': (('train', '{shop}', '--out', 'x', '--model', 'popularity', '--length', '7'), 'even number'),
    'device': (('train', '{shop}', '--out', 'x', '--model', 'popularity', '--device', 'tpu'), "device 'tpu' is not on this machine"),
    'not a run': (('eval', '{shop}'), 'is not a run folder'),
    'a file as data set': (('data', 'check', '{shop}/items.parquet'), 'is a file, not a data set'),
    'demo elsewhere': (('demo', '{shop}'), 'is not empty'),
    'no run': (('eval', 'nowhere'), 'is not a run folder'),
    'folder exists': (('data', 'shop', '{shop}'), 'is not empty'),
    'category': (('data', 'amazon', 'Toys_and_Game', 'x', '--year', '2018'), 'Toys_and_Games'),
    'k-core too high': (('data', 'check', '{shop}', '--k-core', '5000'), 'no event is left by the 5000-core'),
    'source not there': (('data', 'convert', 'nowhere.csv', 'x'), 'nowhere.csv'),
    'features of nothing': (('features', '{shop}', '--image', 'codes', '--out', 'x'), 'image_codes.npy'),
    'unknown option': (('data', 'check', '{shop}', '--nonsense'), 'No such option'),
    'no such command': (('trian', 'x'), "No such command 'trian'"),
    'argument missing': (('train',), 'Missing argument'),
    'not a number': (('train', '{shop}', '--out', 'x', '--length', 'abc'), "Invalid value for '--length'"),
    'features elsewhere': (('train', '{shop}', '--out', 'x', '--model', 'popularity', '--features', 'nowhere'), 'holds neither text_features.npy'),
    'infinite': (('train', '{shop}', '--out', 'x', '--model', 'transition_knn', '--set', 'shrinkage=Infinity'), 'finite'),
    'nothing to set': (('train', '{shop}', '--out', 'x', '--model', 'popularity', '--set', 'a=1'), 'nothing to set'),
    'no configuration': (('train', '{shop}', '--out', 'x', '--config', 'c.toml'), 'c.toml is not there'),
    'quarantine inside': (('data', 'convert', '{shop}', 'x', '--quarantine', 'x/bad.csv'), 'name a file beside it'),
    'too few items': (('data', 'shop', 'x', '--items', '3'), '50'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_ends_in_one_clear_line(name, imecd, shop, tmp_path):
    args, message = MISTAKES[name]
    code, said, err = imecd(*(a.format(shop=shop) for a in args), cwd=tmp_path)
    assert code == 2 and message in ' '.join(err.split()), (said, err)
    assert 'Traceback' not in err and not list(tmp_path.iterdir())
    assert len(err.strip().splitlines()) == 1


def test_a_traceback_on_request(imecd):
    code, _, err = imecd('data', 'check', 'nowhere', '--debug'); assert code not in (0, 2) and 'Traceback' in err


def test_a_folder_that_cannot_be_written(imecd, shop, tmp_path):
    (tmp_path/'file').touch(); code, _, err = imecd('train', shop, '--model', 'popularity', '--out', tmp_path/'file'/'run')
    assert code == 2 and 'file: File exists; name another' in err and len(err.strip().splitlines()) == 1


def test_a_damaged_run_is_named(run, imecd, tmp_path):
    import shutil
    for name, content, message in (('provenance.json', '{}', "it has no 'data'"), ('config.json', '[]', 'is not that of a run'), ('metrics.json', '{"a', 'is not JSON'), ('model.safetensors', 'x', 'missing or broken')):
        copy = tmp_path/name; shutil.copytree(run, copy); (copy/name).write_text(content)
        code, _, err = imecd('eval', copy); assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err


def test_a_model_of_another_kind_is_named(run, imecd, shop, tmp_path):
    import shutil
    assert imecd('train', shop, '--model', 'popularity', '--out', tmp_path/'pop')[0] == 0
    shutil.copytree(run, tmp_path/'knn'); shutil.copy(tmp_path/'pop/model.safetensors', tmp_path/'knn/model.safetensors')
    code, _, err = imecd('eval', tmp_path/'knn'); assert code == 2 and "no tensor 'data' but counts" in err


def test_features_written_elsewhere_are_used(imecd, shop, tmp_path):
    assert imecd('features', shop, '--image', 'none', '--out', tmp_path/'f')[0] == 0
    code, said, err = imecd('train', shop, '--model', 'popularity', '--features', tmp_path/'f', '--out', tmp_path/'run', '--json'); assert code == 0, err
    assert json.loads(said)['test']['ild@10'] > 0


def test_a_demo_is_made_again(imecd, tmp_path):
    for seed in (0, 1):
        code, _, err = imecd('demo', tmp_path/'demo', '--seed', seed); assert code == 0, err
        assert json.loads((tmp_path/'demo/popularity/config.json').read_text())['seed'] == seed


CONFIGS = sorted((Path(__file__).parents[1]/'configs').glob('*.toml'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_configurations_in_the_project_can_be_used(path):
    told = read_config(path); make_model(told['model'], told['settings'])


def test_the_command_line_wins_over_the_configuration(imecd, shop, tmp_path):
    (tmp_path/'c.toml').write_text('model = "transition_knn"\nlength = 20\n[settings]\nwindow = 2\ndirection = "forward"\n')
    code, _, err = imecd('train', shop, '--config', tmp_path/'c.toml', '--set', 'window=4', '--no-tune', '--out', tmp_path/'run'); assert code == 0, err
    config = json.loads((tmp_path/'run/config.json').read_text()); assert (config['length'], config['settings']['window'], config['settings']['direction']) == (20, 4, 'forward')


@pytest.mark.parametrize('text, message', [('model = ', 'not TOML'), ('modle = "x"', "modle='x' cannot be used; there are model"), ('length = "long"', "length='long' cannot be used")])
def test_a_configuration_that_cannot_be_used(text, message, imecd, shop, tmp_path):
    (tmp_path/'c.toml').write_text(text); code, _, err = imecd('train', shop, '--config', tmp_path/'c.toml', '--out', tmp_path/'run')
    assert code == 2 and message in err and not (tmp_path/'run').exists()


def test_an_interrupt_leaves_nothing(tmp_path):
    "A person who presses Ctrl-C in the middle finds no half shop, and is told so."
    command = [str(Path(sys.executable).with_name('imecd')), 'data', 'shop', str(tmp_path/'shop'), '--items', '100000', '--users', '500000']
    p = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.iterdir()) and p.poll() is None: time.sleep(.05)
    p.send_signal(signal.SIGINT); _, err = p.communicate(timeout=120)
    assert p.returncode == 130 and err.strip().splitlines()[-1] == 'imecd: stopped, nothing half-written is left' and not list(tmp_path.iterdir())
