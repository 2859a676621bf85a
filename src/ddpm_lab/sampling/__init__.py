"""Images from a trained network: a random stream for each image, batches, files of images.

May import `core`, `data`, `diffusion`, `models`.
Start with `generation.generate`.
"""
