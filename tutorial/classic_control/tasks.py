"""Two families of tasks whose variants run from easy to hopeless, and whose episodes end in success or not.

    task = Reacher()                                   # or Pong()
    observation = task.start("train-07", rng)          # an episode of this variant
    observation, success, over = task.step(action)

A variant is what a prompt is to a language model: something one can start an episode from, again and again.
"""

import math
from typing import ClassVar

import ale_py
import gymnasium
import mujoco
import numpy as np

gymnasium.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


class Reacher:
    """MuJoCo: a two-joint arm is to bring its fingertip to a goal and hold it there.

    The arm starts stretched out. A variant is a goal; the further the joints have to turn, the rarer it is
    found by chance. Success: within RADIUS of the goal for HOLD control steps running, before the time is up.
    """

    name, cap, discrete, observations, actions = "reacher", 30, False, 11, 2
    RADIUS, HOLD, FRAME_SKIP = 0.025, 3, 2

    def __init__(self, seed=0):
        env = gymnasium.make("Reacher-v5").unwrapped
        self.model, self.data = env.model, env.data
        # One evaluation of the physics a step instead of Runge and Kutta's four.
        self.model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
        self.tip = self.model.body("fingertip").id

    @staticmethod
    def variants(split: str, m=64) -> list[str]:
        return [f"{split}-{i:02}" for i in range(m)]

    @staticmethod
    def goal_of(variant: str) -> tuple[float, float]:
        """Metres. The angle grows with the number; the radius is spread by the golden ratio."""
        split, i = variant.rsplit("-", 1)
        turn = (int(i) + (0.5 if split == "train" else 1.0)) / 64  # held-out goals lie between
        angle = math.pi * turn * (1 if int(i) % 2 else -1)
        radius = 0.10 + 0.10 * (int(i) * 0.618 % 1)
        return radius * math.cos(angle), radius * math.sin(angle)

    def start(self, variant, rng):
        self.goal = self.goal_of(variant)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = [*rng.uniform(-0.1, 0.1, 2), *self.goal]  # joints; the goal, to be drawn
        mujoco.mj_forward(self.model, self.data)
        self.t = self.held = 0
        return self.observe()

    def step(self, action):
        # Not env.step: its reward and contact forces, which nobody reads, take most of its time.
        self.data.ctrl[:] = action.clip(-1, 1)
        mujoco.mj_step(self.model, self.data, self.FRAME_SKIP)
        self.t += 1
        obs = self.observe()
        self.held = self.held + 1 if math.hypot(obs[6], obs[7]) < 10 * self.RADIUS else 0
        success = self.held == self.HOLD
        return obs, success, success or self.t == self.cap

    def observe(self):
        a, b, *_ = self.data.qpos.tolist()  # radians
        u, v, *_ = self.data.qvel.tolist()
        x, y, _ = self.data.xpos[self.tip].tolist()  # metres
        gx, gy = self.goal
        # Decimetres, and ten radians a second: numbers around 1.
        seen = [math.cos(a), math.sin(a), math.cos(b), math.sin(b), u / 10, v / 10]
        seen += [10 * (x - gx), 10 * (y - gy), 10 * gx, 10 * gy, 1 - self.t / self.cap]
        return np.array(seen, np.float32)


class Pong:
    """Atari: the ball comes, and is to be returned. Seen through the console's 128 bytes.

    A variant is a saved moment of a game: one of 2 modes and 4 difficulties, one of 4 balls there, 28 pixels
    away from the paddle, and one of 4 heights of the paddle. The further it has to go, and the more exactly
    it has to stop, the rarer the ball is met by chance. Success: the ball goes back; failure: a point lost.
    """

    name, cap, discrete, observations, actions = "pong", 16, True, 129, 3
    MOVES, FRAME_SKIP = (0, 2, 3), 4  # nothing, up, down
    BALL_X, BALL_Y, PADDLE = 49, 54, 51  # bytes
    FORK, START, HEIGHTS = 130, 160, (50, 90, 130, 170)  # where heights part; where episodes start
    moments: ClassVar[dict] = {}  # variant -> the console's state; made once a process

    def __init__(self, seed=0):
        self.moments or self.moments.update(self.play())
        self.env = self.make(self.FRAME_SKIP, seed)

    @staticmethod
    def make(frames, seed):
        # The console repeats a move now and then, so that a start has more than one outcome.
        env = gymnasium.make("ALE/Pong-v5", obs_type="ram", frameskip=frames, repeat_action_probability=0.25)
        env.reset(seed=seed)
        return env.unwrapped

    @classmethod
    def variants(cls, split: str) -> list[str]:
        balls = (0, 1) if split == "train" else (2, 3)
        rest = [(m, d, b, h) for m in range(2) for d in range(4) for b in balls for h in cls.HEIGHTS]
        return [f"mode{m}-difficulty{d}-ball{b}-height{h}" for m, d, b, h in rest]

    @classmethod
    def play(cls):
        """(variant, state) of all moments: a game in each mode and difficulty, and what it forks into."""
        env, rng = cls.make(1, seed=0), np.random.default_rng(0)

        def towards(height, ram):
            gap = int(ram[cls.PADDLE]) - height
            return env.step(cls.MOVES[0 if abs(gap) < 4 else 1 if gap > 0 else 2])[0]

        for mode, difficulty in [(m, d) for m in range(2) for d in range(4)]:
            env.ale.setMode(mode)
            env.ale.setDifficulty(difficulty)
            env.ale.reset_game()
            ram, ball, aim = env.ale.getRAM(), 0, 0
            while ball < 4:
                before, ram = int(ram[cls.BALL_X]), towards(int(ram[cls.BALL_Y]) + aim, ram)
                if before and before < cls.FORK <= ram[cls.BALL_X]:
                    here = env.ale.cloneState()
                    for height in cls.HEIGHTS:
                        env.ale.restoreState(here)
                        ram = env.ale.getRAM()
                        while ram[cls.BALL_X] < cls.START:
                            ram = towards(height, ram)
                        name = f"mode{mode}-difficulty{difficulty}-ball{ball}-height{height}"
                        yield name, env.ale.cloneState()
                    ball, aim = ball + 1, int(rng.integers(-8, 9))
                if not ram[cls.BALL_X]:
                    aim = int(rng.integers(-8, 9))

    def start(self, variant, rng):
        self.env.ale.restoreState(self.moments[variant])
        self.t, self.x = 0, self.START
        return self.observe(self.env.ale.getRAM())

    def step(self, action):
        ram, points, *_ = self.env.step(self.MOVES[action])
        self.t += 1
        before, self.x = self.x, int(ram[self.BALL_X])
        success = points == 0 and self.x < before
        return self.observe(ram), success, success or points != 0 or self.t == self.cap

    def observe(self, ram):
        return np.append(ram / 128 - 1, 1 - self.t / self.cap).astype(np.float32)
