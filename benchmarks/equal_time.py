"""Train a peer on MNIST for some minutes, and sample 2,000 images with 50 evaluations: what is compared at equal time.

    python -m benchmarks.equal_time diffusers|denoising-diffusion-pytorch --seed 0 --minutes 30 --out DIR

counts the steps of a minute while nothing else runs, and takes the steps of so many minutes at that speed, so that a
peer loses nothing if other work comes in between. It leaves DIR/images.npz and DIR/record.json; `ddpm evaluate
DIR/images.npz --reference mnist:train --features classifier` scores the images, as it does those of `ddpm train
mnist-cpu`. Peers train as their own example or Trainer does, batches of 16 in float32, on a network of 28x28 pixels
that has about as many parameters as the recipe's.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.peers import Peer, denoising_peer, diffusers_peer
from ddpm_lab.core.config import ModelConfig, load_recipe
from ddpm_lab.data.datasets import load_images, to_float
from ddpm_lab.diffusion.unet import build_unet
from ddpm_lab.sampling.image_files import save_npz

BATCH, SHAPE, NUM_STEPS = 16, (1, 28, 28), 50
NETWORK = ModelConfig(
    base_channels=32, channel_multipliers=(1, 2, 4), num_blocks=1, attention_levels=(2,), attention_head_channels=8,
    dropout=0.0, norm_groups=8,
)  # fmt: skip


def build(system: str, seed: int, num_steps: int) -> Peer:
    """The peer, at the beginning."""
    torch.manual_seed(seed)
    images = load_images("mnist").images
    generator = torch.Generator().manual_seed(seed)

    def batch() -> torch.Tensor:
        return to_float(images[torch.randint(len(images), (BATCH,), generator=generator)])

    if system == "diffusers":
        return diffusers_peer(build_unet(NETWORK, 1, 28, 1000), SHAPE, torch.float32, batch, num_steps)
    ours = build_unet(load_recipe("mnist-cpu").model, 1, 28, 1000)
    return denoising_peer(sum(p.numel() for p in ours.parameters()), 3, SHAPE, torch.float32, batch)


def steps_in(system: str, minutes: float) -> int:
    """How many steps the peer takes in so many minutes, at the speed of its first."""
    trial = build(system, 0, 100_000)
    trial.step()
    begun = time.monotonic()
    tried = 0
    while time.monotonic() - begun < min(60, 2 * minutes):
        trial.step()
        tried += 1
    return int(minutes * 60 / (time.monotonic() - begun) * tried)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=["diffusers", "denoising-diffusion-pytorch"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--num-steps", type=int, help="so many steps, counted before, in place of a minute's count")
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--bf16", action="store_true", help="sample in bfloat16, as ours is; training stays as it is")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    planned = given.num_steps or steps_in(given.system, given.minutes)
    peer = build(given.system, given.seed, planned)
    begun = time.monotonic()
    for step in range(1, planned + 1):
        peer.step()
        if step % 500 == 0:
            print(f"{step} of {planned} steps, {time.monotonic() - begun:.0f} s", flush=True)
    seconds = time.monotonic() - begun
    first = range(0, given.num_images, 250)
    with torch.autocast("cpu", torch.bfloat16, enabled=given.bf16):
        batches = (peer.sample(min(250, given.num_images - begin), NUM_STEPS) for begin in first)
        save_npz(given.out / "images.npz", batches, given.num_images)
    record = {
        "system": given.system, "seed": given.seed, "steps": planned, "images": planned * BATCH,
        "minutes": given.minutes, "seconds": seconds, "parameters": peer.num_parameters, "num_steps": NUM_STEPS,
        "sampled_in": "bf16" if given.bf16 else "float32",
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    (given.out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
