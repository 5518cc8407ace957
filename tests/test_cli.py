"The command as a user types it: folders, tables, exit codes, one line on a mistake."
import json
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import polars as pl
import pytest

from imecd.baselines import make_model, read_config
from imecd.cli import app
from imecd.fitting import configure_preset
from imecd.histories import content_hash, load_interactions
from imecd.model import PRESETS


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
    assert [' '.join(p) for p, _ in found] == ['features', 'train', 'eval', 'tune', 'ablate', 'compare', 'recommend', 'demo', 'data check', 'data shop', 'data cache', 'data convert', 'data amazon']
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


def test_a_process_of_its_own_says_the_same(run, imecd, shell):
    for args in (('eval', run), ('eval', run, '--data', 'nowhere')): assert shell(*args) == imecd(*args)


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
    assert code == 0 and found['users'] == 400 and found['text'] == 'title, categories, brand, description of items.parquet' and found['hash'] == content_hash(load_interactions(shop)) and {p.name for p in (tmp_path/'f').iterdir()} == {'lengths.png', 'long_tail.png', 'ties.png'}


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
    code, _, err = imecd('train', tmp_path/'set', '--model', 'popularity', '--out', tmp_path/'run'); assert code == 0 and f"the run is in {tmp_path/'run'}" in err
    code, _, err = imecd('data', 'convert', tmp_path/'set', tmp_path/'core', '--k-core', 8); assert code == 0 and 'left out' not in err
    with (tmp_path/'orders.csv').open('a') as f: f.write('rare,p1,1500000000\n')
    code, _, err = imecd('data', 'convert', tmp_path/'orders.csv', tmp_path/'told', *columns, '--items', tmp_path/'goods.csv'); assert code == 0 and 'the 5-core left out 1 of 241 events; k=0, or --k-core 0, keeps them' in err


def test_the_version(imecd): code, said, _ = imecd('--version'); assert code == 0 and said == f"imecd {metadata.version('imecd')}\n"


def test_time_split_from_the_shell(imecd, shop, tmp_path):
    code, said, err = imecd('train', shop, '--model', 'popularity', '--split', 'time', '--out', tmp_path/'run', '--json'); assert code == 0, err
    assert json.loads((tmp_path/'run/config.json').read_text())['split'] == 'time'


