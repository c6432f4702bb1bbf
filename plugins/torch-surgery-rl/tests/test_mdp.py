"""PPO and TRPO on a Markov decision process whose optimum value iteration gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch_surgery_rl import PPO, TRPO, Experience, conjugate_gradient, evaluate

from surgery.api import SurgeryError

STATES, ACTIONS, GAMMA = 6, 3, 0.9


def transitions() -> tuple[Tensor, Tensor]:
    """A corridor: left, stay, right, each succeeding 8 times in 10. P (state × action × state) and r (state × action):
    staying pays a little at the left end, and ten times that at the right, where every way there costs something."""
    p, r = torch.zeros(STATES, ACTIONS, STATES), torch.zeros(STATES, ACTIONS)
    for state in range(STATES):
        for action, move in enumerate((-1, 0, 1)):
            p[state, action, min(max(state + move, 0), STATES - 1)] += 0.8
            p[state, action, state] += 0.2
            r[state, action] = -0.05 * abs(move)
    r[0, 1], r[-1, 1] = 0.1, 1.0
    return p, r


P, R = transitions()


def optimum() -> tuple[Tensor, Tensor]:
    """The best value of each state, and the best actions, by value iteration."""
    v = torch.zeros(STATES)
    for _ in range(500):
        v = (R + GAMMA * P @ v).max(1).values
    return v, (R + GAMMA * P @ v).argmax(1)


def value_of(policy: nn.Module) -> Tensor:
    """The exact value of each state under a policy."""
    pi = policy.logits.detach().softmax(-1)
    p = torch.einsum("sa,sat->st", pi, P)
    return torch.linalg.solve(torch.eye(STATES) - GAMMA * p, (pi * R).sum(1))


class Table(nn.Module):
    """The policy and the values as tables."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(STATES, ACTIONS))
        self.values = nn.Parameter(torch.zeros(STATES))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits[states], self.values[states]


def play(policy: nn.Module, generator: torch.Generator, episodes: int = 48, steps: int = 16) -> Experience:
    """Episodes from states drawn evenly, cut off after some steps."""
    state = torch.randint(STATES, (episodes,), generator=generator)
    states, actions = [], []
    for _ in range(steps):
        with torch.no_grad():
            chances = policy(state)[0].softmax(-1)
        action = torch.multinomial(chances, 1, generator=generator)[:, 0]
        states.append(state)
        actions.append(action)
        state = torch.multinomial(P[state, action], 1, generator=generator)[:, 0]
    inputs, taken = {"states": torch.stack(states, 1)}, torch.stack(actions, 1)
    log_probs, values = evaluate(policy, inputs, taken)
    with torch.no_grad():
        after = policy(state)[1]
    mask = torch.ones_like(taken, dtype=torch.bool)
    rewards = R[inputs["states"], taken]
    return Experience.of(
        inputs, taken, mask, rewards, log_probs, values, gamma=GAMMA, lam=0.9, last_values=after
    )


def reaches_the_optimum(policy: nn.Module) -> None:
    best, actions = optimum()
    got = value_of(policy)
    # A softmax is never quite deterministic: 2% of the best value is left to it.
    assert float((got / best).min()) > 0.98, (got, best)
    assert torch.equal(policy.logits.argmax(1), actions)


def test_the_problem_is_one():
    best, actions = optimum()
    assert actions.tolist() == [2, 2, 2, 2, 2, 1]
    assert float((value_of(Table()) / best).max()) < 0.5


@pytest.mark.parametrize("seed", range(3))
def test_ppo_reaches_the_optimum(seed):
    generator = torch.Generator().manual_seed(seed)
    policy = Table()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    ppo = PPO(minibatch=12, value_clip=None, entropy_weight=0.001)
    for _ in range(50):
        seen = ppo.update(policy, play(policy, generator), optimizer, generator=generator)
        assert seen["steps"] == 16
    reaches_the_optimum(policy)


@pytest.mark.parametrize("seed", range(3))
def test_trpo_reaches_the_optimum_within_its_bound(seed):
    generator = torch.Generator().manual_seed(seed)
    policy = Table()
    optimizer = torch.optim.Adam([policy.values], lr=0.1)
    trpo, steps = TRPO(max_kl=0.02, damping=1e-3), 0
    for _ in range(60):
        experience = play(policy, generator)
        before = policy.logits.detach().log_softmax(-1)[experience.inputs["states"]]
        seen = trpo.update(policy, experience)
        after = policy.logits.detach().log_softmax(-1)[experience.inputs["states"]]
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        # Measured here on its own, in float32: the same number but for rounding.
        assert kl <= trpo.max_kl + 1e-7
        assert kl == pytest.approx(seen["kl"], abs=1e-6)
        assert (seen["step"] > 0) == (kl > 0)
        steps += seen["step"] > 0
        trpo.fit_values(policy, experience, optimizer, epochs=8)
    assert steps > 20
    reaches_the_optimum(policy)


