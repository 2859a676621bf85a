"""Put a run's averaged weights into the package, in half precision.

    python scripts/package_weights.py RUN NAME [GUIDANCE]

GUIDANCE is the guidance scale for those who give none.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save

from ddpm_lab.models.trained import load


def main(run: str, name: str, guidance: str | None = None) -> None:
    trained = load(run, device="cpu")
    folder = Path(__file__).parent.parent / "src" / "ddpm_lab" / "models" / "weights" / name
    folder.mkdir(parents=True, exist_ok=True)
    record = trained.record | ({} if guidance is None else {"guidance": float(guidance)})
    content = save({key: p.detach().to(torch.float16).contiguous() for key, p in trained.model.named_parameters()})
    meta = {"step": trained.step, "sha256": {"ema.safetensors": hashlib.sha256(content).hexdigest()}}
    (folder / "ema.safetensors").write_bytes(content)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{folder}: {len(content):,} bytes of step {trained.step}")


if __name__ == "__main__":
    main(*sys.argv[1:])
