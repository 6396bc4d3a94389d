"""Reacher2d: a planar arm of two links that must bring its tip to a goal. Reward is sparse.

The task of the LaMo paper (arXiv 2310.20587, its sparse "Reacher2d"), written here from its
description: torques within [-1, 1], no gravity, 100 steps of 0.15 s an episode, reward 1 for each
step that ends with the tip near the goal. So a return is the number of steps spent there, 0 to 100.
"""

from typing import ClassVar

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from gymnasium.spaces import Box

EPISODE_STEPS = 100
TIME_STEP = 0.01  # seconds of a simulation step
FRAME_SKIP = 15  # simulation steps under one action
LINKS = (0.6, 0.4)  # lengths, metres
TIP = 0.45  # where the tip is on the second link, from its joint
START_ANGLE = 2.0  # joints start uniformly in [-2, 2] rad, at rest
GOAL_RADIUS = (0.5, 1.0)  # the goal is uniform over the area of this ring
NEAR = 0.1  # reward 1 when |x| + |y| from tip to goal is below this

XML = f"""
<mujoco model="reacher2d">
  <compiler angle="radian" inertiafromgeom="true"/>
  <option timestep="{TIME_STEP}" gravity="0 0 0" integrator="RK4"/>
  <default>
    <joint type="hinge" axis="0 0 1" damping="1" armature="0.05"/>
    <geom contype="0" conaffinity="0" rgba="0.2 0.4 0.8 1"/>
    <motor gear="1" ctrllimited="true" ctrlrange="-1 1"/>
  </default>
  <visual><global offwidth="480" offheight="480"/></visual>
  <worldbody>
    <light pos="0 0 3" dir="0 0 -1" directional="true" diffuse="0.4 0.4 0.4"/>
    <camera name="above" pos="0 0 3"/>
    <geom name="ground" type="plane" size="1.5 1.5 0.1" pos="0 0 -0.1" rgba="0.9 0.9 0.9 1"/>
    <body name="upper">
      <joint name="shoulder"/>
      <geom type="capsule" fromto="0 0 0 {LINKS[0]} 0 0" size="0.03"/>
      <body name="lower" pos="{LINKS[0]} 0 0">
        <joint name="elbow"/>
        <geom type="capsule" fromto="0 0 0 {LINKS[1]} 0 0" size="0.03"/>
        <site name="tip" pos="{TIP} 0 0" size="0.04" rgba="0.9 0.3 0.1 1"/>
      </body>
    </body>
    <body name="goal" mocap="true" pos="0.7 0 0">
      <geom type="sphere" size="0.05" rgba="0.2 0.7 0.3 1"/>
    </body>
  </worldbody>
  <actuator><motor joint="shoulder"/><motor joint="elbow"/></actuator>
</mujoco>
"""


class Reacher2d(gym.Env):
    """Observation (12,): sin q (2), cos q (2), dt * qvel (2), tip (2), goal (2), tip - goal (2).

    q are the joints' angles in rad, dt is the 0.15 s between two actions, positions are in metres.
    Action (2,): torque on shoulder and elbow in N m.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array", "human"], "render_fps": 7}

    def __init__(self, render_mode=None):
        self.model = mujoco.MjModel.from_xml_string(XML)
        self.data = mujoco.MjData(self.model)
        self.dt = TIME_STEP * FRAME_SKIP
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = Box(-np.inf, np.inf, (12,), np.float64)
        self.goal = np.zeros(2)
        self.render_mode = render_mode
        self.renderer = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self.np_random.uniform(-START_ANGLE, START_ANGLE, 2)
        radius = np.sqrt(self.np_random.uniform(*np.square(GOAL_RADIUS)))  # uniform over the area
        angle = self.np_random.uniform(-np.pi, np.pi)
        self.goal = radius * np.array([np.cos(angle), np.sin(angle)])
        self.data.mocap_pos[0, :2] = self.goal
        mujoco.mj_forward(self.model, self.data)
        if self.render_mode == "human":
            self.render()
        return self.observe(), {}

    def step(self, action):
        self.data.ctrl[:] = np.clip(action, -1, 1)
        mujoco.mj_step(self.model, self.data, nstep=FRAME_SKIP)
        mujoco.mj_kinematics(self.model, self.data)  # or the tip would be a simulation step behind
        reward = float(np.abs(self.tip() - self.goal).sum() < NEAR)
        if self.render_mode == "human":
            self.render()
        return self.observe(), reward, False, False, {}  # Gymnasium's TimeLimit ends the episode

    def tip(self):
        return self.data.site("tip").xpos[:2].copy()

    def observe(self):
        q, tip = self.data.qpos, self.tip()
        velocity = self.dt * self.data.qvel
        return np.concatenate([np.sin(q), np.cos(q), velocity, tip, self.goal, tip - self.goal])

    def render(self):
        if self.renderer is None:
            self.renderer = MujocoRenderer(
                self.model, self.data, width=480, height=480, camera_name="above"
            )
        return self.renderer.render(self.render_mode)

    def close(self):
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None


gym.register(
    "lamo/Reacher2d-v0", entry_point="reacher2d:Reacher2d", max_episode_steps=EPISODE_STEPS
)
