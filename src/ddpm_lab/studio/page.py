"""The page whole: its tabs, its look, and how it is served: to this machine only, with nothing from elsewhere."""

import os
import socket
import threading
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before it is imported

import gradio as gr

from ddpm_lab.settings import InputError
from ddpm_lab.studio.forward import forward_tab
from ddpm_lab.studio.generate import generate_tab
from ddpm_lab.studio.runs import runs_tab
from ddpm_lab.studio.scores import scores_tab

HOST = "127.0.0.1"  # this machine alone
STYLE = """
.gradio-container { max-width: 1200px !important; }
.pixels img { image-rendering: pixelated; }
footer { display: none !important; }
"""


def build_page(runs: Path, device: str) -> gr.Blocks:
    """The page over a folder of runs."""
    page: gr.Blocks
    with gr.Blocks(title="ddpm-lab studio", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# ddpm-lab studio")
        with gr.Tab("Generate", id="generate"):
            generate_tab(runs, device)
        with gr.Tab("Forward", id="forward"):
            forward_tab(page, runs, device)
        with gr.Tab("Runs", id="runs-tab"):
            runs_tab(page, runs)
        with gr.Tab("Scores", id="scores-tab"):
            scores_tab(page, runs, device)
    return page


def serve(runs: Path, port: int, device: str) -> None:
    """Serve the page until it is interrupted.

    Raises:
        InputError: the port is taken, or no port.
    """
    if not 0 < port < 65536:
        raise InputError(f"--port must be from 1 to 65535, not {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was served on a moment ago is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(f"port {port} cannot be had ({error.strerror}); give another --port") from error
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"]).set(
        button_primary_background_fill="*primary_600",  # white on it has a contrast of 5.2 : 1
        button_primary_background_fill_hover="*primary_700",
        color_accent="*primary_600",  # of the chosen tab
        body_text_color_subdued="*neutral_500",
    )
    page = build_page(runs.resolve(), device)
    page.queue(default_concurrency_limit=4).launch(
        server_name=HOST, server_port=port, share=False, quiet=True, show_error=False, max_file_size="10mb",
        theme=theme, css=STYLE, footer_links=[], prevent_thread_lock=True, pwa=False, ssr_mode=False, mcp_server=False,
    )  # fmt: skip
    print(f"http://{HOST}:{port}  (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
