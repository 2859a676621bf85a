"""Images from disk: data sets, folders, arrays. Images are uint8 everywhere; only `datasets` turns them into [-1, 1].

May import `core`.
Start with `datasets.load_images`.
"""
