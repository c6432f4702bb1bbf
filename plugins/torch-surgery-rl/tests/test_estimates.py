"""Advantages and penalties against what their papers define, summed directly."""

from __future__ import annotations

import pytest
import torch
from torch_surgery_rl import AdaptiveKL, Experience, gae, masked_mean, penalized_rewards, sequence_kl, whiten

from surgery.api import SurgeryError


def ragged(seed: int = 0):
    """Rewards, values, a mask of rows of 1 to 7 steps and the values after them."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([7, 1, 3, 6, 7])
    last = torch.randn(5, generator=generator, dtype=torch.float64)
    return rewards, values, torch.arange(7) < lengths[:, None], last


@pytest.mark.parametrize("cut_off", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (0.7, 0.0)])
def test_gae_is_the_discounted_sum_of_temporal_differences(gamma, lam, cut_off):
    rewards, values, mask, last = ragged()
    found, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, last_values=last if cut_off else None)
    for row in range(5):
        n = int(mask[row].sum())
        v = [*values[row, :n].tolist(), float(last[row]) if cut_off else 0.0]
        delta = [float(rewards[row, t]) + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            direct = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            # float64, a sum of at most seven terms
            assert float(found[row, t]) == pytest.approx(direct, abs=1e-12)
            assert float(returns[row, t]) == pytest.approx(direct + v[t], abs=1e-12)
    assert not found[~mask].any()
    assert not returns[~mask].any()


def test_what_the_mask_leaves_out_counts_nowhere():
    rewards, values, mask, last = ragged()
    clean = gae(rewards, values, mask, last_values=last)
    rewards[~mask] = values[~mask] = torch.nan
    dirty = gae(rewards, values, mask, last_values=last)
    assert torch.equal(torch.stack(clean), torch.stack(dirty))
    # steps that are no actions are passed over in the middle of a row too
    spread = torch.tensor([[True, False, True, True, False]])
    row = gae(rewards[4:, :3], values[4:, :3], torch.ones(1, 3, dtype=torch.bool))
    wide = torch.full((2, 1, 5), torch.nan, dtype=torch.float64)
    wide[:, spread] = torch.stack([rewards[4, :3], values[4, :3]])
    assert torch.equal(torch.stack(gae(*wide, spread))[:, spread], torch.stack(row)[:, 0])


def test_whitened_advantages():
    _, values, mask, _ = ragged()
    white = whiten(values, mask)
    assert float(masked_mean(white, mask)) == pytest.approx(0, abs=1e-12)
    assert float(masked_mean(white**2, mask)) == pytest.approx(1, abs=1e-6)  # but for the floor of 1e-8
    assert not white[~mask].any()
    same = torch.full((2, 3), 0.1)
    assert float(whiten(same, torch.ones(2, 3, dtype=torch.bool)).abs().max()) < 1e-3


def test_the_penalty_is_per_token_and_the_score_at_the_end():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    ours, reference = torch.tensor([[[-1.0, -2, -3], [-1, 9, 9]], [[-2.0, -2, -1], [-4, 9, 9]]])
    rewards = penalized_rewards(torch.tensor([10.0, 20]), ours, reference, mask, 0.5)
    assert rewards.tolist() == [[-0.5, 0, 11], [18.5, 0, 0]]
    assert sequence_kl(ours, reference, mask) == ((1 + 0 - 2) + 3) / 2


def test_the_coefficient_follows_the_target():
    kl = AdaptiveKL(coefficient=1.0, target=2.0, gain=0.1)
    assert kl.update(2.2) == pytest.approx(1.01)
    assert kl.update(100.0) == pytest.approx(1.01 * 1.02)  # the error is clipped at 0.2
    assert kl.update(0.0) == pytest.approx(1.01 * 1.02 * 0.98)
    with pytest.raises(SurgeryError, match="a target above 0"):
        AdaptiveKL(target=0)


def test_bad_experience_is_refused_in_a_line():
    rewards, values, mask, _ = ragged()
    actions = torch.zeros(5, 7, dtype=torch.long)

    def experience(**changed):
        given = {"rewards": rewards, "values": values, "mask": mask, "log_probs": values, **changed}
        return Experience.of({}, actions, **given)

    assert len(experience()) == 5
    empty = mask.clone()
    empty[2] = False
    nan, infinite = rewards.clone(), values.clone()
    nan[3, 1], infinite[0, 6] = torch.nan, torch.inf
    for changed, message in (
        ({"mask": empty}, "row 2 has no action"),
        ({"rewards": nan}, "the reward of row 3, step 1 is nan"),
        ({"values": infinite}, "the value of row 0, step 6 is inf"),
        ({"log_probs": infinite}, "the log-probability of row 0, step 6 is inf"),
        ({"values": None}, "the policy has no values; add a value head with surgery.Head"),
        ({"mask": mask.long()}, "the mask has dtype torch.int64"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"rewards": rewards[:, :3]}, "the shapes differ or are not rows × steps"),
    ):
        with pytest.raises(SurgeryError, match=message) as error:
            experience(**changed)
        assert "\n" not in str(error.value)
