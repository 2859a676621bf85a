"""Networks on disk: checkpoints, loading of any source, the formats of diffusers and ONNX; the packaged weights.

May import `core`, `data`, `diffusion`.
Start with `trained.load`, then `checkpoint`.
"""