class Net(nn.Module):
    """A policy with a hidden layer, and a value head that the logits do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(STATES, 4)
        self.hidden = nn.Linear(4, 5)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(5, ACTIONS)
        self.value = nn.Linear(5, 1)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        x = self.drop(torch.tanh(self.hidden(self.embed(states))))
        return self.out(x), self.value(x).squeeze(-1)


def net(seed: int = 0) -> tuple[Net, Experience]:
    torch.manual_seed(seed)
    policy = Net().double()
    experience = play(policy.eval(), torch.Generator().manual_seed(seed), episodes=6, steps=5)
    mask = torch.arange(5) < torch.tensor([5, 2, 4, 1, 5, 3])[:, None]
    return policy, Experience(**{**vars(experience), "mask": mask})


def explicit_fisher(policy: nn.Module, experience: Experience, parameters: list[nn.Parameter]) -> Tensor:
    """mean over states of Σ_a π(a|s) ∇log π(a|s) ∇log π(a|s)ᵀ, a gradient at a time."""
    logits, _ = policy(**experience.inputs)
    log_probs = logits[experience.mask].log_softmax(-1)
    total = 0
    for state in log_probs:
        for log_prob in state:
            slopes = torch.autograd.grad(log_prob, parameters, retain_graph=True)
            slope = torch.cat([s.reshape(-1) for s in slopes])
            total = total + log_prob.exp().detach() * slope[:, None] * slope[None, :]
    return total / len(log_probs)


@pytest.mark.parametrize("minibatch", [2, 32])
def test_fisher_vector_products_are_those_of_the_explicit_matrix(minibatch):
    policy, experience = net()
    parameters = [p for name, p in policy.named_parameters() if not name.startswith("value")]
    fisher = explicit_fisher(policy, experience, parameters)
    product = TRPO(damping=0.0, minibatch=minibatch).fisher(policy, experience, parameters)
    damped = TRPO(damping=0.3, minibatch=minibatch).fisher(policy, experience, parameters)
    for vector in torch.randn(5, len(fisher), dtype=torch.float64):
        expected = fisher @ vector
        assert float(expected.norm()) > 1e-2
        torch.testing.assert_close(product(vector), expected, atol=1e-5 * float(expected.norm()), rtol=0)
        torch.testing.assert_close(damped(vector), expected + 0.3 * vector, atol=1e-5, rtol=0)
    solution = conjugate_gradient(damped, fisher[0] + 1, 100, tolerance=1e-20)
    exact = torch.linalg.solve(fisher + 0.3 * torch.eye(len(fisher)), fisher[0] + 1)
    torch.testing.assert_close(solution, exact, atol=1e-5, rtol=0)


def test_the_fisher_matrix_of_some_rows():
    """With every row twice, every second row has the same matrix: the same step. Other rows give another."""
    policy, experience = net()
    twice = experience.rows(torch.arange(6).repeat_interleave(2))
    ends = []
    for rows in (None, 6, 3, 40):
        moved = copy.deepcopy(policy)
        TRPO(fisher_rows=rows, minibatch=4).update(moved, twice)
        ends.append(torch.cat([p.detach().flatten() for p in moved.parameters()]))
    step = float((ends[0] - torch.cat([p.detach().flatten() for p in policy.parameters()])).norm())
    # float64, and conjugate gradients that stop at 1e-10 of the square of the residual.
    torch.testing.assert_close(ends[1], ends[0], atol=1e-8 * step, rtol=0)
    assert float((ends[2] - ends[0]).norm()) > 1e-3 * step
    assert torch.equal(ends[3], ends[0])


@pytest.mark.parametrize("rows", [None, 2])
def test_trpo_over_many_updates_of_a_network_in_train_mode(rows):
    """Dropout is off in an update, and the modes are as they were after it; the value head is not moved. The bound is
    that of all rows, of however many the Fisher matrix is."""
    policy, experience = net()
    policy.train()
    head = copy.deepcopy(policy.value.state_dict())
    for update in range(20):
        trpo = TRPO(max_kl=10 ** -(1 + update % 4), fisher_rows=rows)  # 0.1 to 0.0001
        was = copy.deepcopy(policy).eval()
        seen = trpo.update(policy, experience)
        assert policy.training
        assert policy.drop.training
        now = copy.deepcopy(policy).eval()
        with torch.no_grad():
            before, after = (p(**experience.inputs)[0][experience.mask].log_softmax(-1) for p in (was, now))
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        assert kl <= trpo.max_kl * (1 + 1e-9)  # float64
        assert kl == pytest.approx(seen["kl"], abs=1e-12)
    assert all(torch.equal(tensor, head[name]) for name, tensor in policy.value.state_dict().items())


def test_where_nothing_improves_the_policy_stays_bit_for_bit():
    policy, experience = net()
    before = copy.deepcopy(policy.state_dict())
    flat = Experience(**{**vars(experience), "advantages": torch.zeros_like(experience.advantages)})
    assert TRPO().update(policy, flat) == {"kl": 0.0, "improvement": 0.0, "step": 0.0}
    # A step that is far too long for its quadratic model, and no second try.
    long = TRPO(max_kl=50.0, damping=0.0, backtracks=1)
    assert long.update(policy, experience)["step"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


def test_values_are_fitted_without_the_policy():
    """With an optimizer of all there is, that decays weights and has momentum."""
    policy, experience = net()
    before = copy.deepcopy(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05, weight_decay=0.1)
    first = TRPO().fit_values(policy, experience, optimizer, epochs=1)
    last = TRPO().fit_values(policy, experience, optimizer, epochs=60)
    assert last < 0.8 * first
    moved = {name for name, tensor in policy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"value.weight", "value.bias"}


def test_ppos_loss_is_the_papers():
    ppo = PPO(clip=0.2, value_clip=0.5, value_weight=0.5, entropy_weight=0.1)
    ratios = torch.tensor([[1.5, 1.1, 0.5, 0.5, 9.0]])
    advantages = torch.tensor([[1.0, 1.0, 1.0, -1.0, 9.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    logits = torch.log(torch.tensor([0.25, 0.75])).expand(1, 5, 2).clone().requires_grad_()
    actions = torch.zeros(1, 5, dtype=torch.long)
    old_values, returns = torch.zeros(1, 5), torch.tensor([[2.0, 0.4, 0.0, -1.0, 9.0]])
    values = torch.tensor([[1.0, 0.4, 0.6, 0.5, 9.0]])
    log_probs = torch.log(0.25 / ratios)
    experience = Experience({}, actions, mask, log_probs, old_values, advantages, returns)
    loss, parts = ppo.loss(logits, values, experience)
    surrogate = (1.2 + 1.1 + 0.5 - 0.8) / 4
    value = (1.5**2 + 0.0 + 0.6**2 + 1.5**2) / 4 / 2
    entropy = -float(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())
    assert float(parts["policy"]) == pytest.approx(-surrogate, abs=1e-6)
    assert float(parts["value"]) == pytest.approx(value, abs=1e-6)
    assert float(parts["entropy"]) == pytest.approx(entropy, abs=1e-6)
    assert float(parts["clipped"]) == 0.75
    assert float(loss.detach()) == pytest.approx(-surrogate + 0.5 * value - 0.1 * entropy, abs=1e-6)


def test_bad_input_is_refused_in_a_line():
    policy, experience = net()
    frozen = copy.deepcopy(policy).requires_grad_(False)
    only_value = copy.deepcopy(frozen)
    only_value.value.requires_grad_(True)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    own = torch.optim.SGD(policy.parameters(), lr=0.1)
    wild = Experience(**{**vars(experience), "advantages": experience.advantages * torch.nan})
    for act, message in (
        (lambda: PPO().update(frozen, experience, other), "the policy has no trainable parameter"),
        (lambda: TRPO().update(frozen, experience), "the policy has no trainable parameter"),
        (
            lambda: TRPO().update(only_value, experience),
            "no trainable parameter reaches the policy's logits",
        ),
        (
            lambda: PPO().update(policy, experience, other),
            "the optimizer has no trainable parameter of the policy",
        ),
        (lambda: PPO().update(policy, wild, own), "the loss of PPO is nan in epoch 0"),
        (lambda: TRPO().update(policy, wild), "gradient of TRPO's surrogate is not finite"),
        (
            lambda: TRPO().fit_values(policy, experience, other),
            "the optimizer has no parameter of the value head",
        ),
        (lambda: PPO(clip=0), "clip is 0"),
        (lambda: TRPO(max_kl=-1), "max_kl is -1"),
        (lambda: TRPO(fisher_rows=0), "fisher_rows is 0"),
        (lambda: TRPO(shrink=1.0), "shrink is 1.0"),
    ):
        before = copy.deepcopy(policy.state_dict())
        with pytest.raises(SurgeryError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
