"Diffusion: schedules, noise, sampler and losses against formulas, other people's code and brute force."
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch.nn import functional as F

from imecd.core import ImecdError
from imecd.diffusion import (CONTRASTS, SCHEDULES, ContrastiveDiffusion, Denoiser, NoiseSchedule, beta_levels, catalogue_loss,
                             contrastive_loss, information_limit, keyed_noise, plot_loss, plot_schedule, q_sample, sample, snr_levels, sphere)

few = settings(deadline=None, max_examples=15)


# schedules

@pytest.mark.parametrize('kind', SCHEDULES)
@pytest.mark.parametrize('steps', [32, 64, 1000])
def test_schedules_are_sound(kind, steps):
    bar = NoiseSchedule(steps, kind).alpha_bar.double(); beta = 1-bar[1:]/bar[:-1]
    assert len(bar) == steps+1 and bar[0] == 1 and (bar.diff() < 0).all() and bar[-1] < 1e-2
    assert ((beta > 0) & (beta < 1)).all()


@pytest.mark.parametrize('kind', ['snr', 'cosine', 'sqrt'])
@pytest.mark.parametrize('steps', [1, 2, 3])
def test_few_steps_still_reach_noise(kind, steps): assert NoiseSchedule(steps, kind).alpha_bar[-1] < 1e-2


@pytest.mark.parametrize('build, cure', [
    (lambda: NoiseSchedule(20, 'linear'), 'take more steps or the cosine schedule'), (lambda: NoiseSchedule(12, 'linear'), 'beta reaches'),
    (lambda: NoiseSchedule(20, 'trunc_lin'), 'take more steps or the cosine schedule'), (lambda: NoiseSchedule(1, 'linear'), 'alpha-bar ends at'),
    (lambda: NoiseSchedule(10**6, 'cosine'), 'take fewer steps'), (lambda: NoiseSchedule(0), 'at least one'), (lambda: NoiseSchedule(8, 'cos'), 'use one of snr'),
    (lambda: NoiseSchedule(top=1e-3), 'must be above 0.001'), (lambda: NoiseSchedule(top=-1.), 'must be above'), (lambda: NoiseSchedule(top=math.inf), 'finite'),
    (lambda: NoiseSchedule(top=math.nan), 'must be above'), (lambda: NoiseSchedule(8).trailing(9), 'allows 1 to 8'), (lambda: NoiseSchedule(8).trailing(0), 'allows 1 to 8'),
    (lambda: ContrastiveDiffusion(4, pure=1.5), 'between 0 and 1'), (lambda: ContrastiveDiffusion(4, drop=-.1), 'between 0 and 1'),
    (lambda: contrastive_loss(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), against='all'), 'use one of both')])
def test_mistakes_name_their_cure(build, cure):
    with pytest.raises(ImecdError) as e: build()
    assert cure in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 300


def test_snr_levels_are_even_in_the_logarithm():
    bar = snr_levels(32, .5); s = bar/(1-bar)
    assert torch.allclose(s[:-1].log().diff(), s[:-1].log().diff()[0].expand(30)) and math.isclose(s[0], .5) and math.isclose(s[-2], 1e-3) and s[-1] < 1e-5


def test_information_limit_separates():
    g = torch.Generator().manual_seed(0); n, d = 1000, 128; items = sphere(torch.randn(n, d, generator=g)); y = torch.arange(n)
    def found(s): return float(((q_sample(items, torch.full((n,), s/(1+s)), torch.randn(n, d, generator=g))@items.T).argmax(1) == y).float().mean())
    limit = information_limit(n, d)
    assert found(4*limit) > .99 and found(limit/20) < .1


@few
@given(st.integers(1, 200), st.data())
def test_trailing_steps(total, data):
    steps = data.draw(st.integers(1, total)); path = NoiseSchedule(total).trailing(steps)
    assert len(path) == steps and path[0] == total and path[-1] >= 1 and all(a > b for a, b in zip(path, path[1:]))


@few
@given(st.integers(1, 40), st.sampled_from([0., .3, 1.]))
def test_drawn_steps(total, pure):
    t = NoiseSchedule(total).draw(500, pure)
    assert t.min() >= 1 and t.max() <= total
    if pure == 1: assert (t == total).all()
    if pure == 0 and total > 1: assert (t < total).all()


# noise

