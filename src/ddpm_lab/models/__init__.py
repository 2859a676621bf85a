"""Networks on disk: checkpoints, loading any SOURCE, the formats of diffusers and ONNX; the packaged weights.

May import `core`, `data`, `diffusion`.
Start with `trained.load`.
"""
