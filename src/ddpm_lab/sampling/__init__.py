"""Images from a trained network: a random stream per image, batches, and files of images.

May import `core`, `data`, `diffusion` and `models`.
Start with `generation.generate`; `output.sample_to_file` is `ddpm sample`.
"""