def test_q_sample_moments():
    torch.manual_seed(0); x0 = torch.tensor([1., -2., .5]).expand(100_000, 3)
    for bar in (.9, .3, .01):
        x = q_sample(x0, torch.full((100_000,), bar), torch.randn(100_000, 3))
        assert torch.allclose(x.mean(0), bar**.5*x0[0], atol=.02) and torch.allclose(x.var(0), torch.full((3,), 1-bar), atol=.02)


def test_keyed_noise_is_normal():
    x = keyed_noise(torch.arange(20_000), 16, seed=3).double()
    assert abs(x.mean()) < .005 and abs(x.std()-1) < .005 and abs((x**3).mean()) < .02 and abs((x**4).mean()-3) < .05
    assert kstest(x.ravel().numpy(), 'norm').pvalue > .001
    assert torch.isfinite(x).all() and x.abs().max() < 6


def test_keyed_noise_is_independent():
    users = torch.arange(20_000); x = keyed_noise(users, 16)
    corr = np.corrcoef(x.numpy().T); assert np.abs(corr-np.eye(16)).max() < .035                       # dimensions
    for other in (keyed_noise(users, 16, 1), keyed_noise(users, 16, 0, 1), keyed_noise(users+1, 16), keyed_noise(users+2**32, 16)):
        assert abs(np.corrcoef(x.ravel(), other.ravel())[0, 1]) < .008 and abs(np.corrcoef(x.ravel()**2, other.ravel()**2)[0, 1]) < .008
    assert len(torch.unique(x)) > .97*x.numel()


@few
@given(st.integers(1, 33), st.integers(0, 2**70), st.integers(0, 9), st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_keyed_noise_ignores_the_batch(width, seed, draw, users):
    users = torch.tensor(users); whole = keyed_noise(users, width, seed, draw)
    assert torch.equal(whole.flip(0), keyed_noise(users.flip(0), width, seed, draw))
    assert all(torch.equal(row[None], keyed_noise(u[None], width, seed, draw)) for row, u in zip(whole, users)) and whole.dtype == torch.float32


def test_keyed_noise_takes_any_integer_users_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(keyed_noise(torch.arange(3, dtype=torch.int32), 5), keyed_noise(torch.arange(3), 5))


# sampler

def gaussian(schedule, mean, sd):
    "The optimal denoiser where every item is normal."
    def denoise(x, t, c): bar = schedule.alpha_bar[t]; return mean+sd**2*bar.sqrt()/(bar*sd**2+1-bar)*(x-bar.sqrt()*mean)
    return denoise


@pytest.mark.parametrize('kind', SCHEDULES)
@pytest.mark.parametrize('steps', [1, 2, 5, 7, 32])
def test_perfect_denoiser_is_returned_exactly(kind, steps):
    truth, seen = torch.randn(4, 6), []
    x = sample(lambda x, t, c: truth, None, NoiseSchedule(32, kind), torch.randn(4, 6), steps, seen.append)
    assert torch.equal(x, truth) and [s.index for s in seen] == list(range(steps)) and seen[0].t == 32


def test_all_steps_reach_the_gaussian():
    "With the analytic posterior mean, DDIM carries noise to the distribution of the items."
    schedule, noise = NoiseSchedule(1000, 'cosine'), keyed_noise(torch.arange(5000), 4)
    x = sample(gaussian(schedule, 1.5, .4), None, schedule, noise, 1000)
    assert abs(x.mean()-1.5) < .01 and abs(x.std()-.4) < .01 and kstest(((x-1.5)/.4).ravel().numpy(), 'norm').pvalue > 1e-6
    spread = [float(sample(gaussian(schedule, 1.5, .4), None, schedule, noise, n).std()) for n in (1, 4, 16, 1000)]
    assert spread == sorted(spread) and spread[0] < .01


@pytest.mark.parametrize('sd', [.3, 1., 2.])
def test_posterior_mean_is_the_regression(sd):
    "The optimal denoiser is what least squares finds on noised Gaussian items."
    torch.manual_seed(0); schedule = NoiseSchedule(32, 'cosine'); t = 12; x0 = 1+sd*torch.randn(200_000, 1)
    x = q_sample(x0, schedule.alpha_bar[t].expand(len(x0)), torch.randn_like(x0))
    fit = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x)], 1).double(), x0.double()).solution.ravel()
    at = gaussian(schedule, 1., sd)(torch.tensor([0., 1.]), t, None)
    assert abs(fit[1]-at[0]) < .02 and abs(fit[0]-(at[1]-at[0])) < .02


