"""The page whole: its tabs, its look, and how it is served: to this machine only, with nothing from elsewhere."""

import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import gradio as gr
from PIL import Image
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ddpm_lab.core.device import resolve_device
from ddpm_lab.core.errors import InputError
from ddpm_lab.data.image_formats import formats
from ddpm_lab.studio.forward import forward_tab
from ddpm_lab.studio.generate import generate_tab
from ddpm_lab.studio.runs import runs_tab
from ddpm_lab.studio.scores import scores_tab

HOST = "127.0.0.1"  # this machine alone
LOOKS = 5.0  # seconds between looks at the disk
STYLE = """
.gradio-container { max-width: 1200px !important; }
.pixels img { image-rendering: pixelated; }
footer { display: none !important; }
"""


class OwnOrigin:
    """Refuses what a page of another origin sends: a browser lets any page post to this machine."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self.app, self.origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] in ("http", "websocket") else None
        if origin is not None and origin not in self.origins:
            await PlainTextResponse("another page's request is not served", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def forget_other_formats() -> None:
    """Have Pillow know no other formats than ours in this process, for the server opens pictures on its own, too."""
    known = formats()
    for name in [name for name in Image.OPEN if name not in known]:
        del Image.OPEN[name]
    Image.ID[:] = [name for name in Image.ID if name in Image.OPEN]


def build_page(runs: Path, device: str) -> gr.Blocks:
    """The page over a folder of runs."""
    page: gr.Blocks
    with gr.Blocks(title="ddpm-lab studio", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# ddpm-lab studio")
        timer = gr.Timer(LOOKS, active=False)  # outside the tabs, for what is in one is not there until it is opened
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate") as generate:
                generate_tab(page, generate, runs, device)
            with gr.Tab("Forward", id="forward") as forward:
                forward_tab(page, forward, runs, device)
            with gr.Tab("Runs", id="runs-tab") as seen:
                runs_tab(page, seen, timer, runs)
            with gr.Tab("Scores", id="scores-tab") as scores:
                scores_tab(page, scores, runs, device)
        # one handler for all tabs, or that of the tab one leaves may come after that of the tab one goes to
        tabs.select(_looking, None, timer, show_progress="hidden", trigger_mode="multiple", concurrency_limit=1)
    return page


def _looking(chosen: gr.SelectData) -> gr.Timer:
    """The disk is looked at only while somebody looks at the runs."""
    return gr.Timer(active=chosen.value == "Runs")


def serve(runs: Path, port: int, device: str) -> None:
    """Serve the page until it is interrupted.

    Raises:
        InputError: the port is taken, or no port; `runs` is a file; the device is not here.
    """
    if runs.exists() and not runs.is_dir():
        raise InputError(f"--runs {runs} is a file; name the folder that holds runs")
    if not 0 < port < 65536:
        raise InputError(f"--port must be from 1 to 65535, not {port}")
    resolve_device(device)
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
    # A name that a stranger's page has pointed at this machine is not ours, nor is what another page sends here.
    known = [
        Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
        Middleware(OwnOrigin, origins=(f"http://{HOST}:{port}", f"http://localhost:{port}")),
    ]
    forget_other_formats()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too, which a shell has jobs in the background ignore
        signal.signal(number, _end)
    page = build_page(runs.resolve(), device)
    page.queue(default_concurrency_limit=4).launch(
        server_name=HOST, server_port=port, share=False, quiet=True, show_error=False, max_file_size="10mb",
        theme=theme, css=STYLE, footer_links=[], prevent_thread_lock=True, pwa=False, ssr_mode=False,
        mcp_server=False, app_kwargs={"middleware": known},
    )  # fmt: skip
    print(f"http://{HOST}:{port}  (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
