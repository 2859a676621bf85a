"""`python -m ddpm_lab` is `ddpm`."""

from ddpm_lab.cli.main import main

main()
