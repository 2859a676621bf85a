"""The mathematics: noise schedule, forward process, samplers, guidance, likelihood bound, U-Net.

May import `core`, `data`.
Start with `process.q_sample` and `process.diffusion_loss`, then `samplers.ddpm_steps`.
"""