MISTAKES = {
    'no folder': (('data', 'check', 'nowhere'), 'interactions.parquet is not there'),
    'preset misspelt': (('train', '{shop}', '--out', 'x', '--model', 'wo_msqv'), "did you mean 'wo_msvq'"),
    'no such model': (('train', '{shop}', '--out', 'x', '--model', 'qqqq'), 'there are imecd, wo_idmoe'),
    'field of the model misspelt': (('train', '{shop}', '--out', 'x', '--set', 'expert=2'), "ModelConfig has no field 'expert'; did you mean 'experts'"),
    'field of the training misspelt': (('train', '{shop}', '--out', 'x', '--set', 'train.epoch=2'), "TrainConfig has no field 'epoch'; did you mean 'epochs'"),
    'training without a field': (('train', '{shop}', '--out', 'x', '--set', 'train=2'), 'e.g. train.epochs=5'),
    'impossible pair': (('train', '{shop}', '--out', 'x', '--set', 'dim=10', '--set', 'heads=4'), 'make dim a multiple of heads'),
    'no epochs': (('train', '{shop}', '--out', 'x', '--epochs', '0'), "Invalid value for '--epochs'"),
    'epochs of what counts': (('train', '{shop}', '--out', 'x', '--model', 'popularity', '--epochs', '3'), "no field 'train.epochs'"),
    'odd length of the model': (('train', '{shop}', '--out', 'x', '--set', 'length=7'), 'even number'),
    'streams that are not there': (('train', '{shop}', '--out', 'x', '--model', 'image_only'), 'needs features of image'),
    'streams asked for': (('train', '{shop}', '--out', 'x', '--set', 'streams=id+image'), 'needs features of image'),
    'stored features of nothing': (('train', '{shop}', '--out', 'x', '--features', 'nowhere'), 'holds neither text_features.npy nor image_features.npy'),
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
    'a data set for a run': (('recommend', '{shop}', '--history', 'x'), 'it is a data set: `imecd train'),
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


def test_a_traceback_on_request(shell):
    code, _, err = shell('data', 'check', 'nowhere', '--debug'); assert code not in (0, 2) and 'Traceback' in err


def test_a_folder_that_cannot_be_written(imecd, shop, tmp_path):
    (tmp_path/'file').touch(); code, _, err = imecd('train', shop, '--model', 'popularity', '--out', tmp_path/'file'/'run')
    assert code == 2 and 'file is no folder that may be written to; give another --out' in err and len(err.strip().splitlines()) == 1


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
    "Both tables end in IMECD; every figure is there; a second demo replaces the first."
    for seed in (0, 1):
        code, said, err = imecd('demo', tmp_path/'demo', '--seed', seed, '--users', 300, '--items', 60, '--epochs', 3); assert code == 0, err
        assert json.loads((tmp_path/'demo/popularity/config.json').read_text())['seed'] == seed
        run = tmp_path/'demo/IMECD'; told = json.loads((run/'config.json').read_text()); assert (told['model'], told['settings']['seed'], told['train']['seed'], told['train']['epochs'], told['train']['patience']) == ('imecd', seed, seed, 3, 3)
    kept, masked, _ = (tmp_path/'demo/table.txt').read_text().split('\n\n')
    for table, how in ((kept, 'history kept'), (masked, 'history masked')): first, _, *rows = table.splitlines(); assert how in first and [r.split()[0] for r in rows] == ['popularity', 'kNN,', 'kNN,', 'IMECD']
    assert kept.splitlines()[3] != masked.splitlines()[3]
    assert {p.stem for p in (run/'figures').iterdir()} == {'ranks', 'slices', 'history', 'loss', 'trust', 'perplexity', 'gates', 'lies', 'codes', 'path'}
    assert {p.stem for p in (tmp_path/'demo/figures').iterdir()} == {'long_tail', 'lengths', 'ties', 'models'}


TINY = [x for s in ('dim=16', 'heads=2', 'inner=32', 'layers=1', 'codes=8', 'train.targets=256', 'train.warmup=1', 'train.lr=3e-3') for x in ('--set', s)]


@pytest.fixture(scope='module')
def trained(imecd, shop, tmp_path_factory):
    "A run of IMECD on a shop without pictures, and what was said."
    out = tmp_path_factory.mktemp('runs')/'imecd'; code, said, err = imecd('train', shop, *TINY, '--epochs', 2, '--length', 20, '--out', out, '--json'); assert code == 0, err
    return out, json.loads(said), err


def test_imecd_is_trained(trained):
    out, said, err = trained; origin = json.loads((out/'provenance.json').read_text()); config = json.loads((out/'config.json').read_text())
    assert sorted(p.name for p in out.iterdir()) == ['config.json', 'figures', 'history.csv', 'history.jsonl', 'metrics.json', 'model.safetensors', 'provenance.json', 'ranks.parquet', 'slices.csv']
    assert {p.stem for p in (out/'figures').iterdir()} == {'ranks', 'slices', 'history', 'loss', 'trust', 'perplexity', 'gates', 'codes', 'path'}
    assert said == json.loads((out/'metrics.json').read_text()) and set(said) == {'valid', 'test', 'test_masked', 'test_ties'}
    history = pl.read_csv(out/'history.csv'); assert history['epoch'].to_list() == [0, 1] and {'loss', 'generated', 'valid ndcg@10', 'trust text', 'perplexity id'} <= set(history.columns)
    assert origin['training']['best'] == history['valid ndcg@20'].arg_max() and origin['training']['epochs'] == 2 and said['valid']['ndcg@20'] == pytest.approx(history['valid ndcg@20'].max())
    assert (config['model'], config['length'], config['settings']['length'], config['settings']['dim'], config['train']['epochs'], config['train']['lr']) == ('imecd', 20, 20, 16, 2, .003)


def test_streams_that_the_data_set_lacks_are_left_out_and_it_is_said(trained):
    out, _, err = trained; assert 'note: the data set offers no image; trained with streams=id+text\n' in err and json.loads((out/'config.json').read_text())['settings']['streams'] == 'id+text'


def test_a_stored_imecd_is_measured_again_bit_by_bit(trained, imecd):
    code, said, err = imecd('eval', trained[0], '--json'); assert code == 0, err
    assert json.loads(said) == trained[1] and not err


def test_two_equal_trainings_are_equal_byte_for_byte(trained, imecd, shop, tmp_path):
    (tmp_path/'c.toml').write_text('length = 20\n[settings]\ndim = 16\nheads = 2\ninner = 32\nlayers = 1\ncodes = 8\n[settings.train]\ntargets = 256\nwarmup = 1\nlr = 3e-3\nepochs = 9\n')
    assert imecd('train', shop, '--config', tmp_path/'c.toml', '--set', 'train.epochs=2', '--out', tmp_path/'b')[0] == 0
    for name in ('metrics.json', 'config.json', 'ranks.parquet', 'slices.csv', 'model.safetensors'): assert (trained[0]/name).read_bytes() == (tmp_path/'b'/name).read_bytes(), name


def test_other_features_are_named(trained, imecd, shop, tmp_path):
    "Features that were stored elsewhere are found again; others are refused."
    assert imecd('features', shop, '--image', 'none', '--out', tmp_path/'f')[0] == 0
    code, said, err = imecd('train', shop, '--features', tmp_path/'f', *TINY, '--model', 'id+text', '--epochs', 1, '--length', 20, '--out', tmp_path/'run', '--json'); assert code == 0, err
    again, seen, err = imecd('eval', tmp_path/'run', '--json'); assert again == 0 and json.loads(seen) == json.loads(said), err
    import shutil
    copy = tmp_path/'shop'; shutil.copytree(shop, copy); t = pl.read_parquet(copy/'items.parquet'); t.with_columns(pl.col('title').shuffle(seed=1), pl.col('description').shuffle(seed=2)).write_parquet(copy/'items.parquet')
    code, _, err = imecd('eval', trained[0], '--data', copy); assert code == 2 and 'the features are not those of the training' in err and len(err.strip().splitlines()) == 1
    (tmp_path/'f/text_features.npy').unlink(); code, _, err = imecd('eval', tmp_path/'run'); assert code == 2 and 'holds neither text_features.npy' in err


def test_a_stored_imecd_that_does_not_fit_is_named(trained, run, imecd, tmp_path):
    import shutil
    shutil.copytree(trained[0], tmp_path/'a'); shutil.copy(run/'model.safetensors', tmp_path/'a/model.safetensors')
    code, _, err = imecd('eval', tmp_path/'a'); assert code == 2 and 'it belongs to another configuration' in err
    shutil.copytree(trained[0], tmp_path/'b'); told = json.loads((tmp_path/'b/config.json').read_text())
    for changes, message in (({'dim': 8}, 'has shape'), ({'dimm': 8}, "did you mean 'dim'")):
        (tmp_path/'b/config.json').write_text(json.dumps({**told, 'settings': {**told['settings'], **changes}})); code, _, err = imecd('eval', tmp_path/'b'); assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    (tmp_path/'b/config.json').write_text(json.dumps({**told, 'model': 'imced'})); code, _, err = imecd('eval', tmp_path/'b'); assert code == 2 and "did you mean 'imecd'" in err


def test_a_preset_without_features_needs_none(imecd, shop, tmp_path):
    code, _, err = imecd('train', shop, '--model', 'sasrec', *TINY, '--epochs', 1, '--seed', 3, '--out', tmp_path/'run'); *lines, last = err.strip().splitlines(); assert code == 0 and all(x.startswith('epoch 0, ') for x in lines) and last == f"note: the run is in {tmp_path/'run'}", err
    config = json.loads((tmp_path/'run/config.json').read_text()); assert config['settings']['seed'] == config['train']['seed'] == 3 and config['settings']['streams'] == 'id' and config['length'] == 50
    assert {p.stem for p in (tmp_path/'run/figures').iterdir()} == {'ranks', 'slices', 'history', 'loss'} and imecd('eval', tmp_path/'run')[0] == 0


def test_a_gate_that_is_shared_is_stored(imecd, shop, tmp_path):
    code, said, err = imecd('train', shop, '--model', 'shared_gate', *TINY, '--epochs', 1, '--out', tmp_path/'run', '--json'); assert code == 0, err
    again, seen, err = imecd('eval', tmp_path/'run', '--json'); assert again == 0 and json.loads(seen) == json.loads(said), err


def test_a_collapsed_codebook_is_a_note(imecd, shop, tmp_path):
    "400 histories cannot use a tenth of 5,000 codes."
    code, _, err = imecd('train', shop, *TINY, '--set', 'codes=5000', '--set', 'train.warmup=0', '--epochs', 1, '--out', tmp_path/'run'); assert code == 0, err
    assert all(line.startswith(('note: ', 'epoch ')) for line in err.strip().splitlines()) and 'note: codebook of' in err and 'UserWarning' not in err


CONFIGS = sorted((Path(__file__).parents[1]/'configs').glob('*.toml'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_configurations_in_the_project_can_be_used(path):
    told = read_config(path)
    if told['model'] in PRESETS: configure_preset(told['model'], told['settings'])
    else: make_model(told['model'], told['settings'])


def test_the_command_line_wins_over_the_configuration(imecd, shop, tmp_path):
    (tmp_path/'c.toml').write_text('model = "transition_knn"\nlength = 20\n[settings]\nwindow = 2\ndirection = "forward"\n')
    code, _, err = imecd('train', shop, '--config', tmp_path/'c.toml', '--set', 'window=4', '--no-tune', '--out', tmp_path/'run'); assert code == 0, err
    config = json.loads((tmp_path/'run/config.json').read_text()); assert (config['length'], config['settings']['window'], config['settings']['direction']) == (20, 4, 'forward')


@pytest.mark.parametrize('text, message', [('model = ', 'not TOML'), ('modle = "x"', "modle='x' cannot be used; there are model"), ('length = "long"', "length='long' cannot be used")])
def test_a_configuration_that_cannot_be_used(text, message, imecd, shop, tmp_path):
    (tmp_path/'c.toml').write_text(text); code, _, err = imecd('train', shop, '--config', tmp_path/'c.toml', '--out', tmp_path/'run')
    assert code == 2 and message in err and not (tmp_path/'run').exists()


@pytest.mark.parametrize('sent', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(sent, tmp_path):
    "Who presses Ctrl-C in the middle, or whose scheduler ends the job, finds no half shop, and is told so."
    command = [str(Path(sys.executable).with_name('imecd')), 'data', 'shop', str(tmp_path/'shop'), '--items', '100000', '--users', '500000']
    before = signal.signal(signal.SIGINT, signal.default_int_handler)         # a shell's background job ignores Ctrl-C, and so would a child
    try: p = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally: signal.signal(signal.SIGINT, before)
    while not list(tmp_path.iterdir()) and p.poll() is None: time.sleep(.05)
    p.send_signal(sent); _, err = p.communicate(timeout=120)
    assert p.returncode == 130 and err.strip().splitlines()[-1] == 'imecd: stopped, nothing half-written is left' and not list(tmp_path.iterdir())
