"""`ddpm studio`: a local page over what the commands do; it calls their functions and holds no mathematics.

May import `core` to `exchange`.
Start with `page.build_page`.
"""

import os
import tempfile

TEMPORARY = tempfile.TemporaryDirectory(prefix="ddpm-studio-")  # all files of the page; deleted when the process ends
os.environ["GRADIO_TEMP_DIR"] = TEMPORARY.name  # gradio reads these variables when it is imported, after this
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):  # the page only calls itself; bad values break it
    for spelling in (name, name.lower()):
        os.environ.pop(spelling, None)
