"""PPO (Schulman et al., arXiv 1707.06347) on whole episodes, in one file.

    learner = Learner(observations=11, actions=2, discrete=False)
    episodes = collect(learner, tasks, starts, rng)     # starts: the variant of each episode
    learner.update(episodes, minibatch=512, rng=rng)

What is simpler than elsewhere: an episode runs to its end, its only reward is 1 for success at that end,
and the time left is part of the observation, so nothing is bootstrapped where the time is up.
Letters: E episodes, T steps of all episodes one after the other, O numbers of an observation.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

GAMMA, LAMBDA = 0.99, 0.95  # discount of rewards; of later terms in the advantage
CLIP, EPOCHS = 0.2, 4
ENTROPY, CRITIC, MAX_NORM = 0.003, 0.5, 0.5


@dataclass(frozen=True)
class Episodes:
    """The episodes of one update. The steps of an episode stand together."""

    observations: np.ndarray  # (T, O) float32
    actions: np.ndarray  # (T,) whole numbers, or (T, actions) float32
    logprobs: np.ndarray  # (T,) of the policy that acted
    lengths: np.ndarray  # (E,) steps, in sum T
    success: np.ndarray  # (E,) bool


def advantages(rewards, values, lengths) -> np.ndarray:
    """(T,) Generalized Advantage Estimation (arXiv 1506.02438), eq. 16:

    A_t = delta_t + gamma lambda A_(t+1),   delta_t = r_t + gamma V_(t+1) - V_t

    Behind the last step of an episode, A and V are 0."""
    adv, after, value_after = np.zeros(len(rewards)), 0.0, 0.0
    last = set((np.cumsum(lengths) - 1).tolist())
    for t in reversed(range(len(rewards))):
        if t in last:
            after, value_after = 0.0, 0.0
        delta = rewards[t] + GAMMA * value_after - values[t]
        adv[t] = after = delta + GAMMA * LAMBDA * after
        value_after = values[t]
    return adv


def network(inputs: int, outputs: int, last: float) -> nn.Sequential:
    """Two hidden layers; orthogonal weights, the last ones small, so that no action is preferred at first."""
    layers = [nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
    for layer, gain in zip(layers, (2**0.5, 2**0.5, last), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Learner(nn.Module):
    """Policy, critic and optimizer."""

    def __init__(self, observations: int, actions: int, discrete: bool, lr=1e-3, spread=0.6):
        super().__init__()
        self.discrete = discrete
        self.policy = network(observations, actions, last=0.01)
        self.critic = network(observations, 1, last=1.0)
        self.log_std = nn.Parameter(torch.full((actions,), float(np.log(spread))), not discrete)
        learnt = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learnt, lr, eps=1e-5, fused=True)

    def distribution(self, obs):
        """What the policy would do: (B,) choices, or (B, actions) numbers as one draw."""
        out, kind = self.policy(obs), torch.distributions
        # Checking arguments would take a third of an update's time.
        if self.discrete:
            return kind.Categorical(logits=out, validate_args=False)
        normal = kind.Normal(out, self.log_std.exp(), validate_args=False)
        return kind.Independent(normal, 1, validate_args=False)

    @torch.no_grad()
    def act(self, obs: np.ndarray, noise: np.ndarray, greedy=False):
        """(actions, logprobs) for (B, O). noise is the caller's: (B, actions) standard normal or Gumbel
        numbers, so that an episode's luck does not depend on which episodes run beside it."""
        dist = self.distribution(torch.from_numpy(obs))
        noise = torch.from_numpy(noise) * (not greedy)
        if self.discrete:  # the Gumbel trick: argmax(logits + Gumbel) is a draw
            actions = (dist.logits + noise).argmax(-1)
        else:
            actions = dist.mean + dist.base_dist.scale * noise
        return actions.numpy(), dist.log_prob(actions).numpy()

    def update(self, episodes: Episodes, minibatch: int, rng) -> dict:
        """EPOCHS passes over the steps. Returns what the log shows."""
        obs = torch.from_numpy(episodes.observations)
        rewards = np.zeros(len(obs))
        rewards[np.cumsum(episodes.lengths) - 1] = episodes.success
        with torch.no_grad():
            values = self.critic(obs)[:, 0]  # (T,)
        adv = torch.from_numpy(advantages(rewards, values.tolist(), episodes.lengths)).float()
        returns = adv + values
        adv = (adv - adv.mean()) / (adv.std() + 1e-8)
        actions, old = torch.from_numpy(episodes.actions), torch.from_numpy(episodes.logprobs)
        for _ in range(EPOCHS):
            # A minibatch has a fixed number of steps: equal steps are equally many gradient steps.
            for rows in torch.from_numpy(rng.permutation(len(obs))).split(minibatch):
                dist = self.distribution(obs[rows])
                ratio = (dist.log_prob(actions[rows]) - old[rows]).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                # Eq. 7: the smaller of the two, so that no ratio gains by leaving the clip range.
                gain = torch.minimum(ratio * adv[rows], clipped * adv[rows]).mean()
                critic_loss = 0.5 * (self.critic(obs[rows])[:, 0] - returns[rows]).square().mean()
                loss = CRITIC * critic_loss - gain - ENTROPY * dist.entropy().mean()
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters(), MAX_NORM)
                self.optimizer.step()
        unexplained = (returns - values).var() / returns.var().clamp(min=1e-8)
        return {"critic_explains": 1 - unexplained.item(), "entropy": dist.entropy().mean().item()}


def collect(learner: Learner, tasks: list, starts, rng, greedy=False) -> Episodes:
    """Runs an episode from each of `starts` to its end, len(tasks) at a time, in lockstep.

    A task has start(variant, rng) -> observation and step(action) -> (observation, success, over)."""
    starts, waiting = list(starts), 0
    at, obs = [], []  # which episode each running task is at; what it sees
    kept = [([], [], []) for _ in starts]  # observations, actions, logprobs of each episode
    success = np.zeros(len(starts), bool)
    running = list(tasks)
    while True:
        # Free tasks take the next episodes; without any they leave.
        while len(at) < len(running) and waiting < len(starts):
            obs.append(running[len(at)].start(starts[waiting], rng))
            at.append(waiting)
            waiting += 1
        del running[len(at) :]
        if not running:
            break
        seen = np.stack(obs)  # (B, O)
        shape = (len(seen), learner.log_std.numel())
        noise = (rng.gumbel(size=shape) if learner.discrete else rng.normal(size=shape)).astype(np.float32)
        actions, logprobs = learner.act(seen, noise, greedy)
        over = []
        for k, task in enumerate(running):
            for rows, x in zip(kept[at[k]], (seen[k], actions[k], logprobs[k]), strict=True):
                rows.append(x)
            obs[k], success[at[k]], ended = task.step(actions[k])
            over += [k] * ended
        for k in reversed(over):  # to the end of the list, where free tasks stand
            del at[k], obs[k]
            running.append(running.pop(k))
    lengths = np.array([len(rows[0]) for rows in kept])
    return Episodes(*(np.array([x for rows in kept for x in rows[i]]) for i in range(3)), lengths, success)
