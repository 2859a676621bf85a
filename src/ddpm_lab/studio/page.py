"""The page: its tabs and style, and the server, which serves this machine only and loads nothing from elsewhere."""

import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from PIL import Image
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ddpm_lab.core.device import resolve_device
from ddpm_lab.core.errors import InputError, require
from ddpm_lab.data.image_formats import formats
from ddpm_lab.studio.controls import QUIET
from ddpm_lab.studio.forward import forward_tab
from ddpm_lab.studio.generate import generate_tab
from ddpm_lab.studio.runs import runs_tab
from ddpm_lab.studio.scores import scores_tab

HOST = "127.0.0.1"  # this machine alone
REFRESH_SECONDS = 5.0  # between two looks at the files of the runs
STYLE = """
.gradio-container { max-width: 1200px !important; }
.pixels img { image-rendering: pixelated; }
footer { display: none !important; }
"""


class SameOrigin:
    """Refuses requests that another web page sends: a browser lets any page post to this machine."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self.app, self.origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] in ("http", "websocket") else None
        if origin is not None and origin not in self.origins:
            await PlainTextResponse("requests of other pages are refused", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def remove_other_formats() -> None:
    """Restrict Pillow to the named formats in this process, because the server itself opens pictures too."""
    known = formats()
    for name in [name for name in Image.OPEN if name not in known]:
        del Image.OPEN[name]
    Image.ID[:] = [name for name in Image.ID if name in Image.OPEN]


def build_page(runs: Path, device: str) -> gr.Blocks:
    """The page over a folder of runs."""
    page: gr.Blocks
    with gr.Blocks(title="ddpm-lab studio", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# ddpm-lab studio")
        timer = gr.Timer(REFRESH_SECONDS, active=False)  # outside the tabs: their parts exist only once they are opened
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate") as generate:
                generate_tab(page, generate, runs, device)
            with gr.Tab("Forward", id="forward") as forward:
                forward_tab(page, forward, runs, device)
            with gr.Tab("Runs", id="runs-tab") as run_tab:
                runs_tab(page, run_tab, timer, runs)
            with gr.Tab("Scores", id="scores-tab") as scores:
                scores_tab(page, scores, runs, device)
        # One handler for all tabs: with one for each, that of the old tab could run after that of the new one.
        tabs.select(_set_timer, None, timer, trigger_mode="multiple", concurrency_limit=1, **QUIET)
    return page


def _set_timer(selected: gr.SelectData) -> gr.Timer:
    """The files are read again only while the tab of runs is open."""
    return gr.Timer(active=selected.value == "Runs")


def serve(runs: Path, port: int, device: str) -> None:
    """Serve the page until it is interrupted.

    Raises:
        InputError: the port is invalid or not available, `runs` is a file, or the device is not available.
    """
    require(runs.is_dir() or not runs.exists(), f"--runs {runs} is a file; name the folder that holds runs")
    require(0 < port < 65536, f"--port must be from 1 to 65535, not {port}")
    resolve_device(device)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose server has just ended is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(f"port {port} is not available ({error.strerror}); give another --port") from error
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"]).set(
        button_primary_background_fill="*primary_600",  # white text on it has a contrast of 5.2 : 1
        button_primary_background_fill_hover="*primary_700",
        color_accent="*primary_600",  # of the selected tab
        body_text_color_subdued="*neutral_500",
    )
    # Refuse other host names that a stranger's page points at this machine, and requests of other pages.
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
        Middleware(SameOrigin, origins=(f"http://{HOST}:{port}", f"http://localhost:{port}")),
    ]
    remove_other_formats()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell makes background jobs ignore it
        signal.signal(number, signal.default_int_handler)
    page = build_page(runs.resolve(), device)
    page.queue(default_concurrency_limit=4).launch(
        server_name=HOST, server_port=port, share=False, quiet=True, show_error=False, max_file_size="10mb",
        theme=theme, css=STYLE, footer_links=[], prevent_thread_lock=True, pwa=False, ssr_mode=False,
        mcp_server=False, app_kwargs={"middleware": middleware},
    )  # fmt: skip
    print(f"http://{HOST}:{port}  (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
