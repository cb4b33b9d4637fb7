"""Reward functions for RL trainers, one file a trainer. They run in the trainer's process: no JAX.

`flow_grpo.py` also serves Edit-R1. Each asks a reward service through `jrm_jax.client`. A picture
that cannot be scored raises; a trainer that must go on says with `failed` which number stands for
it, and nothing else ever does.
"""
