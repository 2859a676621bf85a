"""Networks on disk and on the hub: checkpoints, loading any source, formats of diffusers and ONNX; packaged weights.

May import `core`, `data`, `diffusion`.
Start with `trained.load`, then `checkpoint`.
"""