def reference(schedule):
    diffusers = pytest.importorskip('diffusers')
    betas = (1-schedule.alpha_bar[1:].double()/schedule.alpha_bar[:-1].double()).numpy()
    return diffusers.DDIMScheduler(num_train_timesteps=schedule.steps, trained_betas=betas, prediction_type='sample', clip_sample=False, timestep_spacing='trailing', set_alpha_to_one=True)


def other_sampler(theirs, denoise, x, steps):
    theirs.set_timesteps(steps)
    for t in theirs.timesteps: x = theirs.step(denoise(x, int(t)+1, None), int(t), x, eta=0.).prev_sample
    return x


@pytest.mark.parametrize('kind', ['snr', 'cosine', 'trunc_lin'])
@pytest.mark.parametrize('steps', [1, 2, 4, 8, 16, 32])
def test_equal_to_diffusers(kind, steps):
    schedule, noise = NoiseSchedule(32, kind), keyed_noise(torch.arange(20), 6)
    def denoise(x, t, c): return torch.tanh(x)+t/100
    theirs = reference(schedule); theirs.set_timesteps(steps)
    assert [int(t)+1 for t in theirs.timesteps] == schedule.trailing(steps)
    assert torch.allclose(sample(denoise, None, schedule, noise, steps), other_sampler(theirs, denoise, noise, steps), rtol=1e-4, atol=1e-4)


def test_uneven_steps_go_where_they_are_visited_next():
    "With 32 steps in 5, diffusers moves down by 32//5 = 6 each time and is then asked elsewhere; ours arrives at the step it asks next."
    schedule, noise = NoiseSchedule(32, 'cosine'), keyed_noise(torch.arange(2000), 2); theirs = reference(schedule); theirs.set_timesteps(5)
    assert [int(t)+1 for t in theirs.timesteps] == schedule.trailing(5) == [32, 26, 19, 13, 6]
    seen = []; sample(lambda x, t, c: torch.zeros_like(x), None, schedule, noise, 5, seen.append)
    for s in seen[1:]: assert math.isclose(float(s.x_t.std()), float((1-schedule.alpha_bar[s.t]).sqrt()*noise.std()), rel_tol=1e-4)
    assert not torch.allclose(sample(gaussian(schedule, 1., .5), None, schedule, noise, 5), other_sampler(theirs, gaussian(schedule, 1., .5), noise, 5), atol=1e-3)


# losses

def brute_contrast(x0, z, y, temperature, against):
    "Row by row, negatives one by one."
    cos, out = lambda a, b: float(F.cosine_similarity(a, b, dim=0)), []
    for i in range(len(y)):
        rest = [j for j in range(len(y)) if y[j] != y[i]]; terms = [cos(x0[i], z[i])]
        if against in ('both', 'targets'): terms += [cos(x0[i], z[j]) for j in rest]
        if against in ('both', 'generated'): terms += [cos(x0[i], x0[j]) for j in rest]
        out.append(math.log(sum(math.exp(t/temperature) for t in terms))-terms[0]/temperature)
    return out


@few
@given(st.lists(st.integers(1, 4), min_size=1, max_size=9), st.sampled_from(CONTRASTS), st.sampled_from([.07, .1, 1.]))
def test_contrast_is_the_formula(targets, against, temperature):
    g = torch.Generator().manual_seed(len(targets)); y = torch.tensor(targets); table = torch.randn(5, 6, generator=g); x0 = torch.randn(len(y), 6, generator=g)
    assert np.allclose(contrastive_loss(x0, table[y], y, temperature, against), brute_contrast(x0, table[y], y, temperature, against), atol=1e-4)


def test_two_moments_of_a_user_are_no_contrast():
    torch.manual_seed(0); x, z, y = torch.randn(4, 4), torch.randn(4, 4), torch.tensor([1, 2, 3, 4]); users = torch.tensor([7, 8, 9, 7])
    told = contrastive_loss(x, z, y, users=users)
    for row, others in ((0, [0, 1, 2]), (1, [1, 0, 2, 3])): assert torch.allclose(told[row], contrastive_loss(x[others], z[others], y[others])[0])
    assert (told[[0, 3]] < contrastive_loss(x, z, y)[[0, 3]]).all() and torch.equal(told[1:3], contrastive_loss(x, z, y)[1:3])


def test_users_with_the_same_target_are_no_contrast():
    torch.manual_seed(0); x, z, y = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([1, 2, 3, 4, 1]); z[4] = z[0]
    assert torch.allclose(contrastive_loss(x, z, y)[0], contrastive_loss(x[:4], z[:4], y[:4])[0])
    alone = contrastive_loss(x, z, torch.ones(5)); assert torch.allclose(alone, torch.zeros(5), atol=1e-5)


