"""`ddpm studio`: a local page over what the commands do; it calls their functions and holds no mathematics.

May import `core` to `exchange`.
Start with `page.build_page`.
"""

import os
import tempfile

HELD = tempfile.TemporaryDirectory(prefix="ddpm-studio-")  # all that the page writes; it goes when the process does
os.environ["GRADIO_TEMP_DIR"] = HELD.name  # these are read when gradio is imported, which is after this
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):  # the page asks itself only, and odd ones end it
    for spelled in (name, name.lower()):
        os.environ.pop(spelled, None)