def test_pad_and_masked_items_are_no_candidates():
    torch.manual_seed(0); q, z, y = torch.randn(7, 4), torch.randn(9, 4), torch.randint(1, 8, (7,)); bias = torch.zeros(9); bias[8] = -torch.inf
    before = catalogue_loss(q, z, y, bias); z[0] = 1e3; z[8] = 1e3
    assert torch.equal(catalogue_loss(q, z, y, bias), before)
    assert torch.allclose(before, -(q@z[1:8].T).log_softmax(1)[range(7), y-1], atol=1e-5)


def test_targets_are_held_still():
    "The table of items gets no gradient through the room."
    z = torch.randn(8, 12, requires_grad=True); c = torch.randn(8, 12, requires_grad=True); out = ContrastiveDiffusion(12)(c, z)
    (out.x0-z.detach()).square().mean().backward(); assert z.grad is None and c.grad is not None


# the room

def trained(width=12):
    "A room whose zero-initialised layers have been moved."
    torch.manual_seed(1); cdg = ContrastiveDiffusion(width)
    for p in cdg.parameters(): torch.nn.init.normal_(p, std=.2)
    return cdg


def test_untrained_answers_with_the_condition():
    c = torch.randn(6, 12); assert torch.allclose(ContrastiveDiffusion(12).generate(c, torch.arange(6), steps=4), sphere(c), atol=1e-5)
    assert torch.equal(Denoiser(12)(c, torch.rand(6), 2*c), 2*c)


def test_every_parameter_learns():
    torch.manual_seed(0); cdg = ContrastiveDiffusion(12, drop=.5); optimiser = torch.optim.Adam(cdg.parameters(), 1e-2); seen = set()
    for _ in range(3):
        z = torch.randn(64, 12); loss = (cdg(torch.randn(64, 12), z).x0-sphere(z)).square().mean()
        optimiser.zero_grad(); loss.backward(); optimiser.step(); seen |= {n for n, p in cdg.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert seen == {n for n, _ in cdg.named_parameters()}


@few
@given(st.integers(1, 9), st.sampled_from([1, 2, 5]), st.sampled_from([1, 3]), st.sampled_from([0., 1.5]), st.integers(0, 99))
def test_generation_ignores_the_batch(rows, steps, samples, guidance, seed):
    cdg = trained(); g = torch.Generator().manual_seed(seed); c, users = torch.randn(rows, 12, generator=g), torch.randint(0, 10**6, (rows,), generator=g); order = torch.randperm(rows, generator=g)
    whole = cdg.generate(c, users, seed, steps, samples, guidance)
    assert whole.shape == (rows, 12) and torch.isfinite(whole).all() and not whole.requires_grad
    assert torch.allclose(cdg.generate(c[order], users[order], seed, steps, samples, guidance), whole[order], atol=1e-5)
    assert torch.allclose(cdg.generate(c[:1], users[:1], seed, steps, samples, guidance), whole[:1], atol=1e-5)


def test_samples_differ_by_seed_alone():
    cdg, c, users = trained(), torch.randn(50, 12), torch.arange(50)
    same = torch.stack([cdg.generate(c, users, 4, 8) for _ in range(3)]); other = torch.stack([cdg.generate(c, users, seed, 8) for seed in range(8)])
    assert same.var(0).max() == 0 and other.var(0).mean() > 1e-3
    many = torch.stack([sample(lambda x, t, c: cdg.guided(x, t, c, 0.), sphere(c), cdg.schedule, keyed_noise(users, 12, 4, k), 8) for k in range(5)]).mean(0)
    assert torch.allclose(cdg.generate(c, users, 4, 8, samples=5), many.detach(), atol=1e-6)


def test_guidance_is_the_formula():
    cdg, x, c = trained(), torch.randn(5, 12), sphere(torch.randn(5, 12))
    with torch.no_grad():
        a, b = cdg.guess(x, 7, c), cdg.guess(x, 7, sphere(cdg.nothing).expand(5, 12))
        assert torch.equal(cdg.guided(x, 7, c, 0.), a) and torch.allclose(cdg.guided(x, 7, c, 2.), sphere(3*a-2*b), atol=1e-6)


def test_conditions_are_dropped_in_training_only():
    torch.manual_seed(0); cdg = ContrastiveDiffusion(12, drop=1.); c = torch.randn(5, 12)
    assert torch.allclose(cdg(c, torch.randn(5, 12)).x0, sphere(cdg.nothing).expand(5, 12), atol=1e-5)
    assert torch.allclose(cdg.generate(c, torch.arange(5)), sphere(c), atol=1e-5)


def test_callback_gets_every_step_of_every_sample():
    cdg, seen = trained(), []; cdg.generate(torch.randn(3, 12), torch.arange(3), steps=4, samples=2, callback=seen.append)
    assert [s.index for s in seen] == [0, 1, 2, 3]*2 and [s.t for s in seen] == [32, 24, 16, 8]*2 and not torch.equal(seen[0].x_t, seen[4].x_t)


@pytest.mark.parametrize('steps, rows, width', [(1, 1, 1), (1, 1, 5), (2, 1, 3), (32, 1, 64), (1, 7, 2)])
def test_small_things(steps, rows, width):
    cdg = ContrastiveDiffusion(width, steps); out = cdg(torch.randn(rows, width), torch.randn(rows, width))
    assert out.x0.shape == out.x_t.shape == (rows, width) and out.t.shape == (rows,) and torch.isfinite(out.x0).all()
    assert torch.isfinite(cdg.generate(torch.randn(rows, width), torch.arange(rows), steps=steps, samples=2, guidance=1.)).all()


def test_bfloat16_is_finite():
    cdg, c, z = trained(), torch.randn(40, 12), torch.randn(41, 12); y = torch.arange(1, 41)
    with torch.autocast('cpu', torch.bfloat16):
        out = cdg(c.bfloat16(), z[y]); loss = catalogue_loss(out.x0, z, y).mean()+contrastive_loss(out.x0, z[y], y).mean()
    assert out.x0.dtype == torch.float32 and torch.isfinite(loss)


def test_parameters_are_all_that_is_stored(tmp_path):
    a, b = trained(), ContrastiveDiffusion(12); assert not any('alpha_bar' in k for k in a.state_dict())
    b.load_state_dict(a.state_dict()); c = torch.randn(4, 12)
    assert torch.equal(a.generate(c, torch.arange(4), steps=8), b.generate(c, torch.arange(4), steps=8))


def test_learns_to_use_condition_and_noise():
    "A toy whose condition names half of the item: permuted conditions and other noise levels change the loss as they should."
    torch.manual_seed(0); n, d = 64, 16; z = F.normalize(torch.randn(n+1, d), dim=1); group = torch.randn(8, d); y = torch.randint(1, n+1, (4096,))
    cdg = ContrastiveDiffusion(d, top=4*information_limit(n, d)); optimiser = torch.optim.Adam(cdg.parameters(), 3e-3)
    for _ in range(300):
        rows = torch.randint(0, 4096, (256,)); out = cdg(group[y[rows] % 8], z[y[rows]])
        loss = catalogue_loss(F.normalize(out.x0, dim=1)/.1, z, y[rows]).mean(); optimiser.zero_grad(); loss.backward(); optimiser.step()
    @torch.no_grad()
    def cost(t, c):
        x = q_sample(sphere(z[y]), cdg.schedule.alpha_bar[t].expand(len(y)), torch.randn(len(y), d))
        return float(catalogue_loss(F.normalize(cdg.guess(x, t, sphere(c)), dim=1)/.1, z, y).mean())
    right = [cost(t, group[y % 8]) for t in (1, 10, 32)]; wrong = [cost(t, group[(y+1) % 8]) for t in (1, 10, 32)]
    assert right == sorted(right) and right[-1]-right[0] > .5 and all(b-a > .5 for a, b in zip(right, wrong))
    x = torch.randn(256, d, requires_grad=True); slope = torch.autograd.grad(cdg.guess(x, 16, sphere(group[y[:256] % 8])).sum(), x)[0].norm(dim=1).mean()
    assert slope > .05


# pictures

def test_pictures_take_plain_data():
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    axes = [plot_schedule({'a': beta_levels('cosine', 8), 'b': [.9, .5, .1]}, .2), plot_loss([.1, .2], {'x': [1, .5]}, {'x': .15, 'limit': .1})]
    assert all(ax.get_xlabel() and ax.get_ylabel() and ax.get_title(loc='left') for ax in axes)
    ax = plt.subplots()[1]; assert plot_schedule({'a': [.5, .1]}, ax=ax) is ax; plt.close('all')
